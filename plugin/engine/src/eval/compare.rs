//! One step's distribution over the next token beside level 0's: the figures that everything else is made of.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Logits of one step, and the logarithm of the sum of their exponentials.
#[derive(Debug, Clone)]
pub(super) struct Distribution {
    logits: Vec<f32>,
    log_sum: f64,
    best: usize,
}

/// A forced token, as a policy and level 0 saw it coming. All in nats or probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Step {
    /// Minus the log-probability of the forced token.
    pub(super) nll: f64,
    /// Level 0's.
    pub(super) reference_nll: f64,
    /// Kullback-Leibler divergence from level 0's distribution to this one.
    pub(super) kl: f64,
    /// Change of the forced token's probability.
    pub(super) delta_p: f64,
    /// Whether the likeliest token is level 0's.
    pub(super) agrees: bool,
    /// Whether the likeliest token is the forced one.
    pub(super) right: bool,
    /// Whether level 0's is.
    pub(super) reference_right: bool,
}

impl Distribution {
    /// Of logits over the vocabulary.
    ///
    /// # Errors
    /// No logits, or some that are no numbers.
    pub(super) fn new(logits: Vec<f32>) -> Result<Self> {
        let (mut best, mut most) = (0, f32::NEG_INFINITY);
        let mut sound = !logits.is_empty();
        for (i, &logit) in logits.iter().enumerate() {
            sound &= !logit.is_nan();
            if logit > most {
                (best, most) = (i, logit);
            }
        }
        ensure!(sound && most.is_finite(), "the model's logits are not finite");
        let sum: f64 = logits.iter().map(|&x| f64::from(x - most).exp()).sum();
        Ok(Self {
            log_sum: f64::from(most) + sum.ln(),
            logits,
            best,
        })
    }

    /// The likeliest token; of several the first.
    pub(super) fn best(&self) -> usize {
        self.best
    }

    fn log_p(&self, token: usize) -> f64 {
        let logit = self.logits.get(token).copied().unwrap_or(f32::NEG_INFINITY);
        f64::from(logit) - self.log_sum
    }
}

/// `given` beside level 0's `reference`, of the same step, in which `forced` comes next.
///
/// # Errors
/// Distributions over different vocabularies.
pub(super) fn compare(reference: &Distribution, given: &Distribution, forced: u32) -> Result<Step> {
    let (wanted, found) = (reference.logits.len(), given.logits.len());
    ensure!(wanted == found, "expected {wanted} logits, given {found}");
    // The sum of p (log p - log q), its constant part taken out: the p add up to 1.
    let shift = given.log_sum - reference.log_sum;
    let pairs = reference.logits.iter().zip(&given.logits);
    let kl: f64 = pairs
        .filter(|(r, _)| r.is_finite())
        .map(|(&r, &g)| (f64::from(r) - reference.log_sum).exp() * (f64::from(r) - f64::from(g)))
        .sum();
    let token = forced as usize;
    let (log_p, reference_log_p) = (given.log_p(token), reference.log_p(token));
    Ok(Step {
        nll: -log_p,
        reference_nll: -reference_log_p,
        // Rounding can leave it a hair below zero, which it never is.
        kl: (kl + shift).max(0.0),
        delta_p: log_p.exp() - reference_log_p.exp(),
        agrees: given.best == reference.best,
        right: given.best == token,
        reference_right: reference.best == token,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(p: &[f64]) -> Distribution {
        // Any constant may be added to logits.
        Distribution::new(p.iter().map(|p| (p.ln() + 3.0) as f32).collect()).unwrap()
    }

    #[test]
    fn by_hand() {
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]);
        let step = compare(&of(&p), &of(&q), 1).unwrap();
        // 0.5 ln 2 + 0.25 ln 0.5 + 0.
        assert!((step.kl - 0.25 * 2.0_f64.ln()).abs() < 1e-6, "{step:?}");
        assert!((step.nll - 2.0_f64.ln()).abs() < 1e-6);
        assert!((step.reference_nll - 4.0_f64.ln()).abs() < 1e-6);
        assert!((step.delta_p - 0.25).abs() < 1e-6);
        assert!(!step.agrees && step.right && !step.reference_right);

        let same = compare(&of(&p), &of(&p), 0).unwrap();
        assert_eq!((same.kl, same.delta_p), (0.0, 0.0));
        assert!(same.agrees && same.right);
    }

    #[test]
    fn what_is_no_distribution_is_refused() {
        assert!(Distribution::new(Vec::new()).is_err());
        assert!(Distribution::new(vec![0.0, f32::NAN]).is_err());
        assert!(Distribution::new(vec![f32::NEG_INFINITY]).is_err());
        assert!(compare(&of(&[1.0]), &of(&[0.5, 0.5]), 0).is_err());
        // A token that level 0 cannot say has no part in it.
        let reference = Distribution::new(vec![1.0, f32::NEG_INFINITY]).unwrap();
        let given = Distribution::new(vec![1.0, 1.0]).unwrap();
        let step = compare(&reference, &given, 0).unwrap();
        assert!((step.kl - 2.0_f64.ln()).abs() < 1e-6, "{step:?}");
    }
}
