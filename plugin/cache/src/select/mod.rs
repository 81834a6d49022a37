//! Which rows stay. A method is a pure function from what is known of the rows to the rows kept, one a file, and
//! one line of [`method`]. Invariants of all: sinks and the most recent tokens stay, the budget is met exactly, and
//! the answer is strictly increasing.

mod h2o;
mod key_norm;
mod keydiff;
mod lagkv;
mod snapkv;
mod streaming;
mod tova;

use std::borrow::Cow;

use cinch_protocol::SelectMethod;

/// The method of that name.
pub(crate) fn method(method: SelectMethod) -> &'static dyn Method {
    match method {
        SelectMethod::Streaming => &streaming::Streaming,
        SelectMethod::H2o => &h2o::H2o,
        SelectMethod::Tova => &tova::Tova,
        SelectMethod::Snapkv => &snapkv::SnapKv,
        SelectMethod::KeyNorm => &key_norm::KeyNorm,
        SelectMethod::Keydiff => &keydiff::KeyDiff,
        SelectMethod::Lagkv => &lagkv::LagKv,
    }
}

/// A way to rank rows. The lowest go first, of equals the earlier.
pub(crate) trait Method: Sync {
    /// The attention weights that [`Rows::scores`] are made of.
    fn statistics(&self) -> Statistics;

    /// Whether each head keeps rows of its own choice; else all heads of a layer keep the same.
    fn per_head(&self) -> bool {
        true
    }

    /// Whether it looks at keys and values.
    fn reads_rows(&self) -> bool {
        false
    }

    /// A value a row, the higher the rather it stays.
    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]>;
}

/// Which queries' attention weights are summed, row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Statistics {
    /// A sample of all, for the day that a running request is retuned to a method that needs them.
    Sampled,
    /// All.
    Every,
    /// The last ones of a prefill, and after it the last ones before an eviction.
    Window,
    /// The last one before an eviction.
    Last,
}

/// Queries of [`Statistics::Window`] in a decode, at most: those of a prefill are [`crate::layer::OBSERVED_QUERIES`].
pub(crate) const DECODE_WINDOW: usize = 32;

/// What a method may look at. Rows are in order of position.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Each row's position; `None`: row `i` is at position `i`.
    pub(crate) positions: Option<&'a [u32]>,
    /// Number of rows.
    pub(crate) kept: usize,
    /// Tokens seen.
    pub(crate) seen: usize,
    /// First positions that stay.
    pub(crate) sinks: usize,
    /// Attention weights that each row received.
    pub(crate) scores: &'a [f32],
    /// kept × `k_dim`; empty where the method does not read rows.
    pub(crate) k: &'a [f32],
    pub(crate) k_dim: usize,
    /// kept × `v_dim`, likewise.
    pub(crate) v: &'a [f32],
    pub(crate) v_dim: usize,
}

impl Rows<'_> {
    /// How many rows lie before `position`.
    pub(crate) fn before(&self, position: usize) -> usize {
        match self.positions {
            None => position.min(self.kept),
            Some(positions) => positions.partition_point(|p| (*p as usize) < position),
        }
    }
}

/// What a method must leave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Rows to keep in all.
    pub(crate) total: usize,
    /// First positions that stay.
    pub(crate) sinks: usize,
    /// Last positions that stay.
    pub(crate) recent: usize,
}

/// Rows kept by `method`, strictly increasing; `min(total, kept)` of them.
pub(crate) fn keep(method: &dyn Method, rows: &Rows<'_>, budget: Budget) -> Vec<u32> {
    let total = budget.total.min(rows.kept);
    let sinks = rows.before(budget.sinks).min(total);
    let recent = rows
        .before(rows.seen.saturating_sub(budget.recent))
        .max(sinks)
        .max(rows.kept + sinks - total);
    let chosen = total - sinks - (rows.kept - recent);
    let mut middle: Vec<u32> = (sinks..recent).map(|row| row as u32).collect();
    if chosen < middle.len() {
        if chosen > 0 {
            let ranks = method.rank(rows);
            let rank = |row: &u32| ranks.get(*row as usize).copied().unwrap_or(0.0);
            middle.select_nth_unstable_by(chosen - 1, |a, b| rank(b).total_cmp(&rank(a)).then(b.cmp(a)));
        }
        middle.truncate(chosen);
        middle.sort_unstable();
    }
    let mut keep: Vec<u32> = Vec::with_capacity(total);
    keep.extend((0..sinks).map(|row| row as u32));
    keep.append(&mut middle);
    keep.extend((recent..rows.kept).map(|row| row as u32));
    keep
}
