//! KeyDiff: keys least like the mean key stay. <https://arxiv.org/abs/2504.15364>, section 3, algorithm 1.
//!
//! A row's score is minus the cosine between its key and the mean of all keys, each normalized first. No weights
//! are needed, so blocks of a prompt can be evicted from as they come.
//!
//! When not to use it: for text that repeats itself little, where an eviction by attention loses less.

use std::borrow::Cow;

use super::vector::{dot, norm};
use super::{Method, Reads, Rows, Statistics};

/// Below it, a vector has no direction.
const LEAST: f32 = 1e-12;

pub(super) struct KeyDiff;

impl Method for KeyDiff {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn reads(&self) -> Reads {
        Reads::Keys
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let keys = rows.k.chunks_exact(rows.k_dim);
        let mut anchor = vec![0.0; rows.k_dim];
        for key in keys.clone() {
            let inverse = 1.0 / norm(key).max(LEAST);
            anchor
                .iter_mut()
                .zip(key)
                .for_each(|(sum, x)| *sum += x * inverse);
        }
        // The anchor's own length is the same for all rows, so it is left out.
        keys.map(|key| -dot(key, &anchor) / norm(key).max(LEAST))
            .collect()
    }
}
