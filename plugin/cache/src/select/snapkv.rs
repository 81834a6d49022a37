//! SnapKV: what the last queries of the prompt attend to most, smoothed over neighbours.
//! <https://arxiv.org/abs/2404.14469>, sections 4.1 and 4.2.
//!
//! The observation window is the last 64 queries of a prefill (the query heads that share a KV head summed up); a
//! row's score is the mean over it and two rows on either side, zeros beyond the ends. The paper compresses the
//! prompt only. Here a decode goes on alike: its window is the last 32 queries before an eviction, on top of the
//! prompt's at the first one.
//!
//! When not to use it: for a second, different question about the same prompt. What stays is what the prompt's end
//! asked for.

use std::borrow::Cow;

use super::{Method, Rows, Statistics};

/// Neighbours on either side: a pooling kernel of five.
const SIDE: usize = 2;

pub(super) struct SnapKv;

impl Method for SnapKv {
    fn statistics(&self) -> Statistics {
        Statistics::Window
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let scores = rows.scores;
        let pooled = (0..scores.len()).map(|row| {
            let window = &scores[row.saturating_sub(SIDE)..scores.len().min(row + SIDE + 1)];
            // The divisor is the same for all rows, so it is left out.
            window.iter().sum()
        });
        pooled.collect()
    }
}
