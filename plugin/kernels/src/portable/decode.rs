//! One token's attention over packed rows. Invariant: each key and each value row is unpacked once,
//! whatever the number of query heads, and nothing but the caller's weights grows with the rows.

use super::math::{exp, exps, logits, madd, max, panel};
use super::{LANES, rotate, unpack, width};
use crate::types::Rise;
use crate::{Heads, KernelError, Partial, Scratch, Segment, check};

/// Rows unpacked at a time.
const TILE: usize = 64;

/// See [`crate::Kernels::attend_decode`].
pub(crate) fn attend_decode(
    heads: &Heads,
    segments: &[Segment<'_>],
    q: &[f32],
    partial: &mut Partial,
    mut weights: Option<&mut [f32]>,
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let rows = check::decode(heads, segments, q, weights.as_deref())?;
    let (k_width, v_width) = (width(heads.k_dim), width(heads.v_dim));
    partial.reset(heads);
    let Scratch {
        queries,
        tile,
        scores,
        rises,
        ..
    } = scratch;
    // Queries as they are, then rotated; the padding stays 0.
    queries.clear();
    queries.resize(2 * heads.q_heads * k_width, 0.0);
    let (plain, rotated) = queries.split_at_mut(heads.q_heads * k_width);
    let pairs = plain
        .chunks_exact_mut(k_width)
        .zip(rotated.chunks_exact_mut(k_width));
    for ((plain, rotated), q) in pairs.zip(q.chunks_exact(heads.k_dim)) {
        plain[..heads.k_dim].copy_from_slice(q);
        if segments.iter().any(|s| s.k_rotated) {
            rotated[..heads.k_dim].copy_from_slice(q);
            rotate::row(&mut rotated[..heads.k_dim]);
        }
    }
    tile.clear();
    tile.resize(TILE * k_width.max(v_width), 0.0);
    scores.clear();
    scores.resize(heads.q_heads * TILE, 0.0);
    rises.clear();

    let mut first = 0;
    for s in segments {
        let q = if s.k_rotated { &*rotated } else { &*plain };
        let keys = s.k.chunks(TILE * s.k_codec.row_bytes(heads.k_dim));
        let values = s.v.chunks(TILE * s.v_codec.row_bytes(heads.v_dim));
        for (keys, values) in keys.zip(values) {
            let n = keys.len() / s.k_codec.row_bytes(heads.k_dim);
            // The padding of key tiles must be 0, and value tiles have another width.
            tile.fill(0.0);
            unpack::rows(s.k_codec, heads.k_dim, keys, tile, k_width);
            for (h, q) in q.chunks_exact(k_width).enumerate() {
                let scores = &mut scores[h * TILE..][..n];
                dots(q, &tile[..n * k_width], scores);
                logits(heads, scores);
                let stat = &mut partial.stats[h];
                let top = max(scores);
                if top > stat.max {
                    let shrink = exp(stat.max - top);
                    let out = &mut partial.out[h * heads.v_dim..][..heads.v_dim];
                    out.iter_mut().for_each(|x| *x *= shrink);
                    stat.sum *= shrink;
                    if weights.is_some() && first > 0 {
                        rises.push(Rise {
                            head: h,
                            row: first,
                            before: stat.max,
                        });
                    }
                    stat.max = top;
                }
                stat.sum += exps(scores, stat.max);
                if let Some(weights) = &mut weights {
                    weights[h * rows + first..][..n].copy_from_slice(scores);
                }
            }
            unpack::rows(s.v_codec, heads.v_dim, values, tile, v_width);
            let tile = tile[..n * v_width].as_chunks::<LANES>().0;
            let mut h = 0;
            while h < heads.q_heads {
                let row = |i: usize| &scores[(h + i) * TILE..][..n];
                let out = &mut partial.out[h * heads.v_dim..];
                h += match heads.q_heads - h {
                    1 => add([row(0)], tile, out, heads.v_dim),
                    2 => add([row(0), row(1)], tile, out, heads.v_dim),
                    3 => add([row(0), row(1), row(2)], tile, out, heads.v_dim),
                    _ => add([row(0), row(1), row(2), row(3)], tile, out, heads.v_dim),
                };
            }
            first += n;
        }
    }
    if let Some(weights) = weights {
        rescale(partial, rises, weights, rows);
    }
    Ok(())
}

/// Makes weights that were written under lower maxima fit the final one.
fn rescale(partial: &Partial, rises: &[Rise], weights: &mut [f32], rows: usize) {
    for (h, (weights, stat)) in weights.chunks_exact_mut(rows).zip(&partial.stats).enumerate() {
        let mut from = 0;
        for rise in rises.iter().filter(|rise| rise.head == h) {
            let factor = exp(rise.before - stat.max);
            weights[from..rise.row].iter_mut().for_each(|w| *w *= factor);
            from = rise.row;
        }
    }
}
/// Dot products of a query with each row of a tile; all as wide as the query.
#[inline(always)]
fn dots(q: &[f32], tile: &[f32], out: &mut [f32]) {
    let q = q.as_chunks::<8>().0;
    let tile = tile.as_chunks::<8>().0;
    for (rows, out) in tile.chunks(4 * q.len()).zip(out.chunks_mut(4)) {
        let mut rows = rows.chunks_exact(q.len());
        match (rows.next(), rows.next(), rows.next(), rows.next()) {
            (Some(a), Some(b), Some(c), Some(d)) => out.copy_from_slice(&dot4(q, [a, b, c, d])),
            (a, b, c, _) => {
                for (row, out) in [a, b, c].into_iter().flatten().zip(out) {
                    *out = dot4(q, [row])[0];
                }
            }
        }
    }
}

/// Dot products of one query with R rows: each query value is loaded once for all of them.
#[inline(always)]
fn dot4<const R: usize>(q: &[[f32; 8]], rows: [&[[f32; 8]]; R]) -> [f32; R] {
    let rows = rows.map(|r| &r[..q.len()]);
    let mut acc = [[0.0f32; 8]; R];
    for (d, q) in q.iter().enumerate() {
        for r in 0..R {
            for i in 0..8 {
                acc[r][i] = madd(q[i], rows[r][d][i], acc[r][i]);
            }
        }
    }
    sums(&acc)
}

/// Each row's lanes added up. Not inlined: next to these sums the compiler would vectorize the loop above
/// across rows instead of lanes, which costs a transposition for every 8 values.
#[inline(never)]
fn sums<const R: usize>(acc: &[[f32; 8]; R]) -> [f32; R] {
    acc.map(|a| ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])))
}

/// Adds H heads' weights times the tile's rows to their outputs. Returns H.
#[inline(always)]
fn add<const H: usize>(w: [&[f32]; H], tile: &[[f32; LANES]], out: &mut [f32], dim: usize) -> usize {
    let panels = dim.div_ceil(LANES);
    for p in 0..panels {
        let acc = panel(w, w[0].len(), tile, panels, p);
        for (acc, out) in acc.iter().zip(out.chunks_mut(dim)) {
            for (out, acc) in out[LANES * p..].iter_mut().zip(acc) {
                *out += acc;
            }
        }
    }
    H
}
