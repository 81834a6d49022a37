//! One step of a batch at one layer, in two phases. First attention: a prefill attends to what is stored
//! and to its fresh rows exactly as they came, and changes nothing; a decoded token is appended and then
//! attended to. Then settling: prefill rows are appended, scores grow, and layers whose turn it is compact
//! themselves, layer by layer, so a long prompt is never held uncompressed in more than one.
//!
//! Invariant: an error in the first phase leaves every row as it was.

mod cpu;
mod device;
mod exact;
mod host;
mod merge;
mod pieces;
mod score;
pub(crate) mod settle;

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::utils::barrier_pool;
use candle_core::{Device, Tensor};
use cinch_hooks::{AttendParams, DenseAttention, HookError, Qkv, SequenceCache};
use cinch_kernels::{Heads, Kernels};

use crate::layer::{Layer, OBSERVED_QUERIES, OBSERVED_STEPS};
use crate::registry::lock;
use crate::select::{DECODE_WINDOW, Statistics};
use crate::sequence::Sequence;
use crate::shared::Core;
use crate::store::Head;
use host::{Geometry, View, readable};

/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 1 << 16;

/// What both phases need to know of a step.
pub(crate) struct Step<'a> {
    core: &'a Core,
    layer: usize,
    geometry: Geometry,
    heads: Heads,
    q: View<'a>,
    k: View<'a>,
    v: View<'a>,
    /// Multiply-adds of this step's attention, roughly.
    work: usize,
}

impl Step<'_> {
    /// Runs `f` on every index, on candle's threads if there is enough to do.
    fn run(&self, count: usize, f: impl Fn(usize) -> Result<(), HookError> + Sync) -> Result<(), HookError> {
        if self.threads() == 1 || count < 2 || self.work < SERIAL_WORK {
            return (0..count).try_for_each(f);
        }
        spread(count, f)
    }

    /// The same, for tasks that are changed.
    fn run_each<T: Send>(
        &self,
        tasks: &mut [T],
        f: impl Fn(&mut T) -> Result<(), HookError> + Sync,
    ) -> Result<(), HookError> {
        let tasks: Vec<Mutex<&mut T>> = tasks.iter_mut().map(Mutex::new).collect();
        self.run(tasks.len(), |index| f(&mut lock(&tasks[index])))
    }

    fn kernels(&self) -> Kernels {
        self.core.settings.kernels
    }

    /// Threads that [`run`](Self::run) may use.
    fn threads(&self) -> usize {
        if self.core.settings.serial {
            1
        } else {
            barrier_pool().n_workers() + 1
        }
    }
}

/// Runs `f` on every index, on candle's threads. A pool of our own would fight with candle's for the cores: its workers spin for
/// a while after each matmul.
pub(crate) fn spread(
    count: usize,
    f: impl Fn(usize) -> Result<(), HookError> + Sync,
) -> Result<(), HookError> {
    let failed = Mutex::new(None);
    barrier_pool().execute_chunked(count, |range| {
        for index in range {
            if let Err(error) = f(index) {
                lock(&failed).get_or_insert(error);
            }
        }
    });
    lock(&failed).take().map_or(Ok(()), Err)
}

/// Attention weights received by each row's keys: summed over all query heads where the layer keeps
/// scores, else a head at a time, or the largest of them.
pub(crate) enum Sums {
    /// This step does not count.
    None,
    Layer(Vec<f32>),
    Heads(Vec<Vec<f32>>),
}

/// Appends, attends, compacts.
pub(crate) fn attend(
    core: &Arc<Core>,
    layer: usize,
    rows: &[Arc<dyn SequenceCache>],
    qkv: Qkv<'_>,
    params: &AttendParams,
    engine: &dyn DenseAttention,
) -> Result<Tensor, HookError> {
    let sequences = sequences(core, rows)?;
    let geometry = check(layer, &sequences, &qkv)?;
    core.group.fetch_max(geometry.group(), Relaxed);
    let (q, k, v) = (readable(qkv.q)?, readable(qkv.k)?, readable(qkv.v)?);
    let ((q_storage, q_layout), (k_storage, k_layout), (v_storage, v_layout)) = (
        q.storage_and_layout(),
        k.storage_and_layout(),
        v.storage_and_layout(),
    );
    let mut layers = lock_all(&sequences, layer)?;
    let shape = geometry.shape;
    if geometry.fresh == 1 && layers.iter().any(|layer| layer.reread.is_some()) {
        return Err(HookError::Shape {
            tensor: "q",
            given: qkv.q.dims().to_vec(),
            expected: "at least 2 tokens of an extra pass at a time".into(),
        });
    }
    let kept: usize = layers
        .iter()
        .filter_map(|layer| layer.heads.iter().map(Head::kept).max())
        .sum();
    let pairs = geometry.fresh * (kept + geometry.batch * geometry.fresh.div_ceil(2));
    let step = Step {
        core,
        layer,
        geometry,
        heads: Heads {
            q_heads: geometry.group(),
            k_dim: shape.k_dim,
            v_dim: shape.v_dim,
            scale: params.scale,
            softcap: params.softcap,
        },
        q: View::new(&q_storage, q_layout)?,
        k: View::new(&k_storage, k_layout)?,
        v: View::new(&v_storage, v_layout)?,
        work: pairs * geometry.q_heads * (shape.k_dim + shape.v_dim),
    };
    for (sequence, layer) in sequences.iter().zip(&mut layers) {
        let plan = sequence.plan(layer);
        if plan.id != layer.plan.id && layer.reread.is_none() {
            layer.adopt_plan(&core.ledger, &plan, sequence.dtype, geometry.group());
        }
        layer.prompt = sequence.prompt();
        layer.held = geometry.fresh > 1 && sequence.holds() && layer.plan.rereads().is_some();
        layer.prepare(&core.ledger, geometry.group());
    }
    if let Some(request) = core.check.request() {
        check_keys(&step, request, &sequences, &layers);
    }
    let before: Vec<Vec<usize>> = layers
        .iter()
        .map(|layer| layer.heads.iter().map(Head::kept).collect())
        .collect();
    let on_cpu = matches!(qkv.q.device(), Device::Cpu) && !core.settings.force_device_path;
    let attended = if on_cpu {
        let mut out = vec![0.0; geometry.batch * geometry.q_heads * geometry.fresh * shape.v_dim];
        cpu::attend(&step, &mut layers, &mut out).map(|sums| (out, sums))
    } else {
        device::attend(&step, &mut layers, qkv.q.device())
    };
    let (out, sums) = match attended {
        Ok(attended) => attended,
        Err(error) => {
            for (layer, rows) in layers.iter_mut().zip(before) {
                for (head, rows) in layer.heads.iter_mut().zip(rows) {
                    head.truncate(rows);
                }
            }
            return Err(error);
        }
    };
    let mut settled = settle::settle(&step, &mut layers, sums, &out)?;
    merge::merge(&step, &sequences, &mut layers, &mut settled, &out)?;
    for (sequence, layer_state) in sequences.iter().zip(&layers) {
        sequence.gauge(layer, layer_state);
    }
    let dims = (geometry.batch, geometry.q_heads, geometry.fresh, shape.v_dim);
    let out = Tensor::from_vec(out, dims, &Device::Cpu)?
        .to_device(qkv.q.device())?
        .to_dtype(qkv.q.dtype())?;
    let out = exact::replace(&layers, qkv.q, out, engine)?;
    drop(layers);
    settle::report(core, &sequences, &settled);
    Ok(out)
}

/// Holds keys of the request under watch against how they are said to turn.
fn check_keys(step: &Step<'_>, request: usize, sequences: &[&Sequence], layers: &[MutexGuard<'_, Layer>]) {
    for (row, (sequence, layer)) in sequences.iter().zip(layers).enumerate() {
        let watched = sequence.request().is_some_and(|own| own.id == request);
        let turns = step.core.rotary.of(step.layer, sequence.shapes());
        // What a second reading puts behind the prompt is other tokens.
        let read = step.geometry.fresh > 1 && layer.reread.is_none();
        let Some(turns) = turns.ok().filter(|_| watched && read) else {
            continue;
        };
        for head in 0..step.geometry.shape.kv_heads {
            let keys = (0..step.geometry.fresh).map(|token| step.k.row(row, head, token));
            step.core.check.compare(step.layer, &turns, layer.seen, keys);
        }
    }
}

fn sequences<'a>(
    core: &Arc<Core>,
    rows: &'a [Arc<dyn SequenceCache>],
) -> Result<Vec<&'a Sequence>, HookError> {
    rows.iter()
        .enumerate()
        .map(|(row, cache)| {
            cache
                .as_any()
                .downcast_ref::<Sequence>()
                .filter(|sequence| Arc::ptr_eq(&sequence.core, core))
                .ok_or(HookError::ForeignCache { row })
        })
        .collect()
}

fn check(layer: usize, sequences: &[&Sequence], qkv: &Qkv<'_>) -> Result<Geometry, HookError> {
    let mut geometry = None;
    for sequence in sequences {
        let shapes = sequence.shapes();
        let shape = *shapes.get(layer).ok_or(HookError::Layer {
            given: layer,
            layers: shapes.len(),
        })?;
        geometry = Some(Geometry::check(qkv, sequences.len(), shape)?);
    }
    geometry.ok_or_else(|| HookError::Shape {
        tensor: "q",
        given: qkv.q.dims().to_vec(),
        expected: "at least one row".into(),
    })
}

/// Locks one layer of every row, in the order of the sequences' ids so that two batches can't wait for
/// each other, and hands the guards back in the order of the rows.
fn lock_all<'a>(sequences: &[&'a Sequence], layer: usize) -> Result<Vec<MutexGuard<'a, Layer>>, HookError> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_unstable_by_key(|row| sequences[*row].id);
    if order
        .windows(2)
        .any(|pair| sequences[pair[0]].id == sequences[pair[1]].id)
    {
        return Err(HookError::Shape {
            tensor: "rows",
            given: vec![sequences.len()],
            expected: "each sequence once in a batch".into(),
        });
    }
    let mut guards: Vec<(usize, MutexGuard<'a, Layer>)> = order
        .into_iter()
        .map(|row| (row, lock(&sequences[row].layers[layer])))
        .collect();
    guards.sort_unstable_by_key(|(row, _)| *row);
    Ok(guards.into_iter().map(|(_, guard)| guard).collect())
}

/// How many of a prefill's last queries are summed up in a layer's scores.
fn observed(layer: &Layer) -> usize {
    match layer.plan.statistics() {
        _ if layer.reread.is_some() => usize::MAX,
        // They are credited one by one, later.
        _ if layer.plan.credits() => 0,
        Statistics::Every => usize::MAX,
        Statistics::Sampled => OBSERVED_QUERIES,
        Statistics::Window(window) => window,
    }
}

/// Whether a decode step counts in a layer's scores.
fn counts(layer: &Layer) -> bool {
    match layer.plan.statistics() {
        Statistics::Every => true,
        Statistics::Sampled => layer.seen.is_multiple_of(OBSERVED_STEPS),
        Statistics::Window(window) => {
            // Steps until the one that evicts, which is 0 itself.
            let left = layer.plan.interval().map_or(usize::MAX, |interval| {
                let due = if layer.pending { 0 } else { interval };
                due.saturating_sub(layer.since + 1)
            });
            left < window.min(DECODE_WINDOW)
        }
    }
}

/// A head's or a layer's share of the sums, added up.
fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// What is larger of a head's shares.
fn raise(to: &mut [f32], from: impl IntoIterator<Item = f32>) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = to.max(from);
    }
}

/// Collects per-head sums, none or one a head, as a layer's scores need them.
fn collect(layer: &Layer, heads: Vec<Vec<f32>>) -> Sums {
    if layer.head_scores() {
        return Sums::Heads(heads);
    }
    let mut heads = heads.into_iter();
    let Some(mut total) = heads.next() else {
        return Sums::None;
    };
    for head in heads {
        add(&mut total, &head);
    }
    Sums::Layer(total)
}
