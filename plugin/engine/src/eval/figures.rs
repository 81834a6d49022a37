//! From steps to figures, with how sure they are.
//!
//! Neighbouring tokens of a text are not independent, so what is drawn again are blocks of consecutive steps (Künsch,
//! Annals of Statistics 17, 1989), and a policy's step stays with level 0's of the same token.

use serde::{Deserialize, Serialize};

use super::compare::Step;
use super::random::Random;

/// Consecutive steps that are drawn together.
pub(super) const BLOCK: usize = 16;
/// How often all blocks are drawn.
pub(super) const RESAMPLES: usize = 1000;
/// What they are drawn with.
pub(super) const SEED: u64 = 20_260_101;
/// Of the resamples' values, the shares that the interval leaves out on either side: 95 % lie in it.
const TAIL: f64 = 0.025;

/// A figure, and between what 95 % of the resamples lie.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Estimate {
    /// Of all steps.
    pub(super) value: f64,
    /// Lower end of the interval.
    pub(super) low: f64,
    /// Upper end of the interval.
    pub(super) high: f64,
}

/// How a policy's answers differ from level 0's, over forced tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Quality {
    /// Forced tokens.
    pub(super) tokens: usize,
    /// Exponential of the mean negative log-likelihood.
    pub(super) perplexity: Estimate,
    /// Perplexity over level 0's on the same tokens.
    pub(super) perplexity_ratio: Estimate,
    /// Mean KL divergence, nats.
    pub(super) kl_mean: Estimate,
    /// Its 95th percentile over tokens.
    pub(super) kl_p95: Estimate,
    /// Its 99th percentile over tokens.
    pub(super) kl_p99: Estimate,
    /// Share of tokens whose likeliest successor is level 0's.
    pub(super) top1_agreement: Estimate,
    /// Root mean square of the change of the right token's probability.
    pub(super) rms_delta_p: Estimate,
}

/// The figures of the runs' steps, each run's in order.
pub(super) fn quality(runs: &[&[Step]]) -> Quality {
    let blocks: Vec<&[Step]> = runs.iter().flat_map(|run| run.chunks(BLOCK)).collect();
    let estimate = |figure: fn(&[Step]) -> f64| bootstrap(&blocks, figure);
    Quality {
        tokens: runs.iter().map(|run| run.len()).sum(),
        perplexity: estimate(|steps| mean(steps, |step| step.nll).exp()),
        perplexity_ratio: estimate(|steps| mean(steps, |step| step.nll - step.reference_nll).exp()),
        kl_mean: estimate(|steps| mean(steps, |step| step.kl)),
        kl_p95: estimate(|steps| percentile(steps, 95)),
        kl_p99: estimate(|steps| percentile(steps, 99)),
        top1_agreement: estimate(|steps| mean(steps, |step| f64::from(step.agrees))),
        rms_delta_p: estimate(|steps| mean(steps, |step| step.delta_p.powi(2)).sqrt()),
    }
}

/// The mean of independent values.
pub(super) fn mean_of(values: &[f64]) -> Estimate {
    let blocks: Vec<&[f64]> = values.chunks(1).collect();
    bootstrap(&blocks, |values| {
        values.iter().sum::<f64>() / values.len().max(1) as f64
    })
}

/// The mean of values of consecutive steps, each run's in order.
pub(super) fn mean_of_runs(runs: &[Vec<f64>]) -> Estimate {
    let blocks: Vec<&[f64]> = runs.iter().flat_map(|run| run.chunks(BLOCK)).collect();
    bootstrap(&blocks, |values| {
        values.iter().sum::<f64>() / values.len().max(1) as f64
    })
}

fn bootstrap<T: Copy>(blocks: &[&[T]], figure: fn(&[T]) -> f64) -> Estimate {
    let value = figure(&blocks.concat());
    let mut random = Random::new(SEED);
    let mut drawn = Vec::new();
    let mut values: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            drawn.clear();
            for _ in 0..blocks.len() {
                drawn.extend_from_slice(blocks[random.below(blocks.len())]);
            }
            figure(&drawn)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((RESAMPLES - 1) as f64 * share).round() as usize];
    Estimate {
        value,
        low: at(TAIL),
        high: at(1.0 - TAIL),
    }
}

fn mean(steps: &[Step], of: impl Fn(&Step) -> f64) -> f64 {
    if steps.is_empty() {
        return 0.0;
    }
    steps.iter().map(of).sum::<f64>() / steps.len() as f64
}

/// The least KL divergence that at least `percent` of the steps do not exceed (nearest rank).
fn percentile(steps: &[Step], percent: usize) -> f64 {
    let mut values: Vec<f64> = steps.iter().map(|step| step.kl).collect();
    let rank = (values.len() * percent).div_ceil(100).saturating_sub(1);
    if values.is_empty() {
        return 0.0;
    }
    *values.select_nth_unstable_by(rank, f64::total_cmp).1
}

/// Spearman's rank correlation; `None` under three pairs or where one side is all the same.
pub(super) fn spearman(pairs: &[(f64, f64)]) -> Option<f64> {
    let ranks = |of: fn(&(f64, f64)) -> f64| -> Vec<f64> {
        let values: Vec<f64> = pairs.iter().map(of).collect();
        let rank = |&x: &f64| {
            let below = values.iter().filter(|&&y| y < x).count() as f64;
            let same = values.iter().filter(|&&y| y == x).count() as f64;
            // Equal values share the mean of their ranks.
            below + (same - 1.0) / 2.0
        };
        values.iter().map(rank).collect()
    };
    let (a, b) = (ranks(|pair| pair.0), ranks(|pair| pair.1));
    let middle = (pairs.len().checked_sub(1)? as f64) / 2.0;
    let sum = |x: &[f64], y: &[f64]| -> f64 {
        let products = x.iter().zip(y).map(|(x, y)| (x - middle) * (y - middle));
        products.sum()
    };
    let spread = (sum(&a, &a) * sum(&b, &b)).sqrt();
    (pairs.len() > 2 && spread > 0.0).then(|| sum(&a, &b) / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(nll: f64, kl: f64) -> Step {
        Step {
            nll,
            reference_nll: 1.0,
            kl,
            delta_p: kl / 2.0,
            agrees: kl < 0.5,
            right: true,
            reference_right: true,
        }
    }

    #[test]
    fn figures_of_known_steps() {
        let steps: Vec<Step> = (1..=100)
            .map(|i| step(1.0 + f64::from(i) / 100.0, f64::from(i) / 100.0))
            .collect();
        let of = quality(&[&steps[..60], &steps[60..]]);
        let near = |given: Estimate, wanted: f64| {
            assert!((given.value - wanted).abs() < 1e-9, "{given:?} {wanted}");
            assert!(given.low <= given.value && given.value <= given.high, "{given:?}");
        };
        assert_eq!(of.tokens, 100);
        near(of.perplexity, 1.505_f64.exp());
        near(of.perplexity_ratio, 0.505_f64.exp());
        near(of.kl_mean, 0.505);
        near(of.kl_p95, 0.95);
        near(of.kl_p99, 0.99);
        near(of.top1_agreement, 0.49);
        near(of.rms_delta_p, (0.338_35_f64 / 4.0).sqrt());
        assert_eq!(of, quality(&[&steps[..60], &steps[60..]]), "a fixed seed");
        let kls = [&steps[..60], &steps[60..]].map(|run| run.iter().map(|step| step.kl).collect());
        assert_eq!(mean_of_runs(&kls), of.kl_mean, "the same blocks");
    }

    /// The interval of a mean of independent values is about what the normal distribution says.
    #[test]
    fn the_interval_is_as_wide_as_it_should_be() {
        let mut random = Random::new(7);
        let steps: Vec<Step> = (0..3200)
            .map(|_| step(1.0, random.below(1000) as f64 / 1000.0))
            .collect();
        let of = quality(&[&steps]).kl_mean;
        let wanted = 2.0 * 1.96 * (1.0 / 12.0_f64 / 3200.0).sqrt();
        let width = of.high - of.low;
        assert!((width / wanted - 1.0).abs() < 0.2, "{width} {wanted}");

        // Blocks that are alike inside say less than as many independent steps: the interval is wider.
        let alike: Vec<Step> = (0..200)
            .flat_map(|_| {
                let kl = random.below(1000) as f64 / 1000.0;
                [step(1.0, kl); BLOCK]
            })
            .collect();
        let of = quality(&[&alike]).kl_mean;
        assert!(of.high - of.low > 3.0 * wanted, "{of:?} {wanted}");
    }

    #[test]
    fn ranks_correlate() {
        let rising: Vec<(f64, f64)> = (0..9).map(|i| (f64::from(i), f64::from(i * i))).collect();
        assert!((spearman(&rising).unwrap() - 1.0).abs() < 1e-12);
        let falling: Vec<(f64, f64)> = rising.iter().map(|&(a, b)| (a, -b)).collect();
        assert!((spearman(&falling).unwrap() + 1.0).abs() < 1e-12);
        // Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
        let tied = [(1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (4.0, 9.0)];
        assert!((spearman(&tied).unwrap() - 4.5 / (4.5_f64 * 5.0).sqrt()).abs() < 1e-12);
        assert_eq!(spearman(&rising[..2]), None);
        assert_eq!(spearman(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]), None);
    }
}
