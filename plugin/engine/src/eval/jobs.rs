//! What is run: a prompt, and tokens that are then forced one decode step at a time. Text and retrieval tasks are both
//! that; only which steps are scored, and as what, differs.
//!
//! A forced answer is one that greedy decoding gives if and only if the likeliest token is the forced one at each of its
//! steps: the steps before it are the same. So exact match needs no second run.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::grid::Sizes;
use crate::fields::FieldFault;

/// What a run of scored steps is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// The text goes on.
    Text,
    /// One statement in the text is asked for.
    Needle,
    /// One of several alike.
    MultiKey,
    /// Another of them, once the first question is answered: what the first one's compression left of it.
    SecondQuestion,
    /// One line of a list of keys and values.
    KeyValue,
    /// The value of a variable that was assigned through others.
    VariableTracking,
}

impl Kind {
    /// The retrieval tasks.
    pub(super) const TASKS: [Self; 5] = [
        Self::Needle,
        Self::MultiKey,
        Self::SecondQuestion,
        Self::KeyValue,
        Self::VariableTracking,
    ];

    /// For people.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Needle => "single needle",
            Self::MultiKey => "one key of several",
            Self::SecondQuestion => "second question",
            Self::KeyValue => "key-value lookup",
            Self::VariableTracking => "variable tracking",
        }
    }
}

/// Steps that are scored.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Span {
    pub(super) kind: Kind,
    /// Prompt tokens that were aimed at.
    pub(super) length: usize,
    /// Where in the prompt what is asked for is, 0 to 1.
    pub(super) depth: f64,
    /// Of the forced tokens.
    pub(super) steps: Range<usize>,
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Job {
    /// For people.
    pub(super) name: String,
    pub(super) prompt: Vec<u32>,
    pub(super) forced: Vec<u32>,
    pub(super) spans: Vec<Span>,
}

impl Job {
    /// Whether a step is scored.
    pub(super) fn scored(&self, step: usize) -> bool {
        self.spans.iter().any(|span| span.steps.contains(&step))
    }

    /// What it costs beside others, in prompt tokens. A decode step costs about five of them on the CPUs this was tried on.
    pub(super) fn cost(&self) -> f64 {
        (self.prompt.len() + 5 * self.forced.len()) as f64
    }
}

/// Stretches of `text`, spread evenly and not overlapping, each after the tokens that `start` any prompt.
///
/// # Errors
/// A text that is too short.
pub(super) fn windows(text: &[u32], start: &[u32], sizes: &Sizes) -> Result<Vec<Job>, FieldFault> {
    let (count, steps) = (sizes.windows, sizes.steps);
    let prompt = sizes.context.saturating_sub(start.len());
    let span = prompt + steps;
    let Some(free) = text.len().checked_sub(count * span) else {
        let given = format!("a text of {} tokens", text.len());
        let allowed = format!("at least {}: {count} windows of {span}", count * span);
        return Err(FieldFault::new("--text", given, allowed));
    };
    let window = |i: usize| {
        let from = i * (span + free / count);
        let (head, tail) = text[from..from + span].split_at(prompt);
        Job {
            name: format!("text {} of {count}", i + 1),
            prompt: [start, head].concat(),
            forced: tail.to_vec(),
            spans: vec![Span {
                kind: Kind::Text,
                length: sizes.context,
                depth: 1.0,
                steps: 0..steps,
            }],
        }
    };
    Ok((0..count).map(window).collect())
}

/// Refuses lengths that the model cannot attend to.
///
/// # Errors
/// The first that is too long.
pub(super) fn fit(jobs: &[Job], sizes: &Sizes, context: usize) -> Result<(), FieldFault> {
    let whole = |job: &Job| job.prompt.len() + job.forced.len();
    let longest = jobs.iter().max_by_key(|job| whole(job));
    let (given, length) = match longest {
        Some(job) if whole(job) > context => (
            format!(
                "{} with {} prompt and {} forced tokens",
                job.name,
                job.prompt.len(),
                job.forced.len()
            ),
            whole(job),
        ),
        _ => (
            format!(
                "speed_context and speed_steps of {} and {}",
                sizes.speed_context, sizes.speed_steps
            ),
            sizes.speed_context + sizes.speed_steps,
        ),
    };
    if length > context {
        let allowed = format!("together at most {context}, the model's context");
        return Err(FieldFault::new("--grid", given, allowed));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes() -> Sizes {
        Sizes {
            windows: 3,
            context: 10,
            steps: 5,
            speed_context: 10,
            speed_steps: 6,
            ..Sizes::default()
        }
    }

    #[test]
    fn windows_are_spread_and_do_not_overlap() {
        let text: Vec<u32> = (0..100).collect();
        let jobs = windows(&text, &[777], &sizes()).unwrap();
        let firsts: Vec<u32> = jobs.iter().map(|job| job.prompt[1]).collect();
        assert_eq!(firsts, [0, 33, 66]);
        for job in &jobs {
            assert_eq!((job.prompt.len(), job.forced.len(), job.prompt[0]), (10, 5, 777));
            assert_eq!(job.forced[0], job.prompt[9] + 1, "the text goes on");
            assert!(job.scored(0) && job.scored(4) && !job.scored(5));
        }
        assert!(windows(&text[..42], &[777], &sizes()).is_ok(), "it just fits");
        let said = windows(&text[..41], &[777], &sizes()).unwrap_err().to_string();
        let wanted = "field `--text`: given a text of 41 tokens, allowed at least 42: 3 windows of 14";
        assert_eq!(said, wanted);
    }

    #[test]
    fn what_the_model_cannot_attend_to_is_refused() {
        let text: Vec<u32> = (0..100).collect();
        let jobs = windows(&text, &[], &sizes()).unwrap();
        fit(&jobs, &sizes(), 16).unwrap();
        let said = fit(&jobs, &sizes(), 15).unwrap_err().to_string();
        assert!(
            said.contains("speed_steps of 10 and 6, allowed together at most 15"),
            "{said}"
        );
        let said = fit(&jobs, &sizes(), 14).unwrap_err().to_string();
        assert!(
            said.contains("given text 3 of 3 with 10 prompt and 5 forced tokens"),
            "{said}"
        );
    }
}
