//! A block of rows: the dot products of its keys, the weighted sums of its values. Invariant: every row is read
//! once, straight from its bytes if it is of floats, else by an implementation's own integer arithmetic, else from a tile
//! that it is unpacked to.

use super::arrange::unpack_part;
use super::decode::{BLOCK, KeyCodes, Tiles, ValueCodes};
use super::math::{add_to, gemm};
use super::width;
use crate::Codec;
use crate::codec::GROUP;
use crate::simd::{Ahead, Bf16, Chunk, F16, F32, LANES, Simd, Tile};

/// Dot products of all heads' queries with the job's first `rows` keys. What an implementation's own arithmetic leaves is
/// unpacked.
#[inline(always)]
pub(super) fn score<S: Simd>(s: S, mut job: KeyCodes<'_>, rows: usize, tiles: &mut Tiles<'_>) {
    let (codec, dim) = (job.codec, job.heads.k_dim);
    let panels = width(dim) / LANES;
    let own = codec.levels().is_some() && dim.is_multiple_of(GROUP);
    let done = if own { s.key_codes(&mut job) } else { 0 };
    if done >= rows {
        return;
    }
    let KeyCodes {
        layout,
        keys,
        q,
        scores,
        ahead,
        ..
    } = job;
    if dim.is_multiple_of(LANES) {
        match codec {
            Codec::F32 => return heads_dots::<S, F32>(s, q, keys.as_chunks().0, panels, rows, scores, ahead),
            Codec::F16 => return heads_dots::<S, F16>(s, q, keys.as_chunks().0, panels, rows, scores, ahead),
            Codec::Bf16 => {
                return heads_dots::<S, Bf16>(s, q, keys.as_chunks().0, panels, rows, scores, ahead);
            }
            _ => {}
        }
    }
    let tile = &mut *tiles.values;
    if dim < panels * LANES {
        // The padding must be finite, as it is multiplied by 0, and value rows may have been there.
        tile.fill(0.0);
    }
    unpack_part(
        s,
        layout,
        codec,
        dim,
        keys,
        done..rows,
        tile,
        panels * LANES,
        tiles.rows,
    );
    let (left, scores) = (rows - done, &mut scores[done..]);
    heads_dots::<S, Tile>(s, q, tile.as_chunks().0, panels, left, scores, ahead);
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
        let taken = match left {
            1 => dots::<S, C, 1>(s, q, keys, panels, rows, scores, ahead),
            2 => dots::<S, C, 2>(s, q, keys, panels, rows, scores, ahead),
            3 => dots::<S, C, 3>(s, q, keys, panels, rows, scores, ahead),
            _ => dots::<S, C, 4>(s, q, keys, panels, rows, scores, ahead),
        };
        ahead = Ahead::NOTHING;
        q = &q[taken * panels..];
        // The last head's end where the rows do.
        let next = scores.len().min(taken * BLOCK);
        scores = &mut scores[next..];
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
    // Indices below, not closures: see `gemm`.
    let mut heads = [&q[..panels]; H];
    for h in 1..H {
        heads[h] = &q[h * panels..][..panels];
    }
    for r in (0..rows).step_by(4) {
        ahead.ask(s, r / 4);
        // The last rows may repeat: the repeated results are past the rows.
        let mut four = [&keys[r * panels..][..panels]; 4];
        for i in 1..4 {
            four[i] = &keys[(r + i).min(rows - 1) * panels..][..panels];
        }
        let mut acc = [[s.splat(0.0); 4]; H];
        if S::WIDE || H == 1 {
            for p in 0..panels {
                let mut k = [s.splat(0.0); 4];
                for i in 0..4 {
                    k[i] = C::get(s, &four[i][p]);
                }
                for h in 0..H {
                    let q = s.load(&heads[h][p]);
                    for i in 0..4 {
                        acc[h][i] = s.madd(q, k[i], acc[h][i]);
                    }
                }
            }
        } else {
            // Few registers: those of one row, and queries from memory.
            for i in 0..4 {
                let mut row = [s.splat(0.0); H];
                for p in 0..panels {
                    let k = C::get(s, &four[i][p]);
                    for h in 0..H {
                        row[h] = s.madd(s.load(&heads[h][p]), k, row[h]);
                    }
                }
                for h in 0..H {
                    acc[h][i] = row[h];
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

/// Adds weights times the job's first `rows` values to the outputs.
#[inline(always)]
pub(super) fn add_values<S: Simd>(s: S, mut job: ValueCodes<'_>, rows: usize, tiles: &mut Tiles<'_>) {
    let (codec, dim) = (job.codec, job.heads.v_dim);
    let panels = width(dim) / LANES;
    let own = codec.levels().is_some() && dim.is_multiple_of(GROUP);
    let done = if own { s.value_codes(&mut job) } else { 0 };
    if done >= rows {
        return;
    }
    let ValueCodes {
        layout,
        values,
        weights,
        out,
        ahead,
        ..
    } = job;
    if dim.is_multiple_of(LANES) {
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
    let tile = &mut *tiles.values;
    unpack_part(
        s,
        layout,
        codec,
        dim,
        values,
        done..rows,
        tile,
        panels * LANES,
        tiles.rows,
    );
    let (left, weights) = (rows - done, &weights[done..]);
    heads_add::<S, Tile>(s, weights, tile.as_chunks().0, panels, left, out, dim, ahead);
}

#[expect(clippy::too_many_arguments, reason = "a step of decode's loop")]
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
        weights = &weights[weights.len().min(taken * BLOCK)..];
        out = &mut out[taken * dim..];
    }
}

/// Adds H heads' weights times the rows to their outputs. Returns H.
#[expect(clippy::too_many_arguments, reason = "a step of decode's loop")]
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
    let mut w = [&weights[..rows]; H];
    for h in 1..H {
        w[h] = &weights[h * BLOCK..][..rows];
    }
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
    for h in 0..H {
        for p in 0..P {
            add_to(s, acc[h][p], &mut out[h * dim..][..dim][LANES * (first + p)..]);
        }
    }
}
