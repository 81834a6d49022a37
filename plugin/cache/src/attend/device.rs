//! Attention through tensor operations on the tensors' own device, from the same stores. Rows are
//! unpacked a head at a time and queries attend a tile at a time, so memory stays linear in length.

use std::ops::Range;
use std::sync::MutexGuard;

use candle_core::{D, Device, Tensor};
use cinch_hooks::HookError;
use smallvec::smallvec;

use super::cpu::finite;
use super::{Step, Sums, add, collect, counts, observed, raise};
use crate::layer::Layer;
use crate::select::quest::{self, Runs};

/// Queries that attend at a time.
const TILE: usize = 128;

/// Attends with all rows; answers (batch, query heads, fresh, v_dim) and each row's sums.
pub(crate) fn attend(
    step: &Step<'_>,
    layers: &mut [MutexGuard<'_, Layer>],
    device: &Device,
) -> Result<(Vec<f32>, Vec<Sums>), HookError> {
    let (geometry, group) = (step.geometry, step.geometry.group());
    let fresh = geometry.fresh;
    let mut out = Vec::with_capacity(geometry.batch * geometry.q_heads * fresh * step.heads.v_dim);
    let mut all = Vec::with_capacity(layers.len());
    for (row, layer) in layers.iter_mut().enumerate() {
        let last_queries = if fresh > 1 { observed(layer) } else { 1 };
        let counted = fresh > 1 || counts(layer);
        let layer: &mut Layer = layer;
        let (seen, targets) = (layer.seen, layer.targets);
        let attended = layer.plan.attended(layer.place);
        let largest = layer.plan.largest();
        let mut sums = Vec::with_capacity(layer.heads.len());
        for (kv, head) in layer.heads.iter_mut().enumerate() {
            let (fresh_k, fresh_v) = (step.k.rows(row, kv), step.v.rows(row, kv));
            finite("k", &fresh_k)?;
            finite("v", &fresh_v)?;
            if fresh == 1 {
                head.append(&targets, seen, step.k.row(row, kv, 0), step.v.row(row, kv, 0))?;
            }
            let (mut k, mut v) = head.unpack()?;
            let mut runs: Runs = smallvec![0..head.kept()];
            if fresh == 1
                && let Some(attended) = attended
            {
                head.bound_pages()?;
                let q: Vec<f32> = (kv * group..(kv + 1) * group)
                    .flat_map(|head| step.q.row(row, head, 0))
                    .copied()
                    .collect();
                runs = quest::choose(head, &q, seen + 1, attended);
                k = rows_of(&k, step.heads.k_dim, &runs);
                v = rows_of(&v, step.heads.v_dim, &runs);
            }
            if fresh > 1 {
                for token in 0..fresh {
                    k.extend_from_slice(step.k.row(row, kv, token));
                    v.extend_from_slice(step.v.row(row, kv, token));
                }
            }
            let total = k.len() / step.heads.k_dim;
            let k = Tensor::from_vec(k, (total, step.heads.k_dim), device)?
                .t()?
                .contiguous()?;
            let v = Tensor::from_vec(v, (total, step.heads.v_dim), device)?;
            let mut head_sums = vec![0.0; total];
            for q_head in kv * group..(kv + 1) * group {
                for from in (0..fresh).step_by(TILE) {
                    let to = fresh.min(from + TILE);
                    let q = (from..to)
                        .flat_map(|token| step.q.row(row, q_head, token))
                        .copied()
                        .collect();
                    let q = Tensor::from_vec(q, (to - from, step.heads.k_dim), device)?;
                    let weights = weights(step, &q, &k, total, from)?;
                    out.extend(weights.matmul(&v)?.flatten_all()?.to_vec1::<f32>()?);
                    let observed = fresh.saturating_sub(last_queries).clamp(from, to) - from;
                    if observed < to - from {
                        let seen = weights.narrow(0, observed, to - from - observed)?;
                        if largest {
                            raise(&mut head_sums, seen.max(0)?.to_vec1::<f32>()?);
                        } else {
                            add(&mut head_sums, &seen.sum(0)?.to_vec1::<f32>()?);
                        }
                    }
                }
            }
            if counted {
                let rows = if fresh == 1 { head.kept() } else { total };
                sums.push(quest::spread(head_sums, &runs, rows));
            }
        }
        all.push(collect(layer, sums));
    }
    Ok((out, all))
}

/// The rows of `runs`, `dim` values each.
fn rows_of(x: &[f32], dim: usize, runs: &[Range<usize>]) -> Vec<f32> {
    let runs = runs.iter().flat_map(|run| &x[run.start * dim..run.end * dim]);
    runs.copied().collect()
}

/// Normalized weights of the queries from fresh token `from` on, (queries, total).
fn weights(step: &Step<'_>, q: &Tensor, k: &Tensor, total: usize, from: usize) -> Result<Tensor, HookError> {
    let mut scores = (q.matmul(k)? * f64::from(step.heads.scale))?;
    if let Some(cap) = step.heads.softcap {
        scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
    }
    let queries = q.dim(0)?;
    let past = total - step.geometry.fresh;
    if step.geometry.fresh > 1 {
        let mask: Vec<f32> = (0..queries)
            .flat_map(|query| {
                let open = past + from + query + 1;
                (0..total).map(move |key| if key < open { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        scores = (scores + Tensor::from_vec(mask, (queries, total), q.device())?)?;
    }
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?)
}
