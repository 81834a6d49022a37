//! Keyformer: accumulated attention, with Gumbel noise and a temperature that rises as tokens are decoded.
//! <https://arxiv.org/abs/2403.09054>, section 3, algorithm 1.
//!
//! A query adds softmax((logits + noise) / τ) to the scores. That softmax is one of (ln weights + noise) / τ, since
//! both differ by a constant of the query. τ is 1 in a prompt and rises, in equal steps over 512 decoded tokens, to
//! `temperature` (2, as the paper has it). Each query draws its own noise for each key, which is a function of `seed`, layer,
//! head and both positions: the same request gets the same rows, a fork goes on alike, and nothing is stored.
//!
//! Of the budget, 30 % are recent rows, as in the authors' code.
//!
//! The paper adds up every query. Here a prompt's are a sample, 64 of each part of it, spread evenly, and of decoded
//! tokens every eighth counts, for eight: each needs its own softmax. The query heads that share a KV head count as one,
//! by their mean weight.
//!
//! When not to use it: where the same text must keep the same rows under every seed; and where H2O serves, which is
//! this without noise.

use std::borrow::Cow;

use cinch_protocol::Select;

use super::draw::{mix, of_head, uniform};
use super::{Method, Query, Rows, Statistics};

/// Decoded tokens after which the temperature rises no more. The paper takes the number of tokens to be generated,
/// which a server does not know.
const RISE: usize = 512;

pub(super) struct Keyformer {
    seed: u32,
    temperature: f32,
}

impl Keyformer {
    pub(super) fn new(select: &Select) -> Self {
        Self {
            seed: select.seed.unwrap_or(0),
            temperature: select.temperature.unwrap_or(2.0) as f32,
        }
    }
}

impl Method for Keyformer {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn recent_percent(&self) -> usize {
        30
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }

    fn credits(&self) -> bool {
        true
    }

    fn credit(&self, query: &Query<'_>, weights: &mut [f32]) {
        let risen = query.decoded.min(RISE) as f32 / RISE as f32;
        let inverse = 1.0 / (1.0 + (self.temperature - 1.0) * risen);
        let own = mix(of_head(self.seed, query.layer, query.kv) ^ query.position as u64);
        let mut sum = 0.0;
        for (row, weight) in weights.iter_mut().enumerate() {
            let position = query
                .positions
                .map_or(row as u64, |positions| u64::from(positions[row]));
            // e^gumbel is 1 over an exponential variate.
            let noisy = *weight / exponential(mix(own ^ position));
            *weight = if inverse == 1.0 {
                noisy
            } else {
                noisy.powf(inverse)
            };
            sum += *weight;
        }
        if sum > 0.0 {
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
    }
}

/// An exponential variate of mean 1: −ln of a uniform one that is neither 0 nor 1.
fn exponential(bits: u64) -> f32 {
    -uniform(bits).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// −ln of an exponential variate is standard Gumbel: mean 0.5772, variance π²/6.
    #[test]
    fn noise_is_standard_gumbel() {
        let n = 100_000;
        let noise: Vec<f64> = (0..n).map(|i| -f64::from(exponential(mix(i))).ln()).collect();
        let mean = noise.iter().sum::<f64>() / n as f64;
        let variance = noise.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.577).abs() < 0.02, "{mean}");
        assert!((variance - 1.645).abs() < 0.05, "{variance}");
    }
}
