//! What each paper ranks rows by.

use cinch_protocol::{Select, SelectMethod};

use crate::common::*;
use crate::replay::{Head, Row, wide};

pub(crate) fn of(head: &Head, select: &Select, seen: usize) -> Vec<f64> {
    match select.method {
        SelectMethod::Streaming | SelectMethod::Quest => vec![0.0; head.rows.len()],
        SelectMethod::H2o
        | SelectMethod::Tova
        | SelectMethod::Scissorhands
        | SelectMethod::Keyformer
        | SelectMethod::Fastgen
        | SelectMethod::Kvzip => head.rows.iter().map(|row| row.score).collect(),
        SelectMethod::Snapkv => pooled(head, select, seen),
        SelectMethod::ExpectedAttention => expected(head, select),
        SelectMethod::KeyNorm => head.rows.iter().map(|row| -norm(&row.k)).collect(),
        SelectMethod::Keydiff => unlike_the_mean(head),
        SelectMethod::Lagkv => lag(head, select),
    }
}

pub(crate) fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

pub(crate) fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// Mean over neighbours, with zeros before the first row and from the recent ones on.
fn pooled(head: &Head, select: &Select, seen: usize) -> Vec<f64> {
    let kernel = select.kernel.unwrap_or(5) as isize;
    let end = head.before((seen as u32).saturating_sub(select.recent)) as isize;
    let score = |row: isize| {
        if (0..end).contains(&row) {
            head.rows[row as usize].score
        } else {
            0.0
        }
    };
    (0..head.rows.len() as isize)
        .map(|row| (-kernel / 2..=kernel / 2).map(|d| score(row + d)).sum::<f64>() / kernel as f64)
        .collect()
}

fn unlike_the_mean(head: &Head) -> Vec<f64> {
    let unit = |row: &Row| row.k.iter().map(|x| x / norm(&row.k)).collect();
    let unit: Vec<Vec<f64>> = head.rows.iter().map(unit).collect();
    let mean: Vec<f64> = (0..head.model.k_dim)
        .map(|c| unit.iter().map(|k| k[c]).sum::<f64>() / unit.len() as f64)
        .collect();
    unit.iter().map(|k| -dot(k, &mean) / norm(&mean)).collect()
}

/// Equations 4 to 8 of the paper, with partitions of 128.
fn lag(head: &Head, select: &Select) -> Vec<f64> {
    let n = head.rows.len();
    let first = head.before(select.sinks);
    let whole = (n - first) / 128;
    if whole < 2 {
        return (0..n).map(|row| row as f64).collect();
    }
    let mut ranks = vec![1.0; n];
    let k: Vec<Vec<f64>> = head.rows.iter().map(|row| row.k.clone()).collect();
    let v: Vec<Vec<f64>> = head.rows.iter().map(|row| row.v.clone()).collect();
    for at in (0..whole - 1).map(|p| first + 128 * p) {
        let score = |x: &[Vec<f64>]| -> Vec<f64> {
            let (own, next) = (&x[at..at + 128], &x[at + 128..at + 256]);
            let channel = |c: usize| next.iter().map(move |row| row[c]);
            let exponential = own.iter().map(|row| {
                let scaled: Vec<f64> = (0..row.len())
                    .map(|c| {
                        let min = channel(c).fold(f64::INFINITY, f64::min);
                        let max = channel(c).fold(f64::NEG_INFINITY, f64::max);
                        (row[c] - min) / (max - min)
                    })
                    .collect();
                let mean = scaled.iter().sum::<f64>() / scaled.len() as f64;
                let squares: f64 = scaled.iter().map(|x| (x - mean).powi(2)).sum();
                (squares / (scaled.len() as f64 - 1.0)).sqrt().exp()
            });
            let exponential: Vec<f64> = exponential.collect();
            let sum: f64 = exponential.iter().sum();
            exponential.iter().map(|x| x / sum).collect()
        };
        let both: Vec<f64> = score(&k)
            .iter()
            .zip(score(&v))
            .map(|(a, b)| (a + b) / 2.0)
            .collect();
        for row in 0..128 {
            let below = both.iter().filter(|other| **other < both[row]).count();
            ranks[at + row] = below as f64 / 128.0;
        }
    }
    ranks
}

/// The mean over query heads of softmax(μ·k/√d + kᵀΣk/2d) over the rows behind the sinks, times the value's length.
fn expected(head: &Head, select: &Select) -> Vec<f64> {
    let total: f64 = head.queries.iter().map(|query| query.1).sum();
    if total < 16.0 {
        return head.rows.iter().map(|row| row.score).collect();
    }
    let d = head.model.k_dim;
    let (first, group) = (head.before(select.sinks), head.model.group);
    let mut ranks = vec![0.0; head.rows.len()];
    for q_head in head.kv * group..(head.kv + 1) * group {
        let queries: Vec<(Vec<f64>, f64)> = head
            .queries
            .iter()
            .map(|(token, weight)| {
                let q = vector(head.text, head.layer, What::Q, q_head, *token, d);
                (wide(&q), weight / total)
            })
            .collect();
        let mean: Vec<f64> = (0..d)
            .map(|c| queries.iter().map(|(q, w)| w * q[c]).sum())
            .collect();
        let covariance = |i: usize, j: usize| -> f64 {
            let product = |(q, w): &(Vec<f64>, f64)| w * (q[i] - mean[i]) * (q[j] - mean[j]);
            queries.iter().map(product).sum()
        };
        let covariance: Vec<Vec<f64>> = (0..d)
            .map(|i| (0..d).map(|j| covariance(i, j)).collect())
            .collect();
        let weight = |row: &Row| {
            let k = &row.k;
            let product: Vec<f64> = covariance.iter().map(|row| dot(row, k)).collect();
            (dot(&mean, k) / (d as f64).sqrt() + dot(&product, k) / (2.0 * d as f64)).exp()
        };
        let weights: Vec<f64> = head.rows[first..].iter().map(weight).collect();
        let sum: f64 = weights.iter().sum();
        for (rank, weight) in ranks[first..].iter_mut().zip(weights) {
            *rank += weight / sum / group as f64;
        }
    }
    ranks
        .iter()
        .zip(&head.rows)
        .map(|(rank, row)| rank * norm(&row.v))
        .collect()
}

/// Standard Gumbel noise of a query and a row.
pub(crate) fn gumbel(seed: u32, layer: usize, kv: usize, query: usize, position: u32) -> f64 {
    -(-uniform(seed, layer, kv, &[query as u64, u64::from(position)]).ln()).ln()
}

/// A uniform draw: by splitmix64 of seed, layer, head and then of positions.
pub(crate) fn uniform(seed: u32, layer: usize, kv: usize, positions: &[u64]) -> f64 {
    let split = |state: u64| {
        let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let head = split(u64::from(seed) ^ split(layer as u64) ^ split(u64::MAX - kv as u64));
    let bits = positions
        .iter()
        .fold(head, |state, position| split(state ^ position));
    ((bits >> 41) as f64 + 0.5) / f64::from(1 << 23)
}
