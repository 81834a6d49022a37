//! Mean and covariance of the queries of one KV head's query heads, over the last 512 tokens of a prompt (of a decode, every
//! eighth counts).
//!
//! Queries come rotated by their positions, and are taken as they come. Invariant: older queries count as at most
//! 512 − n when n more come, so the statistics of up to 512 queries are exact, and fade from then on.
//!
//! Layout of the column: the number of queries, then of each query head its mean (`dim`) and the lower triangle of
//! its covariance, row by row.

use std::sync::Arc;

use crate::store::{Column, Ledger};

/// Queries that count.
const WINDOW: usize = 512;

/// Queries without which nothing is said.
const LEAST: f32 = 16.0;

/// Values that `group` query heads of this dimension take.
pub(crate) fn values(group: usize, dim: usize) -> usize {
    1 + group * head(dim)
}

fn head(dim: usize) -> usize {
    dim + dim * (dim + 1) / 2
}

/// The statistics of one query head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gaussian<'a> {
    pub(super) mean: &'a [f32],
    /// Lower triangle, row by row.
    pub(super) covariance: &'a [f32],
}

/// A KV head's statistics.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moments<'a> {
    dim: usize,
    heads: &'a [f32],
}

impl<'a> Moments<'a> {
    /// `None` while there were too few queries.
    pub(crate) fn read(column: &'a Column<f32>, dim: usize) -> Option<Self> {
        let (count, heads) = column.as_slice().split_first()?;
        (*count >= LEAST).then_some(Self { dim, heads })
    }

    pub(super) fn heads(&self) -> impl Iterator<Item = Gaussian<'a>> {
        self.heads.chunks_exact(head(self.dim)).map(|head| {
            let (mean, covariance) = head.split_at(self.dim);
            Gaussian { mean, covariance }
        })
    }
}

/// Room for the statistics of a KV head.
pub(crate) fn column(ledger: &Arc<Ledger>, group: usize, dim: usize) -> Column<f32> {
    Column::from_vec(ledger, vec![0.0; values(group, dim)])
}

/// Adds `count` tokens: `query(h, t)` is that of query head `h` and token `t`.
pub(crate) fn add<'q>(
    column: &mut Column<f32>,
    dim: usize,
    count: usize,
    query: impl Fn(usize, usize) -> &'q [f32],
) {
    let Some((old, heads)) = column.as_mut_slice().split_first_mut() else {
        return;
    };
    if count == 0 {
        return;
    }
    let n = count.min(WINDOW) as f32;
    let before = old.min((WINDOW as f32 - n).max(0.0));
    let total = before + n;
    let mut own_mean = vec![0.0; dim];
    let mut own = vec![0.0; dim * (dim + 1) / 2];
    let mut centered = vec![0.0; dim];
    for (h, head) in heads.chunks_exact_mut(head(dim)).enumerate() {
        let (mean, covariance) = head.split_at_mut(dim);
        let last = || (count.saturating_sub(WINDOW)..count).map(|token| query(h, token));
        own_mean.fill(0.0);
        for query in last() {
            own_mean.iter_mut().zip(query).for_each(|(sum, x)| *sum += x / n);
        }
        own.fill(0.0);
        for query in last() {
            centered
                .iter_mut()
                .zip(query)
                .zip(&own_mean)
                .for_each(|((c, x), mean)| *c = x - mean);
            outer(&mut own, &centered, 1.0);
        }
        // Two samples put together: the covariances by their sizes, and what lies between the means.
        covariance
            .iter_mut()
            .zip(&own)
            .for_each(|(c, sum)| *c = (before * *c + sum) / total);
        for ((d, own), mean) in centered.iter_mut().zip(&own_mean).zip(mean.iter_mut()) {
            *d = own - *mean;
            *mean += *d * n / total;
        }
        outer(covariance, &centered, before * n / (total * total));
    }
    *old = total;
}

/// Adds `factor · x xᵀ` to a lower triangle.
fn outer(triangle: &mut [f32], x: &[f32], factor: f32) {
    let mut rest = triangle;
    for (i, x_i) in x.iter().enumerate() {
        let Some(row) = rest.split_off_mut(..=i) else {
            return;
        };
        let x_i = factor * x_i;
        row.iter_mut().zip(x).for_each(|(sum, x_j)| *sum += x_i * x_j);
    }
}
