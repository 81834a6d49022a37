//! The most likely token. Upstream gives every request a temperature, greedy ones too, whose top-k is 1: it takes the softmax
//! of the whole vocabulary, partitions it and draws from it, to find the one token that is left. Its probability needs only
//! the largest logit and one sum.

use std::sync::Mutex;

use candle_core::utils::barrier_pool;
use candle_core::{Result, Tensor};

/// Logits that are one piece of work.
const EACH: usize = 4096;

/// The most likely token, of equals the first, and log10 of its probability at a temperature. `None`: a logit is not finite,
/// which upstream has its own errors for.
pub(crate) fn most_likely(logits: &Tensor, temperature: Option<f64>) -> Result<Option<(u32, f32)>> {
    let logits: Vec<f32> = logits.to_vec1()?;
    let best = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (token, logit)| {
        if *logit > best.1 {
            (token, *logit)
        } else {
            best
        }
    });
    let (token, top) = best;
    let scale = temperature.map_or(1.0, f64::recip) as f32;
    let pieces: Vec<_> = logits.chunks(EACH).map(|logits| Mutex::new((logits, 0.0_f32))).collect();
    barrier_pool().execute_chunked(pieces.len(), |range| {
        for piece in &pieces[range] {
            if let Ok(mut piece) = piece.lock() {
                piece.1 = piece.0.iter().map(|logit| ((logit - top) * scale).exp()).sum();
            }
        }
    });
    let sum: f32 = pieces.into_iter().filter_map(|piece| piece.into_inner().ok()).map(|(_, sum)| sum).sum();
    // A NaN or an infinity among the logits makes the sum one; of none at all it is 0.
    Ok((sum.is_finite() && sum > 0.0).then(|| (token as u32, -sum.log10())))
}
