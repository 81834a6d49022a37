//! D2O's merging: what is evicted is not dropped but added to what it is most like. <https://arxiv.org/abs/2406.13035>,
//! its operation at the level of tokens; its budgets of layers are not part of this.
//!
//! Each evicted row goes to the kept one whose key has the highest cosine with its own, if that is no less than a
//! threshold, else it is dropped. A kept row becomes the mean of itself, weighted e, and of the rows that came to it,
//! weighted e^cosine each: keys and values alike. The threshold is the mean of the highest cosines, and at later
//! evictions a moving average of them. Sinks take nothing in: their values are small for a reason.
//!
//! When not to use it: at large budgets, where what is evicted matters little, as it costs a product of evicted and
//! kept keys; and with rows packed to few bits, which a merge rounds once more.

use super::{Merged, evicted};
use crate::select::vector::{LANES, TILE, norm, products, transpose};

/// Share of the latest eviction in the moving average.
const NEW: f32 = 0.7;

/// Merges rows of (`k`, `v`) that are not in `keep` (strictly increasing) into those that are and lie behind the first
/// `sinks`.
pub(crate) fn merge(
    (k, k_dim): (&[f32], usize),
    (v, v_dim): (&[f32], usize),
    keep: &[u32],
    sinks: usize,
    threshold: &mut Option<f32>,
) -> Merged {
    let targets: Vec<usize> = keep[sinks.min(keep.len())..]
        .iter()
        .map(|row| *row as usize)
        .collect();
    let evicted: Vec<usize> = evicted(k.len() / k_dim, keep).collect();
    if targets.is_empty() || evicted.is_empty() {
        return Merged::default();
    }
    let nearest = nearest(k, k_dim, &evicted, &targets);
    let mean = nearest.iter().map(|(cosine, _)| cosine).sum::<f32>() / nearest.len() as f32;
    let least = threshold.map_or(mean, |old| NEW * mean + (1.0 - NEW) * old);
    *threshold = Some(least);

    // By target, so that each is made once.
    let mut pairs: Vec<(usize, usize, f32)> = nearest
        .into_iter()
        .zip(evicted)
        .filter(|((cosine, _), _)| *cosine >= least)
        .map(|((cosine, target), row)| (target, row, cosine.exp()))
        .collect();
    pairs.sort_unstable_by_key(|(target, row, _)| (*target, *row));
    let mut merged = Merged::default();
    for group in pairs.chunk_by(|a, b| a.0 == b.0) {
        let target = group[0].0;
        let own = std::f32::consts::E;
        let total = own + group.iter().map(|(_, _, weight)| weight).sum::<f32>();
        let blend = |x: &[f32], dim: usize, to: &mut Vec<f32>| {
            let at = to.len();
            let row = |row: usize| &x[row * dim..(row + 1) * dim];
            to.extend(row(targets[target]).iter().map(|x| x * own / total));
            for (_, evicted, weight) in group {
                let sums = to[at..].iter_mut().zip(row(*evicted));
                sums.for_each(|(sum, x)| *sum += x * weight / total);
            }
        };
        blend(k, k_dim, merged.k.get_or_insert_default());
        blend(v, v_dim, &mut merged.v);
        merged.rows.push(sinks + target);
    }
    merged
}

/// Of each evicted row the highest cosine with a target's key, and which target it is: of equals the first.
fn nearest(k: &[f32], dim: usize, evicted: &[usize], targets: &[usize]) -> Vec<(f32, usize)> {
    let row = |row: usize| &k[row * dim..(row + 1) * dim];
    let inverse = |key: &[f32]| 1.0 / norm(key).max(f32::MIN_POSITIVE);
    let mut best = vec![(f32::NEG_INFINITY, 0); evicted.len()];
    let mut columns = vec![[0.0; LANES]; dim];
    for (chunk, targets) in targets.chunks(LANES).enumerate() {
        transpose(targets.iter().map(|target| row(*target)), &mut columns);
        let mut lengths = [0.0; LANES];
        for (lane, target) in targets.iter().enumerate() {
            lengths[lane] = inverse(row(*target));
        }
        for (best, evicted) in best.chunks_mut(TILE).zip(evicted.chunks(TILE)) {
            let rows = std::array::from_fn(|r| row(evicted[r.min(evicted.len() - 1)]));
            let sums = products(rows, &columns);
            for (best, sums) in best.iter_mut().zip(&sums) {
                for lane in 0..targets.len() {
                    let cosine = sums[lane] * lengths[lane];
                    if cosine > best.0 {
                        *best = (cosine, chunk * LANES + lane);
                    }
                }
            }
        }
    }
    for (best, evicted) in best.iter_mut().zip(evicted) {
        best.0 *= inverse(row(*evicted));
    }
    best
}
