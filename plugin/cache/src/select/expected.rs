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
//! When not to use it: with a short `interval`, as every eviction multiplies all keys by each query head's covariance (at
//! 2,000 rows and every 64 tokens, 5 % of a small model's decode step); where few queries have been seen, as in the
//! first part of a prompt in chunks; or where head dimensions are large and caches small, since a covariance takes half
//! of its dimension squared.

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
        let n = rows.kept - first;
        let heads: Vec<Head<'_>> = moments.heads().map(|head| Head::new(head, rows.k_dim)).collect();
        let mut logits = vec![0.0; heads.len() * n];
        expected(
            &heads,
            &rows.k[first * rows.k_dim..],
            rows.k_dim,
            rows.scale,
            &mut logits,
        );
        let mut ranks = vec![0.0; rows.kept];
        for logits in logits.chunks_exact_mut(n.max(1)) {
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            logits.iter_mut().for_each(|logit| *logit = (*logit - top).exp());
            let inverse = 1.0 / logits.iter().sum::<f32>();
            let ranks = ranks[first..].iter_mut();
            ranks.zip(logits).for_each(|(rank, e)| *rank += *e * inverse);
        }
        for (rank, value) in ranks.iter_mut().zip(rows.v.chunks_exact(rows.v_dim)) {
            *rank *= norm(value);
        }
        Cow::Owned(ranks)
    }
}

/// A query head's statistics, laid out for products: Σ as one triangle, where what lies beside the diagonal counts
/// twice, in rows as wide as a tile of them needs.
struct Head<'a> {
    mean: &'a [f32],
    triangle: Vec<f32>,
}

impl<'a> Head<'a> {
    fn new(gaussian: Gaussian<'a>, dim: usize) -> Self {
        let width = dim.next_multiple_of(TILE);
        let mut triangle = vec![0.0; width * width];
        let mut rest = gaussian.covariance;
        for (i, to) in triangle.chunks_exact_mut(width).enumerate().take(dim) {
            let Some(from) = rest.split_off(..=i) else { break };
            to.iter_mut().zip(from).for_each(|(to, from)| *to = 2.0 * from);
            to[i] = from[i];
        }
        Self {
            mean: gaussian.mean,
            triangle,
        }
    }

    /// kᵀΣk of sixteen keys.
    fn quadratic(&self, keys: &[[f32; LANES]]) -> [f32; LANES] {
        let width = keys.len();
        let mut quadratic = [0.0; LANES];
        for i in (0..width).step_by(TILE) {
            let rows = std::array::from_fn(|r| &self.triangle[(i + r) * width..][..width]);
            let sums = products(rows, &keys[..i + TILE]);
            for (sums, own) in sums.iter().zip(&keys[i..]) {
                for lane in 0..LANES {
                    quadratic[lane] += sums[lane] * own[lane];
                }
            }
        }
        quadratic
    }
}

/// μ·k·s + ½ s² kᵀΣk of every head and key.
fn expected(heads: &[Head<'_>], keys: &[f32], dim: usize, scale: f32, logits: &mut [f32]) {
    let n = keys.len() / dim;
    let mut columns = vec![[0.0; LANES]; dim.next_multiple_of(TILE)];
    for (chunk, keys) in keys.chunks(LANES * dim).enumerate() {
        transpose(keys.chunks_exact(dim), &mut columns);
        for (head, logits) in heads.iter().zip(logits.chunks_exact_mut(n)) {
            let quadratic = head.quadratic(&columns);
            let keys = keys.chunks_exact(dim).zip(quadratic);
            for (logit, (key, quadratic)) in logits[chunk * LANES..].iter_mut().zip(keys) {
                *logit = scale * dot(head.mean, key) + 0.5 * scale * scale * quadratic;
            }
        }
    }
}
