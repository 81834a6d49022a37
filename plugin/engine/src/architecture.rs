//! What a model is, told from its description before the loader gets it. With the plugin on, architectures whose keys and
//! values would go round it are refused by name, with the reason; the self-test of the loaded model guards against
//! what is not known here.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::config::{ModelKind, Settings, Switch};
use crate::fields::FieldFault;
use crate::model;

/// Entries of `architectures` in config.json that are managed.
pub const ARCHITECTURES: [&str; 16] = [
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "PhiMoEForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
];

/// Of these, the ones to which mistral.rs 0.8.1 gives a sliding window in every layer where config.json has one.
const WINDOW_IN_EVERY_LAYER: [&str; 5] = [
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Phi3ForCausalLM",
    "PhiMoEForCausalLM",
    "Starcoder2ForCausalLM",
];

const LATENT: &str = "multi-head latent attention (MLA) caches a compressed form of its own";
const RECURRENT: &str = "recurrent layers keep a state and no keys and values";
const CROSS: &str = "cross-attention reads keys and values that no token of the text appends";
const MULTIMODAL: &str = "multimodal: its masks are not causal, and only text is served";
const SINKS: &str = "attention sinks in its weights take part in the softmax";
const SHARED: &str = "layers share other layers' keys and values, and only text is served";
const XLORA: &str = "X-LoRA runs the model twice a token, with a cache for each";
const NOT_IN_GGUF: &str = "mistral.rs 0.8.1 reads it from safetensors only: kind = \"hf\"";

/// Beginnings of names, in config.json (lower case) or a GGUF file, and why what is called so is refused. The first
/// that fits counts.
const REASONS: [(&str, &str); 46] = [
    ("deepseekv2", LATENT),
    ("deepseekv3", LATENT),
    ("deepseek2", LATENT),
    ("glm4moelite", LATENT),
    ("minicpm3", LATENT),
    ("plm", LATENT),
    ("granitemoehybrid", RECURRENT),
    ("granitehybrid", RECURRENT),
    ("qwen3next", RECURRENT),
    ("qwen3_5", RECURRENT),
    ("qwen35", RECURRENT),
    ("mamba", RECURRENT),
    ("falconmamba", RECURRENT),
    ("falconh1", RECURRENT),
    ("falcon-h1", RECURRENT),
    ("jamba", RECURRENT),
    ("bamba", RECURRENT),
    ("zamba", RECURRENT),
    ("nemotronh", RECURRENT),
    ("nemotron_h", RECURRENT),
    ("recurrentgemma", RECURRENT),
    ("rwkv", RECURRENT),
    ("lfm2", RECURRENT),
    ("plamo2", RECURRENT),
    ("mllama", CROSS),
    ("t5", CROSS),
    ("gemma3n", SHARED),
    ("gemma4", SHARED),
    ("gemma3forconditionalgeneration", MULTIMODAL),
    ("gptoss", SINKS),
    ("gpt-oss", SINKS),
    ("llama4", MULTIMODAL),
    ("llava", MULTIMODAL),
    ("idefics", MULTIMODAL),
    ("minicpmo", MULTIMODAL),
    ("mistral3for", MULTIMODAL),
    ("phi3v", MULTIMODAL),
    ("phi4mm", MULTIMODAL),
    ("qwen2vl", MULTIMODAL),
    ("qwen2_5_vl", MULTIMODAL),
    ("qwen3vl", MULTIMODAL),
    ("voxtral", MULTIMODAL),
    ("gemma", NOT_IN_GGUF),
    ("smollm3", NOT_IN_GGUF),
    ("glm4", NOT_IN_GGUF),
    ("granite", NOT_IN_GGUF),
];

/// Why an architecture that is not allowed is not, where it is known.
#[must_use]
pub fn reason(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let fits = |(begin, _): &&(&str, &str)| name.starts_with(begin);
    REASONS.iter().find(fits).map(|(_, reason)| *reason)
}

/// What is read of config.json.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    sliding_window: Option<u64>,
    #[serde(default)]
    max_position_embeddings: Option<u64>,
}

/// Checks the description of safetensors, if it is on this machine: a folder's, or the hub's once it has been fetched.
/// Without the plugin, everything loads that mistral.rs loads.
///
/// # Errors
/// What the model is and why that can't be managed, as a fault of the field `model.model_id`.
pub fn check(settings: &Settings) -> Result<(), FieldFault> {
    let id = settings.model.model_id.as_deref().unwrap_or_default();
    if settings.model.kind != ModelKind::Hf || settings.kv.plugin == Switch::Off {
        return Ok(());
    }
    let adapter = model::home(Path::new(id)).join("xlora_config.json");
    if adapter.is_file() {
        return Err(fault(id, &format!("an X-LoRA adapter: {XLORA}")));
    }
    let Some(path) = description(settings) else {
        return Ok(());
    };
    let unreadable = |err: &dyn std::fmt::Display| {
        FieldFault::new(
            "model.model_id",
            format!("{id} ({}: {err})", path.display()),
            "a model whose config.json can be read",
        )
    };
    let text = std::fs::read_to_string(&path).map_err(|err| unreadable(&err))?;
    let config: Config = serde_json::from_str(&text).map_err(|err| unreadable(&err))?;
    managed(id, &config)
}

/// config.json of the configured safetensors, where that is on this machine.
pub(crate) fn description(settings: &Settings) -> Option<PathBuf> {
    let id = settings.model.model_id.as_deref().unwrap_or_default();
    let folder = model::home(Path::new(id));
    if folder.is_dir() {
        Some(folder.join("config.json"))
    } else {
        mistralrs_core::hf_hub_cache_dir().and_then(|cache| in_hub_cache(&cache, id))
    }
}

/// config.json of the revision that was fetched last.
fn in_hub_cache(cache: &Path, id: &str) -> Option<PathBuf> {
    let repository = cache.join(format!("models--{}", id.replace('/', "--")));
    let revision = std::fs::read_to_string(repository.join("refs/main")).ok()?;
    let config = repository
        .join("snapshots")
        .join(revision.trim())
        .join("config.json");
    config.is_file().then_some(config)
}

fn managed(id: &str, config: &Config) -> Result<(), FieldFault> {
    let [architecture] = &config.architectures[..] else {
        let given = format!("{} architectures in its config.json", config.architectures.len());
        return Err(fault(id, &given));
    };
    if !ARCHITECTURES.contains(&architecture.as_str()) {
        let reason = match reason(architecture) {
            Some(NOT_IN_GGUF) | None => "not known to pass its keys and values to the plugin",
            Some(reason) => reason,
        };
        return Err(fault(id, &format!("{architecture}: {reason}")));
    }
    let context = config.max_position_embeddings.unwrap_or(u64::MAX);
    match config.sliding_window.filter(|window| *window < context) {
        Some(window) if WINDOW_IN_EVERY_LAYER.contains(&architecture.as_str()) => {
            let given = format!(
                "{id} ({architecture} with a sliding_window of {window} tokens in every layer: none is left to manage)"
            );
            let allowed =
                "a sliding_window of null, or of max_position_embeddings or more; or kv.plugin = \"off\"";
            Err(FieldFault::new("model.model_id", given, allowed))
        }
        _ => Ok(()),
    }
}

fn fault(id: &str, given: &str) -> FieldFault {
    let allowed = format!("one of {}; or kv.plugin = \"off\"", ARCHITECTURES.join(", "));
    FieldFault::new("model.model_id", format!("{id} ({given})"), allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(more: &[&str]) -> Settings {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml"));
        let text = std::fs::read_to_string(path).unwrap();
        let text = text.replace("kind = \"gguf\"", "kind = \"hf\"");
        let text: String = text
            .split_inclusive('\n')
            .filter(|line| !line.starts_with("file = \"~"))
            .collect();
        let more: Vec<String> = more.iter().map(|text| (*text).to_owned()).collect();
        Settings::parse(&text, path, &more).unwrap()
    }

    /// A folder with one file; removed at the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str, file: &str, text: &str) -> Self {
            let path = std::env::temp_dir().join(format!("cinch-architecture-{name}-{}", std::process::id()));
            let file = path.join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
            Self(path)
        }

        fn check(&self, more: &[&str]) -> Result<(), String> {
            let id = format!("model.model_id={}", self.0.display());
            check(&settings(&[&[id.as_str()], more].concat())).map_err(|fault| fault.to_string())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _gone = std::fs::remove_dir_all(&self.0);
        }
    }

    fn of(name: &str, config: &str) -> Folder {
        Folder::new(name, "config.json", config)
    }

    #[test]
    fn what_goes_round_the_plugin_is_refused_by_name_and_reason() {
        for (architecture, reason) in [
            ("DeepseekV2ForCausalLM", LATENT),
            ("DeepseekV3ForCausalLM", LATENT),
            ("Glm4MoeLiteForCausalLM", LATENT),
            ("GraniteMoeHybridForCausalLM", RECURRENT),
            ("Qwen3NextForCausalLM", RECURRENT),
            ("MambaForCausalLM", RECURRENT),
            ("MllamaForConditionalGeneration", CROSS),
            ("Qwen2_5_VLForConditionalGeneration", MULTIMODAL),
            ("Gemma3ForConditionalGeneration", MULTIMODAL),
            ("Gemma3nForConditionalGeneration", SHARED),
            ("GptOssForCausalLM", SINKS),
            ("SomethingNewForCausalLM", "not known"),
        ] {
            let folder = of(
                architecture,
                &format!(r#"{{"architectures": ["{architecture}"]}}"#),
            );
            let said = folder.check(&[]).unwrap_err();
            for part in [
                "field `model.model_id`: given ",
                architecture,
                reason,
                "LlamaForCausalLM",
                "kv.plugin = \"off\"",
            ] {
                assert!(said.contains(part), "{part}: {said}");
            }
            folder.check(&["kv.plugin=off"]).unwrap();
        }
    }

    #[test]
    fn what_is_managed_passes() {
        for architecture in ARCHITECTURES {
            let folder = of(
                architecture,
                &format!(r#"{{"architectures": ["{architecture}"]}}"#),
            );
            folder.check(&[]).unwrap();
        }
    }

    #[test]
    fn a_window_in_every_layer_leaves_nothing_to_manage() {
        let config = |architecture: &str, window: &str| {
            format!(
                r#"{{"architectures": ["{architecture}"], "sliding_window": {window}, "max_position_embeddings": 32768}}"#
            )
        };
        let said = of("window", &config("MistralForCausalLM", "4096"))
            .check(&[])
            .unwrap_err();
        assert!(
            said.contains("sliding_window of 4096 tokens") && said.contains("max_position_embeddings"),
            "{said}"
        );
        of("long", &config("Phi3ForCausalLM", "262144"))
            .check(&[])
            .unwrap();
        of("none", &config("Starcoder2ForCausalLM", "null"))
            .check(&[])
            .unwrap();
        // Its global layers are managed.
        of("gemma", &config("Gemma3ForCausalLM", "512"))
            .check(&[])
            .unwrap();
    }

    #[test]
    fn adapters_and_descriptions_that_are_none() {
        let said = Folder::new("xlora", "xlora_config.json", "{}")
            .check(&[])
            .unwrap_err();
        assert!(said.contains(XLORA), "{said}");
        for (name, text) in [
            ("broken", "{"),
            ("two", r#"{"architectures": ["A", "B"]}"#),
            ("zero", "{}"),
        ] {
            let said = of(name, text).check(&[]).unwrap_err();
            assert!(said.contains("config.json"), "{said}");
        }
        let said = Folder::new("empty", "README.md", "").check(&[]).unwrap_err();
        assert!(said.contains("config.json"), "{said}");
    }

    #[test]
    fn a_fetched_model_is_found_in_the_hubs_cache() {
        let cache = Folder::new("hub", "models--some--model/refs/main", "abc\n");
        assert_eq!(in_hub_cache(&cache.0, "some/model"), None);
        let config = cache.0.join("models--some--model/snapshots/abc/config.json");
        std::fs::create_dir_all(config.parent().unwrap()).unwrap();
        std::fs::write(&config, "{}").unwrap();
        assert_eq!(in_hub_cache(&cache.0, "some/model"), Some(config));
        assert_eq!(in_hub_cache(&cache.0, "other/model"), None);
    }

    #[test]
    fn reasons_are_found_by_the_names_in_gguf_files_too() {
        assert_eq!(reason("deepseek2"), Some(LATENT));
        assert_eq!(reason("granitehybrid"), Some(RECURRENT));
        assert_eq!(reason("gemma3"), Some(NOT_IN_GGUF));
        assert_eq!(reason("gemma3n"), Some(SHARED));
        assert_eq!(reason("falcon"), None);
        assert!(
            ARCHITECTURES
                .iter()
                .all(|name| matches!(reason(name), None | Some(NOT_IN_GGUF)))
        );
    }
}
