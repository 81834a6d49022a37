//! What a sequence measures of itself, readable at any time without waiting for a running step.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use cinch_hooks::LayerShape;

/// One layer's figures after its last step.
#[derive(Debug, Default)]
pub(crate) struct LayerGauge {
    pub(crate) seen: AtomicUsize,
    /// Tokens of a second reading, which are no part of the sequence.
    pub(crate) reread: AtomicUsize,
    /// Rows kept, summed over heads.
    pub(crate) kept: AtomicUsize,
    /// Rows of the fullest head.
    pub(crate) kept_max: AtomicUsize,
    pub(crate) bytes: AtomicUsize,
    /// Id of the plan this layer last compacted itself by.
    pub(crate) plan: AtomicU64,
}

/// A sequence's figures, a layer at a time.
#[derive(Debug)]
pub(crate) struct Gauges {
    pub(crate) layers: Box<[LayerGauge]>,
    shapes: Vec<LayerShape>,
}

/// Figures of one or more sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Measures {
    pub(crate) seen: usize,
    pub(crate) kept: f64,
    pub(crate) kept_max: usize,
    pub(crate) bytes: usize,
    pub(crate) uncompressed: usize,
}

impl Measures {
    pub(crate) fn add(&mut self, other: &Self) {
        self.seen += other.seen;
        self.kept += other.kept;
        self.kept_max = self.kept_max.max(other.kept_max);
        self.bytes += other.bytes;
        self.uncompressed += other.uncompressed;
    }
}

/// Bytes of one token's K and V of a layer in f16.
fn token_bytes(shape: &LayerShape) -> usize {
    shape.kv_heads * (shape.k_dim + shape.v_dim) * 2
}

impl Gauges {
    pub(crate) fn new(shapes: &[LayerShape]) -> Self {
        Self {
            layers: shapes.iter().map(|_| LayerGauge::default()).collect(),
            shapes: shapes.to_vec(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.bytes.load(Relaxed)).sum()
    }

    /// Tokens that every layer has processed: in the middle of a step the first layers are ahead.
    pub(crate) fn seen(&self) -> usize {
        self.layers
            .iter()
            .map(|layer| layer.seen.load(Relaxed))
            .min()
            .unwrap_or(0)
    }

    /// Whether every layer has compacted itself by plan `id`.
    pub(crate) fn applied(&self, id: u64) -> bool {
        self.layers.iter().all(|layer| layer.plan.load(Relaxed) == id)
    }

    pub(crate) fn measure(&self) -> Measures {
        let mut measures = Measures {
            seen: self.seen(),
            ..Measures::default()
        };
        let mut heads = 0;
        for (layer, shape) in self.layers.iter().zip(&self.shapes) {
            heads += shape.kv_heads;
            measures.kept += layer.kept.load(Relaxed) as f64;
            measures.kept_max = measures.kept_max.max(layer.kept_max.load(Relaxed));
            measures.bytes += layer.bytes.load(Relaxed);
            measures.uncompressed += layer.seen.load(Relaxed) * token_bytes(shape);
        }
        measures.kept /= heads.max(1) as f64;
        measures
    }
}
