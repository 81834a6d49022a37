//! What a step adds to the statistics that rows are ranked by.

use std::cell::RefCell;

use cinch_hooks::HookError;
use cinch_kernels::{Partial, Scratch, accumulate};

use super::{Step, raise};
use crate::error::kernel;
use crate::layer::{OBSERVED_QUERIES, OBSERVED_STEPS};
use crate::plan::{Place, Plan};
use crate::select::{Query, Statistics, moments};
use crate::store::Head;

/// Where a head's statistics come from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) plan: &'a Plan,
    pub(super) place: Place,
    pub(super) row: usize,
    pub(super) kv: usize,
    /// Tokens seen, those of this step included.
    pub(super) seen: usize,
    /// Tokens decoded since the last prefill.
    pub(super) decoded: usize,
    /// Attention weights of the step, summed over queries and query heads.
    pub(super) sums: Option<&'a [f32]>,
}

/// Adds a step's sums, so many times, to what is left of the scores that were gathered before it; or raises those to the step's
/// largest weights.
pub(super) fn gather(plan: &Plan, fresh: usize, scores: &mut [f32], sums: &[f32], times: f32) {
    if plan.largest() {
        return raise(scores, sums.iter().copied());
    }
    let statistics = plan.statistics();
    // A decode step stands for those between it and the last that counted.
    let times = match statistics {
        Statistics::Sampled if fresh == 1 => OBSERVED_STEPS as f32 * times,
        _ => times,
    };
    let left = statistics.left(fresh);
    for (score, sum) in scores.iter_mut().zip(sums) {
        *score = *score * left + sum * times;
    }
}

/// Adds a step to the statistics of a head that has its own; its fresh rows are stored, and have scores.
pub(super) fn observe(step: &Step<'_>, head: &mut Head, source: &Source<'_>) -> Result<(), HookError> {
    queries(step, head, source);
    let Some(mut scores) = head.scores.take() else {
        return Ok(());
    };
    let fresh = step.geometry.fresh;
    let to = scores.as_mut_slice();
    let done = match (source.plan.credits(), source.sums) {
        (true, _) if fresh > 1 => credit_prefill(step, head, source, to),
        (true, Some(sums)) => {
            credit_decode(step, head, source, sums, to);
            Ok(())
        }
        (false, Some(sums)) => {
            gather(source.plan, fresh, to, sums, 1.0);
            Ok(())
        }
        (_, None) => Ok(()),
    };
    head.scores = Some(scores);
    done
}

/// Mean and covariance of the queries, without those of sinks; of a decode, those of the steps that count.
fn queries(step: &Step<'_>, head: &mut Head, source: &Source<'_>) {
    let fresh = step.geometry.fresh;
    let Some(moments) = head
        .moments
        .as_mut()
        .filter(|_| fresh > 1 || source.sums.is_some())
    else {
        return;
    };
    let first = source.plan.sinks().saturating_sub(source.seen - fresh).min(fresh);
    let group = step.geometry.group();
    moments::add(
        moments,
        step.geometry.shape.k_dim,
        fresh - first,
        |head, token| step.q.row(source.row, source.kv * group + head, first + token),
    );
}

fn credit_decode(step: &Step<'_>, head: &Head, source: &Source<'_>, sums: &[f32], scores: &mut [f32]) {
    let group = step.geometry.group() as f32;
    let mut weights: Vec<f32> = sums.iter().map(|sum| sum / group).collect();
    credit(head, source, source.seen - 1, &mut weights);
    gather(source.plan, 1, scores, &weights, group);
}

fn credit(head: &Head, source: &Source<'_>, position: usize, weights: &mut [f32]) {
    let query = Query {
        positions: head.positions(),
        layer: source.place.layer,
        kv: source.kv,
        position,
        decoded: source.decoded,
    };
    if let Some(method) = source.plan.method() {
        method.credit(&query, weights);
    }
}

/// Attends once more with the queries that count, each by itself: a window's last ones, or a sample spread evenly,
/// which stands for all.
fn credit_prefill(
    step: &Step<'_>,
    head: &Head,
    source: &Source<'_>,
    scores: &mut [f32],
) -> Result<(), HookError> {
    thread_local! {
        static SCRATCH: RefCell<(Partial, Scratch, Vec<f32>, Vec<f32>)> = RefCell::default();
    }
    let (fresh, group) = (step.geometry.fresh, step.geometry.group());
    let statistics = source.plan.statistics();
    let count = match statistics {
        Statistics::Window(window) => window.min(fresh),
        Statistics::Sampled | Statistics::Every => OBSERVED_QUERIES.min(fresh),
    };
    let (spread, times) = match statistics {
        Statistics::Window(_) => (count, 1.0),
        Statistics::Sampled | Statistics::Every => (fresh, fresh as f32 / count as f32),
    };
    let left = statistics.left(count);
    scores.iter_mut().for_each(|score| *score *= left);
    SCRATCH.with_borrow_mut(|(partial, scratch, raw, weights)| {
        for i in 0..count {
            let token = fresh - spread + (i + 1) * spread / count - 1;
            let position = source.seen - fresh + token;
            let rows = head.rows_before(position + 1);
            raw.resize(group * rows, 0.0);
            let q: Vec<f32> = (source.kv * group..(source.kv + 1) * group)
                .flat_map(|head| step.q.row(source.row, head, token))
                .copied()
                .collect();
            head.attend(
                &step.heads,
                std::slice::from_ref(&(0..rows)),
                &q,
                partial,
                Some(raw),
                scratch,
            )?;
            let mean = |stat: &cinch_kernels::Stat| stat.factor(*stat) / group as f32;
            let factors: Vec<f32> = partial.stats().iter().map(mean).collect();
            weights.clear();
            weights.resize(rows, 0.0);
            accumulate(raw, &factors, weights).map_err(kernel)?;
            credit(head, source, position, weights);
            for (score, weight) in scores.iter_mut().zip(weights.iter()) {
                *score += weight * times * group as f32;
            }
        }
        Ok(())
    })
}
