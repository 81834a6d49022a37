//! Attention straight from tensor storage and packed blocks: a task per row and KV head.

use std::cell::RefCell;
use std::sync::MutexGuard;

use cinch_hooks::HookError;
use cinch_kernels::{ColumnSums, Heads, Rows, RowsMut, Scratch, attend_decode, attend_prefill};

use super::{Step, Sums, add, collect, observed};
use crate::error::kernel;
use crate::layer::Layer;
use crate::store::{Head, Targets};

thread_local! {
    /// A thread's buffers, reused from step to step.
    static BUFFERS: RefCell<(Vec<f32>, Vec<f32>, Scratch)> = RefCell::default();
}

/// Attends with all rows; `out` is (batch, query heads, fresh, v_dim).
pub(crate) fn attend(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    out: &mut [f32],
) -> Result<Vec<Sums>, HookError> {
    let sums = if step.geometry.fresh == 1 {
        decode(step, layers, out)?
    } else {
        prefill(step, layers, out)?
    };
    Ok(layers
        .iter()
        .zip(sums)
        .map(|(layer, sums)| collect(layer, sums))
        .collect())
}

struct DecodeTask<'a> {
    row: usize,
    kv: usize,
    seen: usize,
    targets: Targets,
    head: &'a mut Head,
    out: &'a mut [f32],
    sums: Vec<f32>,
}

/// A decoded token is appended first, so it is attended to as it is stored.
fn decode(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    out: &mut [f32],
) -> Result<Vec<Vec<Vec<f32>>>, HookError> {
    let group = step.geometry.group();
    let mut outs = out.chunks_exact_mut(group * step.heads.v_dim);
    let mut tasks = Vec::with_capacity(layers.len() * step.geometry.shape.kv_heads);
    for (row, layer) in layers.iter_mut().enumerate() {
        let layer: &mut Layer = layer;
        let (seen, targets) = (layer.seen, layer.targets);
        for ((kv, head), out) in layer.heads.iter_mut().enumerate().zip(&mut outs) {
            tasks.push(DecodeTask {
                row,
                kv,
                seen,
                targets,
                head,
                out,
                sums: Vec::new(),
            });
        }
    }
    step.run(&mut tasks, |task| {
        let DecodeTask { row, kv, .. } = *task;
        task.head.append(
            &task.targets,
            task.seen,
            step.k.row(row, kv, 0),
            step.v.row(row, kv, 0),
        )?;
        BUFFERS.with_borrow_mut(|(q, weights, _)| {
            q.clear();
            for head in kv * group..(kv + 1) * group {
                q.extend_from_slice(step.q.row(row, head, 0));
            }
            let rows = task.head.kept();
            attend_decode(&step.heads, &task.head.segments(rows), q, weights, task.out).map_err(kernel)?;
            let mut weights = weights.chunks_exact(rows);
            task.sums = weights.next().unwrap_or_default().to_vec();
            weights.for_each(|weights| add(&mut task.sums, weights));
            Ok(())
        })
    })?;
    let mut sums = vec![Vec::new(); step.geometry.batch];
    for task in tasks {
        sums[task.row].push(task.sums);
    }
    Ok(sums)
}

struct PrefillTask<'a> {
    row: usize,
    kv: usize,
    /// First query head.
    from: usize,
    head: &'a Head,
    last_queries: usize,
    out: &'a mut [f32],
    sums: Vec<f32>,
}

/// Fresh rows are exact in this pass, and nothing is stored yet.
fn prefill(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    out: &mut [f32],
) -> Result<Vec<Vec<Vec<f32>>>, HookError> {
    let (geometry, group) = (step.geometry, step.geometry.group());
    // Few heads on many threads: a task per query head, at the price of unpacking the past for each.
    let share = if geometry.batch * geometry.shape.kv_heads < 2 * step.threads() {
        1
    } else {
        group
    };
    let mut outs = out.chunks_exact_mut(share * geometry.fresh * step.heads.v_dim);
    let mut tasks = Vec::new();
    for (row, layer) in layers.iter().enumerate() {
        let last_queries = observed(layer);
        for (kv, head) in layer.heads.iter().enumerate() {
            for from in (kv * group..(kv + 1) * group).step_by(share) {
                let Some(out) = outs.next() else { continue };
                let sums = Vec::new();
                tasks.push(PrefillTask {
                    row,
                    kv,
                    from,
                    head,
                    last_queries,
                    out,
                    sums,
                });
            }
        }
    }
    let heads = Heads {
        q_heads: share,
        ..step.heads
    };
    step.run(&mut tasks, |task| {
        let (k, v) = (step.k.rows(task.row, task.kv), step.v.rows(task.row, task.kv));
        // Checked before anything is stored: packing refuses what is not finite.
        finite("k", &k)?;
        finite("v", &v)?;
        let rows = task.head.kept();
        task.sums = vec![0.0; rows + geometry.fresh];
        let q: Vec<Rows<'_>> = (task.from..task.from + share)
            .map(|head| step.q.rows(task.row, head))
            .collect();
        let mut out: Vec<RowsMut<'_>> = task
            .out
            .chunks_exact_mut(geometry.fresh * heads.v_dim)
            .map(|out| RowsMut::packed(out, heads.v_dim))
            .collect();
        let sums = ColumnSums {
            last_queries: task.last_queries,
            out: &mut task.sums,
        };
        BUFFERS.with_borrow_mut(|(_, _, scratch)| {
            attend_prefill(
                &heads,
                &task.head.segments(rows),
                k,
                v,
                &q,
                &mut out,
                Some(sums),
                scratch,
            )
            .map_err(kernel)
        })
    })?;
    let mut sums: Vec<Vec<Vec<f32>>> = vec![Vec::new(); geometry.batch];
    for task in tasks {
        match sums[task.row].get_mut(task.kv) {
            Some(head) => add(head, &task.sums),
            None => sums[task.row].push(task.sums),
        }
    }
    Ok(sums)
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
