//! Key norm: keys of the smallest norm stay. <https://arxiv.org/abs/2406.11430>, section 3.
//!
//! A small norm goes with attention received, the paper observes; neither queries nor weights are looked at.
//!
//! The observation does not hold in the first layers. The paper leaves two of them uncompressed: `skip_layers`, 0 by
//! default, since what those keep comes on top of the budget.
//!
//! When not to use it: where quality matters.

use std::borrow::Cow;

use super::vector::dot;
use super::{Method, Reads, Rows, Statistics};

pub(super) struct KeyNorm;

impl Method for KeyNorm {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn reads(&self) -> Reads {
        Reads::Keys
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let keys = rows.k.chunks_exact(rows.k_dim);
        // Squares order as norms do.
        keys.map(|key| -dot(key, key)).collect()
    }
}
