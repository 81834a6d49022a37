//! The same weights in a GGUF file: matrices in Q8_0, under the names and with the metadata that mistral.rs 0.8.1 reads.

use std::fs::File;
use std::path::Path;

use candle_core::Tensor;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};

use super::{
    Architecture, CONTEXT, Checkpoint, EPSILON, FEED_FORWARD, HEADS, HIDDEN, KV_HEADS, LAYERS, tokenizer,
    weights,
};

/// Parts of names on the hub and in a GGUF file.
const NAMES: [(&str, &str); 19] = [
    ("model.layers.", "blk."),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];

pub(super) fn write(checkpoint: Checkpoint, path: &Path) {
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    for (name, tensor) in weights::tensors(checkpoint) {
        let renamed = rename(&name);
        if checkpoint.architecture.is_tied() && renamed == "token_embd.weight" {
            tensors.push(("output.weight".to_owned(), quantized(&tensor)));
        }
        tensors.push((renamed, quantized(&tensor)));
    }
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let metadata = metadata(checkpoint.architecture);
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

fn rename(name: &str) -> String {
    let replaced = |name: String, (hub, gguf): &(&str, &str)| name.replace(hub, gguf);
    NAMES.iter().fold(name.to_owned(), replaced)
}

fn quantized(tensor: &Tensor) -> QTensor {
    let dtype = if tensor.rank() == 2 {
        GgmlDType::Q8_0
    } else {
        GgmlDType::F32
    };
    QTensor::quantize(tensor, dtype).unwrap()
}

fn metadata(architecture: Architecture) -> Vec<(String, Value)> {
    let name = match architecture {
        // As llama.cpp's own conversion calls Mistral.
        Architecture::Llama | Architecture::Mistral => "llama",
        Architecture::Phi3 => "phi3",
        Architecture::Qwen2 => "qwen2",
        Architecture::Qwen3 => "qwen3",
        Architecture::Starcoder2 => "starcoder2",
        Architecture::Gemma2 | Architecture::Gemma3 | Architecture::SmolLm3 => {
            panic!("mistral.rs 0.8.1 reads no GGUF of {architecture:?}")
        }
    };
    let number = |value: usize| Value::U32(u32::try_from(value).unwrap());
    #[allow(clippy::cast_possible_truncation)]
    let epsilon = Value::F32(EPSILON as f32);
    let head_dim = architecture.head_dim();
    let own = [
        ("context_length", number(CONTEXT)),
        ("embedding_length", number(HIDDEN)),
        ("feed_forward_length", number(FEED_FORWARD)),
        ("block_count", number(LAYERS)),
        ("attention.head_count", number(HEADS)),
        ("attention.head_count_kv", number(KV_HEADS)),
        ("attention.key_length", number(head_dim)),
        ("attention.value_length", number(head_dim)),
        ("attention.layer_norm_rms_epsilon", epsilon.clone()),
        ("attention.layer_norm_epsilon", epsilon),
        ("rope.dimension_count", number(head_dim)),
        ("rope.freq_base", Value::F32(10_000.0)),
    ];
    let text = |text: &str| Value::String(text.to_owned());
    let vocabulary = tokenizer::vocabulary();
    // 1: text, 3: control.
    let kinds = (0..vocabulary.len()).map(|id| Value::I32(if tokenizer::is_text(id) { 1 } else { 3 }));
    let merges = tokenizer::MERGES
        .iter()
        .map(|(left, right)| text(&format!("{left} {right}")));
    let common = [
        ("general.architecture", text(name)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.token_type", Value::Array(kinds.collect())),
        ("tokenizer.ggml.merges", Value::Array(merges.collect())),
        ("tokenizer.ggml.eos_token_id", Value::U32(tokenizer::END)),
        ("tokenizer.chat_template", text(tokenizer::TEMPLATE)),
        (
            "tokenizer.ggml.tokens",
            Value::Array(vocabulary.into_iter().map(Value::String).collect()),
        ),
    ];
    let own = own
        .into_iter()
        .map(|(key, value)| (format!("{name}.{key}"), value));
    own.chain(common.map(|(key, value)| (key.to_owned(), value)))
        .collect()
}
