//! One token's attention over packed rows. Invariant: each key and each value row is read from memory once,
//! whatever the number of query heads, and nothing but the caller's weights grows with the rows.
//!
//! Softmax is computed on the fly (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3), block by block.

use super::math::{exp, logits, scale};
use super::rows::{add_values, score};
use super::{reset, rotate, width};
use crate::simd::{LANES, Simd};
use crate::types::Rise;
use crate::{Codec, Heads, KernelError, Layout, Partial, Scratch, Segment, check};

/// Rows at a time. 64 rows of 256 values are 64 KiB unpacked, and 16 KiB for 64 values.
pub(crate) const BLOCK: usize = 64;

/// What integer keys are scored with.
pub(crate) struct KeyCodes<'a> {
    pub(crate) layout: Layout,
    pub(crate) codec: Codec,
    pub(crate) heads: &'a Heads,
    /// A run of up to `BLOCK` rows.
    pub(crate) keys: &'a [u8],
    /// q_heads × `width(k_dim)`.
    pub(crate) q: &'a [f32],
    /// The queries in an implementation's own form; empty until it has made one of `q`.
    pub(crate) prepared: &'a mut Vec<i32>,
    /// q_heads × `BLOCK` dot products; what is past the rows is not used.
    pub(crate) scores: &'a mut [f32],
    /// What is read next.
    pub(crate) ahead: &'a [u8],
}

/// What integer values are added up with.
pub(crate) struct ValueCodes<'a> {
    pub(crate) layout: Layout,
    pub(crate) codec: Codec,
    pub(crate) heads: &'a Heads,
    /// A run of up to `BLOCK` rows.
    pub(crate) values: &'a [u8],
    /// q_heads × `BLOCK`, not negative; 0 past the rows, up to whole lanes.
    pub(crate) weights: &'a [f32],
    /// q_heads × v_dim, added to.
    pub(crate) out: &'a mut [f32],
    /// What is read next.
    pub(crate) ahead: &'a [u8],
}

/// Room for rows that are unpacked before they are used.
pub(super) struct Tiles<'a> {
    /// `BLOCK` rows.
    pub(super) values: &'a mut [f32],
    /// A tile's rows as they are packed.
    pub(super) rows: &'a mut Vec<u8>,
}

/// See [`crate::Kernels::attend_decode`].
#[inline(always)]
pub(crate) fn attend_decode<S: Simd>(
    simd: S,
    heads: &Heads,
    segments: &[Segment<'_>],
    q: &[f32],
    partial: &mut Partial,
    mut weights: Option<&mut [f32]>,
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let rows = check::decode(heads, segments, q, weights.as_deref())?;
    let k_width = width(heads.k_dim);
    partial.reset(heads);
    let Scratch {
        queries,
        prepared,
        tile,
        rows: packed,
        scores,
        max: tops,
        sum: sums,
        rises,
        ..
    } = scratch;
    // Queries as they are, then rotated; the padding stays 0.
    let queries = reset(queries, 2 * heads.q_heads * k_width, 0.0);
    let (plain, rotated) = queries.split_at_mut(heads.q_heads * k_width);
    let is_rotated = segments.iter().any(|s| s.k_rotated);
    for (h, q) in q.chunks_exact(heads.k_dim).enumerate() {
        plain[h * k_width..][..heads.k_dim].copy_from_slice(q);
        if is_rotated {
            let row = &mut rotated[h * k_width..][..heads.k_dim];
            row.copy_from_slice(q);
            rotate::row(row);
        }
    }
    prepared.iter_mut().for_each(Vec::clear);
    let tile = reset(tile, BLOCK * k_width.max(width(heads.v_dim)), 0.0);
    let scores = reset(scores, heads.q_heads * BLOCK, 0.0);
    let tops = reset(tops, heads.q_heads, 0.0);
    let sums = reset(sums, heads.q_heads * LANES, 0.0);
    rises.clear();

    let mut first = 0;
    for (i, s) in segments.iter().enumerate() {
        let q = if s.k_rotated { &*rotated } else { &*plain };
        let prepared = &mut prepared[usize::from(s.k_rotated)];
        for from in (0..s.rows).step_by(BLOCK) {
            let n = BLOCK.min(s.rows - from);
            let (keys, values) = (s.keys(heads, from, n), s.values(heads, from, n));
            let next = match segments.get(i + 1) {
                _ if from + n < s.rows => s.keys(heads, from + n, BLOCK),
                Some(next) => next.keys(heads, 0, BLOCK),
                None => &[],
            };
            let mut tiles = Tiles {
                values: tile,
                rows: packed,
            };
            let job = KeyCodes {
                layout: s.k_layout,
                codec: s.k_codec,
                heads,
                keys,
                q,
                prepared,
                scores,
                ahead: values,
            };
            score(simd, job, n, &mut tiles);
            // All heads' maxima first, then all exponentials: neither waits for the other heads'.
            for (top, scores) in tops.iter_mut().zip(scores.chunks_exact_mut(BLOCK)) {
                *top = largest(simd, heads, &mut scores[..n.next_multiple_of(LANES)], n);
            }
            for (h, scores) in scores.chunks_exact_mut(BLOCK).enumerate() {
                let (stat, sums) = (&mut partial.stats[h], &mut sums.as_chunks_mut().0[h]);
                if tops[h] > stat.max {
                    let shrink = exp(simd, stat.max - tops[h]);
                    scale(simd, &mut partial.out[h * heads.v_dim..][..heads.v_dim], shrink);
                    scale(simd, sums, shrink);
                    if weights.is_some() && first > 0 {
                        rises.push(Rise {
                            head: h,
                            row: first,
                            before: stat.max,
                        });
                    }
                    stat.max = tops[h];
                }
                exponentials(simd, &mut scores[..n.next_multiple_of(LANES)], stat.max, sums);
                if let Some(weights) = &mut weights {
                    weights[h * rows + first..][..n].copy_from_slice(&scores[..n]);
                }
            }
            let job = ValueCodes {
                layout: s.v_layout,
                codec: s.v_codec,
                heads,
                values,
                weights: scores,
                out: &mut partial.out,
                ahead: next,
            };
            add_values(simd, job, n, &mut tiles);
            first += n;
        }
    }
    for (stat, sums) in partial.stats.iter_mut().zip(sums.as_chunks().0) {
        stat.sum = simd.sum(simd.load(sums));
    }
    if let Some(weights) = weights {
        rescale(simd, partial, rises, weights, rows);
    }
    Ok(())
}

/// Turns dot products into logits, −∞ past the first `n`. Returns the largest.
#[inline(always)]
fn largest<S: Simd>(s: S, heads: &Heads, scores: &mut [f32], n: usize) -> f32 {
    let mut top = s.splat(f32::NEG_INFINITY);
    for chunk in scores.as_chunks_mut().0 {
        let x = logits(s, heads, s.load(chunk));
        s.store(x, chunk);
        top = s.max(x, top);
    }
    if n < scores.len() {
        scores[n..].fill(f32::NEG_INFINITY);
        top = s.splat(f32::NEG_INFINITY);
        for chunk in scores.as_chunks().0 {
            top = s.max(s.load(chunk), top);
        }
    }
    s.top(top)
}

/// Turns logits into e^(logit − max), and adds them to the sums, lane by lane.
#[inline(always)]
fn exponentials<S: Simd>(s: S, scores: &mut [f32], max: f32, sums: &mut [f32; LANES]) {
    let (max, mut total) = (s.splat(max), s.load(sums));
    for chunk in scores.as_chunks_mut().0 {
        let e = s.exp(s.sub(s.load(chunk), max));
        total = s.add(total, e);
        s.store(e, chunk);
    }
    s.store(total, sums);
}

/// Makes weights that were written under lower maxima fit the final one.
#[inline(always)]
fn rescale<S: Simd>(s: S, partial: &Partial, rises: &[Rise], weights: &mut [f32], rows: usize) {
    for (h, (weights, stat)) in weights
        .chunks_exact_mut(rows.max(1))
        .zip(&partial.stats)
        .enumerate()
    {
        let mut from = 0;
        for rise in rises.iter().filter(|rise| rise.head == h) {
            scale(s, &mut weights[from..rise.row], exp(s, rise.before - stat.max));
            from = rise.row;
        }
    }
}
