//! One token's attention over packed rows. Invariant: each key and each value row is read from memory once,
//! whatever the number of query heads, and nothing but the caller's weights grows with the rows.
//!
//! Softmax is computed on the fly (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3), block by block.

use super::math::{add_to, exp, gemm, logits, scale, weigh};
use super::{reset, rotate, unpack, width};
use crate::codec::GROUP;
use crate::simd::{Ahead, Bf16, Chunk, F16, F32, LANES, Simd, Tile};
use crate::types::Rise;
use crate::{Codec, Heads, KernelError, Partial, Scratch, Segment, check};

/// Rows at a time. 64 rows of 256 values are 64 KiB unpacked, and 16 KiB for 64 values.
pub(crate) const BLOCK: usize = 64;

/// What integer keys are scored with.
pub(crate) struct KeyCodes<'a> {
    pub(crate) codec: Codec,
    pub(crate) heads: &'a Heads,
    /// Up to `BLOCK` rows.
    pub(crate) keys: &'a [u8],
    pub(crate) rows: usize,
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
    pub(crate) codec: Codec,
    pub(crate) heads: &'a Heads,
    /// Up to `BLOCK` rows.
    pub(crate) values: &'a [u8],
    pub(crate) rows: usize,
    /// q_heads × `BLOCK`, not negative; 0 past the rows.
    pub(crate) weights: &'a [f32],
    /// q_heads × v_dim, added to.
    pub(crate) out: &'a mut [f32],
    /// What is read next.
    pub(crate) ahead: &'a [u8],
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
        scores,
        rises,
        ..
    } = scratch;
    // Queries as they are, then rotated; the padding stays 0.
    reset(queries, 2 * heads.q_heads * k_width, 0.0);
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
    reset(tile, BLOCK * k_width.max(width(heads.v_dim)), 0.0);
    reset(scores, heads.q_heads * BLOCK, 0.0);
    rises.clear();

    let mut first = 0;
    for (i, s) in segments.iter().enumerate() {
        let q = if s.k_rotated { &*rotated } else { &*plain };
        let prepared = &mut prepared[usize::from(s.k_rotated)];
        let (k_row, v_row) = (s.k_codec.row_bytes(heads.k_dim), s.v_codec.row_bytes(heads.v_dim));
        for from in (0..s.rows).step_by(BLOCK) {
            let n = BLOCK.min(s.rows - from);
            let (keys, values) = (
                &s.k[from * k_row..][..n * k_row],
                &s.v[from * v_row..][..n * v_row],
            );
            let next = &s.k[(from + n) * k_row..];
            let next = match segments.get(i + 1) {
                Some(s) if next.is_empty() => s.k,
                _ => next,
            };
            let next = &next[..next.len().min(BLOCK * k_row)];
            score(simd, s.k_codec, heads, keys, n, q, prepared, tile, scores, values);
            for h in 0..heads.q_heads {
                let scores = &mut scores[h * BLOCK..][..n.next_multiple_of(LANES)];
                for chunk in scores.as_chunks_mut().0 {
                    simd.store(logits(simd, heads, simd.load(chunk)), chunk);
                }
                scores[n..].fill(f32::NEG_INFINITY);
                let out = &mut partial.out[h * heads.v_dim..][..heads.v_dim];
                let stat = &mut partial.stats[h];
                let before = stat.max;
                stat.sum = weigh(simd, scores, out, &mut stat.max, stat.sum);
                if let Some(weights) = &mut weights {
                    if stat.max > before && first > 0 {
                        let row = first;
                        rises.push(Rise { head: h, row, before });
                    }
                    weights[h * rows + first..][..n].copy_from_slice(&scores[..n]);
                }
            }
            add_values(
                simd,
                s.v_codec,
                heads,
                values,
                n,
                scores,
                tile,
                &mut partial.out,
                next,
            );
            first += n;
        }
    }
    if let Some(weights) = weights {
        rescale(simd, partial, rises, weights, rows);
    }
    Ok(())
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

/// Dot products of all heads' queries with up to `BLOCK` keys: q_heads × `BLOCK`.
#[expect(clippy::too_many_arguments, reason = "a step of the loop above")]
#[inline(always)]
fn score<S: Simd>(
    s: S,
    codec: Codec,
    heads: &Heads,
    keys: &[u8],
    rows: usize,
    q: &[f32],
    prepared: &mut Vec<i32>,
    tile: &mut [f32],
    scores: &mut [f32],
    ahead: &[u8],
) {
    let (dim, panels) = (heads.k_dim, width(heads.k_dim) / LANES);
    if codec.levels().is_some() && dim.is_multiple_of(GROUP) {
        let mut job = KeyCodes {
            codec,
            heads,
            keys,
            rows,
            q,
            prepared,
            scores,
            ahead,
        };
        if s.key_codes(&mut job) {
            return;
        }
    }
    if S::WIDE && dim.is_multiple_of(LANES) {
        match codec {
            Codec::F32 => return heads_dots::<S, F32>(s, q, keys.as_chunks().0, panels, rows, scores, ahead),
            Codec::F16 => return heads_dots::<S, F16>(s, q, keys.as_chunks().0, panels, rows, scores, ahead),
            Codec::Bf16 => {
                return heads_dots::<S, Bf16>(s, q, keys.as_chunks().0, panels, rows, scores, ahead);
            }
            _ => {}
        }
    }
    if dim < panels * LANES {
        // The padding must be finite, as it is multiplied by 0, and value rows may have been there.
        tile.fill(0.0);
    }
    unpack::rows(s, codec, dim, keys, tile, panels * LANES);
    heads_dots::<S, Tile>(s, q, tile.as_chunks().0, panels, rows, scores, ahead);
}

#[inline(always)]
fn heads_dots<S: Simd, C: Chunk>(
    s: S,
    q: &[f32],
    keys: &[C::Data],
    panels: usize,
    rows: usize,
    scores: &mut [f32],
    ahead: &[u8],
) {
    let mut ahead = Ahead::new(ahead, rows.div_ceil(4));
    let (mut q, mut scores) = (q.as_chunks::<LANES>().0, scores);
    while !q.is_empty() {
        let left = q.len() / panels;
        // With few registers, four rows share each load of one head's query; with many, of several heads'.
        let taken = match left {
            1 => dots::<S, C, 1>(s, q, keys, panels, rows, scores, ahead),
            _ if !S::WIDE => dots::<S, C, 1>(s, q, keys, panels, rows, scores, ahead),
            2 => dots::<S, C, 2>(s, q, keys, panels, rows, scores, ahead),
            3 => dots::<S, C, 3>(s, q, keys, panels, rows, scores, ahead),
            _ => dots::<S, C, 4>(s, q, keys, panels, rows, scores, ahead),
        };
        ahead = Ahead::NOTHING;
        q = &q[taken * panels..];
        scores = &mut scores[taken * BLOCK..];
    }
}

/// Dot products of H heads' queries with each row. Returns H.
#[inline(always)]
fn dots<S: Simd, C: Chunk, const H: usize>(
    s: S,
    q: &[[f32; LANES]],
    keys: &[C::Data],
    panels: usize,
    rows: usize,
    scores: &mut [f32],
    ahead: Ahead<'_>,
) -> usize {
    let q: [&[[f32; LANES]]; H] = std::array::from_fn(|h| &q[h * panels..][..panels]);
    for r in (0..rows).step_by(4) {
        ahead.ask(s, r / 4);
        // The last rows may repeat: the repeated results are past the rows.
        let keys: [&[C::Data]; 4] =
            std::array::from_fn(|i| &keys[(r + i).min(rows - 1) * panels..][..panels]);
        let mut acc = [[s.splat(0.0); 4]; H];
        for p in 0..panels {
            let k: [S::V; 4] = std::array::from_fn(|i| C::get(s, &keys[i][p]));
            for h in 0..H {
                let q = s.load(&q[h][p]);
                for i in 0..4 {
                    acc[h][i] = s.madd(q, k[i], acc[h][i]);
                }
            }
        }
        for h in 0..H {
            if let Some(out) = scores[h * BLOCK + r..].first_chunk_mut::<4>() {
                *out = s.sums(acc[h]);
            }
        }
    }
    H
}

/// Adds weights (q_heads × `BLOCK`) times up to `BLOCK` value rows to the outputs (q_heads × v_dim).
#[expect(clippy::too_many_arguments, reason = "a step of the loop above")]
#[inline(always)]
fn add_values<S: Simd>(
    s: S,
    codec: Codec,
    heads: &Heads,
    values: &[u8],
    rows: usize,
    weights: &[f32],
    tile: &mut [f32],
    out: &mut [f32],
    ahead: &[u8],
) {
    let (dim, panels) = (heads.v_dim, width(heads.v_dim) / LANES);
    if codec.levels().is_some() && dim.is_multiple_of(GROUP) {
        let mut job = ValueCodes {
            codec,
            heads,
            values,
            rows,
            weights,
            out,
            ahead,
        };
        if s.value_codes(&mut job) {
            return;
        }
    }
    if S::WIDE && dim.is_multiple_of(LANES) {
        match codec {
            Codec::F32 => {
                return heads_add::<S, F32>(s, weights, values.as_chunks().0, panels, rows, out, dim, ahead);
            }
            Codec::F16 => {
                return heads_add::<S, F16>(s, weights, values.as_chunks().0, panels, rows, out, dim, ahead);
            }
            Codec::Bf16 => {
                return heads_add::<S, Bf16>(s, weights, values.as_chunks().0, panels, rows, out, dim, ahead);
            }
            _ => {}
        }
    }
    unpack::rows(s, codec, dim, values, tile, panels * LANES);
    heads_add::<S, Tile>(s, weights, tile.as_chunks().0, panels, rows, out, dim, ahead);
}

#[inline(always)]
fn heads_add<S: Simd, C: Chunk>(
    s: S,
    weights: &[f32],
    values: &[C::Data],
    panels: usize,
    rows: usize,
    out: &mut [f32],
    dim: usize,
    ahead: &[u8],
) {
    let mut ahead = Ahead::new(ahead, rows);
    let (mut weights, mut out) = (weights, out);
    while !out.is_empty() {
        let taken = match out.len() / dim {
            1 => add::<S, C, 1>(s, weights, values, panels, rows, out, dim, ahead),
            2 => add::<S, C, 2>(s, weights, values, panels, rows, out, dim, ahead),
            3 => add::<S, C, 3>(s, weights, values, panels, rows, out, dim, ahead),
            _ => add::<S, C, 4>(s, weights, values, panels, rows, out, dim, ahead),
        };
        ahead = Ahead::NOTHING;
        weights = &weights[taken * BLOCK..];
        out = &mut out[taken * dim..];
    }
}

/// Adds H heads' weights times the rows to their outputs. Returns H.
#[inline(always)]
fn add<S: Simd, C: Chunk, const H: usize>(
    s: S,
    weights: &[f32],
    values: &[C::Data],
    panels: usize,
    rows: usize,
    out: &mut [f32],
    dim: usize,
    mut ahead: Ahead<'_>,
) -> usize {
    let w: [&[f32]; H] = std::array::from_fn(|h| &weights[h * BLOCK..][..rows]);
    let mut p = 0;
    while p < panels {
        if S::WIDE && panels - p >= 4 {
            let acc = gemm::<S, C, H, 4>(s, w, rows, values, panels, p, ahead);
            put(s, acc, p, out, dim);
            p += 4;
        } else {
            let acc = gemm::<S, C, H, 1>(s, w, rows, values, panels, p, ahead);
            put(s, acc, p, out, dim);
            p += 1;
        }
        ahead = Ahead::NOTHING;
    }
    H
}

#[inline(always)]
fn put<S: Simd, const H: usize, const P: usize>(
    s: S,
    acc: [[S::V; P]; H],
    first: usize,
    out: &mut [f32],
    dim: usize,
) {
    for (out, acc) in out.chunks_exact_mut(dim).zip(acc) {
        for (p, v) in acc.into_iter().enumerate() {
            add_to(s, v, &mut out[LANES * (first + p)..]);
        }
    }
}
