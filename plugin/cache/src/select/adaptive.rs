//! Ada-KV: a layer's budget goes to the heads whose rows score highest. <https://arxiv.org/abs/2407.11550>,
//! algorithm 1 and the safeguard of its integrations.
//!
//! Of all rows of a layer that may go, those with the highest scores stay, whatever head they are of; but each head
//! keeps at least `floor` of what it would have if all had the same. Invariant: the layer's total is what it would
//! be then.
//!
//! When not to use it: where memory must be the same in every head. And with methods whose scores are not on one
//! scale in all heads (norms of keys): for those a policy that asks for it is refused.

use super::Edges;

/// A head's ranked rows.
pub(crate) struct Candidate<'a> {
    pub(crate) ranks: &'a [f32],
    pub(crate) edges: Edges,
    pub(crate) kept: usize,
}

/// Rows that stay of each head, where `total` is the mean over heads.
pub(crate) fn share(heads: &[Candidate<'_>], total: usize, floor: f64) -> Vec<usize> {
    let least = (total as f64 * floor) as usize;
    let mut shares = Vec::with_capacity(heads.len());
    // What is left to be given, and the rows that compete for it.
    let mut left = heads.len() * total;
    let mut pool: Vec<(f32, usize, u32)> = Vec::new();
    for (index, head) in heads.iter().enumerate() {
        let Edges { from, to } = head.edges;
        let protected = head.kept - (to - from);
        let safe = least.saturating_sub(protected).min(to - from);
        let rank = |row: &u32| head.ranks.get(*row as usize).copied().unwrap_or(0.0);
        let mut rows: Vec<u32> = (from..to).map(|row| row as u32).collect();
        if safe > 0 {
            rows.select_nth_unstable_by(safe - 1, |a, b| rank(b).total_cmp(&rank(a)).then(b.cmp(a)));
        }
        pool.extend(rows[safe..].iter().map(|row| (rank(row), index, *row)));
        left = left.saturating_sub(protected + safe);
        shares.push(protected + safe);
    }
    if left < pool.len() && left > 0 {
        pool.select_nth_unstable_by(left - 1, |a, b| {
            let by_rank = b.0.total_cmp(&a.0);
            by_rank.then(b.2.cmp(&a.2)).then(a.1.cmp(&b.1))
        });
    }
    for (_, index, _) in pool.iter().take(left) {
        shares[*index] += 1;
    }
    shares
}
