//! Which of the measured policies make a ladder: the Pareto frontier of (bytes, KL divergence), within the user's floors,
//! thinned to steps that are worth taking.

use super::options::Floors;

/// Most levels of a ladder, level 0 among them.
pub(super) const MOST: usize = 9;
/// Fewer than these are too coarse to control with.
pub(super) const FEWEST: usize = 5;
/// A step that saves less than this share of the bytes is left out while there are more than [`FEWEST`].
const WORTH: f64 = 0.08;

/// A measured policy, as far as the frontier is concerned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    /// Bytes of those of level 0.
    pub(super) bytes_ratio: f64,
    /// Mean KL divergence from level 0.
    pub(super) kl: f64,
    /// Perplexity over level 0's.
    pub(super) perplexity_ratio: f64,
    /// Share of likeliest tokens that are level 0's.
    pub(super) top1: f64,
}

impl Candidate {
    fn within(&self, floors: &Floors) -> bool {
        let under = |most: Option<f64>, given: f64| most.is_none_or(|most| given <= most);
        under(floors.max_kl, self.kl)
            && under(
                floors.max_perplexity_percent,
                (self.perplexity_ratio - 1.0) * 100.0,
            )
            && floors.min_top1.is_none_or(|least| self.top1 >= least)
    }
}

/// The candidates that no other beats in both bytes and divergence, most bytes first; of equal ones the first. Level 0 is
/// `candidates[0]`: what holds as much as it is no compression and never on the frontier beside it.
pub(super) fn pareto(candidates: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (1..candidates.len())
        .filter(|&i| candidates[i].bytes_ratio < 1.0)
        .collect();
    let key = |i: &usize| (candidates[*i].bytes_ratio, candidates[*i].kl);
    order.sort_by(|a, b| {
        let ((bytes, kl), (other_bytes, other_kl)) = (key(a), key(b));
        bytes.total_cmp(&other_bytes).then(kl.total_cmp(&other_kl))
    });
    let mut least = f64::INFINITY;
    // From the fewest bytes on, each must diverge less than all that hold fewer.
    order.retain(|&i| {
        let better = candidates[i].kl < least;
        least = least.min(candidates[i].kl);
        better
    });
    order.reverse();
    if !candidates.is_empty() {
        order.insert(0, 0);
    }
    order
}

/// The levels of a ladder, as indices into `candidates`, whose first is level 0.
pub(super) fn levels(candidates: &[Candidate], floors: &Floors) -> Vec<usize> {
    let mut levels = pareto(candidates);
    levels.retain(|&i| i == 0 || candidates[i].within(floors));
    // The step that saves least goes first. Level 0 and the hardest level stay: they are what was asked for.
    while levels.len() > FEWEST {
        let saves =
            |i: usize| 1.0 - candidates[levels[i]].bytes_ratio / candidates[levels[i - 1]].bytes_ratio;
        let inner = 1..levels.len() - 1;
        let Some(least) = inner
            .clone()
            .chain(std::iter::once(levels.len() - 1))
            .min_by(|&a, &b| saves(a).total_cmp(&saves(b)))
        else {
            break;
        };
        if saves(least) >= WORTH && levels.len() <= MOST {
            break;
        }
        // Of the last step's two ends the inner one goes.
        levels.remove(if least == levels.len() - 1 {
            least - 1
        } else {
            least
        });
    }
    levels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(pairs: &[(f64, f64)]) -> Vec<Candidate> {
        let candidate = |&(bytes_ratio, kl): &(f64, f64)| Candidate {
            bytes_ratio,
            kl,
            perplexity_ratio: 1.0 + kl,
            top1: 1.0 - kl,
        };
        pairs.iter().map(candidate).collect()
    }

    #[test]
    fn dominated_ones_are_not_on_the_frontier() {
        let all = candidates(&[
            (1.0, 0.0),
            (0.5, 0.01),
            (0.5, 0.02),
            (0.6, 0.02),
            (0.25, 0.1),
            (0.25, 0.1),
            (0.4, 0.1),
            (0.1, 0.5),
            (1.0, 0.0),
            (1.2, 0.0),
        ]);
        assert_eq!(pareto(&all), [0, 1, 4, 7]);
        assert_eq!(pareto(&[]), [0_usize; 0]);
        assert_eq!(pareto(&all[..1]), [0]);
    }

    #[test]
    fn floors_hold() {
        let all = candidates(&[(1.0, 0.0), (0.5, 0.01), (0.25, 0.1), (0.1, 0.5)]);
        let none = Floors::default();
        assert_eq!(levels(&all, &none), [0, 1, 2, 3]);
        let kl = Floors {
            max_kl: Some(0.1),
            ..none
        };
        assert_eq!(levels(&all, &kl), [0, 1, 2]);
        let perplexity = Floors {
            max_perplexity_percent: Some(5.0),
            ..none
        };
        assert_eq!(levels(&all, &perplexity), [0, 1]);
        let top1 = Floors {
            min_top1: Some(0.995),
            ..none
        };
        assert_eq!(levels(&all, &top1), [0]);
    }

    #[test]
    fn five_to_nine_levels_with_both_ends() {
        // Nineteen, each a tenth less than the one before.
        let many: Vec<(f64, f64)> = (0..19).map(|i| (0.9_f64.powi(i), f64::from(i) / 100.0)).collect();
        let chosen = levels(&candidates(&many), &Floors::default());
        assert_eq!(chosen.len(), MOST);
        assert_eq!((chosen[0], chosen[MOST - 1]), (0, 18));
        let gaps: Vec<usize> = chosen.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.iter().all(|gap| (1..=4).contains(gap)), "{gaps:?}");

        // Steps that save next to nothing are left out, but five levels stay.
        let close: Vec<(f64, f64)> = (0..8)
            .map(|i| (1.0 - f64::from(i) / 100.0, f64::from(i) / 100.0))
            .collect();
        assert_eq!(levels(&candidates(&close), &Floors::default()).len(), FEWEST);
        let mut last_two = close[..1].to_vec();
        last_two.extend([(0.8, 0.1), (0.6, 0.2), (0.4, 0.3), (0.2, 0.4), (0.199, 0.5)]);
        assert_eq!(
            levels(&candidates(&last_two), &Floors::default()),
            [0, 1, 2, 3, 5]
        );
    }
}
