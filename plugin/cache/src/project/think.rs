//! `ThinK` (arXiv 2407.21018, section 3.2): of K, the channels whose part in the logits of the latest queries is largest,
//! ‖Q_c‖ · ‖K_c‖ over the observation window's queries of the head's group and the head's keys.
//!
//! When not to use it: where K can be of low rank: a channel is a direction that was not chosen.

use super::Made;

/// The `rank` channels with the highest scores as directions, in order of the channels.
pub(super) fn keys(rows: &[f32], dim: usize, q_squares: &[f64], rank: usize) -> Made {
    let mut squares = vec![0.0; dim];
    for row in rows.chunks_exact(dim) {
        for (sum, x) in squares.iter_mut().zip(row) {
            *sum += f64::from(*x).powi(2);
        }
    }
    let score = |c: usize| squares[c] * q_squares.get(c).copied().unwrap_or(1.0);
    let mut order: Vec<usize> = (0..dim).collect();
    order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
    order.truncate(rank);
    order.sort_unstable();
    let mut out = vec![0.0; rank * dim];
    for (i, c) in order.into_iter().enumerate() {
        out[i * dim + c] = 1.0;
    }
    Made {
        encode: out,
        decode: None,
    }
}
