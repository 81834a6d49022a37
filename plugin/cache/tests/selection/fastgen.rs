//! FastGen's policies, written from the paper but for punctuation: sets of rows, tried from the cheapest on.

use cinch_protocol::Select;

use crate::replay::Head;

/// The rows that a head keeps; a prompt has ended where it is profiled `anew`.
pub(crate) fn keep(head: &mut Head, select: &Select, seen: usize, budget: usize, anew: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..head.rows.len()).collect();
    order.sort_by(|a, b| {
        let by_score = head.rows[*b].score.total_cmp(&head.rows[*a].score);
        by_score.then(b.cmp(a))
    });
    let share = (30 * seen).div_ceil(100);
    let set = |policy: usize| -> Vec<usize> {
        let half = (budget - budget.min(select.sinks as usize)) / 2;
        let local = if policy == 2 { share.min(half) } else { 0 };
        let local = local.max(select.recent as usize);
        let special = |row: &usize| {
            let position = head.rows[*row].position as usize;
            position < select.sinks as usize || position + local >= seen
        };
        // By attention, those that must stay first.
        let (mut kept, others): (Vec<usize>, Vec<usize>) = order.iter().partition(|row| special(row));
        let frequent = &order[..share.min(order.len())];
        kept.extend(
            others
                .iter()
                .filter(|row| policy == 3 || (policy > 0 && frequent.contains(row))),
        );
        kept.truncate(budget);
        kept.sort_unstable();
        kept
    };
    let all: f64 = head.rows.iter().map(|row| row.score).sum();
    let recovered = |rows: &[usize]| rows.iter().map(|row| head.rows[*row].score).sum::<f64>() / all;
    let enough = select.recover.unwrap_or(0.95);
    let found = || {
        (0..3)
            .find(|policy| recovered(&set(*policy)) >= enough)
            .unwrap_or(3)
    };
    let policy = head.profile.filter(|_| !anew).unwrap_or_else(found);
    let kept = set(policy);
    head.profile = Some(policy);
    kept
}
