//! Random weights under the names that the Hugging Face hub has. With these sizes, what a layer attends to decides what comes
//! next: attention is sharp, its output large, and a token's own embedding small. Greedy answers then wander.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::{Architecture, Checkpoint, FEED_FORWARD, HEADS, HIDDEN, KV_HEADS, LAYERS, tokenizer};

/// Tensors by name.
pub(super) type Tensors = BTreeMap<String, Tensor>;

/// Of embeddings, as they enter the first layer.
const EMBEDDING: f32 = 0.1;
/// Of queries and keys, each.
const SHARPNESS: f32 = 3.0;
/// Of what attention adds, in units of what an MLP does.
const ATTENTION: f32 = 2.0;
const BIAS: f32 = 0.03;
/// Of the last norm where the output is as small as the embeddings of Gemma.
const LAST_NORM: f32 = 4.0;

/// All of a checkpoint's tensors, f32.
pub(super) fn tensors(checkpoint: Checkpoint) -> Tensors {
    let architecture = checkpoint.architecture;
    let mut writer = Writer {
        architecture,
        random: Random(0x5EED),
        tensors: Tensors::new(),
    };
    #[allow(clippy::cast_precision_loss)]
    let root = (HIDDEN as f32).sqrt();
    let gemma = architecture.is_gemma();
    // Gemma multiplies embeddings by it.
    let embedding = if gemma { EMBEDDING / root } else { EMBEDDING };
    writer.table("model.embed_tokens", embedding);
    for layer in 0..LAYERS {
        writer.layer(layer);
    }
    writer.norm("model.norm", HIDDEN, if gemma { LAST_NORM } else { 1.0 });
    if !architecture.is_tied() {
        writer.table("lm_head", root.recip());
    }
    if checkpoint.silent_windows {
        for layer in (0..LAYERS).filter(|layer| architecture.is_sliding(*layer)) {
            let name = format!("model.layers.{layer}.self_attn.v_proj.weight");
            let values = writer.tensors.get_mut(&name).unwrap();
            *values = values.zeros_like().unwrap();
        }
    }
    writer.tensors
}

struct Writer {
    architecture: Architecture,
    random: Random,
    tensors: Tensors,
}

impl Writer {
    fn layer(&mut self, layer: usize) {
        use Architecture::{Gemma3, Phi3, Qwen2, Qwen3, Starcoder2};
        let architecture = self.architecture;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let (q, kv) = (
            HEADS * architecture.head_dim(),
            KV_HEADS * architecture.head_dim(),
        );
        let all_biased = architecture == Starcoder2;
        if architecture == Phi3 {
            self.linear(&name("self_attn.qkv_proj"), q + 2 * kv, HIDDEN, SHARPNESS, false);
        } else {
            let biased = all_biased || architecture == Qwen2;
            self.linear(&name("self_attn.q_proj"), q, HIDDEN, SHARPNESS, biased);
            self.linear(&name("self_attn.k_proj"), kv, HIDDEN, SHARPNESS, biased);
            self.linear(&name("self_attn.v_proj"), kv, HIDDEN, 1.0, biased);
        }
        if matches!(architecture, Gemma3 | Qwen3) {
            self.norm(&name("self_attn.q_norm"), architecture.head_dim(), SHARPNESS);
            self.norm(&name("self_attn.k_norm"), architecture.head_dim(), SHARPNESS);
        }
        self.linear(&name("self_attn.o_proj"), HIDDEN, q, ATTENTION, all_biased);
        match architecture {
            Starcoder2 => {
                self.linear(&name("mlp.c_fc"), FEED_FORWARD, HIDDEN, 1.0, true);
                self.linear(&name("mlp.c_proj"), HIDDEN, FEED_FORWARD, 1.0, true);
            }
            Phi3 => {
                self.linear(&name("mlp.gate_up_proj"), 2 * FEED_FORWARD, HIDDEN, 1.0, false);
                self.linear(&name("mlp.down_proj"), HIDDEN, FEED_FORWARD, 1.0, false);
            }
            _ => {
                self.linear(&name("mlp.gate_proj"), FEED_FORWARD, HIDDEN, 1.0, false);
                self.linear(&name("mlp.up_proj"), FEED_FORWARD, HIDDEN, 1.0, false);
                self.linear(&name("mlp.down_proj"), HIDDEN, FEED_FORWARD, 1.0, false);
            }
        }
        self.norm(&name("input_layernorm"), HIDDEN, 1.0);
        self.norm(&name("post_attention_layernorm"), HIDDEN, 1.0);
        if architecture.is_gemma() {
            self.norm(&name("pre_feedforward_layernorm"), HIDDEN, 1.0);
            self.norm(&name("post_feedforward_layernorm"), HIDDEN, 1.0);
        }
    }

    /// `name`.weight, outputs by inputs, and with it `name`.bias.
    fn linear(&mut self, name: &str, outputs: usize, inputs: usize, size: f32, biased: bool) {
        #[allow(clippy::cast_precision_loss)]
        let size = size / (inputs as f32).sqrt();
        let weight = self.random.normal(outputs * inputs, size);
        self.put(&format!("{name}.weight"), weight, &[outputs, inputs]);
        if biased {
            let bias = self.random.normal(outputs, BIAS);
            self.put(&format!("{name}.bias"), bias, &[outputs]);
        }
    }

    fn norm(&mut self, name: &str, size: usize, mean: f32) {
        let mean = if self.architecture.is_gemma() {
            mean - 1.0
        } else {
            mean
        };
        let weight = self.random.normal(size, 0.1);
        let weight = weight.into_iter().map(|x| mean + x).collect();
        self.put(&format!("{name}.weight"), weight, &[size]);
        if self.architecture == Architecture::Starcoder2 {
            let bias = self.random.normal(size, BIAS);
            self.put(&format!("{name}.bias"), bias, &[size]);
        }
    }

    /// A row a token; those of tokens that are not text are zero, so that their logits are.
    fn table(&mut self, name: &str, size: f32) {
        let tokens = tokenizer::vocabulary().len();
        let mut rows = self.random.normal(tokens * HIDDEN, size);
        for (token, row) in rows.chunks_exact_mut(HIDDEN).enumerate() {
            if !tokenizer::is_text(token) {
                row.fill(0.0);
            }
        }
        self.put(&format!("{name}.weight"), rows, &[tokens, HIDDEN]);
    }

    fn put(&mut self, name: &str, values: Vec<f32>, shape: &[usize]) {
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        self.tensors.insert(name.to_owned(), tensor);
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// In [-0.5, 0.5).
    fn centred(&mut self) -> f32 {
        #[allow(clippy::cast_precision_loss)]
        let unit = (self.next() >> 40) as f32 / (1_u32 << 24) as f32;
        unit - 0.5
    }

    /// Nearly normal, of standard deviation `size`: a sum of twelve even values has a variance of one.
    fn normal(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count)
            .map(|_| size * (0..12).map(|_| self.centred()).sum::<f32>())
            .collect()
    }
}
