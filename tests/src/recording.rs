//! What the unhooked engine answered, and how an answer is held against it.

use cinch_protocol::probe::RunReport;
use serde::{Deserialize, Serialize};

/// Top-two logits closer than this are a tie that rounding may decide either way.
const TIE: f32 = 1e-3;

/// The unhooked engine's answers on one CPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recording {
    /// Whose bits these are ([`cpu_key`](crate::cpu_key)).
    pub cpu: String,
    /// mistralrs-core and candle versions.
    pub engine: String,
    /// SHA-256 of the model file.
    pub model_sha256: String,
    /// One a run.
    pub runs: Vec<Recorded>,
}

/// One run's recorded steps. The prompt is not stored: the plan makes it again.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recorded {
    /// The run's name.
    pub name: String,
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Greedy tokens.
    pub tokens: Vec<u32>,
    /// Top-one minus top-two logit, a step.
    pub gaps: Vec<f32>,
    /// Hash of the logits' bits, a step.
    pub hashes: Vec<String>,
    /// The answer's text, where that is what was recorded.
    #[serde(default)]
    pub text: String,
}

impl From<&RunReport> for Recorded {
    fn from(run: &RunReport) -> Self {
        Self {
            name: run.name.clone(),
            prompt_tokens: run.prompt_tokens,
            tokens: run.tokens.clone(),
            gaps: run.gaps.clone(),
            hashes: run.hashes.clone(),
            text: run.texts.first().cloned().unwrap_or_default(),
        }
    }
}

/// The first step at which `tokens` leaves the recording, with the recording's gap there; `Err` if that
/// gap is not a tie. After a tie that fell the other way the texts may differ for good reason.
///
/// # Errors
/// A message for the test's reader.
pub fn mismatch(recorded: &Recorded, tokens: &[u32]) -> Result<Option<(usize, f32)>, String> {
    let first = (0..recorded.tokens.len().max(tokens.len()))
        .find(|&step| recorded.tokens.get(step) != tokens.get(step));
    match first {
        None => Ok(None),
        Some(step) => {
            let gap = recorded.gaps.get(step).copied().unwrap_or(f32::INFINITY);
            if gap < TIE {
                Ok(Some((step, gap)))
            } else {
                Err(format!(
                    "{}: step {step}: token {:?}, recorded {:?} with its top two logits {gap} apart",
                    recorded.name,
                    tokens.get(step),
                    recorded.tokens.get(step)
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ties_are_forgiven() {
        let recorded = Recorded {
            name: "p".into(),
            prompt_tokens: 1,
            tokens: vec![1, 2, 3],
            gaps: vec![1.0, 5e-4, 1.0],
            hashes: Vec::new(),
            text: String::new(),
        };
        assert_eq!(mismatch(&recorded, &[1, 2, 3]), Ok(None));
        assert_eq!(mismatch(&recorded, &[1, 9, 9]), Ok(Some((1, 5e-4))));
        assert!(mismatch(&recorded, &[1, 2, 9]).is_err());
        assert!(mismatch(&recorded, &[1, 2]).is_err());
        assert!(mismatch(&recorded, &[1, 2, 3, 4]).is_err());
    }
}
