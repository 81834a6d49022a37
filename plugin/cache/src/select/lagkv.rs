//! LagKV: tokens that stand out against the partition that follows theirs stay.
//! <https://arxiv.org/abs/2504.04704>, section 3.
//!
//! Rows after the sinks form partitions of 128. A partition's keys, and values, are scaled channel by channel by
//! minimum and maximum of the partition after it; a row's score is the standard deviation over its channels, by softmax
//! within the partition, the mean of keys' and values'. What counts is the rank within the partition, so that each
//! loses the same share. The last whole partition and what follows have no reference and stay first of all; with fewer
//! than two partitions the most recent rows stay.
//!
//! When not to use it: with a context of a few hundred tokens, where it is no better than recency.

use std::borrow::Cow;

use super::vector::{dot, sum};
use super::{Method, Reads, Rows, Statistics};

/// Rows of a partition.
const LAG: usize = 128;

pub(super) struct LagKv;

impl Method for LagKv {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn reads(&self) -> Reads {
        Reads::KeysAndValues
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let first = rows.edges.from;
        let partitions = (rows.kept - first) / LAG;
        if partitions < 2 {
            return (0..rows.kept).map(|row| row as f32).collect();
        }
        let mut ranks = vec![1.0; rows.kept];
        for p in 0..partitions - 1 {
            let at = first + p * LAG;
            let k = scores(rows.k, rows.k_dim, at);
            let v = scores(rows.v, rows.v_dim, at);
            let score = |row: &usize| k[*row] + v[*row];
            let mut order: Vec<usize> = (0..LAG).collect();
            order.sort_by(|a, b| score(a).total_cmp(&score(b)));
            for (rank, row) in order.into_iter().enumerate() {
                ranks[at + row] = rank as f32 / LAG as f32;
            }
        }
        Cow::Owned(ranks)
    }
}

/// The scores of the partition that starts at row `at`.
fn scores(data: &[f32], dim: usize, at: usize) -> Vec<f32> {
    let (own, reference) = (
        &data[at * dim..][..LAG * dim],
        &data[(at + LAG) * dim..][..LAG * dim],
    );
    let mut min = vec![f32::INFINITY; dim];
    let mut max = vec![f32::NEG_INFINITY; dim];
    for row in reference.chunks_exact(dim) {
        for ((min, max), x) in min.iter_mut().zip(&mut max).zip(row) {
            *min = min.min(*x);
            *max = max.max(*x);
        }
    }
    // A channel that is constant over the reference says nothing.
    let inverse: Vec<f32> = min
        .iter()
        .zip(&max)
        .map(|(min, max)| if max > min { 1.0 / (max - min) } else { 0.0 })
        .collect();
    let mut scaled = vec![0.0; dim];
    let mut deviation = |row: &[f32]| {
        for (((to, x), min), f) in scaled.iter_mut().zip(row).zip(&min).zip(&inverse) {
            *to = (x - min) * f;
        }
        let mean = sum(&scaled) / dim as f32;
        scaled.iter_mut().for_each(|x| *x -= mean);
        (dot(&scaled, &scaled) / (dim as f32 - 1.0).max(1.0)).sqrt()
    };
    let deviations: Vec<f32> = own.chunks_exact(dim).map(&mut deviation).collect();
    let top = deviations.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f32 = deviations.iter().map(|x| (x - top).exp()).sum();
    deviations.iter().map(|x| (x - top).exp() / total).collect()
}
