//! What is run: prompts by length, the same ones for every system.

use cinch_protocol::probe::{Plan, Run};

/// Prompt lengths of requests that run at once, in the order they are sent; more than these begin again. Of
/// four the mean is 2176, of eight 2400.
pub(super) const MIXED: [usize; 8] = [2048, 1024, 4096, 1536, 3072, 1280, 3584, 2560];

/// What threads, caches and allocator get to see before they are measured.
const WARM_UP: (usize, usize) = (16, 4);

/// A load: one request, or several at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Case {
    /// Prompt tokens of each request.
    pub(crate) prompts: Vec<usize>,
}

impl Case {
    /// All loads, in the order they are run.
    pub(super) fn all(contexts: &[usize], concurrency: &[usize]) -> Vec<Self> {
        let mut cases = Vec::new();
        for &n in concurrency {
            if n == 1 {
                cases.extend(contexts.iter().map(|&context| Self {
                    prompts: vec![context],
                }));
            } else {
                cases.push(Self {
                    prompts: MIXED.iter().copied().cycle().take(n).collect(),
                });
            }
        }
        cases
    }

    /// Mean prompt length.
    pub(super) fn context(&self) -> usize {
        self.prompts.iter().sum::<usize>() / self.prompts.len().max(1)
    }

    /// Its plan: a short warm-up, then the load. `tokens` has at least the longest prompt's. Requests begin in
    /// different places, so that none is the prefix of another.
    pub(crate) fn plan(&self, tokens: &[u32], new_tokens: usize) -> Plan {
        let run = |name: String, start: usize, length: usize, max_tokens| Run {
            tokens: tokens.iter().skip(start).take(length).copied().collect(),
            ..Run::greedy(name, "", max_tokens)
        };
        let load = self.prompts.iter().enumerate().map(|(i, &length)| {
            let start = tokens.len().saturating_sub(length) * i / self.prompts.len();
            run(format!("{length} tokens"), start, length, new_tokens)
        });
        let (prompt, new) = WARM_UP;
        Plan {
            timing: true,
            groups: vec![vec![run("warm-up".to_owned(), 0, prompt, new)], load.collect()],
            ..Plan::default()
        }
    }
}

/// Sentences that are counted, so that no stretch is another's repetition: at least `words` words.
pub(super) fn sentences(words: usize) -> String {
    // Twenty words each.
    let count = words / 20 + 1;
    let sentence = |n: usize| {
        format!(
            "On day {n} the keeper of the lighthouse wrote down {} ships, {} storms, and how far the beam could be seen.\n",
            n * 7 % 101,
            n % 13
        )
    };
    (1..=count).map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_and_their_plans() {
        let cases = Case::all(&[64, 100], &[4, 1]);
        assert_eq!(cases.len(), 3);
        assert_eq!(
            (cases[0].prompts.as_slice(), cases[0].context()),
            (&MIXED[..4], 2176)
        );
        assert_eq!(cases[2].prompts, [100]);
        assert_eq!(Case::all(&[], &[8])[0].context(), 2400);
        assert_eq!(Case::all(&[], &[9])[0].prompts[8], MIXED[0]);

        let tokens: Vec<u32> = (0..5000).collect();
        let plan = cases[0].plan(&tokens, 8);
        assert!(plan.timing && !plan.prefix_cache);
        let lengths: Vec<usize> = plan.groups[1].iter().map(|run| run.tokens.len()).collect();
        assert_eq!(lengths, MIXED[..4]);
        let mut starts: Vec<u32> = plan.groups[1].iter().map(|run| run.tokens[0]).collect();
        starts.dedup();
        assert_eq!(starts.len(), 4, "{starts:?}");
        let whole = Case { prompts: vec![5000] }.plan(&tokens, 8);
        assert_eq!(whole.groups[1][0].tokens, tokens);
    }

    #[test]
    fn enough_sentences() {
        assert!(sentences(1000).split_whitespace().count() >= 1000);
    }
}
