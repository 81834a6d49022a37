//! Which rows stay. A method is a pure function from what is known of the rows to the rows kept.
//! Invariants of all: sinks and the most recent tokens stay, the budget is met exactly, and the answer is
//! strictly increasing.

pub(crate) mod h2o;
pub(crate) mod streaming;

use cinch_protocol::SelectMethod;

/// What a method may look at. Rows are in order of position.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Each row's position; `None`: row `i` is at position `i`.
    pub(crate) positions: Option<&'a [u32]>,
    /// Number of rows.
    pub(crate) kept: usize,
    /// Tokens seen.
    pub(crate) seen: usize,
    /// Accumulated attention of each row; empty where the method does not need it.
    pub(crate) scores: &'a [f32],
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
pub(crate) fn keep(method: SelectMethod, rows: Rows<'_>, budget: Budget) -> Vec<u32> {
    match method {
        SelectMethod::Streaming => streaming::keep(rows, budget),
        SelectMethod::H2o => h2o::keep(rows, budget),
    }
}
