//! The settings themselves.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use cinch_kernels::{KernelError, Kernels};
use cinch_protocol::{Choice, Given, LevelFigures, Policy, PolicyError};
use serde::{Deserialize, Serialize};

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What is served.
    pub model: Model,
    /// The OpenAI listener.
    #[serde(default)]
    pub server: Server,
    /// The policy API listener.
    #[serde(default)]
    pub api: Api,
    /// Logs.
    #[serde(default)]
    pub log: Log,
    /// The host engine.
    #[serde(default)]
    pub engine: Engine,
    /// The KV cache.
    #[serde(default)]
    pub kv: Kv,
    /// Who may run, and who waits.
    #[serde(default)]
    pub admission: Admission,
    /// When running requests are tightened without being asked.
    #[serde(default)]
    pub watermark: Watermark,
    /// What is measured beyond the counts.
    #[serde(default)]
    pub metrics: Metrics,
    /// The ladder: how hard to compress, in steps.
    pub ladder: Ladder,
    /// Classes of requests by name; `default` must be there.
    #[serde(default)]
    pub class: BTreeMap<String, Class>,
}

/// What is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// How it is stored.
    pub kind: ModelKind,
    /// The GGUF file, for `kind = "gguf"`.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Hugging Face id or local folder of safetensors, for `kind = "hf"`.
    #[serde(default)]
    pub model_id: Option<String>,
    /// The name clients ask for; absent: the file's stem or the Hugging Face id.
    #[serde(default)]
    pub id: Option<String>,
    /// A chat template in place of the model's own.
    #[serde(default)]
    pub chat_template: Option<PathBuf>,
    /// Activation dtype.
    #[serde(default)]
    pub dtype: DType,
}

/// How a model is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelKind {
    /// One GGUF file; tokenizer and chat template inside.
    Gguf,
    /// Safetensors, from the Hugging Face hub or a folder.
    Hf,
}

/// Activation dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// What mistral.rs finds best for the device.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// Brain floats.
    Bf16,
}

/// The OpenAI listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Address and port.
    pub listen: SocketAddr,
    /// Longest request body in bytes.
    pub max_body_bytes: usize,
    /// Seconds that running requests get to finish after a stop signal.
    pub drain_seconds: u64,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            max_body_bytes: 16 << 20,
            drain_seconds: 10,
        }
    }
}

/// The policy API listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// Address and port.
    pub listen: SocketAddr,
    /// Bearer token; required where `listen` is not loopback.
    pub token: Option<String>,
    /// Milliseconds a `PATCH` waits for the running sequences to take up the policy.
    pub apply_wait_ms: u64,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 9180)),
            token: None,
            apply_wait_ms: 2000,
        }
    }
}

/// Logs, on standard error.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// For people or for machines.
    pub format: LogFormat,
    /// How much.
    pub level: LogLevel,
}

/// How a log line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures.
    Error,
    /// And what may become one.
    Warn,
    /// And what happens.
    #[default]
    Info,
    /// And mistral.rs' own account of it.
    Debug,
    /// Everything.
    Trace,
}

/// The host engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// Sequences that decode in one batch; the rest wait.
    pub max_running: usize,
    /// Whether finished prefixes are kept for reuse.
    pub prefix_cache: bool,
    /// Implementation of packing, attention and Q8_0 products; `auto` for the fastest that this CPU can run.
    pub kernels: String,
}

impl Engine {
    /// The implementation that is meant.
    ///
    /// # Errors
    /// A name that is none, or one that this CPU can't run.
    pub fn kernels(&self) -> Result<Kernels, KernelError> {
        match self.kernels.as_str() {
            "auto" => Ok(Kernels::detect()),
            name => Kernels::forced(name),
        }
    }
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            max_running: 16,
            prefix_cache: true,
            kernels: "auto".into(),
        }
    }
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// On.
    #[default]
    On,
    /// Off.
    Off,
}

/// The KV cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kv {
    /// Whether the plugin manages the cache; off is mistral.rs as it comes.
    pub plugin: Switch,
    /// Bytes that live requests' caches stay within.
    pub capacity_bytes: u64,
    /// Bytes that finished prefixes may hold.
    pub prefix_cache_bytes: u64,
}

impl Default for Kv {
    fn default() -> Self {
        Self {
            plugin: Switch::On,
            capacity_bytes: 2 << 30,
            prefix_cache_bytes: 256 << 20,
        }
    }
}

/// Who may run, and who waits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admission {
    /// Requests that may wait for room in the KV cache.
    pub max_queue: usize,
    /// Seconds one may wait.
    pub max_wait_seconds: u64,
    /// Tokens a request may generate that does not say how many.
    pub default_max_tokens: usize,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            max_queue: 64,
            max_wait_seconds: 600,
            default_max_tokens: 1024,
        }
    }
}

/// When running requests are tightened without being asked. Fractions of the KV capacity.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Watermark {
    /// Whether it acts.
    pub enabled: bool,
    /// It acts over this.
    pub high: f64,
    /// And brings what is held under this.
    pub low: f64,
}

impl Default for Watermark {
    fn default() -> Self {
        Self {
            enabled: true,
            high: 0.95,
            low: 0.85,
        }
    }
}

/// What is measured beyond the counts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Each how manyth layer's attention error is measured at a compression; 0: none.
    pub error_every_layers: usize,
    /// KV heads of such a layer that are measured.
    pub error_heads: usize,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            error_every_layers: 5,
            error_heads: 1,
        }
    }
}

/// A class of requests: exactly one of the three.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Class {
    /// A policy spelled out.
    pub policy: Option<Policy>,
    /// A level of the ladder.
    pub level: Option<u32>,
    /// How many times fewer bytes than level 0 holds it is to take, 1 or more: a level of the ladder is picked.
    pub ratio: Option<f64>,
}

impl Class {
    /// What its requests are served with.
    ///
    /// # Errors
    /// None or more than one of the three; one out of range.
    pub fn choice(&self, ladder: &cinch_protocol::Ladder) -> Result<Choice, PolicyError> {
        let given = Given::one_of(self.policy.as_ref(), self.level, self.ratio)?;
        ladder.choice(given)
    }
}

/// Where the ladder is, and what it says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ladder {
    /// The file; relative to the configuration's folder.
    pub file: PathBuf,
    /// Whether it may have been measured on another model than is served.
    #[serde(default)]
    pub allow_other_model: bool,
    /// What is in it.
    #[serde(skip)]
    pub content: LadderFile,
}

/// A ladder file.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LadderFile {
    /// The model it was measured on.
    pub model: String,
    /// The [fingerprint](crate::fingerprint) of that model; absent in a ladder written by hand.
    #[serde(default)]
    pub fingerprint: Option<String>,
    /// Prompt tokens of the requests that were measured.
    #[serde(default)]
    pub prompt_tokens: Option<u32>,
    /// When, as YYYY-MM-DD.
    pub measured: String,
    /// Its levels; a level's number is its place. Level 0 is uncompressed.
    pub level: Vec<Level>,
}

/// A level of the ladder.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// A name for people.
    pub name: String,
    /// What it does.
    #[serde(default)]
    pub policy: Policy,
    /// Bytes it holds of those level 0 holds.
    pub bytes_ratio: f64,
    /// What else was measured of it.
    #[serde(default)]
    pub figures: Option<LevelFigures>,
}
