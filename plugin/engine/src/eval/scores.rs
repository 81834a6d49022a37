//! Retrieval: how likely the right answers are, and how often they are given, both beside level 0.

use serde::{Deserialize, Serialize};

use super::compare::Step;
use super::figures::Estimate;
use super::jobs::{Job, Kind};
use super::runner::Piece;

/// A task, over all lengths and depths.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TaskScore {
    /// Which.
    pub(super) task: Kind,
    /// Answers of all its cells together.
    #[serde(flatten)]
    pub(super) all: Score,
    /// What is asked for by length and depth, in order.
    pub(super) cells: Vec<Cell>,
}

/// A length and a depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Cell {
    /// Prompt tokens.
    pub(super) length: usize,
    /// Where in the prompt, 0 to 1.
    pub(super) depth: f64,
    /// Its answers.
    #[serde(flatten)]
    pub(super) score: Score,
}

/// Answers. An answer's log-likelihood is the sum over its tokens, in nats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Score {
    /// How many.
    pub(super) answers: usize,
    /// Mean log-likelihood of the right answers.
    pub(super) log_likelihood: f64,
    /// Level 0's.
    pub(super) reference_log_likelihood: f64,
    /// Mean of what an answer's log-likelihood changed by, with its interval over answers.
    pub(super) change: Estimate,
    /// Share of answers that greedy decoding gives in full.
    pub(super) exact: f64,
    /// Level 0's.
    pub(super) reference_exact: f64,
}

/// One answer.
struct Answer {
    task: Kind,
    length: usize,
    depth: f64,
    log_likelihood: f64,
    reference: f64,
    exact: bool,
    reference_exact: bool,
}

/// The scores of all tasks that `jobs` have, from a policy's pieces, one a job.
pub(super) fn of(jobs: &[Job], pieces: &[Piece]) -> Vec<TaskScore> {
    let mut answers = Vec::new();
    for (job, piece) in jobs.iter().zip(pieces) {
        for span in job.spans.iter().filter(|span| span.kind != Kind::Text) {
            let steps: Vec<Step> = piece.steps[span.steps.clone()]
                .iter()
                .copied()
                .flatten()
                .collect();
            answers.push(Answer {
                task: span.kind,
                length: span.length,
                depth: span.depth,
                log_likelihood: -steps.iter().map(|step| step.nll).sum::<f64>(),
                reference: -steps.iter().map(|step| step.reference_nll).sum::<f64>(),
                exact: steps.iter().all(|step| step.right),
                reference_exact: steps.iter().all(|step| step.reference_right),
            });
        }
    }
    let scored = |task: Kind| -> Option<TaskScore> {
        let mine: Vec<&Answer> = answers.iter().filter(|answer| answer.task == task).collect();
        let mut places: Vec<(usize, f64)> = mine.iter().map(|answer| (answer.length, answer.depth)).collect();
        places.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        places.dedup();
        let cell = |(length, depth): (usize, f64)| {
            let here = |answer: &&&Answer| (answer.length, answer.depth) == (length, depth);
            Cell {
                length,
                depth,
                score: score(&mine.iter().filter(here).copied().collect::<Vec<_>>()),
            }
        };
        (!mine.is_empty()).then(|| TaskScore {
            task,
            all: score(&mine),
            cells: places.into_iter().map(cell).collect(),
        })
    };
    Kind::TASKS.into_iter().filter_map(scored).collect()
}

fn score(answers: &[&Answer]) -> Score {
    let mean = |of: &dyn Fn(&Answer) -> f64| {
        answers.iter().map(|answer| of(answer)).sum::<f64>() / answers.len().max(1) as f64
    };
    let changes: Vec<f64> = answers
        .iter()
        .map(|answer| answer.log_likelihood - answer.reference)
        .collect();
    Score {
        answers: answers.len(),
        log_likelihood: mean(&|answer| answer.log_likelihood),
        reference_log_likelihood: mean(&|answer| answer.reference),
        change: super::figures::mean_of(&changes),
        exact: mean(&|answer| f64::from(answer.exact)),
        reference_exact: mean(&|answer| f64::from(answer.reference_exact)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::jobs::Span;
    use super::*;
    use cinch_protocol::Policy;

    /// A job of two questions: tokens 0 and 1 are the first one's answer, token 3 the second one's.
    fn job(depth: f64) -> Job {
        let span = |kind, steps| Span {
            kind,
            length: 512,
            depth,
            steps,
        };
        Job {
            name: String::new(),
            prompt: vec![0; 512],
            forced: vec![0; 4],
            spans: vec![span(Kind::MultiKey, 0..2), span(Kind::SecondQuestion, 3..4)],
        }
    }

    fn piece(steps: [(f64, f64, bool, bool); 3]) -> Piece {
        let [a, b, c] = steps.map(|(nll, reference_nll, right, reference_right)| {
            Some(Step {
                nll,
                reference_nll,
                kl: 0.0,
                delta_p: 0.0,
                agrees: true,
                right,
                reference_right,
            })
        });
        Piece {
            job: String::new(),
            policy: Policy::default(),
            steps: vec![a, b, None, c],
            prompt_bytes: 0,
            end_bytes: 0,
            seen: 0,
            kept: 0.0,
            attention_error: None,
        }
    }

    #[test]
    fn answers_are_scored_by_task_and_place() {
        let jobs = [job(0.9), job(0.1)];
        let pieces = [
            piece([
                (1.0, 0.5, true, true),
                (2.0, 0.5, false, true),
                (4.0, 1.0, false, false),
            ]),
            piece([
                (0.1, 0.1, true, true),
                (0.1, 0.1, true, true),
                (0.5, 1.0, true, false),
            ]),
        ];
        let scores = of(&jobs, &pieces);
        let tasks: Vec<Kind> = scores.iter().map(|score| score.task).collect();
        assert_eq!(tasks, [Kind::MultiKey, Kind::SecondQuestion]);
        let first = &scores[0];
        let places: Vec<f64> = first.cells.iter().map(|cell| cell.depth).collect();
        assert_eq!(places, [0.1, 0.9], "in order");
        assert_eq!(first.all.answers, 2);
        assert!((first.all.log_likelihood + 1.6).abs() < 1e-12);
        assert!((first.all.reference_log_likelihood + 0.6).abs() < 1e-12);
        assert!((first.all.change.value + 1.0).abs() < 1e-12);
        assert_eq!((first.all.exact, first.all.reference_exact), (0.5, 1.0));
        assert_eq!(first.cells[1].score.exact, 0.0, "a wrong digit is a wrong answer");
        assert_eq!((scores[1].all.exact, scores[1].all.reference_exact), (0.5, 0.0));
    }
}
