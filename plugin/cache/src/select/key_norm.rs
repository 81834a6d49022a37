//! Key norm: keys of the smallest norm stay. <https://arxiv.org/abs/2406.11430>, section 3.
//!
//! A small norm goes with attention received, the paper observes; neither queries nor weights are looked at.
//!
//! When not to use it: where quality matters. The paper leaves the first two layers uncompressed, as the observation
//! does not hold there; here all layers meet the budget, since a budget means what it says.

use std::borrow::Cow;

use super::{Method, Rows, Statistics};

pub(super) struct KeyNorm;

impl Method for KeyNorm {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn reads_rows(&self) -> bool {
        true
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let keys = rows.k.chunks_exact(rows.k_dim);
        // Squares order as norms do.
        keys.map(|key| -key.iter().map(|x| x * x).sum::<f32>()).collect()
    }
}
