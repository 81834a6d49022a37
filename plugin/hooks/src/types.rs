//! What crosses the seam.

use candle_core::{DType, Device, Tensor};

/// One layer's cache geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// Key-value heads.
    pub kv_heads: usize,
    /// Head dimension of K (and Q).
    pub k_dim: usize,
    /// Head dimension of V.
    pub v_dim: usize,
}

/// What a plugin needs to open a sequence's cache.
#[derive(Debug, Clone)]
pub struct SequenceInfo {
    /// The engine's id of the request; several sequences share it when n > 1.
    pub request: usize,
    /// The engine's id of the sequence, unique in the process.
    pub sequence: usize,
    /// Which of the request's n choices this is, from 0.
    pub choice: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Positions that the model has.
    pub context: usize,
    /// One entry a managed layer, in the model's order. Layers with a sliding window are not among them: the engine
    /// keeps their rotating caches itself.
    pub layers: Vec<LayerShape>,
    /// The engine's activation dtype.
    pub dtype: DType,
    /// Where K and V arrive.
    pub device: Device,
}

/// One step's fresh projections, RoPE already applied to q and k. Any strides.
#[derive(Clone, Copy)]
pub struct Qkv<'a> {
    /// (batch, query heads, query tokens, k_dim)
    pub q: &'a Tensor,
    /// (batch, kv heads, query tokens, k_dim)
    pub k: &'a Tensor,
    /// (batch, kv heads, query tokens, v_dim)
    pub v: &'a Tensor,
}

/// How the model wants its attention. Always causal: query token `i` of a row sees the row's past and
/// fresh tokens `0..=i`. The engine refuses other masks before it comes here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttendParams {
    /// Multiplies q·k before the softmax.
    pub scale: f32,
    /// `tanh(score / cap) * cap` before the softmax.
    pub softcap: Option<f32>,
}

/// What a fork is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForkRole {
    /// Kept for reuse after its sequence ends; belongs to no request.
    Prefix,
    /// Goes on as the cache of a running sequence.
    Sequence,
}

/// A second reading of a prompt, in parts: each is a text, tokens of the prompt, and is forgotten after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtraPass {
    /// What comes before the prompt's first tokens, in a part of its own with them.
    pub first: &'static str,
    /// What comes before those of each further part.
    pub further: &'static str,
    /// Tokens that are repeated between `further` and a part's own, the last ones of the part before.
    pub overlap: usize,
    /// Tokens of a part at most, all of these counted.
    pub tokens: usize,
}
