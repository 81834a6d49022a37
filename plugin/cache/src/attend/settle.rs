//! The second phase of a step: prefill rows are stored, scores grow, and layers whose turn it is evict,
//! pack, and measure on a sample what that did to attention.

use std::iter::{once, repeat_n};
use std::sync::MutexGuard;

use cinch_hooks::HookError;

use super::host::packed;
use super::{Step, Sums};
use crate::layer::{Compaction, Layer, OBSERVED_STEPS, compact};
use crate::observe::{Probe, WINDOW, relative_error};
use crate::plan::Plan;
use crate::select::Statistics;
use crate::sequence::Sequence;
use crate::shared::Core;
use crate::store::{Column, Head, Rebuilt, Targets};

/// What one row's compaction did.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    changed: bool,
    /// Rows evicted, mean over the layer's heads.
    evicted: f64,
    errors: Vec<f64>,
}

struct Task<'a> {
    row: usize,
    kv: usize,
    head: &'a mut Head,
    plan: &'a Plan,
    targets: Targets,
    seen: usize,
    sums: Option<&'a [f32]>,
    layer_scores: &'a [f32],
    what: Option<Compaction>,
    rebuilt: Rebuilt,
    keep: Option<Vec<u32>>,
    error: Option<f64>,
}

/// Stores, scores and compacts. `out` is phase one's, (batch, query heads, fresh, v_dim).
pub(crate) fn settle(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    sums: Vec<Sums>,
    out: &[f32],
) -> Result<Vec<Settled>, HookError> {
    let fresh = step.geometry.fresh;
    let mut whats = Vec::with_capacity(layers.len());
    for (layer, sums) in layers.iter_mut().zip(&sums) {
        let layer: &mut Layer = layer;
        if let Some(scores) = &mut layer.scores {
            scores.extend(repeat_n(0.0, fresh));
            if let Sums::Layer(sums) = sums {
                let mean = 1.0 / step.geometry.q_heads as f32;
                gather(layer.plan.statistics(), fresh, scores.as_mut_slice(), sums, mean);
            }
        }
        layer.since += fresh;
        let due = fresh > 1 || layer.pending;
        let evict = layer
            .plan
            .interval()
            .is_some_and(|interval| due || layer.since >= interval);
        let pack = due || layer.heads.iter().any(|head| head.pack_due(&layer.targets));
        if evict {
            layer.since = 0;
        }
        whats.push((evict || pack).then_some(Compaction { evict, pack }));
    }
    let mut tasks = Vec::new();
    for (row, ((layer, sums), what)) in layers.iter_mut().zip(&sums).zip(&whats).enumerate() {
        let layer: &mut Layer = layer;
        let (plan, targets, seen) = (&*layer.plan, layer.targets, layer.seen + fresh);
        let layer_scores = layer.scores.as_ref().map_or(&[][..], Column::as_slice);
        for (kv, head) in layer.heads.iter_mut().enumerate() {
            if fresh == 1
                && let Some(scores) = &mut head.scores
            {
                scores.extend(once(0.0));
            }
            let sums = match sums {
                Sums::None | Sums::Layer(_) => None,
                Sums::Heads(heads) => heads.get(kv).map(Vec::as_slice),
            };
            if fresh > 1 || sums.is_some() || what.is_some() {
                let what = *what;
                let (rebuilt, keep, error) = (Rebuilt::default(), None, None);
                tasks.push(Task {
                    row,
                    kv,
                    head,
                    plan,
                    targets,
                    seen,
                    sums,
                    layer_scores,
                    what,
                    rebuilt,
                    keep,
                    error,
                });
            }
        }
    }
    step.run_each(&mut tasks, |task| run(step, task, out))?;
    let mut settled: Vec<Settled> = whats.iter().map(|_| Settled::default()).collect();
    let mut keeps: Vec<Option<Vec<u32>>> = vec![None; whats.len()];
    let heads = step.geometry.shape.kv_heads as f64;
    for task in tasks {
        let row = &mut settled[task.row];
        row.changed |= task.rebuilt != Rebuilt::default();
        row.evicted += task.rebuilt.evicted as f64 / heads;
        row.errors.extend(task.error);
        if task.kv == 0 {
            keeps[task.row] = task.keep;
        }
    }
    for (((layer, keep), settled), what) in layers.iter_mut().zip(keeps).zip(&settled).zip(&whats) {
        layer.seen += fresh;
        layer.pending &= what.is_none();
        if settled.evicted > 0.0 {
            layer.evicted_at = layer.seen;
        }
        // Without per-head scores all heads keep the same rows.
        if let (Some(scores), Some(keep)) = (&mut layer.scores, keep) {
            scores.gather(&keep);
        }
    }
    Ok(settled)
}

/// Adds a step's sums to the scores that were gathered before it, or lets them take their place.
fn gather(statistics: Statistics, fresh: usize, scores: &mut [f32], sums: &[f32], factor: f32) {
    let factor = match statistics {
        // A decode step stands for those between it and the last that counted.
        Statistics::Sampled if fresh == 1 => OBSERVED_STEPS as f32 * factor,
        _ => factor,
    };
    let anew = match statistics {
        Statistics::Sampled | Statistics::Every => false,
        Statistics::Window => fresh > 1,
        Statistics::Last => true,
    };
    if anew {
        scores.fill(0.0);
    }
    for (score, sum) in scores.iter_mut().zip(sums) {
        *score += sum * factor;
    }
}

fn run(step: &Step<'_>, task: &mut Task<'_>, out: &[f32]) -> Result<(), HookError> {
    let fresh = step.geometry.fresh;
    if fresh > 1 {
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let k = packed(&step.k.rows(task.row, task.kv), &mut k);
        let v = packed(&step.v.rows(task.row, task.kv), &mut v);
        task.head.append(&task.targets, task.seen - fresh, k, v)?;
    }
    let statistics = task.plan.statistics();
    if let Some(scores) = &mut task.head.scores {
        if fresh > 1 {
            scores.extend(repeat_n(0.0, fresh));
        }
        if let Some(sums) = task.sums {
            gather(statistics, fresh, scores.as_mut_slice(), sums, 1.0);
        }
    }
    let Some(what) = task.what else {
        return Ok(());
    };
    (task.rebuilt, task.keep) = compact(
        task.head,
        task.plan,
        &task.targets,
        what,
        task.seen,
        task.layer_scores,
    )?;
    if let (Some(scores), true) = (
        &mut task.head.scores,
        what.evict && fresh == 1 && statistics == Statistics::Window,
    ) {
        // The next window begins.
        scores.as_mut_slice().fill(0.0);
    }
    if task.rebuilt != Rebuilt::default() && step.core.settings.error_sample.includes(step.layer, task.kv) {
        task.error = relative_error(step.kernels(), task.head, &step.heads, &probes(step, task, out))?;
    }
    Ok(())
}

/// The step's last queries and the outputs they had before the compaction.
fn probes<'a>(step: &Step<'_>, task: &Task<'_>, out: &'a [f32]) -> Vec<Probe<'a>> {
    let (geometry, group) = (step.geometry, step.geometry.group());
    let (fresh, v_dim) = (geometry.fresh, step.heads.v_dim);
    let heads = task.kv * group..(task.kv + 1) * group;
    (fresh - fresh.min(WINDOW)..fresh)
        .map(|token| Probe {
            q: heads
                .clone()
                .flat_map(|head| step.q.row(task.row, head, token))
                .copied()
                .collect(),
            exact: heads
                .clone()
                .map(|head| {
                    let at = ((task.row * geometry.q_heads + head) * fresh + token) * v_dim;
                    &out[at..at + v_dim]
                })
                .collect(),
            position: task.seen - fresh + token,
        })
        .collect()
}

/// Publishes what the step did, when no layer is locked any more.
pub(crate) fn report(core: &Core, sequences: &[&Sequence], settled: &[Settled]) {
    for (sequence, settled) in sequences.iter().zip(settled) {
        let Some(request) = sequence.request() else {
            continue;
        };
        request.note_running();
        if !settled.changed {
            continue;
        }
        request.note_errors(&settled.errors);
        let layers = sequence.shapes().len() as f64;
        request
            .counters
            .compressed(1, settled.evicted / layers, &settled.errors);
        if let Some(observer) = core.observer().filter(|_| !settled.errors.is_empty()) {
            settled
                .errors
                .iter()
                .for_each(|error| observer.attention_error(&request.class, *error));
        }
    }
}
