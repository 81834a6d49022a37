//! Retrieval tasks, made on the spot: statements hidden in the user's own text at a depth, and a question at its end. Every
//! choice is drawn from the task, its length, depth and number, so two runs make the same.

use anyhow::{Result, ensure};

use super::grid::Sizes;
use super::jobs::{Job, Kind, Span};
use super::random::Random;

/// Names that codes are of. All different at their beginning.
const NAMES: [&str; 24] = [
    "Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Prague", "Dublin", "Tunis", "Lima", "Vienna", "Cairo",
    "Manila", "Warsaw", "Athens", "Bogota", "Kyoto", "Zagreb", "Seoul", "Rabat", "Geneva", "Havana",
    "Jakarta", "Ottawa", "Ankara",
];
/// Variables of a chain.
const VARIABLES: [&str; 3] = ["RED", "BLUE", "GREEN"];

/// Encodes a piece of a prompt, without tokens that only start or end one.
pub(super) type Encode<'a> = &'a dyn Fn(&str) -> Result<Vec<u32>>;

/// What tasks are made of.
pub(super) struct Maker<'a> {
    /// Of text to tokens.
    pub(super) encode: Encode<'a>,
    /// Tokens that start any prompt.
    pub(super) start: &'a [u32],
    /// The text that statements are hidden in.
    pub(super) text: &'a [u32],
}

/// A question and its answer; the answer is what follows the question.
struct Question {
    kind: Kind,
    depth: f64,
    question: String,
    answer: String,
}

impl Maker<'_> {
    /// All tasks at all lengths and depths.
    ///
    /// # Errors
    /// A length too short for what is to be hidden, or a text too short to hide it in.
    pub(super) fn all(&self, sizes: &Sizes) -> Result<Vec<Job>> {
        let mut jobs = Vec::new();
        for &length in &sizes.task_lengths {
            for at in 0..sizes.task_depths.len() {
                for repeat in 0..sizes.task_repeats {
                    // The second question is asked in the same request as the first.
                    for (i, kind) in Kind::TASKS.into_iter().enumerate() {
                        let parts = [i, length, at, repeat];
                        let seed = parts.iter().fold(1, |seed: u64, &part| {
                            seed.wrapping_mul(0x0100_0000_01b3).wrapping_add(part as u64)
                        });
                        let random = &mut Random::new(seed);
                        match kind {
                            Kind::Needle => jobs.push(self.needle(random, length, sizes.task_depths[at])?),
                            Kind::MultiKey => jobs.push(self.keys(random, length, &sizes.task_depths, at)?),
                            Kind::KeyValue => {
                                jobs.push(self.lookup(random, length, sizes.task_depths[at])?)
                            }
                            Kind::VariableTracking => {
                                jobs.push(self.tracking(random, length, sizes.task_depths[at])?);
                            }
                            Kind::Text | Kind::SecondQuestion => {}
                        }
                    }
                }
            }
        }
        Ok(jobs)
    }

    fn needle(&self, random: &mut Random, length: usize, depth: f64) -> Result<Job> {
        let (name, code) = (NAMES[random.below(NAMES.len())], code(random));
        let question = ask(Kind::Needle, depth, name, &code);
        self.hide(random, length, &[(depth, statement(name, &code))], &[question])
    }

    /// A key at each depth; that at `at` is asked for first, the next one afterwards.
    fn keys(&self, random: &mut Random, length: usize, depths: &[f64], at: usize) -> Result<Job> {
        let names = random.distinct(depths.len(), NAMES.len());
        let keys: Vec<(f64, &str, String)> = depths
            .iter()
            .zip(names)
            .map(|(&depth, name)| (depth, NAMES[name], code(random)))
            .collect();
        let hidden: Vec<(f64, String)> = keys
            .iter()
            .map(|(depth, name, code)| (*depth, statement(name, code)))
            .collect();
        let question = |kind: Kind, at: usize| {
            let (depth, name, code) = &keys[at % keys.len()];
            ask(kind, *depth, name, code)
        };
        let questions = [
            question(Kind::MultiKey, at),
            question(Kind::SecondQuestion, at + 1),
        ];
        self.hide(random, length, &hidden, &questions)
    }

    /// Each assignment comes after the one it refers to, and the last well before the end.
    fn tracking(&self, random: &mut Random, length: usize, depth: f64) -> Result<Job> {
        let value = code(random);
        let mut hidden = Vec::new();
        let mut given = value.clone();
        for (i, variable) in VARIABLES.iter().enumerate() {
            let at = depth + (1.0 - depth) * i as f64 / VARIABLES.len() as f64;
            hidden.push((at, format!("\nThe variable {variable} is {given}.\n")));
            given = format!("equal to the variable {variable}");
        }
        let last = VARIABLES[VARIABLES.len() - 1];
        let question = Question {
            kind: Kind::VariableTracking,
            depth,
            question: format!("\n\nWhat number is the variable {last}? The variable {last} is"),
            answer: format!(" {value}"),
        };
        self.hide(random, length, &hidden, &[question])
    }

    /// Lines of a list instead of a text.
    fn lookup(&self, random: &mut Random, length: usize, depth: f64) -> Result<Job> {
        let line = |key: usize, value: &str| format!("key {key}: {value}\n");
        let width = (self.encode)(&line(1000, "10000"))?.len();
        let room = length.saturating_sub(self.start.len() + 3 * width);
        // Keys of four digits: there are 9000.
        let count = (room / width.max(1)).min(9000);
        ensure!(
            count >= 2,
            "task_lengths: given {length}, too short for two lines of a list"
        );
        let asked = ((count - 1) as f64 * depth).round() as usize;
        let keys: Vec<usize> = random
            .distinct(count, 9000)
            .into_iter()
            .map(|key| key + 1000)
            .collect();
        let mut prompt = self.start.to_vec();
        let mut answer = String::new();
        for (i, &key) in keys.iter().enumerate() {
            let value = code(random);
            prompt.extend((self.encode)(&line(key, &value))?);
            if i == asked {
                answer = format!(" {value}");
            }
        }
        let question = Question {
            kind: Kind::KeyValue,
            depth,
            question: format!("\nThe value of key {} again:\nkey {}:", keys[asked], keys[asked]),
            answer,
        };
        self.finish(length, prompt, &[question])
    }

    /// `hidden` statements at their depths in a stretch of the text, then the questions; `length` tokens up to the first
    /// question's end.
    fn hide(
        &self,
        random: &mut Random,
        length: usize,
        hidden: &[(f64, String)],
        questions: &[Question],
    ) -> Result<Job> {
        let mut statements = Vec::new();
        for (depth, statement) in hidden {
            statements.push((*depth, (self.encode)(statement)?));
        }
        statements.sort_by(|a, b| a.0.total_cmp(&b.0));
        let first = questions.first().map_or("", |first| &first.question);
        let fixed = self.start.len()
            + (self.encode)(first)?.len()
            + statements.iter().map(|(_, tokens)| tokens.len()).sum::<usize>();
        let filler = length.saturating_sub(fixed);
        ensure!(
            filler >= length / 4,
            "task_lengths: given {length}, too short: statements and question have {fixed} tokens"
        );
        ensure!(
            self.text.len() > filler,
            "--text: given a text of {} tokens, too short to hide anything in {filler} of them",
            self.text.len()
        );
        let from = random.below(self.text.len() - filler);
        let filler = &self.text[from..from + filler];
        let mut prompt = self.start.to_vec();
        let mut done = 0;
        for (depth, statement) in statements {
            let until = (filler.len() as f64 * depth).round() as usize;
            prompt.extend_from_slice(&filler[done..until]);
            prompt.extend(statement);
            done = until;
        }
        prompt.extend_from_slice(&filler[done..]);
        self.finish(length, prompt, questions)
    }

    /// The first question ends the prompt; its answer and everything after it is forced, answers are scored.
    fn finish(&self, length: usize, mut prompt: Vec<u32>, questions: &[Question]) -> Result<Job> {
        let (mut forced, mut spans, mut names) = (Vec::new(), Vec::new(), Vec::new());
        for (i, question) in questions.iter().enumerate() {
            let asked = (self.encode)(&question.question)?;
            if i == 0 {
                prompt.extend(asked);
            } else {
                forced.extend((self.encode)(".")?);
                forced.extend(asked);
            }
            let from = forced.len();
            forced.extend((self.encode)(&question.answer)?);
            ensure!(
                forced.len() > from,
                "the tokenizer has no tokens for {:?}",
                question.answer
            );
            spans.push(Span {
                kind: question.kind,
                length,
                depth: question.depth,
                steps: from..forced.len(),
            });
            names.push(question.kind.title());
        }
        let depth = questions.first().map_or(0.0, |first| first.depth);
        Ok(Job {
            name: format!("{} at {depth} of {length}", names.join(" and ")),
            prompt,
            forced,
            spans,
        })
    }
}

/// Five digits.
fn code(random: &mut Random) -> String {
    (10_000 + random.below(90_000)).to_string()
}

fn statement(name: &str, code: &str) -> String {
    format!("\nThe secret code of {name} is {code}.\n")
}

fn ask(kind: Kind, depth: f64, name: &str, code: &str) -> Question {
    Question {
        kind,
        depth,
        question: format!("\n\nWhat is the secret code of {name}? The secret code of {name} is"),
        answer: format!(" {code}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte a token.
    fn encode(text: &str) -> Result<Vec<u32>> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn text(tokens: &[u32]) -> String {
        tokens
            .iter()
            .map(|&token| u8::try_from(token).map_or('^', char::from))
            .collect()
    }

    fn sizes() -> Sizes {
        Sizes {
            task_lengths: vec![700],
            task_depths: vec![0.0, 0.5, 1.0],
            task_repeats: 2,
            ..Sizes::default()
        }
    }

    fn jobs() -> Vec<Job> {
        let filler: Vec<u32> = (0..5000).map(|i| u32::from(b'a') + i % 23).collect();
        let maker = Maker {
            encode: &encode,
            start: &[999],
            text: &filler,
        };
        maker.all(&sizes()).unwrap()
    }

    fn answer(job: &Job, kind: Kind) -> Option<(String, f64)> {
        let span = job.spans.iter().find(|span| span.kind == kind)?;
        Some((text(&job.forced[span.steps.clone()]), span.depth))
    }

    #[test]
    fn every_task_at_every_depth_and_twice_the_same() {
        let jobs = jobs();
        assert_eq!(jobs.len(), 4 * 3 * 2);
        assert_eq!(jobs, self::jobs());
        for kind in Kind::TASKS {
            let mut depths: Vec<f64> = jobs
                .iter()
                .filter_map(|job| answer(job, kind))
                .map(|(_, depth)| depth)
                .collect();
            depths.sort_by(f64::total_cmp);
            assert_eq!(depths, [0.0, 0.0, 0.5, 0.5, 1.0, 1.0], "{kind:?}");
        }
        let mut prompts: Vec<String> = jobs.iter().map(|job| text(&job.prompt)).collect();
        prompts.sort();
        prompts.dedup();
        assert_eq!(prompts.len(), jobs.len(), "repeats differ");
    }

    #[test]
    fn the_answer_is_in_the_prompt_where_it_should_be() {
        for job in jobs() {
            let prompt = text(&job.prompt);
            assert!(prompt.starts_with('^'), "{prompt}");
            let place = |what: &str| {
                let at = prompt.find(what).unwrap_or_else(|| panic!("{what}: {prompt}"));
                at as f64 / prompt.len() as f64
            };
            for span in &job.spans {
                let answer = text(&job.forced[span.steps.clone()]);
                assert_eq!((answer.len(), &answer[..1]), (6, " "));
                if span.kind != Kind::KeyValue {
                    assert_eq!(job.prompt.len(), 700);
                }
                // The question at the end, and statements before this one, take their share.
                let (low, high) = (span.depth * 0.55, span.depth.mul_add(0.6, 0.4));
                let at = place(&answer);
                assert!((low..=high).contains(&at), "{:?} at {at}: {prompt}", span.kind);
            }
        }
    }

    #[test]
    fn the_second_question_asks_for_another_key_after_the_first_answer() {
        for job in jobs() {
            let Some((first, _)) = answer(&job, Kind::MultiKey) else {
                continue;
            };
            let (second, _) = answer(&job, Kind::SecondQuestion).unwrap();
            assert_ne!(first, second);
            let forced = text(&job.forced);
            assert!(
                forced.starts_with(&format!("{first}.\n\nWhat is the secret code of ")),
                "{forced}"
            );
            assert!(forced.ends_with(&format!("is{second}")), "{forced}");
        }
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let filler = [7; 600];
        let maker = Maker {
            encode: &encode,
            start: &[],
            text: &filler,
        };
        let said = |length| {
            let sizes = Sizes {
                task_lengths: vec![length],
                ..sizes()
            };
            maker.all(&sizes).unwrap_err().to_string()
        };
        assert!(
            said(130).contains("task_lengths: given 130, too short"),
            "{}",
            said(130)
        );
        assert!(
            said(2000).contains("--text: given a text of 600 tokens"),
            "{}",
            said(2000)
        );
    }
}
