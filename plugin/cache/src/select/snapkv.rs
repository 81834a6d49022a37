//! SnapKV: what the last queries of the prompt attend to most, smoothed over neighbours.
//! <https://arxiv.org/abs/2404.14469>, sections 4.1 and 4.2.
//!
//! The observation window is the last 64 queries (`window`); the query heads that share a KV head are summed up. A
//! row's score is the mean over itself and its neighbours, five in all (`kernel`): those rows that are next to it in
//! the cache, zeros before the first and where the recent tokens begin. The paper compresses the prompt only; here the
//! window goes on sliding over decoded tokens.
//!
//! When not to use it: for a second, different question about the same prompt. What stays is what the prompt's end
//! asked for.

use std::borrow::Cow;

use cinch_protocol::Select;

use super::{Method, Rows, Statistics};

pub(super) struct SnapKv {
    window: usize,
    /// Neighbours on either side.
    side: usize,
}

impl SnapKv {
    pub(super) fn new(select: &Select) -> Self {
        Self {
            window: select.window.unwrap_or(64) as usize,
            side: select.kernel.unwrap_or(5) as usize / 2,
        }
    }
}

impl Method for SnapKv {
    fn statistics(&self) -> Statistics {
        Statistics::Window(self.window)
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let scores = &rows.scores[..rows.edges.to.min(rows.scores.len())];
        let pooled = (0..scores.len()).map(|row| {
            let window = &scores[row.saturating_sub(self.side)..scores.len().min(row + self.side + 1)];
            // The divisor is the same for all rows, so it is left out.
            window.iter().sum()
        });
        pooled.collect()
    }
}
