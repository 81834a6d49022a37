//! What `cinch bench` measures, and the records kept of it. A figure that was not measured is absent, never
//! worked out from others.

use serde::{Deserialize, Serialize};

/// A system beside the engine that is measured in turn with it: a command that answers a
/// [plan](crate::probe::Plan) as `cinch probe` does. It gets the plan's file and the report's as its last
/// arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Other {
    /// Its name.
    pub system: String,
    /// What its KV cache is in; absent: the dtype of activations, as its report has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<String>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Most requests it takes at once; absent: any number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_concurrency: Option<usize>,
}

/// One run of the benchmark.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// When it began, UTC, as YYYY-MM-DD.
    pub date: String,
    /// The CPU, as the system names it.
    pub cpu: String,
    /// Threads that computed.
    pub threads: usize,
    /// The model file's or Hugging Face name.
    pub model: String,
    /// What activations are in.
    pub dtype: String,
    /// Tokens each request generated, greedily.
    pub new_tokens: usize,
    /// Rounds that are in these figures: every system in turn, once a round.
    pub rounds: usize,
    /// Load averages over 1, 5 and 15 minutes when it began: what else the machine did.
    pub load_average: Option<[f64; 3]>,
    /// One a system, KV cache and load.
    pub rows: Vec<Row>,
    /// The attention kernel by itself; empty: not asked for.
    #[serde(default)]
    pub kernel: Vec<KernelRow>,
}

/// One system under one load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// cinch, or another one's name.
    pub system: String,
    /// What its KV cache is in: a ladder level, a policy, `off`, or as the other system has it.
    pub kv: String,
    /// Prompt tokens; of several requests, their mean.
    pub context: usize,
    /// Requests at once.
    pub concurrency: usize,
    /// Prompt tokens of each.
    pub prompts: Vec<usize>,
    /// Of each figure the median over the rounds.
    #[serde(flatten)]
    pub median: Figures,
    /// Each round's.
    pub samples: Vec<Figures>,
}

/// What was measured of one process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// All prompt tokens, by the time to the last request's first token. Tokens/s.
    pub prefill_tps: f64,
    /// Steps after the last request's first token, by the time they took; absent: there were none. Tokens/s.
    pub decode_tps: Option<f64>,
    /// Prompt and new tokens, by the time to the last of them. Tokens/s.
    pub total_tps: f64,
    /// Time to the first token, median over the requests.
    pub ttft_p50_ms: f64,
    /// The same, of the last one.
    pub ttft_max_ms: f64,
    /// Time between two tokens of a request, over all steps of all requests.
    pub itl_p50_ms: f64,
    /// 95th percentile of it.
    pub itl_p95_ms: f64,
    /// 99th percentile of it.
    pub itl_p99_ms: f64,
    /// Bytes resident once the model was loaded.
    pub loaded_rss_bytes: Option<u64>,
    /// The most bytes that were resident by then.
    pub loaded_peak_rss_bytes: Option<u64>,
    /// The most bytes that were resident while the requests ran.
    pub run_peak_rss_bytes: Option<u64>,
    /// The most bytes that the plugin's blocks took; absent where no plugin counts.
    pub kv_bytes: Option<u64>,
}

impl Figures {
    /// The most bytes that were resident over the life of the process.
    #[must_use]
    pub fn peak_rss_bytes(&self) -> Option<u64> {
        Some(self.loaded_peak_rss_bytes?.max(self.run_peak_rss_bytes?))
    }
}

/// Decode attention over one packed sequence, all threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelRow {
    /// The codec of K and V.
    pub kv: String,
    /// Packed bytes read a second, 10⁹.
    pub gb_s: f64,
    /// What the same threads read as a plain stream, measured in the same run.
    pub roofline_gb_s: f64,
}

/// What is kept of a benchmark in benches/records: one file a day and CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// UTC, as YYYY-MM-DD.
    pub date: String,
    /// A name for the CPU, fit for a file name.
    pub cpu: String,
    /// The commit that was measured.
    pub commit: String,
    /// End to end.
    pub rows: Vec<RecordRow>,
    /// The attention kernel by itself.
    pub kernel: Vec<KernelRow>,
}

/// A [`Row`]'s medians.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordRow {
    /// cinch, mistralrs or llama.cpp.
    pub system: String,
    /// [`Row::kv`].
    pub kv: String,
    /// [`Row::context`].
    pub context: usize,
    /// [`Row::concurrency`].
    pub concurrency: usize,
    /// [`Figures::prefill_tps`].
    pub prefill_tps: f64,
    /// [`Figures::decode_tps`].
    pub decode_tps: Option<f64>,
    /// [`Figures::total_tps`].
    pub total_tps: f64,
    /// [`Figures::itl_p50_ms`].
    pub itl_p50_ms: f64,
    /// [`Figures::itl_p99_ms`].
    pub itl_p99_ms: f64,
    /// [`Figures::peak_rss_bytes`].
    pub peak_rss_bytes: Option<u64>,
    /// [`Figures::kv_bytes`].
    pub kv_bytes: Option<u64>,
}

impl From<&Row> for RecordRow {
    fn from(row: &Row) -> Self {
        let figures = &row.median;
        Self {
            system: row.system.clone(),
            kv: row.kv.clone(),
            context: row.context,
            concurrency: row.concurrency,
            prefill_tps: figures.prefill_tps,
            decode_tps: figures.decode_tps,
            total_tps: figures.total_tps,
            itl_p50_ms: figures.itl_p50_ms,
            itl_p99_ms: figures.itl_p99_ms,
            peak_rss_bytes: figures.peak_rss_bytes(),
            kv_bytes: figures.kv_bytes,
        }
    }
}

impl Record {
    /// What is kept of `measured`.
    #[must_use]
    pub fn of(measured: &Measured, cpu: &str, commit: &str) -> Self {
        Self {
            date: measured.date.clone(),
            cpu: cpu.to_owned(),
            commit: commit.to_owned(),
            rows: measured.rows.iter().map(RecordRow::from).collect(),
            kernel: measured.kernel.clone(),
        }
    }
}
