//! FastGen: each head keeps no more than what its attention to the prompt asks for. <https://arxiv.org/abs/2310.01801>,
//! section 3, algorithms 1 and 2; both shares are 30 % as in section 5.1.
//!
//! At the end of a prompt each head takes the first of these policies whose rows got at least `recover` (0.95) of its
//! attention: special tokens; those and the 30 % of the tokens with most attention; those and the 30 % most recent ones;
//! everything. It stays with that policy while tokens are decoded. The policy's `budget` bounds all of them: a head keeps
//! fewer rows where fewer do, and never more.
//!
//! What differs from the paper: special tokens are the policy's sinks and `recent` tokens, and there is no policy of
//! punctuation, as the cache knows no token ids. Attention is that of the prompt's last 64 queries, summed over those that
//! share a KV head, and later of the last ones before each eviction; the paper profiles every query. Where the budget has
//! no room for two times 30 %, recent tokens get half of it. Both are shares of the tokens seen; the paper's recent ones are
//! a share of the prompt, and do not grow with the answer. "Everything" is the budget. Before its prompt is whole, and
//! where no query has counted yet, a head keeps the budget.
//!
//! When not to use it: where a second, different question about the same prompt follows: a head that attended to nothing
//! but special tokens at the end of the prompt has nothing else any more.

use std::borrow::Cow;

use cinch_protocol::Select;

use super::{Budget, Edges, Method, Rows, Statistics};

/// Queries that a prompt is profiled by.
const WINDOW: usize = 64;

/// Percent of the tokens that count as frequent, and as local: r_f and r_l of section 5.1.
const PERCENT: usize = 30;

/// What a head was found to keep, from the cheapest to the dearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Special,
    Frequent,
    Local,
    Full,
}

pub(super) struct FastGen {
    recover: f64,
}

impl FastGen {
    pub(super) fn new(select: &Select) -> Self {
        Self {
            recover: select.recover.unwrap_or(0.95),
        }
    }

    /// The cheapest policy that recovers enough.
    fn profile(&self, budget: Budget, rows: &Rows<'_>) -> Profile {
        let sum = |rows: &[f32]| rows.iter().map(|score| f64::from(*score)).sum::<f64>();
        let all = sum(rows.scores);
        let frequent = frequent(rows);
        let recovers = |profile: &Profile| {
            let own = narrowed(*profile, budget, rows, &frequent);
            let Edges { from, to } = own.edges(rows.kept, rows.seen, |position| rows.before(position));
            let protected = sum(&rows.scores[..from]) + sum(&rows.scores[to..]);
            let chosen = own.total.min(rows.kept) - from - (rows.kept - to);
            let mut middle = rows.scores[from..to].to_vec();
            middle.sort_unstable_by(|a, b| b.total_cmp(a));
            protected + sum(&middle[..chosen]) >= self.recover * all
        };
        if all <= 0.0 {
            return Profile::Full;
        }
        [Profile::Special, Profile::Frequent, Profile::Local]
            .into_iter()
            .find(recovers)
            .unwrap_or(Profile::Full)
    }
}

impl Method for FastGen {
    fn statistics(&self) -> Statistics {
        Statistics::Window(WINDOW)
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }

    fn profiles(&self) -> bool {
        true
    }

    fn narrow(&self, budget: Budget, rows: &Rows<'_>, profile: &mut Option<Profile>) -> Budget {
        let profile = *profile.get_or_insert_with(|| self.profile(budget, rows));
        narrowed(profile, budget, rows, &frequent(rows))
    }
}

/// What a policy leaves of the budget.
fn narrowed(profile: Profile, budget: Budget, rows: &Rows<'_>, frequent: &[bool]) -> Budget {
    if profile == Profile::Full {
        return budget;
    }
    let room = budget.total.saturating_sub(budget.sinks);
    let local = (rows.seen * PERCENT).div_ceil(100).min(room / 2);
    let recent = match profile {
        Profile::Local => budget.recent.max(local),
        _ => budget.recent,
    };
    let from = rows.before(budget.sinks);
    let to = rows.before(rows.seen.saturating_sub(recent)).max(from);
    let others = match profile {
        Profile::Special => 0,
        _ => frequent[from..to].iter().filter(|frequent| **frequent).count(),
    };
    Budget {
        total: budget.total.min(from + others + rows.kept - to),
        recent,
        ..budget
    }
}

/// Which rows are among those with most attention, of equals the later.
fn frequent(rows: &Rows<'_>) -> Vec<bool> {
    let count = (rows.seen * PERCENT).div_ceil(100).min(rows.kept);
    let mut order: Vec<usize> = (0..rows.kept).collect();
    if count > 0 && count < rows.kept {
        order.select_nth_unstable_by(count - 1, |a, b| {
            rows.scores[*b].total_cmp(&rows.scores[*a]).then(b.cmp(a))
        });
    }
    let mut frequent = vec![false; rows.kept];
    order[..count].iter().for_each(|row| frequent[*row] = true);
    frequent
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a head of 100 tokens keeps, that gives these rows so much attention and the others next to none.
    fn kept(attention: &[(usize, f32)], total: usize) -> (Profile, usize) {
        let mut scores = [1e-4; 100];
        attention.iter().for_each(|(row, score)| scores[*row] = *score);
        let budget = Budget {
            total,
            sinks: 4,
            recent: 16,
        };
        let rows = Rows {
            kept: 100,
            seen: 100,
            positions: None,
            edges: budget.edges(100, 100, |position| position),
            scores: &scores,
            k: &[],
            k_dim: 1,
            v: &[],
            v_dim: 1,
            moments: None,
            scale: 1.0,
        };
        let mut profile = None;
        let total = FastGen { recover: 0.9 }.narrow(budget, &rows, &mut profile).total;
        (profile.unwrap(), total)
    }

    #[test]
    fn the_cheapest_policy_that_recovers_enough() {
        assert_eq!(kept(&[(0, 1.0), (99, 1.0)], 100), (Profile::Special, 20));
        assert_eq!(
            kept(&[(0, 1.0), (40, 1.0), (50, 1.0)], 100),
            (Profile::Frequent, 33)
        );
        // Thirty of them are frequent, and fourteen more local.
        let spread: Vec<(usize, f32)> = (40..84).map(|row| (row, 1.0 + (84 - row) as f32)).collect();
        assert_eq!(kept(&spread, 100), (Profile::Local, 64));
        let spread: Vec<(usize, f32)> = (0..100).map(|row| (row, 1.0)).collect();
        assert_eq!(kept(&spread, 100), (Profile::Full, 100));
        assert_eq!(kept(&spread, 50), (Profile::Full, 50), "no more than the budget");
        assert_eq!(kept(&[(0, 1.0)], 20), (Profile::Special, 20));
    }
}
