//! A look inside a sequence's stores, for tests and debugging: which positions each head kept, in which
//! blocks, with which scores, and as what values.

use cinch_hooks::{HookError, SequenceCache};
use cinch_kernels::Codec;

use crate::layer::Layer;
use crate::registry::lock;
use crate::sequence::Sequence;
use crate::store::{Column, Head};

/// One layer of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerView {
    /// Tokens processed.
    pub seen: usize,
    /// The shortest length a truncation can still reach.
    pub reachable_from: usize,
    /// Accumulated attention of each row as the mean over query heads; `None`: heads have their own.
    pub scores: Option<Vec<f32>>,
    /// One a KV head.
    pub heads: Vec<HeadView>,
    /// Bytes allocated.
    pub bytes: usize,
}

/// One KV head's rows.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadView {
    /// Position of each kept row, strictly increasing.
    pub positions: Vec<u32>,
    /// Accumulated attention of each row over the query heads that share this head.
    pub scores: Option<Vec<f32>>,
    /// Blocks in order.
    pub blocks: Vec<BlockView>,
    /// Bytes allocated.
    pub bytes: usize,
}

/// A run of rows in one codec pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockView {
    /// Codec of K.
    pub k: Codec,
    /// Codec of V.
    pub v: Codec,
    /// Whether keys are stored rotated.
    pub rotated: bool,
    /// Whether keys are stored as they were before their rotary embedding.
    pub before_rope: bool,
    /// Whether a tile's tokens share a channel's scale and zero.
    pub channels: bool,
    /// Whether rows keep fewer dimensions.
    pub projected: bool,
    /// What is held beside codes: `levels`, `error` or `salient`.
    pub beside: Option<&'static str>,
    /// Rows held.
    pub rows: usize,
    /// Rows allocated.
    pub capacity: usize,
    /// Bytes allocated, header included.
    pub bytes: usize,
}

/// What one KV head's rows come back as, of each position that it keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadRows {
    /// (kept, k_dim)
    pub k: Vec<f32>,
    /// (kept, v_dim)
    pub v: Vec<f32>,
}

pub(crate) fn rows(
    cache: &dyn SequenceCache,
    layer: usize,
    kv_head: usize,
) -> Result<Option<HeadRows>, HookError> {
    let sequence = cache.as_any().downcast_ref::<Sequence>();
    let Some(layer) = sequence.and_then(|sequence| sequence.layers.get(layer)) else {
        return Ok(None);
    };
    let layer = lock(layer);
    let unpacked = layer.heads.get(kv_head).map(Head::unpack).transpose()?;
    Ok(unpacked.map(|(k, v)| HeadRows { k, v }))
}

pub(crate) fn inspect(cache: &dyn SequenceCache) -> Option<Vec<LayerView>> {
    let sequence = cache.as_any().downcast_ref::<Sequence>()?;
    Some(sequence.layers.iter().map(|layer| view(&lock(layer))).collect())
}

fn view(layer: &Layer) -> LayerView {
    LayerView {
        seen: layer.seen,
        reachable_from: layer.evicted_at,
        scores: layer.scores.as_ref().map(|scores| scores.as_slice().to_vec()),
        heads: layer.heads.iter().map(head_view).collect(),
        bytes: layer.bytes(),
    }
}

fn head_view(head: &Head) -> HeadView {
    HeadView {
        positions: match head.positions() {
            Some(positions) => positions.to_vec(),
            None => (0..head.kept() as u32).collect(),
        },
        scores: head.scores.as_ref().map(Column::as_slice).map(<[f32]>::to_vec),
        blocks: head
            .blocks()
            .iter()
            .map(|block| BlockView {
                k: block.pair().k,
                v: block.pair().v,
                rotated: block.pair().rotated,
                before_rope: block.pair().before_rope,
                channels: block.pair().channels,
                projected: block.pair().projected,
                beside: block.pair().beside.name(),
                rows: block.rows(),
                capacity: block.capacity(),
                bytes: block.bytes(),
            })
            .collect(),
        bytes: head.bytes(),
    }
}
