//! The runs that recordings and tests are made of.

use std::path::PathBuf;

use cinch_protocol::probe::{Capture, Plan, Run, RunReport};

/// New tokens of a fidelity run.
pub const STEPS: usize = 64;

/// A stretch of `text` at `share` of its length, `chars` long, cut at word borders.
pub(crate) fn stretch(text: &str, share: f64, chars: usize) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )]
    let start = (words.len() as f64 * share) as usize;
    let mut out = String::new();
    for word in &words[start.min(words.len())..] {
        if out.len() + word.len() + 1 > chars {
            break;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

/// Twenty prompts of about 50 to 2,000 tokens, from places all over `text`.
#[must_use]
pub fn fidelity_runs(text: &str) -> Vec<Run> {
    (0..20_u32)
        .map(|i| {
            // 220 · 40^(i/19) characters: a token of this text is a little over four characters.
            let chars = 220.0 * 40_f64.powf(f64::from(i) / 19.0);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let prompt = stretch(text, f64::from(i) * 0.047, chars as usize);
            Run::greedy(format!("p{i:02}"), prompt, STEPS)
        })
        .collect()
}

/// What the cache's oracles take rows of a real model from: about 700 tokens and 32 decoded ones, at the first layer of 30,
/// two in the middle and the last.
#[must_use]
pub fn capture(text: &str, file: PathBuf) -> Plan {
    Plan {
        groups: vec![vec![Run::greedy("captured", stretch(text, 0.2, 3200), 33)]],
        capture: Some(Capture {
            file,
            layers: [0, 14, 15, 29].into(),
        }),
        ..Plan::default()
    }
}

/// Six requests of about 200 to 500 tokens.
#[must_use]
pub fn six_requests(text: &str) -> Vec<Run> {
    (0..6_u32)
        .map(|i| {
            let prompt = stretch(text, 0.03 + f64::from(i) * 0.15, 880 + 250 * i as usize);
            Run::greedy(format!("r{i}"), prompt, STEPS)
        })
        .collect()
}

/// A second turn on top of a finished run: its prompt, its answer but for the last token, then some new
/// tokens. The last sampled token of a run was never fed back; upstream's prefix cache nevertheless hands out
/// a row for it, of zeros. Without it upstream's reuse is right, and can be compared with.
#[must_use]
pub fn second_turn(first: &RunReport, more: &[u32]) -> Run {
    let mut run = Run::greedy(format!("{}-turn2", first.name), "", STEPS);
    run.tokens = [
        &first.prompt[..],
        &first.tokens[..first.tokens.len().saturating_sub(1)],
        more,
    ]
    .concat();
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_grow_and_differ() {
        let text = (0..40_000).map(|i| format!("w{i}")).collect::<Vec<_>>().join(" ");
        let runs = fidelity_runs(&text);
        assert_eq!(runs.len(), 20);
        assert!(
            runs.windows(2)
                .all(|pair| pair[0].text.len() < pair[1].text.len() && pair[0].text != pair[1].text)
        );
        assert!((200..=220).contains(&runs[0].text.len()) && (8_700..=8_800).contains(&runs[19].text.len()));
        assert_eq!(six_requests(&text).len(), 6);
    }
}
