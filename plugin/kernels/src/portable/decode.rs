//! One token's attention over packed rows. Invariant: each key and each value row is unpacked once,
//! whatever the number of query heads.

use super::math::{exps, logits, madd, max, panel};
use super::{LANES, unpack, width};
use crate::{Heads, KernelError, Segment, check};

/// Rows unpacked at a time: 32 rows of 128 values are 16 KiB, half of a first-level cache.
const TILE: usize = 32;

/// Attention of one query token per query head over all rows of `segments`.
///
/// * `q`: `q_heads × k_dim`.
/// * `weights`: scratch; on return `q_heads × rows` softmax weights, each head's adding up to 1, rows in
///   the order of the segments.
/// * `out`: `q_heads × v_dim`, overwritten.
///
/// # Errors
/// [`KernelError::NoRows`] if there is nothing to attend to; other variants tell of shapes that do not
/// fit, or of a scale or cap out of range.
pub fn attend_decode(
    heads: &Heads,
    segments: &[Segment<'_>],
    q: &[f32],
    weights: &mut Vec<f32>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let rows = check::decode(heads, segments, q, out)?;
    let (k_width, v_width) = (width(heads.k_dim), width(heads.v_dim));
    // One allocation that callers reuse: the weights, then the padded queries, then a tile.
    let queries = heads.q_heads * k_width;
    weights.clear();
    weights.resize(heads.q_heads * rows + queries + TILE * k_width.max(v_width), 0.0);
    let (scores, rest) = weights.split_at_mut(heads.q_heads * rows);
    let (padded, tile) = rest.split_at_mut(queries);
    for (padded, q) in padded.chunks_exact_mut(k_width).zip(q.chunks_exact(heads.k_dim)) {
        padded[..heads.k_dim].copy_from_slice(q);
    }

    // The tile's padding is 0 in this pass: nothing has been written there yet.
    let mut first = 0;
    for s in segments {
        for bytes in s.k.chunks(TILE * s.k_codec.row_bytes(heads.k_dim)) {
            let n = bytes.len() / s.k_codec.row_bytes(heads.k_dim);
            unpack::rows(s.k_codec, heads.k_dim, bytes, tile, k_width);
            for (q, scores) in padded.chunks_exact(k_width).zip(scores.chunks_exact_mut(rows)) {
                dots(q, &tile[..n * k_width], &mut scores[first..first + n]);
            }
            first += n;
        }
    }

    for scores in scores.chunks_exact_mut(rows) {
        logits(heads, scores);
        let factor = 1.0 / exps(scores, max(scores));
        scores.iter_mut().for_each(|w| *w *= factor);
    }

    out.fill(0.0);
    let mut first = 0;
    for s in segments {
        for bytes in s.v.chunks(TILE * s.v_codec.row_bytes(heads.v_dim)) {
            let n = bytes.len() / s.v_codec.row_bytes(heads.v_dim);
            unpack::rows(s.v_codec, heads.v_dim, bytes, tile, v_width);
            let tile = tile[..n * v_width].as_chunks::<LANES>().0;
            let mut h = 0;
            while h < heads.q_heads {
                let row = |i: usize| &scores[(h + i) * rows + first..][..n];
                let out = &mut out[h * heads.v_dim..];
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
    weights.truncate(heads.q_heads * rows);
    Ok(())
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
