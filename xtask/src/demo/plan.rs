//! What the demo will do: so many requests, and a KV capacity that so many of them fit into uncompressed.

use std::path::{Path, PathBuf};

use anyhow::Context;
use candle_core::quantized::gguf_file::{Content, Value};
use cinch_settings::FieldFault;

use crate::up::settings::Mode;

/// Bytes of a number in f16.
const F16: u64 = 2;
/// How much longer than asked for a prompt may turn out, in per cent: it is cut by characters.
const LONGER: u64 = 5;
/// Rows that a store opens beyond those it holds, and headers and columns beside them, at most.
const ROWS_OPEN: u64 = 96;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Requests of the load, all sent at once, 1 to 256.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(super) requests: usize,
    /// Tokens of each prompt, about, 16 or more.
    #[arg(long, default_value_t = 700, value_name = "N")]
    pub(super) prompt_tokens: usize,
    /// Tokens that each may generate, 1 to 4096.
    #[arg(long, default_value_t = 192, value_name = "N")]
    pub(super) max_tokens: usize,
    /// How many requests the KV capacity holds at level 0, 1 to 256 [default: a quarter of the requests].
    #[arg(long, value_name = "N")]
    pub(super) fit: Option<usize>,
    /// What the controller's decisions do.
    #[arg(long, default_value = "live", value_name = "MODE")]
    pub(super) mode: Mode,
    /// Objective for the time to the first token: seconds, 0.001 to 3600.
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    pub(super) ttft_slo: f64,
    /// Objective for the time between tokens: seconds, 0.001 to 3600.
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS")]
    pub(super) itl_slo: f64,
    /// After the load, wait this long for new requests to be back at level 0, 1 to 7200.
    #[arg(long, value_name = "SECONDS")]
    pub(super) release_within: Option<u64>,
    /// Write the figures to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Set a field of the engine's configuration, as in `--set watermark.enabled=false`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(super) sets: Vec<String>,
    /// Set a field of the controller's configuration, as in `--controller-set law.up_cooldown=15`.
    #[arg(long = "controller-set", value_name = "KEY=VALUE")]
    pub(super) controller_sets: Vec<String>,
    /// Run the `cinch` and `cinch-controller` in this folder instead of preparing and building them.
    #[arg(long, value_name = "DIR")]
    pub(super) release_dir: Option<PathBuf>,
}

impl Args {
    /// What can be said before there is a model.
    pub(super) fn check(&self) -> Result<(), FieldFault> {
        range("--requests", self.requests, 1, 256)?;
        range("--prompt-tokens", self.prompt_tokens, 16, 1 << 20)?;
        range("--max-tokens", self.max_tokens, 1, 4096)?;
        range("--fit", self.fit(), 1, 256)?;
        range("--ttft-slo", self.ttft_slo, 0.001, 3600.0)?;
        range("--itl-slo", self.itl_slo, 0.001, 3600.0)?;
        range("--release-within", self.release_within.unwrap_or(1), 1, 7200)
    }

    /// How many requests fit at level 0.
    pub(super) fn fit(&self) -> usize {
        self.fit.unwrap_or((self.requests / 4).max(1))
    }

    /// The capacity that holds [`fit`](Self::fit) of these requests.
    pub(super) fn capacity(&self, model: &Geometry) -> Result<u64, FieldFault> {
        let longest = model.context.saturating_sub(self.max_tokens as u64) * 100 / (100 + LONGER);
        range("--prompt-tokens", self.prompt_tokens as u64, 16, longest)?;
        let prompt = self.prompt_tokens as u64 * (100 + LONGER) / 100;
        Ok(self.fit() as u64 * model.request(prompt, self.max_tokens as u64))
    }
}

fn range<T: PartialOrd + std::fmt::Display>(
    field: &str,
    given: T,
    low: T,
    high: T,
) -> Result<(), FieldFault> {
    if given >= low && given <= high {
        return Ok(());
    }
    Err(FieldFault::new(field, given, format!("{low} to {high}")))
}

/// What a model's KV cache takes, from its own file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    layers: u64,
    /// f16 bytes of one token in one layer, K and V of all KV heads.
    layer_bytes: u64,
    /// Most tokens of a sequence.
    context: u64,
}

impl Geometry {
    /// Of the GGUF file at `path`.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let name = || format!("reading {}", path.display());
        let mut file = std::fs::File::open(path).with_context(name)?;
        let content = Content::read(&mut file).with_context(name)?;
        Self::of(&|key| content.metadata.get(key)).with_context(name)
    }

    fn of<'a>(get: &dyn Fn(&str) -> Option<&'a Value>) -> anyhow::Result<Self> {
        let architecture = get("general.architecture")
            .context("general.architecture is missing")?
            .to_string()?
            .clone();
        let maybe = |key: &str| -> anyhow::Result<Option<u64>> {
            let value = get(&format!("{architecture}.{key}"));
            Ok(value.map(Value::to_u32).transpose()?.map(u64::from))
        };
        let number = |key: &str| maybe(key)?.with_context(|| format!("{architecture}.{key} is missing"));
        let heads = number("attention.head_count")?;
        let head = number("embedding_length")? / heads.max(1);
        let k = maybe("attention.key_length")?.unwrap_or(head);
        let v = maybe("attention.value_length")?.unwrap_or(head);
        let kv_heads = maybe("attention.head_count_kv")?.unwrap_or(heads);
        Ok(Self {
            layers: number("block_count")?,
            layer_bytes: kv_heads * (k + v) * F16,
            context: number("context_length")?,
        })
    }

    /// The most that an uncompressed request comes to hold, the layer that its prompt takes in passing included.
    fn request(&self, prompt: u64, new: u64) -> u64 {
        self.layers * (prompt + new + ROWS_OPEN) * self.layer_bytes + prompt * self.layer_bytes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        Cli::parse_from(["demo"].iter().chain(words)).args
    }

    const SMOL: Geometry = Geometry {
        layers: 30,
        layer_bytes: 3 * (64 + 64) * 2,
        context: 8192,
    };

    #[test]
    fn the_capacity_holds_what_is_to_fit_and_not_one_more() {
        let given = args(&["--requests=16", "--prompt-tokens=3000", "--max-tokens=64"]);
        assert_eq!(given.fit(), 4);
        let capacity = given.capacity(&SMOL).unwrap();
        // 23,040 bytes a token; the prompt once more in one layer of thirty.
        let request = 23_040 * (3000 + 64) + 768 * 3000;
        assert!(capacity >= 4 * request && capacity < 5 * request, "{capacity}");
        assert_eq!(args(&[]).fit(), 2);
        assert_eq!(args(&["--requests=1"]).fit(), 1);
    }

    #[test]
    fn bad_arguments_are_named() {
        for (word, said) in [
            ("--requests=0", "field `--requests`: given 0, allowed 1 to 256"),
            (
                "--max-tokens=5000",
                "field `--max-tokens`: given 5000, allowed 1 to 4096",
            ),
            ("--fit=0", "field `--fit`: given 0, allowed 1 to 256"),
            (
                "--itl-slo=NaN",
                "field `--itl-slo`: given NaN, allowed 0.001 to 3600",
            ),
            (
                "--release-within=0",
                "field `--release-within`: given 0, allowed 1 to 7200",
            ),
        ] {
            assert_eq!(args(&[word]).check().unwrap_err().to_string(), said);
        }
        args(&[]).check().unwrap();
        let err = args(&["--prompt-tokens=8000", "--max-tokens=192"])
            .capacity(&SMOL)
            .unwrap_err();
        assert_eq!(
            err.to_string(),
            "field `--prompt-tokens`: given 8000, allowed 16 to 7619"
        );
    }

    #[test]
    fn a_model_says_what_its_cache_takes() {
        let mut data: HashMap<&str, Value> = HashMap::from([
            ("general.architecture", Value::String("llama".into())),
            ("llama.block_count", Value::U32(30)),
            ("llama.embedding_length", Value::U32(576)),
            ("llama.attention.head_count", Value::U32(9)),
            ("llama.attention.head_count_kv", Value::U32(3)),
            ("llama.context_length", Value::U32(8192)),
        ]);
        assert_eq!(Geometry::of(&|key| data.get(key)).unwrap(), SMOL);
        data.insert("llama.attention.key_length", Value::U32(128));
        let wide = Geometry::of(&|key| data.get(key)).unwrap();
        assert_eq!(wide.layer_bytes, 3 * (128 + 64) * 2);
        data.remove("llama.block_count");
        let err = Geometry::of(&|key| data.get(key)).unwrap_err();
        assert!(format!("{err:#}").contains("llama.block_count is missing"));
    }
}
