//! Quest: everything stays, and a decoded token attends to the pages of keys that may give it the largest logits.
//! <https://arxiv.org/abs/2406.10774>, section 4, algorithm 1.
//!
//! Of each page of 16 rows the smallest and the largest value of every channel are kept. No key of the page can have a larger
//! product with the query than Σ max(q·min, q·max) over channels. The pages with the largest such bounds are attended to
//! until `budget` of the rows are. Prompts attend to everything, and so do the first layers (`skip_layers`, 2).
//!
//! The query heads that share a KV head attend to the same pages, and a page counts as what the head that it may matter to
//! most says: the largest of their bounds. A mean would drop a page that one of them looks for and the others do not.
//! Sinks, `recent` rows and what shares a page with them are always attended to, and count. Rows that are not attended to
//! receive no weight, so statistics that a later policy starts from know only of those that were.
//!
//! When not to use it: to save memory. Bounds come on top: two f32 a channel and page.

use std::borrow::Cow;
use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::vector::LANES;
use super::{Method, Rows, Statistics};
use crate::store::Head;

pub(super) struct Quest;

impl Method for Quest {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }

    fn per_head(&self) -> bool {
        false
    }

    fn evicts(&self) -> bool {
        false
    }
}

/// How much of a layer a decoded token attends to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attended {
    /// Share of the rows.
    pub(crate) share: f64,
    /// First positions that are always attended to.
    pub(crate) sinks: usize,
    /// Last positions likewise.
    pub(crate) recent: usize,
}

/// Rows to attend to: runs from a cut on, in order, that do not touch.
pub(crate) type Runs = SmallVec<[Range<usize>; 1]>;

/// The rows that the queries `q` (query heads × `k_dim`) attend to, after `seen` tokens. The head's pages have bounds.
pub(crate) fn choose(head: &Head, q: &[f32], seen: usize, attended: Attended) -> Runs {
    let kept = head.kept();
    // As in budgets of rows: 0.07 of 100 is 7.
    let total = (attended.share * kept as f64 - 1e-9).ceil() as usize;
    if total >= kept {
        return smallvec![0..kept];
    }
    let (first, last) = (
        head.rows_before(attended.sinks),
        head.rows_before(seen.saturating_sub(attended.recent)),
    );
    let mut pages: Vec<(Range<usize>, bool)> = Vec::new();
    let mut open: Vec<(f32, usize)> = Vec::new();
    let mut taken = 0;
    for page in head.pages() {
        let free = page.rows.start >= first && page.rows.end <= last;
        match page.bounds.filter(|_| free) {
            Some((min, max)) => open.push((bound(q, min, max), pages.len())),
            None => taken += page.rows.len(),
        }
        let always = !free || page.bounds.is_none();
        pages.push((page.rows, always));
    }
    // Of equals the later.
    open.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    for (_, index) in open {
        if taken >= total {
            break;
        }
        let (rows, chosen) = &mut pages[index];
        *chosen = true;
        taken += rows.len();
    }
    let mut runs = Runs::new();
    for (rows, _) in pages.into_iter().filter(|(_, chosen)| *chosen) {
        match runs.last_mut() {
            Some(run) if run.end == rows.start => run.end = rows.end,
            _ => runs.push(rows),
        }
    }
    runs
}

/// The largest product that one of the queries may have with a key between `min` and `max`.
fn bound(q: &[f32], min: &[f32], max: &[f32]) -> f32 {
    let sum = |q: &[f32]| {
        let mut sums = [0.0; LANES];
        for ((q, min), max) in q.chunks(LANES).zip(min.chunks(LANES)).zip(max.chunks(LANES)) {
            for (((sum, q), min), max) in sums.iter_mut().zip(q).zip(min).zip(max) {
                *sum += (q * min).max(q * max);
            }
        }
        sums.iter().sum::<f32>()
    };
    q.chunks_exact(min.len())
        .map(sum)
        .fold(f32::NEG_INFINITY, f32::max)
}

/// Where, among the attended rows of `runs`, the last cut at or before the one of number `at` is.
pub(crate) fn cut(head: &Head, runs: &[Range<usize>], at: usize) -> usize {
    let mut before = 0;
    for run in runs {
        if at < before + run.len() {
            let row = run.start + at - before;
            return before + head.cut(row).max(run.start) - run.start;
        }
        before += run.len();
    }
    before
}

/// The attended rows `from..to` of `runs`.
pub(crate) fn part(runs: &[Range<usize>], from: usize, to: usize) -> Runs {
    let mut before = 0;
    let mut part = Runs::new();
    for run in runs {
        let start = from.saturating_sub(before).min(run.len());
        let end = to.saturating_sub(before).min(run.len());
        if start < end {
            part.push(run.start + start..run.start + end);
        }
        before += run.len();
    }
    part
}

/// A value an attended row, as one a row of `rows` in all: 0 for those that are not in `runs`.
pub(crate) fn spread(values: Vec<f32>, runs: &[Range<usize>], rows: usize) -> Vec<f32> {
    if values.len() == rows {
        return values;
    }
    let mut all = vec![0.0; rows];
    let mut at = 0;
    for run in runs {
        all[run.clone()].copy_from_slice(&values[at..at + run.len()]);
        at += run.len();
    }
    all
}

/// Rows in all.
pub(crate) fn rows(runs: &[Range<usize>]) -> usize {
    runs.iter().map(ExactSizeIterator::len).sum()
}
