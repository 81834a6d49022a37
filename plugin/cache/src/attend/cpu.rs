//! Attention straight from tensor storage and packed blocks, in pieces that every thread takes from.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cinch_hooks::HookError;
use cinch_kernels::{ColumnSums, Partial, Rows, RowsMut, Scratch, Stat, accumulate, merge, total};
use smallvec::smallvec;

use super::host::between;
use super::pieces::{self, Piece};
use super::{Step, Sums, add, collect, counts, observed, raise};
use crate::error::kernel;
use crate::layer::Layer;
use crate::registry::lock;
use crate::select::quest::{self, Runs};
use crate::store::{Head, whole};

/// What one decode piece gives.
#[derive(Default)]
struct Slot {
    partial: Partial,
    /// q_heads × rows, not normalized.
    weights: Vec<f32>,
}

/// A decode step's pieces and their results, reused from step to step.
#[derive(Default)]
struct Workspace {
    /// What each head of each row attends to; `from` and `to` of pieces count these rows only.
    runs: Vec<Runs>,
    pieces: Vec<Piece>,
    slots: Vec<Mutex<Slot>>,
}

thread_local! {
    /// A thread's buffers: gathered queries, and what the kernels need.
    static SCRATCH: RefCell<(Vec<f32>, Scratch)> = RefCell::default();
    /// Of the thread that steps.
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// Attends with all rows; `out` is (batch, query heads, fresh, v_dim).
pub(crate) fn attend(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    out: &mut [f32],
) -> Result<Vec<Sums>, HookError> {
    if step.geometry.fresh == 1 {
        append(step, layers)?;
        WORKSPACE.with_borrow_mut(|workspace| decode(step, layers, workspace, out))
    } else {
        prefill(step, layers, out)
    }
}

/// A decoded token is appended first, so it is attended to as it is stored.
fn append(step: &Step<'_>, layers: &mut [MutexGuard<'_, Layer>]) -> Result<(), HookError> {
    for (row, layer) in layers.iter_mut().enumerate() {
        let layer: &mut Layer = layer;
        for (kv, head) in layer.heads.iter_mut().enumerate() {
            let (k, v) = (step.k.row(row, kv, 0), step.v.row(row, kv, 0));
            head.append(&layer.targets, layer.seen, k, v)?;
        }
    }
    Ok(())
}

/// What a decoded token attends to: all rows of each head, or those that a query chooses.
fn choose(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    runs: &mut Vec<Runs>,
) -> Result<(), HookError> {
    runs.clear();
    runs.extend(
        layers
            .iter()
            .flat_map(|layer| layer.heads.iter().map(|head| smallvec![0..head.kept()])),
    );
    let group = step.geometry.group();
    let mut tasks = Vec::new();
    let mut left = runs.iter_mut();
    for (row, layer) in layers.iter_mut().enumerate() {
        let layer: &mut Layer = layer;
        let (attended, seen) = (layer.plan.attended(layer.place), layer.seen + 1);
        for (kv, (head, runs)) in layer.heads.iter_mut().zip(&mut left).enumerate() {
            tasks.extend(attended.map(|attended| (row, kv, seen, attended, head, runs)));
        }
    }
    step.run_each(&mut tasks, |(row, kv, seen, attended, head, runs)| {
        head.bound_pages()?;
        SCRATCH.with_borrow_mut(|(q, _)| {
            let q = step.q.heads(*row, *kv * group..(*kv + 1) * group, q);
            **runs = quest::choose(head, q, *seen, *attended);
        });
        Ok(())
    })
}

fn decode(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    workspace: &mut Workspace,
    out: &mut [f32],
) -> Result<Vec<Sums>, HookError> {
    let Workspace { runs, pieces, slots } = workspace;
    choose(step, layers, runs)?;
    let (runs, heads) = (&runs[..], step.geometry.shape.kv_heads);
    let of = |row: usize, kv: usize| &runs[row * heads + kv][..];
    let layers = &*layers;
    let heads = layers.iter().enumerate().flat_map(|(row, layer)| {
        let heads = 0..layer.heads.len();
        heads.map(move |kv| (row, kv, quest::rows(of(row, kv))))
    });
    pieces::decode(heads, step.threads(), pieces);
    for piece in pieces.iter_mut() {
        // Parts begin where tiles of packed rows do.
        let (head, runs) = (&layers[piece.row].heads[piece.kv], of(piece.row, piece.kv));
        (piece.from, piece.to) = (
            quest::cut(head, runs, piece.from),
            quest::cut(head, runs, piece.to),
        );
    }
    if slots.len() < pieces.len() {
        slots.resize_with(pieces.len(), Mutex::default);
    }
    let group = step.geometry.group();
    step.run(pieces.len(), |index| {
        let Piece { row, kv, from, to } = pieces[index];
        let layer = &layers[row];
        let Slot { partial, weights } = &mut *lock(&slots[index]);
        let weights = counts(layer).then(|| {
            weights.resize(group * (to - from), 0.0);
            &mut weights[..]
        });
        SCRATCH.with_borrow_mut(|(q, scratch)| {
            let q = step.q.heads(row, kv * group..(kv + 1) * group, q);
            let rows = quest::part(of(row, kv), from, to);
            layer.heads[kv].attend(&step.heads, &rows, q, partial, weights, scratch)
        })
    })?;
    let mut done = pieces.iter().zip(slots.iter_mut().map(unlocked)).peekable();
    let mut outs = out.chunks_exact_mut(group * step.heads.v_dim);
    let mut own: Vec<(Piece, &mut Slot)> = Vec::with_capacity(pieces.len());
    let mut all = Vec::with_capacity(layers.len());
    for (row, layer) in layers.iter().enumerate() {
        let mut sums = Vec::new();
        for (kv, head) in layer.heads.iter().enumerate() {
            own.clear();
            while let Some((piece, slot)) = done.next_if(|(piece, _)| (piece.row, piece.kv) == (row, kv)) {
                own.push((*piece, slot));
            }
            let partials = own.iter().map(|(_, slot)| &slot.partial);
            let Some(out) = outs.next() else { continue };
            merge(&step.heads, partials.clone(), out).map_err(kernel)?;
            if counts(layer) {
                let totals: Vec<Stat> = (0..group).map(|h| total(h, partials.clone())).collect();
                let largest = layer.plan.largest();
                sums.push(weights(&own, &totals, of(row, kv), head.kept(), largest)?);
            }
        }
        all.push(collect(layer, sums));
    }
    Ok(all)
}

fn unlocked(slot: &mut Mutex<Slot>) -> &mut Slot {
    slot.get_mut().unwrap_or_else(PoisonError::into_inner)
}

/// One head's softmax weights, summed over its query heads, or the largest of theirs; those of `rows` that are not in `runs`
/// have none.
fn weights(
    pieces: &[(Piece, &mut Slot)],
    totals: &[Stat],
    runs: &[Range<usize>],
    rows: usize,
    largest: bool,
) -> Result<Vec<f32>, HookError> {
    let mut sums = vec![0.0_f32; quest::rows(runs)];
    for (piece, slot) in pieces {
        let stats = slot.partial.stats().iter();
        let factors: Vec<f32> = stats
            .zip(totals)
            .map(|(stat, total)| stat.factor(*total))
            .collect();
        let sums = &mut sums[piece.from..piece.to];
        if largest {
            for (weights, factor) in slot.weights.chunks_exact(sums.len().max(1)).zip(&factors) {
                raise(sums, weights.iter().map(|weight| weight * factor));
            }
        } else {
            accumulate(&slot.weights, &factors, sums).map_err(kernel)?;
        }
    }
    Ok(quest::spread(sums, runs, rows))
}

struct PrefillTask<'a> {
    piece: Piece,
    /// Queries of the piece that count, its last ones.
    counted: usize,
    /// A run of rows a query head.
    outs: Vec<&'a mut [f32]>,
    sums: Vec<f32>,
}

/// Fresh rows are exact in this pass, and nothing is stored yet.
fn prefill(
    step: &Step<'_>,
    layers: &[MutexGuard<'_, Layer>],
    out: &mut [f32],
) -> Result<Vec<Sums>, HookError> {
    let (geometry, group) = (step.geometry, step.geometry.group());
    let fresh = geometry.fresh;
    let heads = layers.iter().enumerate().flat_map(|(row, layer)| {
        let heads = layer.heads.iter().enumerate();
        heads.map(move |(kv, head)| (row, kv, head.kept()))
    });
    let pieces = pieces::prefill(heads, fresh, step.threads());
    let mut tasks: Vec<PrefillTask<'_>> = Vec::with_capacity(pieces.len());
    // What is left of each query head's output, in the order of the pieces.
    let mut rest: Vec<&mut [f32]> = out.chunks_exact_mut(fresh * step.heads.v_dim).collect();
    for piece in pieces {
        let first = piece.row * geometry.q_heads + piece.kv * group;
        let length = (piece.to - piece.from) * step.heads.v_dim;
        let outs = rest[first..first + group]
            .iter_mut()
            .map(|rest| rest.split_off_mut(..length).unwrap_or_default())
            .collect();
        let uncounted = fresh.saturating_sub(observed(&layers[piece.row]));
        let counted = piece.to.saturating_sub(piece.from.max(uncounted));
        let sums = Vec::new();
        tasks.push(PrefillTask {
            piece,
            counted,
            outs,
            sums,
        });
    }
    let expanded = expanded(step, layers)?;
    step.run_each(&mut tasks, |task| {
        let Piece { row, kv, from, to } = task.piece;
        let head = &layers[row].heads[kv];
        let (k, v) = (step.k.rows(row, kv), step.v.rows(row, kv));
        if from == 0 {
            // Before anything is stored: packing refuses what is not finite.
            finite("k", &k)?;
            finite("v", &v)?;
        }
        let q: Vec<Rows<'_>> = (kv * group..(kv + 1) * group)
            .map(|head| between(&step.q.rows(row, head), from..to))
            .collect();
        let outs = task.outs.iter_mut();
        let mut out: Vec<_> = outs.map(|out| RowsMut::packed(out, step.heads.v_dim)).collect();
        let sums = (task.counted > 0).then(|| {
            task.sums.resize(head.kept() + fresh, 0.0);
            ColumnSums {
                largest: layers[row].plan.largest(),
                last_queries: task.counted,
                out: &mut task.sums,
            }
        });
        let past = match &expanded[row][kv] {
            Some((k, v)) => smallvec![whole(head.kept(), k, v)],
            None => head.segments(0, head.kept()),
        };
        SCRATCH.with_borrow_mut(|(_, scratch)| {
            step.kernels()
                .attend_prefill(&step.heads, &past, k, v, from, &q, &mut out, sums, scratch)
                .map_err(kernel)
        })
    })?;
    let mut sums: Vec<Vec<Vec<f32>>> = vec![Vec::new(); geometry.batch];
    for PrefillTask { piece, sums: own, .. } in tasks {
        match sums[piece.row].get_mut(piece.kv) {
            Some(head) if head.is_empty() => *head = own,
            Some(head) if layers[piece.row].plan.largest() => raise(head, own),
            Some(head) => add(head, &own),
            None => sums[piece.row].push(own),
        }
    }
    Ok(layers
        .iter()
        .zip(sums)
        .map(|(layer, sums)| collect(layer, sums))
        .collect())
}

/// A head's K and V in f32.
type Expanded = Option<(Vec<f32>, Vec<f32>)>;

/// All rows of heads that the kernels can't take as they are, a head's at a time: many queries attend to them.
fn expanded(step: &Step<'_>, layers: &[MutexGuard<'_, Layer>]) -> Result<Vec<Vec<Expanded>>, HookError> {
    let heads = layers.first().map_or(0, |layer| layer.heads.len());
    let mut all: Vec<Vec<Expanded>> = vec![vec![None; heads]; layers.len()];
    let mut tasks: Vec<(&Head, &mut Expanded)> = layers
        .iter()
        .zip(&mut all)
        .flat_map(|(layer, all)| layer.heads.iter().zip(all))
        .filter(|(head, _)| !head.is_plain())
        .collect();
    step.run_each(&mut tasks, |(head, to)| {
        **to = Some(head.unpack()?);
        Ok(())
    })?;
    Ok(all)
}

/// Refuses rows that can't be stored.
pub(crate) fn finite(tensor: &'static str, rows: &Rows<'_>) -> Result<(), HookError> {
    for row in 0..rows.rows {
        let row = &rows.data[row * rows.stride..][..rows.dim];
        if !row.iter().all(|x| x.is_finite()) {
            return Err(HookError::Shape {
                tensor,
                given: vec![rows.rows, rows.dim],
                expected: "finite values only; it holds an infinity or a NaN".into(),
            });
        }
    }
    Ok(())
}
