//! Logits of keys that were quantized channel by channel: scales go into the query, once a tile of 32 keys, and zeros
//! into a number that all keys of the tile share: q·k = Σ_c (q_c · scale_c) · code_c + Σ_c q_c · zero_c.
//!
//! The scaled query is rounded as `query` rounds queries, and by the same rule: to one signed byte where that costs a logit
//! at most a sixth of what rounding the keys did, else to two. A key's error is scale_c/√12 in column `c`, so Σ (q_c ·
//! scale_c)² / 12 is what the query's own error is compared with.

use std::arch::x86_64::*;

use super::super::query::{COLUMNS, LARGEST, scaled_fits_one_byte};
use super::Avx512;
use super::codes::{Int2, Int3, Int4};
use super::key_tiles::{Int8, Tiled};
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, KeyCodes};
use crate::layout::{CHANNEL_TILE, TILE, channel_scale};
use crate::simd::{Ahead, LANES};

/// Columns at most, which a query is kept on the stack for.
const MOST: usize = 512;

/// A query times a tile's scales, as it is and as integers.
struct Scaled {
    values: [f32; MOST],
    /// Two signed bytes a column, upper ones first; lower ones alone if one byte is enough.
    integers: [[i32; MOST / 4]; 2],
    top: f32,
    norm: f32,
    step: f32,
    /// What is to be added to each key's product: zeros, and what rounding took from a middle code.
    rest: f32,
}

/// Makes `scores`; false if there is no room for it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn score(job: &mut KeyCodes<'_>) -> bool {
    if job.heads.k_dim > MOST {
        return false;
    }
    match job.codec {
        Codec::Int8 => heads::<Int8>(job),
        Codec::Int4 => heads::<Int4>(job),
        Codec::Int3 => heads::<Int3>(job),
        Codec::Int2 => heads::<Int2>(job),
        Codec::F32 | Codec::F16 | Codec::Bf16 | Codec::Fp8 => return false,
    }
    true
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn heads<G: Tiled>(job: &mut KeyCodes<'_>) {
    let mut h = 0;
    while h < job.heads.q_heads {
        h += match job.heads.q_heads - h {
            1 => dims::<G, 1>(job, h),
            2 => dims::<G, 2>(job, h),
            3 => dims::<G, 3>(job, h),
            _ => dims::<G, 4>(job, h),
        };
    }
}

/// The usual dimensions are known to the compiler.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dims<G: Tiled, const H: usize>(job: &mut KeyCodes<'_>, first: usize) -> usize {
    // SAFETY: this function has the instructions.
    unsafe {
        match job.heads.k_dim {
            64 => run::<G, H>(job, first, 64),
            128 => run::<G, H>(job, first, 128),
            dim => run::<G, H>(job, first, dim),
        }
    }
    H
}

/// H heads from `first` on.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn run<G: Tiled, const H: usize>(job: &mut KeyCodes<'_>, first: usize, dim: usize) {
    let size = CHANNEL_TILE * G::CODEC.row_bytes(dim);
    let half = TILE * G::CODEC.code_bytes(dim);
    let tiles = job.keys.len() / size;
    let ahead = match first {
        0 => Ahead::new(job.ahead, tiles * CHANNEL_TILE / TILE),
        _ => Ahead::NOTHING,
    };
    let mut scaled: [Scaled; H] = std::array::from_fn(|_| Scaled {
        values: [0.0; MOST],
        integers: [[0; MOST / 4]; 2],
        top: 0.0,
        norm: 0.0,
        step: 0.0,
        rest: 0.0,
    });
    for t in 0..tiles {
        let tile = &job.keys[t * size..][..size];
        // SAFETY: the caller's promise; a tile is two halves of sixteen rows' codes, group by group; the slices stored to
        // have sixteen values.
        unsafe {
            let mut wide = false;
            for h in 0..H {
                scale::<G>(&job.q[(first + h) * dim..][..dim], tile, dim, &mut scaled[h]);
                let levels = G::CODEC.levels().unwrap_or(u8::MAX);
                wide |= !scaled_fits_one_byte(levels, dim, scaled[h].top, scaled[h].norm);
            }
            for h in 0..H {
                round::<G>(&mut scaled[h], dim, wide);
            }
            for i in 0..CHANNEL_TILE / TILE {
                ahead.ask(Avx512(()), t * CHANNEL_TILE / TILE + i);
                let codes = tile[i * half..][..half].as_ptr();
                let dots = if wide {
                    dots::<G, 2, H>(codes, dim, &scaled)
                } else {
                    dots::<G, 1, H>(codes, dim, &scaled)
                };
                for h in 0..H {
                    let (step, rest) = (_mm512_set1_ps(scaled[h].step), _mm512_set1_ps(scaled[h].rest));
                    let out = &mut job.scores[(first + h) * BLOCK + t * CHANNEL_TILE + i * TILE..][..TILE];
                    _mm512_storeu_ps(out.as_mut_ptr(), _mm512_fmadd_ps(dots[h], step, rest));
                }
            }
        }
    }
}

/// Sixteen keys' products with queries of so many bytes, in steps.
///
/// # Safety
/// `codes` must be valid for reading a half tile, and the CPU must have the instructions.
#[inline(always)]
unsafe fn dots<G: Tiled, const BYTES: usize, const H: usize>(
    codes: *const u8,
    dim: usize,
    scaled: &[Scaled; H],
) -> [__m512; H] {
    let group_bytes = TILE * G::CODEC.group_bytes(GROUP);
    // SAFETY: the caller's promise; the index of a column's four bytes is below a quarter of `dim`, at most `MOST`.
    unsafe {
        let mut acc = [[[_mm512_setzero_si512(); 2]; BYTES]; H];
        for g in 0..dim / GROUP {
            let columns = G::columns(codes.add(g * group_bytes));
            for c in 0..COLUMNS {
                for h in 0..H {
                    for b in 0..BYTES {
                        let q = scaled[h].integers[2 - BYTES + b].get_unchecked(g * COLUMNS + c);
                        acc[h][b][c % 2] =
                            _mm512_dpbusd_epi32(acc[h][b][c % 2], columns[c], _mm512_set1_epi32(*q));
                    }
                }
            }
        }
        // At most 512 · 255 · 127 a byte: no overflow, and f32 rounds once more.
        let mut out = [_mm512_setzero_ps(); H];
        for h in 0..H {
            for b in 0..BYTES {
                let part = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[h][b][0], acc[h][b][1]));
                out[h] = _mm512_fmadd_ps(out[h], _mm512_set1_ps(256.0), part);
            }
        }
        out
    }
}

/// Multiplies a query with a tile's scales, and adds up its products with zeros.
///
/// # Safety
/// `tile` must be one of keys of `dim` columns, a multiple of 32, and the CPU must have the instructions.
#[inline(always)]
unsafe fn scale<G: Tiled>(q: &[f32], tile: &[u8], dim: usize, to: &mut Scaled) {
    let at = channel_scale(G::CODEC, dim, 0);
    let (scales, zeros) = (&tile[at..at + 2 * dim], &tile[at + 2 * dim..at + 4 * dim]);
    // SAFETY: the caller's promise; every access is to sixteen columns of slices that have `dim`.
    unsafe {
        let (mut top, mut norm, mut zero) = (_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps());
        for c in (0..dim).step_by(LANES) {
            let q = _mm512_loadu_ps(q[c..c + LANES].as_ptr());
            let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales[2 * c..2 * c + 32].as_ptr().cast()));
            let zeros = _mm512_cvtph_ps(_mm256_loadu_si256(zeros[2 * c..2 * c + 32].as_ptr().cast()));
            let x = _mm512_mul_ps(q, scale);
            zero = _mm512_fmadd_ps(q, zeros, zero);
            norm = _mm512_fmadd_ps(x, x, norm);
            top = _mm512_max_ps(top, _mm512_abs_ps(x));
            _mm512_storeu_ps(to.values[c..c + LANES].as_mut_ptr(), x);
        }
        to.top = _mm512_reduce_max_ps(top);
        to.norm = _mm512_reduce_add_ps(norm);
        to.rest = _mm512_reduce_add_ps(zero);
    }
}

/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn round<G: Tiled>(scaled: &mut Scaled, dim: usize, wide: bool) {
    let step = scaled.top / LARGEST[usize::from(wide)];
    // What is not finite must stay so; a query of next to nothing is nothing.
    scaled.step = if scaled.norm.is_finite() { step } else { f32::NAN };
    let inverse = if scaled.top > 1e-30 { step.recip() } else { 0.0 };
    let middle = f32::from(G::CODEC.levels().unwrap_or(u8::MAX)) / 2.0;
    // SAFETY: the caller's promise; every access is to sixteen columns of arrays that have `dim`.
    unsafe {
        let inverse = _mm512_set1_ps(inverse);
        let mut lost = _mm512_setzero_ps();
        for c in (0..dim).step_by(LANES) {
            let x = _mm512_mul_ps(_mm512_loadu_ps(scaled.values[c..c + LANES].as_ptr()), inverse);
            let n = _mm512_cvtps_epi32(x);
            lost = _mm512_add_ps(lost, _mm512_sub_ps(x, _mm512_cvtepi32_ps(n)));
            let lower = scaled.integers[1][c / 4..c / 4 + 4].as_mut_ptr();
            _mm_storeu_si128(lower.cast(), _mm512_cvtepi32_epi8(n));
            if wide {
                let upper = scaled.integers[0][c / 4..c / 4 + 4].as_mut_ptr();
                let x = _mm512_srai_epi32::<8>(_mm512_add_epi32(n, _mm512_set1_epi32(128)));
                _mm_storeu_si128(upper.cast(), _mm512_cvtepi32_epi8(x));
            }
        }
        scaled.rest += _mm512_reduce_add_ps(lost) * middle * step;
    }
}
