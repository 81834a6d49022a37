//! How a model's keys turn with their positions, as mistral.rs 0.8.1 turns them: told from the description that it loads the
//! model from. What it does not read of a description (`rope_scaling` of most architectures, `rope_freqs.weight` in a
//! GGUF file) is not read here either. What is told is held against the loaded model's keys before it is relied on.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use cinch_cache::Pairing::{Halves, Neighbours};
use cinch_cache::{Rotary, RotaryLayers};
use serde::Deserialize;
use serde_json::Value as Json;

use crate::config::{ModelKind, Settings};
use crate::{architecture, model};

/// mistral.rs' base where a description has none.
const BASE: f64 = 10_000.0;

type Told = Result<RotaryLayers, String>;

/// How the configured model's keys turn. It has been loaded, so that its description is on this machine.
#[must_use]
pub fn of(settings: &Settings) -> RotaryLayers {
    let told = match settings.model.kind {
        ModelKind::Gguf => {
            let file = settings.model.file.as_deref().map(model::home);
            in_gguf(&file.unwrap_or_default())
        }
        ModelKind::Hf => match architecture::description(settings) {
            Some(path) => in_config(&path),
            None => Err("its config.json is not on this machine".to_owned()),
        },
    };
    told.unwrap_or_else(RotaryLayers::Unknown)
}

fn in_gguf(path: &Path) -> Told {
    let file = File::open(path).map_err(|err| err.to_string())?;
    let content = Content::read(&mut BufReader::new(file)).map_err(|err| err.to_string())?;
    of_gguf(&content.metadata)
}

fn in_config(path: &Path) -> Told {
    let text = std::fs::read_to_string(path).map_err(|err| err.to_string())?;
    of_config(&text)
}

/// Of a GGUF file's metadata.
fn of_gguf(metadata: &HashMap<String, Value>) -> Told {
    let Some(Value::String(name)) = metadata.get("general.architecture") else {
        return Err("it has no general.architecture".to_owned());
    };
    let number = |key: &str| {
        let key = format!("{name}.{key}");
        let value = metadata.get(&key).and_then(|value| value.to_u32().ok());
        value
            .map(|value| value as usize)
            .ok_or(format!("{key} is missing"))
    };
    let base = |default: f64| match metadata.get(&format!("{name}.rope.freq_base")) {
        Some(Value::F32(base)) => f64::from(*base),
        _ => default,
    };
    let of_hidden = || Ok::<_, String>(number("embedding_length")? / number("attention.head_count")?.max(1));
    let head = || number("attention.key_length").or_else(|_| of_hidden());
    Ok(RotaryLayers::Alike(match name.as_str() {
        // As llama.cpp's conversion orders their rows.
        "llama" | "mistral3" => Rotary::new(base(BASE), number("rope.dimension_count")?, Neighbours),
        "phi2" | "phi3" => Rotary::new(BASE, number("rope.dimension_count")?, Halves),
        "qwen2" | "qwen3" | "qwen3moe" => Rotary::new(base(BASE), head()?, Halves),
        "starcoder2" => Rotary::new(base(100_000.0), of_hidden()?, Halves),
        _ => return Err(format!("how mistral.rs turns keys of {name} is not known")),
    }))
}

/// What is read of config.json.
#[derive(Deserialize)]
struct Config {
    architectures: Vec<String>,
    hidden_size: Option<usize>,
    num_attention_heads: Option<usize>,
    num_hidden_layers: Option<usize>,
    head_dim: Option<usize>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Json>,
    rope_scaling: Option<Json>,
    rope_local_base_freq: Option<f64>,
    partial_rotary_factor: Option<f64>,
    max_position_embeddings: Option<usize>,
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    no_rope_layers: Option<Vec<usize>>,
    no_rope_layer_interval: Option<usize>,
}

impl Config {
    fn base(&self) -> Result<f64, String> {
        self.rope_theta.ok_or("its rope_theta is missing".to_owned())
    }

    /// Hidden size by query heads, whatever `head_dim` says.
    fn of_hidden(&self) -> Result<usize, String> {
        match (self.hidden_size, self.num_attention_heads) {
            (Some(hidden), Some(heads)) if heads > 0 => Ok(hidden / heads),
            _ => Err("its hidden_size or num_attention_heads is missing".to_owned()),
        }
    }

    fn head(&self) -> Result<usize, String> {
        self.head_dim.map_or_else(|| self.of_hidden(), Ok)
    }

    /// So much of a head turns.
    fn partial(&self, head: usize) -> usize {
        (self.partial_rotary_factor.unwrap_or(1.0) * head as f64) as usize
    }

    fn layers(&self) -> Result<usize, String> {
        self.num_hidden_layers
            .ok_or("its num_hidden_layers is missing".to_owned())
    }

    /// `rope_type` of its scaling; `None`: there is none.
    fn scaling(&self) -> Option<(&str, &Json)> {
        let scaling = self.rope_scaling.as_ref().filter(|scaling| !scaling.is_null())?;
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
        Some((kind.and_then(Json::as_str).unwrap_or("unknown"), scaling))
    }

    /// Of Llama and SmolLM3.
    fn llama(&self) -> Result<Rotary, String> {
        let mut rotary = Rotary::new(self.base()?, self.of_hidden()?, Halves);
        let (kind, scaling) = match self.scaling() {
            None | Some(("default", _)) => return Ok(rotary),
            Some(scaling) => scaling,
        };
        let field = |name: &str| {
            let value = scaling.get(name).and_then(Json::as_f64);
            value
                .map(|x| x as f32)
                .ok_or(format!("its rope_scaling.{name} is missing"))
        };
        match kind {
            "linear" => scale(&mut rotary, field("factor")?),
            "llama3" => {
                let (factor, context) = (field("factor")?, field("original_max_position_embeddings")?);
                let (low, high) = (field("low_freq_factor")?, field("high_freq_factor")?);
                for frequency in &mut rotary.frequencies {
                    // Turns within the context that the model was first trained on.
                    let turns = context * *frequency / (2.0 * std::f32::consts::PI);
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    *frequency *= kept + (1.0 - kept) / factor;
                }
            }
            other => {
                return Err(format!(
                    "how its rope_scaling of type {other} turns keys is not known"
                ));
            }
        }
        Ok(rotary)
    }
}

fn scale(rotary: &mut Rotary, factor: f32) {
    rotary
        .frequencies
        .iter_mut()
        .for_each(|frequency| *frequency /= factor);
}

/// Of a config.json.
fn of_config(text: &str) -> Told {
    let config: Config = serde_json::from_str(text).map_err(|err| format!("its config.json: {err}"))?;
    let [architecture] = &config.architectures[..] else {
        return Err("its config.json names no single architecture".to_owned());
    };
    Ok(RotaryLayers::Alike(match architecture.as_str() {
        "LlamaForCausalLM" => config.llama()?,
        "SmolLM3ForCausalLM" => return smollm3(&config),
        "MistralForCausalLM" => {
            let nested = config
                .rope_parameters
                .as_ref()
                .and_then(|nested| nested.get("rope_theta"));
            let base = nested
                .and_then(Json::as_f64)
                .or(config.rope_theta)
                .unwrap_or(BASE);
            Rotary::new(base, config.head()?, Halves)
        }
        "MixtralForCausalLM" | "Qwen2ForCausalLM" | "Starcoder2ForCausalLM" => {
            Rotary::new(config.base()?, config.of_hidden()?, Halves)
        }
        "Qwen3ForCausalLM" | "Qwen3MoeForCausalLM" | "GemmaForCausalLM" | "Gemma2ForCausalLM" => {
            Rotary::new(config.base()?, config.head()?, Halves)
        }
        "Gemma3ForCausalLM" => return gemma3(&config),
        "PhiForCausalLM" => Rotary::new(config.base()?, config.partial(config.of_hidden()?), Halves),
        "Phi3ForCausalLM" | "PhiMoEForCausalLM" => {
            if let Some((kind, _)) = config.scaling() {
                return Err(format!(
                    "its rope_scaling of type {kind} turns keys by other frequencies once the context is long"
                ));
            }
            let head = config.of_hidden()?;
            let dims = if architecture == "Phi3ForCausalLM" {
                config.partial(head)
            } else {
                head
            };
            Rotary::new(config.base()?, dims, Halves)
        }
        "Glm4ForCausalLM" | "Glm4MoeForCausalLM" => {
            Rotary::new(config.base()?, config.partial(config.head()?), Neighbours)
        }
        other => return Err(format!("how mistral.rs turns keys of {other} is not known")),
    }))
}

/// Some layers' keys do not turn.
fn smollm3(config: &Config) -> Told {
    let rotary = config.llama()?;
    let turns = |layer: usize| match (&config.no_rope_layers, config.no_rope_layer_interval) {
        (Some(layers), _) => layers.get(layer).is_some_and(|turns| *turns != 0),
        (None, Some(interval)) => interval == 0 || !(layer + 1).is_multiple_of(interval),
        (None, None) => true,
    };
    let of = |layer| {
        if turns(layer) {
            rotary.clone()
        } else {
            Rotary::none()
        }
    };
    Ok(RotaryLayers::Each((0..config.layers()?).map(of).collect()))
}

/// Its global layers have a base of their own. Those with a window are managed where the context never fills it.
fn gemma3(config: &Config) -> Told {
    let head = config.head_dim.unwrap_or(256);
    let mut global = Rotary::new(config.rope_theta.unwrap_or(1_000_000.0), head, Halves);
    match config.scaling() {
        None => {}
        Some(("linear", scaling)) => {
            let factor = scaling.get("factor").and_then(Json::as_f64);
            scale(
                &mut global,
                factor.ok_or("its rope_scaling.factor is missing")? as f32,
            );
        }
        Some((other, _)) => {
            return Err(format!(
                "how its rope_scaling of type {other} turns keys is not known"
            ));
        }
    }
    let context = config.max_position_embeddings.unwrap_or(131_072);
    if config.sliding_window.is_none_or(|window| window < context) {
        return Ok(RotaryLayers::Alike(global));
    }
    let local = Rotary::new(config.rope_local_base_freq.unwrap_or(BASE), head, Halves);
    let pattern = config.sliding_window_pattern.unwrap_or(6);
    let of = |layer: usize| {
        if (layer + 1).is_multiple_of(pattern) {
            global.clone()
        } else {
            local.clone()
        }
    };
    Ok(RotaryLayers::Each((0..config.layers()?).map(of).collect()))
}
