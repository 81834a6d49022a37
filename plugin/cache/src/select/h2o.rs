//! H2O: heavy hitters by accumulated attention, and the most recent tokens.
//! <https://arxiv.org/abs/2306.14048>, section 4, algorithm 1.
//!
//! The score of a row is the attention weight it received, summed over all queries so far and over the
//! query heads that share its KV head. Ties go to the later position, so the answer is deterministic.
//!
//! When not to use it: where old tokens must not outweigh new ones by their age alone (the sum favours
//! rows that were there for more queries), or where prefill time matters most (it needs the weights of
//! every prompt query).

use super::{Budget, Rows};

pub(crate) fn keep(rows: Rows<'_>, budget: Budget) -> Vec<u32> {
    let total = budget.total.min(rows.kept);
    let sinks = rows.before(budget.sinks).min(total);
    let recent = rows
        .before(rows.seen.saturating_sub(budget.recent))
        .max(sinks)
        .max(rows.kept + sinks - total);
    let hitters = total - sinks - (rows.kept - recent);
    let mut middle: Vec<u32> = (sinks..recent).map(|row| row as u32).collect();
    let score = |row: &u32| rows.scores.get(*row as usize).copied().unwrap_or(0.0);
    if hitters < middle.len() {
        if hitters > 0 {
            middle.select_nth_unstable_by(hitters - 1, |a, b| score(b).total_cmp(&score(a)).then(b.cmp(a)));
        }
        middle.truncate(hitters);
        middle.sort_unstable();
    }
    let mut keep: Vec<u32> = Vec::with_capacity(total);
    keep.extend((0..sinks).map(|row| row as u32));
    keep.append(&mut middle);
    keep.extend((recent..rows.kept).map(|row| row as u32));
    keep
}
