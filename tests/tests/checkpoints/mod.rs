//! Checkpoints of real architectures with random weights, small enough to be written and loaded in a moment: they
//! stand in for weights that are not at hand. The same architecture and settings make the same bytes everywhere.
//!
//! Every model has [`LAYERS`] layers, four query and two KV heads. The end-of-text token is never generated: the
//! row of the output that it belongs to is zero, so answers are as long as was asked for.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod config;
mod gguf;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};

pub(crate) const LAYERS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const HIDDEN: usize = 128;
const FEED_FORWARD: usize = 192;
const CONTEXT: usize = 4096;
const EPSILON: f64 = 1e-5;

/// What is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
    Gemma2,
    Gemma3,
    Llama,
    Mistral,
    Phi3,
    Qwen2,
    Qwen3,
    SmolLm3,
    Starcoder2,
}

use Architecture::{Gemma2, Gemma3, Llama, Mistral, Phi3, Qwen2, Qwen3, SmolLm3, Starcoder2};

impl Architecture {
    /// Values of a head; where the configuration has a field for it, not the hidden size by the query heads.
    pub(crate) fn head_dim(self) -> usize {
        match self {
            Gemma2 | Gemma3 | Qwen3 => 64,
            Llama | Mistral | Phi3 | Qwen2 | SmolLm3 | Starcoder2 => HIDDEN / HEADS,
        }
    }

    /// Gemma: embeddings scaled, norms before and after attention and MLP, that multiply by one more than their weights.
    fn is_gemma(self) -> bool {
        matches!(self, Gemma2 | Gemma3)
    }

    /// Whether the output is the embedding's own matrix.
    fn is_tied(self) -> bool {
        matches!(self, Gemma2 | Gemma3 | SmolLm3 | Starcoder2)
    }

    /// Whether layer `layer` attends to a window only.
    fn is_sliding(self, layer: usize) -> bool {
        match self {
            Gemma2 => layer.is_multiple_of(2),
            Gemma3 => !(layer + 1).is_multiple_of(config::GEMMA3_PATTERN),
            _ => false,
        }
    }
}

/// One checkpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Checkpoint {
    pub(crate) architecture: Architecture,
    /// Tokens that sliding layers attend to, for architectures that have such layers.
    pub(crate) window: usize,
    /// Whether the values of sliding layers are zero: what such a layer attends to then makes no difference.
    pub(crate) silent_windows: bool,
}

impl Checkpoint {
    pub(crate) fn new(architecture: Architecture) -> Self {
        Self {
            architecture,
            window: 64,
            silent_windows: false,
        }
    }

    /// Layers that attend to all tokens.
    pub(crate) fn global_layers(self) -> usize {
        (0..LAYERS)
            .filter(|layer| !self.architecture.is_sliding(*layer))
            .count()
    }

    /// Writes a folder as the Hugging Face hub has it; its path.
    pub(crate) fn folder(self, parent: &Path) -> PathBuf {
        let folder = parent.join(format!("{:?}", self.architecture).to_lowercase());
        std::fs::create_dir_all(&folder).unwrap();
        let json = |name: &str, content: &serde_json::Value| {
            std::fs::write(folder.join(name), content.to_string()).unwrap();
        };
        json("config.json", &config::config(self));
        json("tokenizer.json", &tokenizer::json());
        json("tokenizer_config.json", &tokenizer::config());
        let tensors = weights::tensors(self).into_iter().collect();
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
        folder
    }

    /// Writes a GGUF file; its path.
    pub(crate) fn gguf(self, parent: &Path) -> PathBuf {
        let file = parent.join(format!("{:?}.gguf", self.architecture).to_lowercase());
        gguf::write(self, &file);
        file
    }
}
