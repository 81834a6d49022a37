//! Plans for `cinch probe` and its reports: prompts in, every step's logits (or their hashes) out.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Whether the engine may reuse prefixes of finished runs.
    #[serde(default)]
    pub prefix_cache: bool,
    /// Groups run one after another, the runs within a group at once.
    pub groups: Vec<Vec<Run>>,
    /// Only note when each step was: no logits are looked at, none forced, and a run does not end before
    /// `max_tokens`, whatever comes. For measurements.
    #[serde(default)]
    pub timing: bool,
    /// A text to tokenize before all else; its tokens are [`Report::tokenized`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tokenize: String,
    /// Where to write every step's logits, f32 little endian, run after run; absent: only hashes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits: Option<PathBuf>,
    /// What attention is given in some layers, written to a file; absent: nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<Capture>,
}

/// Queries, keys and values of a plan's only run, as attention is given them (RoPE is applied).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// Where to, safetensors. Of each layer `N`: `q.N` (query heads, tokens, k_dim), `k.N` (KV heads, tokens, k_dim) and `v.N`
    /// (KV heads, tokens, v_dim) in the activations' dtype, `scale.N` (f32, what multiplies q·k) and, where logits are
    /// capped, `softcap.N` (f32). `fresh` (u32): the tokens of each step, chunks of the prompt first.
    pub file: PathBuf,
    /// Which layers, counted from 0 among those that are managed.
    pub layers: BTreeSet<usize>,
}

/// One request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Name in the report.
    pub name: String,
    /// Prompt, as a raw completion.
    #[serde(default)]
    pub text: String,
    /// Prompt as tokens; takes the place of `text` if not empty.
    #[serde(default)]
    pub tokens: Vec<u32>,
    /// New tokens.
    pub max_tokens: usize,
    /// Choices.
    #[serde(default = "one")]
    pub n: usize,
    /// Tokens to force instead of the greedy ones; empty: greedy.
    #[serde(default)]
    pub force: Vec<u32>,
}

fn one() -> usize {
    1
}

impl Run {
    /// A greedy run of `text`.
    #[must_use]
    pub fn greedy(name: impl Into<String>, text: impl Into<String>, max_tokens: usize) -> Self {
        Self {
            name: name.into(),
            text: text.into(),
            tokens: Vec::new(),
            max_tokens,
            n: 1,
            force: Vec::new(),
        }
    }
}

/// What came out. Memory is what the system says of the process; absent where it does not.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Tokens that the model can attend to.
    #[serde(default)]
    pub context: Option<usize>,
    /// What activations are in, and with them a KV cache that nobody manages.
    #[serde(default)]
    pub dtype: Option<String>,
    /// Tokens of [`Plan::tokenize`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokenized: Vec<u32>,
    /// Bytes resident before the first group: the loaded model.
    #[serde(default)]
    pub loaded_rss: Option<u64>,
    /// The most bytes that were resident by then: what loading took.
    #[serde(default)]
    pub loaded_peak_rss: Option<u64>,
    /// The most bytes that were resident during each group.
    #[serde(default)]
    pub group_peak_rss: Vec<Option<u64>>,
    /// The most bytes that the plugin's blocks took since the start; absent where there is no plugin.
    #[serde(default)]
    pub kv_peak_bytes: Option<u64>,
    /// Wall time a group, seconds.
    pub group_seconds: Vec<f64>,
    /// One a run, in the order of the plan.
    pub runs: Vec<RunReport>,
}

/// One request's steps. A plan for [timing](Plan::timing) leaves tokens, gaps and hashes empty.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RunReport {
    /// The run's name.
    pub name: String,
    /// Prompt tokens, as the engine counted them.
    pub prompt_tokens: usize,
    /// New tokens of the answer, as the engine counted them; absent: as many as there were steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_tokens: Option<usize>,
    /// Seconds from the group's start to the first sampled token.
    pub first_token_seconds: f64,
    /// Seconds from the group's start to the last sampled token.
    pub seconds: f64,
    /// Seconds from the group's start to each sampled token.
    #[serde(default)]
    pub step_seconds: Vec<f64>,
    /// The prompt as the engine tokenized it.
    pub prompt: Vec<u32>,
    /// Greedy (or forced) token of each step of choice 0.
    pub tokens: Vec<u32>,
    /// Distance of the two highest logits at each step.
    pub gaps: Vec<f32>,
    /// FNV-1a over the bits of each step's logits.
    pub hashes: Vec<String>,
    /// The text answered, one a choice.
    pub texts: Vec<String>,
}
