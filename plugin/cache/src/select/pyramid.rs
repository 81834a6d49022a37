//! PyramidKV: more of the budget for the first layers, less for the last ones. <https://arxiv.org/abs/2406.02069>, the
//! budget allocation of section 4.
//!
//! What a budget leaves beside sinks and recent tokens falls linearly from the first layer to the last, which gets
//! 1/`beta` of the mean. Where the first would get more than there is, it gets all and the slope is less. Invariant:
//! over all layers it is what it would be if all had the same, to the row.
//!
//! When not to use it: where attention is not spread more widely in first layers than in last ones, as in small
//! models: measure it against an even budget first.

use super::Budget;
use crate::plan::Place;

/// The rows of one layer, where `budget.total` is the mean over layers of `seen` tokens.
pub(crate) fn rows(budget: Budget, place: Place, seen: usize, beta: u32) -> usize {
    let Place { layer, layers } = place;
    let protected = (budget.sinks + budget.recent).min(budget.total);
    let (mean, all) = ((budget.total - protected) as f64, (seen - protected) as f64);
    let first = (mean * 2.0 - mean / f64::from(beta)).min(all);
    if layers < 2 {
        return budget.total;
    }
    // Above the mean before the middle, as far below it behind: rounded alike, so that they cancel.
    let slope = 1.0 - 2.0 * layer.min(layers - 1 - layer) as f64 / (layers - 1) as f64;
    let apart = ((first - mean) * slope).round() as usize;
    if layer < layers / 2 {
        budget.total + apart
    } else {
        budget.total - apart
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_conserved_and_falls_by_layer() {
        for layers in [1, 2, 3, 30, 31] {
            for (total, seen, beta) in [
                (300, 1000, 20),
                (70, 71, 20),
                (512, 1000, 2),
                (999, 1000, 50),
                (20, 20, 20),
            ] {
                let budget = Budget {
                    total,
                    sinks: 4,
                    recent: 16,
                };
                let rows: Vec<usize> = (0..layers)
                    .map(|layer| rows(budget, Place { layer, layers }, seen, beta))
                    .collect();
                assert_eq!(rows.iter().sum::<usize>(), layers * total);
                assert!(rows.is_sorted_by(|a, b| a >= b), "{rows:?}");
                assert!(rows.iter().all(|rows| (20..=seen).contains(rows)), "{rows:?}");
            }
        }
        let budget = Budget {
            total: 420,
            sinks: 4,
            recent: 16,
        };
        let at = |layer| rows(budget, Place { layer, layers: 5 }, 2000, 20);
        // The mean of 400 becomes 780 … 20, in steps of 190.
        assert_eq!([0, 1, 2, 3, 4].map(at), [800, 610, 420, 230, 40]);
    }
}
