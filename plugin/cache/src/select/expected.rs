//! Expected Attention: the weight that queries to come would give a key, by mean and covariance of those so far.
//! <https://arxiv.org/abs/2510.00636>, section 3.
//!
//! For Gaussian queries the expected weight of a key k is e^(μ·k·s + ½ s² kᵀΣk) but for a constant, s being the scale of
//! logits. It is normalized over the rows, averaged over the query heads that share a KV head, and multiplied by the
//! length of the value. Mean and covariance are those of the last 512 queries as they were rotated: the rotations of
//! the positions behind stand for those of the positions ahead, whose average the paper applies to statistics of
//! queries before rotation (the seam shows none). Queries of sinks do not count.
//!
//! A running request that is retuned to it has no statistics of its queries yet: until it has some, rows rank by the
//! attention they received.
//!
//! When not to use it: where few queries have been seen, as the first parts of a prompt in chunks; or where head
//! dimensions are large and caches small, since a covariance takes half of its dimension squared.

use std::borrow::Cow;

use super::moments::Gaussian;
use super::vector::{LANES, TILE, dot, norm, products, transpose};
use super::{Method, Reads, Rows, Statistics};

pub(super) struct Expected;

impl Method for Expected {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn reads(&self) -> Reads {
        Reads::KeysAndValues
    }

    fn moments(&self) -> bool {
        true
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let Some(moments) = rows.moments else {
            return Cow::Borrowed(rows.scores);
        };
        let first = rows.edges.from;
        let keys = &rows.k[first * rows.k_dim..];
        let mut ranks = vec![0.0; rows.kept];
        let mut logits = vec![0.0; rows.kept - first];
        for head in moments.heads() {
            expected(&head, keys, rows.k_dim, rows.scale, &mut logits);
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            logits.iter_mut().for_each(|logit| *logit = (*logit - top).exp());
            let inverse = 1.0 / logits.iter().sum::<f32>();
            let ranks = ranks[first..].iter_mut();
            ranks.zip(&logits).for_each(|(rank, e)| *rank += e * inverse);
        }
        for (rank, value) in ranks.iter_mut().zip(rows.v.chunks_exact(rows.v_dim)) {
            *rank *= norm(value);
        }
        Cow::Owned(ranks)
    }
}

/// μ·k·s + ½ s² kᵀΣk of every key.
fn expected(head: &Gaussian<'_>, keys: &[f32], dim: usize, scale: f32, logits: &mut [f32]) {
    // Σ as one triangle: what lies beside the diagonal counts twice. Rows as wide as a tile of them needs.
    let width = dim.next_multiple_of(TILE);
    let mut triangle = vec![0.0; width * width];
    let mut rest = head.covariance;
    for (i, to) in triangle.chunks_exact_mut(width).enumerate().take(dim) {
        let Some(from) = rest.split_off(..=i) else { break };
        to.iter_mut().zip(from).for_each(|(to, from)| *to = 2.0 * from);
        to[i] = from[i];
    }
    let mut columns = vec![[0.0; LANES]; width];
    for (keys, logits) in keys.chunks(LANES * dim).zip(logits.chunks_mut(LANES)) {
        transpose(keys.chunks_exact(dim), &mut columns);
        let mut quadratic = [0.0; LANES];
        for i in (0..width).step_by(TILE) {
            let rows = std::array::from_fn(|r| &triangle[(i + r) * width..][..width]);
            let sums = products(rows, &columns[..i + TILE]);
            for (sums, own) in sums.iter().zip(&columns[i..]) {
                for lane in 0..LANES {
                    quadratic[lane] += sums[lane] * own[lane];
                }
            }
        }
        for ((logit, key), quadratic) in logits.iter_mut().zip(keys.chunks_exact(dim)).zip(quadratic) {
            *logit = scale * dot(head.mean, key) + 0.5 * scale * scale * quadratic;
        }
    }
}
