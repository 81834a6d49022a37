//! StreamingLLM: attention sinks and the most recent tokens.
//! <https://arxiv.org/abs/2309.17453>, section 3.2.
//!
//! When not to use it: whenever an answer needs something from the middle of the context. It is the
//! cheapest method and the quality floor of its family.

use super::{Budget, Rows};

pub(crate) fn keep(rows: Rows<'_>, budget: Budget) -> Vec<u32> {
    let total = budget.total.min(rows.kept);
    let sinks = rows.before(budget.sinks).min(total);
    let recent = total - sinks;
    (0..sinks)
        .chain(rows.kept - recent..rows.kept)
        .map(|row| row as u32)
        .collect()
}
