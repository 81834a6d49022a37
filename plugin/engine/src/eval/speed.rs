//! Speed and memory of a policy: one request alone, in a process of its own, so that its peak is its own and nothing that
//! is compared slows it. Measured as `cinch bench` does, by the same code.

use std::path::Path;

use anyhow::{Context, Result};
use cinch_protocol::Policy;
use cinch_protocol::bench::Figures;
use serde::{Deserialize, Serialize};

use super::grid::Sizes;
use super::ladder::inline;
use crate::bench::{Case, Children, Runner, System, of_report};

/// What a request alone was measured to take; medians over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Speed {
    /// Measurements.
    pub(super) rounds: usize,
    /// Prompt tokens a second.
    pub(super) prefill_tps: f64,
    /// New tokens a second after the first.
    pub(super) decode_tps: Option<f64>,
    /// Milliseconds to the first token.
    pub(super) ttft_ms: f64,
    /// Median milliseconds between two tokens.
    pub(super) itl_p50_ms: f64,
    /// Bytes resident with the model loaded, before the request.
    pub(super) loaded_rss_bytes: Option<u64>,
    /// The most bytes that were resident while the request ran.
    pub(super) run_peak_rss_bytes: Option<u64>,
}

impl Speed {
    /// Of the rounds' medians; `None` where there were no rounds.
    pub(super) fn new(rounds: &[Figures]) -> Option<Self> {
        let figures = crate::bench::median(rounds);
        (!rounds.is_empty()).then_some(Self {
            rounds: rounds.len(),
            prefill_tps: figures.prefill_tps,
            decode_tps: figures.decode_tps,
            ttft_ms: figures.ttft_p50_ms,
            itl_p50_ms: figures.itl_p50_ms,
            loaded_rss_bytes: figures.loaded_rss_bytes,
            run_peak_rss_bytes: figures.run_peak_rss_bytes,
        })
    }
}

/// Starts the measured processes.
pub(super) struct Stopwatch {
    children: Children,
    case: Case,
    tokens: Vec<u32>,
    steps: usize,
}

impl Stopwatch {
    /// With a configuration made of `config` and `overrides`, and a prompt that `tokens` begin with.
    pub(super) fn new(config: &Path, overrides: &[String], tokens: &[u32], sizes: &Sizes) -> Result<Self> {
        // The configured ladder is no matter here, and may be another model's.
        let mut overrides = overrides.to_vec();
        overrides.push("ladder.allow_other_model=true".to_owned());
        Ok(Self {
            children: Children::new(config, &overrides)?,
            case: Case {
                prompts: vec![sizes.speed_context],
            },
            tokens: tokens.to_vec(),
            steps: sizes.speed_steps,
        })
    }

    /// One measurement.
    pub(super) fn measure(&self, name: &str, policy: &Policy) -> Result<Figures> {
        let system = System {
            name: "cinch".to_owned(),
            kv: name.to_owned(),
            run: Runner::Cinch(vec![format!("class.default.policy={}", inline(policy)?)]),
            max_concurrency: None,
        };
        let plan = self.case.plan(&self.tokens, self.steps);
        let report = self.children.run(&system, &plan)?;
        of_report(&report, &self.case.prompts, self.steps).with_context(|| name.to_owned())
    }
}
