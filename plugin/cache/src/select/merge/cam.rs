//! CaM's merging: the value of an evicted row is added to those of the rows that follow it, more likely the more attention
//! it received. Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference", ICML 2024, section 4.
//! <https://proceedings.mlr.press/v235/zhang24n.html>
//!
//! Each of the 32 kept rows that follow an evicted one, or as many as there are, gets an equal part of its value. Whether
//! it does is drawn once an evicted row: with the probability that is the attention which the row received, over the mean
//! of what those it would go to received, at most 1. Keys stay as they are, and so do scores.
//!
//! Attention is what the method's scores count, and a draw is a function of `seed`, layer, head and the row's position: a
//! request evicts and merges the same again. The paper evicts one token at a time, behind which all are kept; here a row's
//! value goes past those that are evicted with it.
//!
//! When not to use it: where much is evicted at once, as of a long prompt at a small budget. Values are added, not averaged,
//! and the few rows that are left take in all of what went before them.

use super::{Merged, evicted};
use crate::select::draw;

/// Rows that an evicted one is shared among, as in the authors' code.
const SHARED: usize = 32;

/// Where the draws of a head's rows come from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) seed: u32,
    pub(crate) layer: usize,
    pub(crate) kv: usize,
    /// Positions of the rows; `None`: row `i` is at position `i`.
    pub(crate) positions: Option<&'a [u32]>,
}

/// Merges values of rows that are not in `keep` (strictly increasing) into those of rows that are. `scores` has the attention
/// that each row received.
pub(crate) fn merge((v, dim): (&[f32], usize), scores: &[f32], keep: &[u32], source: &Source<'_>) -> Merged {
    let row = |row: usize| &v[row * dim..(row + 1) * dim];
    let head = draw::of_head(source.seed, source.layer, source.kv);
    // What each kept row becomes, once it is another.
    let mut values: Vec<Option<Vec<f32>>> = vec![None; keep.len()];
    let mut next = 0;
    for gone in evicted(v.len() / dim, keep) {
        while keep.get(next).is_some_and(|kept| (*kept as usize) < gone) {
            next += 1;
        }
        let to = next..keep.len().min(next + SHARED);
        if to.is_empty() {
            break;
        }
        let part = 1.0 / to.len() as f32;
        let mean = keep[to.clone()]
            .iter()
            .map(|kept| scores[*kept as usize])
            .sum::<f32>()
            * part;
        let position = source
            .positions
            .map_or(gone as u64, |positions| u64::from(positions[gone]));
        if draw::uniform(draw::mix(head ^ position)) * mean >= scores[gone] {
            continue;
        }
        for (value, kept) in values[to.clone()].iter_mut().zip(&keep[to]) {
            let value = value.get_or_insert_with(|| row(*kept as usize).to_vec());
            value
                .iter_mut()
                .zip(row(gone))
                .for_each(|(sum, x)| *sum += x * part);
        }
    }
    let mut merged = Merged::default();
    for (index, value) in values.into_iter().enumerate() {
        if let Some(value) = value {
            merged.rows.push(index);
            merged.v.extend(value);
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(seed: u32) -> Source<'static> {
        Source {
            seed,
            layer: 1,
            kv: 2,
            positions: None,
        }
    }

    /// A row of half the mean attention is merged in half of all draws; one of none never, one of the mean always.
    #[test]
    fn rows_are_merged_as_often_as_they_were_attended_to() {
        let often = |score: f32| {
            let merges = |seed: &u32| {
                !merge((&[1.0, 0.0, 0.0], 1), &[score, 0.5, 1.5], &[1, 2], &source(*seed))
                    .rows
                    .is_empty()
            };
            (0..10_000).filter(merges).count()
        };
        assert_eq!(often(0.0), 0);
        assert_eq!(often(1.0), 10_000);
        assert!(often(0.5).abs_diff(5_000) < 250, "{}", often(0.5));
    }

    #[test]
    fn values_go_to_those_that_follow_in_equal_parts() {
        let v: Vec<f32> = (0..40).map(|row| if row == 1 { 64.0 } else { 0.0 }).collect();
        let mut scores = [1.0; 40];
        scores[1] = 2.0;
        let keep: Vec<u32> = (0..40).filter(|row| *row != 1).collect();
        let merged = merge((&v, 1), &scores, &keep, &source(0));
        assert_eq!(merged.rows, (1..33).collect::<Vec<_>>());
        assert_eq!(merged.v, [2.0; 32]);
        assert_eq!(merged.k, None);
        assert!(
            merge((&v, 1), &scores, &[0], &source(0)).rows.is_empty(),
            "none follow"
        );
    }
}
