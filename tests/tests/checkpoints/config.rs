//! config.json, with the fields that mistral.rs 0.8.1 asks for.

use serde_json::{Value, json};

use super::{
    Architecture, CONTEXT, Checkpoint, EPSILON, FEED_FORWARD, HEADS, HIDDEN, KV_HEADS, LAYERS, tokenizer,
};

/// Each so manyth layer of Gemma 3 attends to all tokens.
pub(super) const GEMMA3_PATTERN: usize = 2;

pub(super) fn config(checkpoint: Checkpoint) -> Value {
    let mut config = json!({
        "vocab_size": tokenizer::vocabulary().len(),
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "rope_theta": 10000.0,
        "tie_word_embeddings": checkpoint.architecture.is_tied(),
        "bos_token_id": null,
        "eos_token_id": tokenizer::END,
        "torch_dtype": "float32",
    });
    let (class, model_type, more) = own(checkpoint);
    config["architectures"] = json!([class]);
    config["model_type"] = model_type.into();
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Class, type and what an architecture has beside the common fields.
fn own(checkpoint: Checkpoint) -> (&'static str, &'static str, Value) {
    let head_dim = checkpoint.architecture.head_dim();
    let gemma = json!({
        "attention_bias": false,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": head_dim,
        "sliding_window": checkpoint.window,
        "final_logit_softcapping": 30.0,
    });
    match checkpoint.architecture {
        Architecture::Llama => ("LlamaForCausalLM", "llama", json!({})),
        Architecture::Mistral => ("MistralForCausalLM", "mistral", json!({"sliding_window": null})),
        Architecture::Qwen2 => (
            "Qwen2ForCausalLM",
            "qwen2",
            json!({"sliding_window": CONTEXT, "use_sliding_window": false}),
        ),
        Architecture::Qwen3 => (
            "Qwen3ForCausalLM",
            "qwen3",
            json!({
                "head_dim": head_dim,
                "max_window_layers": LAYERS,
                "sliding_window": null,
                "use_sliding_window": false,
            }),
        ),
        // As Phi-3.5 has it: a window longer than the context.
        Architecture::Phi3 => (
            "Phi3ForCausalLM",
            "phi3",
            json!({"original_max_position_embeddings": CONTEXT, "sliding_window": 2 * CONTEXT}),
        ),
        Architecture::Gemma2 => {
            let mut gemma = gemma;
            gemma["attn_logit_softcapping"] = 50.0.into();
            ("Gemma2ForCausalLM", "gemma2", gemma)
        }
        Architecture::Gemma3 => {
            let mut gemma = gemma;
            gemma["sliding_window_pattern"] = GEMMA3_PATTERN.into();
            gemma["rope_local_base_freq"] = 10000.0.into();
            gemma["rope_theta"] = 1_000_000.0.into();
            ("Gemma3ForCausalLM", "gemma3_text", gemma)
        }
        Architecture::Starcoder2 => (
            "Starcoder2ForCausalLM",
            "starcoder2",
            json!({
                "hidden_act": "gelu_pytorch_tanh",
                "norm_epsilon": EPSILON,
                "sliding_window": null,
                "use_bias": true,
            }),
        ),
        Architecture::SmolLm3 => (
            "SmolLM3ForCausalLM",
            "smollm3",
            json!({"no_rope_layer_interval": 4, "no_rope_layers": null}),
        ),
    }
}
