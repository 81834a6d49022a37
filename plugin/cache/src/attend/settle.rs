//! The second phase of a step: prefill rows are stored, scores grow, and layers whose turn it is evict,
//! pack, and measure on a sample what that did to attention.

use std::iter::repeat_n;
use std::sync::MutexGuard;

use cinch_hooks::HookError;

use super::host::packed;
use super::score::{Source, gather, observe};
use super::{Step, Sums};
use crate::evict::{self, Context, Ranked, compact, rank};
use crate::layer::{Compaction, Layer, OBSERVED_QUERIES};
use crate::observe::{Held, HeldQuery, Probe, WINDOW, relative_error};
use crate::project::Queries;
use crate::sequence::Sequence;
use crate::shared::Core;
use crate::store::{Column, Head, Rebuilt, Targets};

/// What one row's compaction did.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub(crate) changed: bool,
    /// Whether `errors` are taken of it, see [`Layer::measures`].
    pub(super) measures: bool,
    /// Rows evicted, mean over the layer's heads.
    pub(crate) evicted: f64,
    pub(crate) errors: Vec<f64>,
}

struct Task<'a> {
    head: &'a mut Head,
    targets: Targets,
    source: Source<'a>,
    context: Context<'a>,
    what: Option<Compaction>,
    ranked: Option<Ranked>,
    rebuilt: Rebuilt,
    keep: Option<Vec<u32>>,
    measures: bool,
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
                gather(&layer.plan, fresh, scores.as_mut_slice(), sums, mean);
            }
        }
        if layer.reread.is_some() {
            whats.push(None);
            continue;
        }
        layer.since += fresh;
        layer.decoded = if fresh == 1 { layer.decoded + 1 } else { 0 };
        let due = fresh > 1 || layer.pending;
        let evict = layer
            .plan
            .interval()
            .is_some_and(|interval| !layer.held && (due || layer.since >= interval));
        let pack = due || layer.heads.iter().any(|head| head.pack_due(&layer.targets));
        if evict {
            layer.since = 0;
        }
        whats.push((evict || pack).then_some(Compaction { evict, pack }));
    }
    let measures = layers.iter().map(|layer| layer.measures(fresh));
    let mut settled: Vec<Settled> = measures
        .map(|measures| Settled {
            measures,
            ..Settled::default()
        })
        .collect();
    let mut tasks = Vec::new();
    for (row, ((layer, sums), what)) in layers.iter_mut().zip(&sums).zip(&whats).enumerate() {
        let layer: &mut Layer = layer;
        let context = Context {
            place: layer.place,
            kv: 0,
            seen: layer.seen + fresh,
            prompt: layer.prompt,
            won: layer.won,
            scale: step.heads.scale,
            layer_scores: layer.scores.as_ref().map_or(&[], Column::as_slice),
            over: false,
            prefilled: fresh > 1 && layer.seen + fresh >= layer.prompt,
        };
        let stored = if fresh > 1 { fresh } else { 0 };
        let budget = layer
            .plan
            .budget(layer.place, context.seen, context.prompt, layer.won);
        let heads = layer.heads.len();
        let kept: usize = layer.heads.iter().map(|head| head.kept() + stored).sum();
        for (kv, head) in layer.heads.iter_mut().enumerate() {
            let context = Context {
                kv,
                over: evict::over(&layer.plan, budget, heads, kept, head.kept() + stored),
                ..context
            };
            if let Some(scores) = &mut head.scores {
                scores.extend(repeat_n(0.0, fresh));
            }
            let sums = match sums {
                Sums::None | Sums::Layer(_) => None,
                Sums::Heads(heads) => heads.get(kv).map(Vec::as_slice),
            };
            if fresh == 1 && sums.is_none() && what.is_none() {
                continue;
            }
            let source = Source {
                plan: &layer.plan,
                place: layer.place,
                row,
                kv,
                seen: context.seen,
                decoded: layer.decoded,
                sums,
            };
            tasks.push(Task {
                head,
                targets: layer.targets,
                source,
                context,
                what: *what,
                ranked: None,
                rebuilt: Rebuilt::default(),
                keep: None,
                measures: settled[row].measures,
                error: None,
            });
        }
    }
    // A head is compacted before the next one is stored, unless it has to wait for how others rank.
    step.run_each(&mut tasks, |task| {
        store(step, task)?;
        if task.ranked.is_none() || task.source.plan.floor().is_none() {
            settle_head(step, task, out)?;
        }
        Ok(())
    })?;
    if tasks.iter().any(|task| task.ranked.is_some()) {
        compete(&mut tasks);
        step.run_each(&mut tasks, |task| {
            if task.ranked.is_some() {
                settle_head(step, task, out)?;
            }
            Ok(())
        })?;
    }
    let mut keeps: Vec<Option<Vec<u32>>> = vec![None; whats.len()];
    let heads = step.geometry.shape.kv_heads as f64;
    for task in tasks {
        let row = &mut settled[task.source.row];
        row.changed |= task.rebuilt != Rebuilt::default();
        row.evicted += task.rebuilt.evicted as f64 / heads;
        row.errors.extend(task.error);
        if task.source.kv == 0 {
            keeps[task.source.row] = task.keep;
        }
    }
    for (((layer, keep), settled), what) in layers.iter_mut().zip(keeps).zip(&settled).zip(&whats) {
        layer.seen += fresh;
        layer.measured |= settled.changed && (fresh > 1 || layer.pending);
        layer.pending = layer.held || (layer.pending && what.is_none());
        if settled.evicted > 0.0 {
            layer.evicted_at = layer.seen;
        }
        // Without per-head scores all heads keep the same rows.
        if let (Some(scores), Some(keep)) = (&mut layer.scores, keep) {
            scores.gather(&keep);
        }
    }
    for (row, layer) in layers.iter_mut().enumerate() {
        if layer.held && layer.reread.is_none() && layer.seen >= layer.prompt {
            layer.probes = Some(held(step, row, layer.seen, out));
        }
    }
    Ok(settled)
}

/// Where heads compete, gives each its share of the layer's budget. Tasks of a layer lie side by side.
fn compete(tasks: &mut [Task<'_>]) {
    for layer in tasks.chunk_by_mut(|a, b| a.source.row == b.source.row) {
        let floor = layer.first().and_then(|task| task.source.plan.floor());
        let mut heads: Vec<&mut Ranked> = layer.iter_mut().filter_map(|task| task.ranked.as_mut()).collect();
        if let Some(floor) = floor {
            evict::compete(&mut heads, floor);
        }
    }
}

/// Stores and scores; ranks the rows if some will go.
fn store(step: &Step<'_>, task: &mut Task<'_>) -> Result<(), HookError> {
    let fresh = step.geometry.fresh;
    if fresh > 1 {
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let k = packed(&step.k.rows(task.source.row, task.source.kv), &mut k);
        let v = packed(&step.v.rows(task.source.row, task.source.kv), &mut v);
        task.head.append(&task.targets, task.context.seen - fresh, k, v)?;
    }
    observe(step, task.head, &task.source)?;
    if task.what.is_some_and(|what| what.evict) {
        task.ranked = rank(task.head, task.source.plan, &task.context)?;
    }
    Ok(())
}

/// Evicts and packs, and measures on a sample what that did.
fn settle_head(step: &Step<'_>, task: &mut Task<'_>, out: &[f32]) -> Result<(), HookError> {
    let Some(what) = task.what else {
        return Ok(());
    };
    let source = task.source;
    (task.rebuilt, task.keep) = compact(
        task.head,
        task.source.plan,
        &task.targets,
        what,
        task.ranked.take(),
        &task.context,
        Some(|| queries(step, &source)),
    )?;
    if task.measures
        && task.rebuilt != Rebuilt::default()
        && step
            .core
            .settings
            .error_sample
            .includes(step.layer, task.source.kv)
    {
        task.error = relative_error(
            task.head,
            &step.heads,
            &probes(step, source.row, source.kv, task.context.seen, out),
        )?;
    }
    Ok(())
}

/// The step's queries of a head's group, as bases are made of them.
fn queries(step: &Step<'_>, source: &Source<'_>) -> Queries {
    let (geometry, group) = (step.geometry, step.geometry.group());
    let dim = geometry.shape.k_dim;
    let (mut moments, mut squares) = (vec![0.0; dim * dim], vec![0.0; dim]);
    let window = geometry.fresh - geometry.fresh.min(OBSERVED_QUERIES);
    for token in 0..geometry.fresh {
        for head in source.kv * group..(source.kv + 1) * group {
            let q = step.q.row(source.row, head, token);
            // Fewer queries than dimensions would say more of themselves than of those to come.
            let counted = if geometry.fresh * group < dim { &[] } else { q };
            for (a, row) in counted.iter().zip(moments.chunks_exact_mut(dim)) {
                for (b, sum) in q.iter().zip(row) {
                    *sum += f64::from(*a) * f64::from(*b);
                }
            }
            if token >= window {
                for (sum, x) in squares.iter_mut().zip(q) {
                    *sum += f64::from(*x).powi(2);
                }
            }
        }
    }
    Queries { moments, squares }
}

/// The step's last queries and the outputs they had before the compaction.
pub(super) fn probes<'a>(
    step: &Step<'_>,
    row: usize,
    kv: usize,
    seen: usize,
    out: &'a [f32],
) -> Vec<Probe<'a>> {
    let (geometry, group) = (step.geometry, step.geometry.group());
    let (fresh, v_dim) = (geometry.fresh, step.heads.v_dim);
    let heads = kv * group..(kv + 1) * group;
    (fresh - fresh.min(WINDOW)..fresh)
        .map(|token| Probe {
            q: heads
                .clone()
                .flat_map(|head| step.q.row(row, head, token))
                .copied()
                .collect(),
            exact: heads
                .clone()
                .map(|head| {
                    let at = ((row * geometry.q_heads + head) * fresh + token) * v_dim;
                    &out[at..at + v_dim]
                })
                .collect(),
            position: seen - fresh + token,
        })
        .collect()
}

/// The same of sampled heads, to be kept.
fn held(step: &Step<'_>, row: usize, seen: usize, out: &[f32]) -> Held {
    let heads = 0..step.geometry.shape.kv_heads;
    let sampled = heads.filter(|kv| step.core.settings.error_sample.includes(step.layer, *kv));
    let probes = sampled.flat_map(|kv| {
        let probes = probes(step, row, kv, seen, out);
        probes.into_iter().map(move |probe| HeldQuery {
            kv,
            position: probe.position,
            exact: probe.exact.iter().map(|out| out.to_vec()).collect(),
            q: probe.q,
        })
    });
    Held {
        heads: step.heads,
        queries: probes.collect(),
    }
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
