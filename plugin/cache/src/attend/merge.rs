//! Rows that two heads have in common become one: once both are packed, of two layers at the later one's turn.

use std::sync::MutexGuard;

use cinch_hooks::HookError;

use super::Step;
use super::settle::{Settled, probes};
use crate::layer::Layer;
use crate::observe::relative_error;
use crate::plan::Merging;
use crate::registry::lock;
use crate::sequence::Sequence;
use crate::store::{Head, twin};

/// Merges what can be of rows that this step packed. `out` is the step's output, as in settling.
pub(super) fn merge(
    step: &Step<'_>,
    sequences: &[&Sequence],
    layers: &mut [MutexGuard<'_, Layer>],
    settled: &mut [Settled],
    out: &[f32],
) -> Result<(), HookError> {
    for (row, (layer, settled)) in layers.iter_mut().zip(settled).enumerate() {
        let layer: &mut Layer = layer;
        let merging = layer.plan.merging(layer.place).filter(|_| settled.changed);
        let merged = match merging {
            None => continue,
            Some(Merging::LayerBefore) => {
                let index = layer.place.layer - 1;
                let mut before = lock(&sequences[row].layers[index]);
                if before.plan.id != layer.plan.id {
                    continue;
                }
                let heads = before.heads.iter_mut().zip(&mut layer.heads);
                let merged: usize = heads.map(|(a, b)| twin::merge(a, b)).sum::<Result<_, _>>()?;
                sequences[row].gauge(index, &before);
                merged
            }
            Some(Merging::Heads { similarity }) => alike(&mut layer.heads, similarity)?,
        };
        if merged == 0 || !settled.measures {
            continue;
        }
        for (kv, head) in layer.heads.iter().enumerate() {
            if step.core.settings.error_sample.includes(step.layer, kv) {
                let probes = probes(step, row, kv, layer.seen, out);
                settled.errors.extend(relative_error(head, &step.heads, &probes)?);
            }
        }
    }
    Ok(())
}

/// Merges disjoint pairs of heads that are at least so similar, the most similar first.
fn alike(heads: &mut [Head], least: f64) -> Result<usize, HookError> {
    let mut pairs = Vec::new();
    for b in 1..heads.len() {
        for a in 0..b {
            if let Some(similarity) = twin::similarity(&heads[a], &heads[b])? {
                pairs.push((similarity, a, b));
            }
        }
    }
    pairs.retain(|(similarity, ..)| *similarity >= least);
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut merged, mut taken) = (0, vec![false; heads.len()]);
    for (_, a, b) in pairs {
        if taken[a] || taken[b] {
            continue;
        }
        (taken[a], taken[b]) = (true, true);
        let (first, rest) = heads.split_at_mut(b);
        merged += twin::merge(&mut first[a], &mut rest[0])?;
    }
    Ok(merged)
}
