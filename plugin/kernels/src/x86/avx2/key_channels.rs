//! Logits of keys that were quantized channel by channel: scales go into the query, once a tile of 32 keys, and zeros
//! into a number that all keys of the tile share: q·k = Σ_c (q_c · scale_c) · code_c + Σ_c q_c · zero_c.
//!
//! The scaled query is rounded as `query` rounds queries, and multiplied as in `keys`.

use std::arch::x86_64::*;

use super::super::lanes;
use super::super::query::{COLUMNS, LARGEST, scaled_fits_one_byte};
use super::keys::{Int2, Int3, Int4, Int8, KEYS, Tiled, dots};
use super::{Avx2, largest};
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, KeyCodes};
use crate::layout::{CHANNEL_TILE, TILE, channel_scale};
use crate::simd::Ahead;

/// Columns at most: their products with codes of eight bits, added up, fit 32 bits.
const MOST: usize = 256;
const _: () = assert!(MOST as u64 * 255 * (LARGEST[1] as u64) < i32::MAX as u64);

/// Columns of a vector.
const EIGHT: usize = 8;

/// A query times a tile's scales, as it is and as integers.
struct Scaled {
    values: [f32; MOST],
    /// Four bytes each.
    bytes: [i32; MOST / 4],
    /// Four integers of two bytes each: the first and the third, then the others, as codes are split.
    words: [[i32; 2]; MOST / 4],
    top: f32,
    norm: f32,
    step: f32,
    /// What is to be added to each key's product: zeros, and what rounding took from a middle code.
    rest: f32,
}

/// Makes the scores of all tiles. Returns their rows; none if there is no room for it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn score(job: &mut KeyCodes<'_>) -> usize {
    if job.heads.k_dim > MOST {
        return 0;
    }
    match job.codec {
        Codec::Int8 => heads::<Int8>(job),
        Codec::Int4 => heads::<Int4>(job),
        Codec::Int3 => heads::<Int3>(job),
        Codec::Int2 => heads::<Int2>(job),
        Codec::F32 | Codec::F16 | Codec::Bf16 | Codec::Fp8 => return 0,
    }
    job.keys.len() / job.codec.row_bytes(job.heads.k_dim)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
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
#[target_feature(enable = "avx2,fma,f16c")]
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
    const EIGHTS: usize = CHANNEL_TILE / KEYS;
    let size = CHANNEL_TILE * G::CODEC.row_bytes(dim);
    let half = TILE * G::CODEC.code_bytes(dim);
    let levels = G::CODEC.levels().unwrap_or(u8::MAX);
    let tiles = job.keys.len() / size;
    let ahead = match first {
        0 => Ahead::new(job.ahead, tiles * EIGHTS),
        _ => Ahead::NOTHING,
    };
    let mut scaled: [Scaled; H] = std::array::from_fn(|_| Scaled {
        values: [0.0; MOST],
        bytes: [0; MOST / 4],
        words: [[0; 2]; MOST / 4],
        top: 0.0,
        norm: 0.0,
        step: 0.0,
        rest: 0.0,
    });
    for t in 0..tiles {
        let tile = &job.keys[t * size..][..size];
        // SAFETY: the caller's promise; a tile is two halves of sixteen rows' codes, group by group; the slices stored to
        // have eight values; a column's number is below a quarter of `dim`, which is at most `MOST`.
        unsafe {
            let mut wide = G::CODEC.levels() == Some(u8::MAX);
            for h in 0..H {
                scale::<G>(&job.q[(first + h) * dim..][..dim], tile, dim, &mut scaled[h]);
                wide |= !scaled_fits_one_byte(levels, dim, scaled[h].top, scaled[h].norm);
            }
            for h in 0..H {
                round(&mut scaled[h], f32::from(levels) / 2.0, dim, wide);
            }
            for i in 0..EIGHTS {
                ahead.ask(Avx2(()), t * EIGHTS + i);
                let codes = tile[i / 2 * half..][..half].as_ptr().add(4 * KEYS * (i % 2));
                let dots: [_; H] = if wide {
                    sums::<G, 2, H>(codes, dim, |h, i| *scaled[h].words.get_unchecked(i))
                } else {
                    sums::<G, 1, H>(codes, dim, |h, i| [*scaled[h].bytes.get_unchecked(i)])
                };
                for h in 0..H {
                    let (step, rest) = (_mm256_set1_ps(scaled[h].step), _mm256_set1_ps(scaled[h].rest));
                    let out = &mut job.scores[(first + h) * BLOCK + t * CHANNEL_TILE + i * KEYS..][..KEYS];
                    let dots = _mm256_cvtepi32_ps(dots[h]);
                    _mm256_storeu_ps(out.as_mut_ptr(), _mm256_fmadd_ps(dots, step, rest));
                }
            }
        }
    }
}

/// Eight keys' products with H queries, in steps: `q` gives what a query has for a column, of any group.
///
/// # Safety
/// `codes` must be valid for reading eight keys' columns of a half tile, and the CPU must have the instructions.
#[inline(always)]
unsafe fn sums<G: Tiled, const BYTES: usize, const H: usize>(
    codes: *const u8,
    dim: usize,
    q: impl Fn(usize, usize) -> [i32; BYTES],
) -> [__m256i; H] {
    let group_bytes = TILE * G::CODEC.group_bytes(GROUP);
    // SAFETY: the caller's promise.
    unsafe {
        let mut out = [_mm256_setzero_si256(); H];
        for g in 0..dim / GROUP {
            let columns = G::columns(codes.add(g * group_bytes));
            let dots: [_; H] = dots(&columns, |h, c| q(h, g * COLUMNS + c));
            for h in 0..H {
                out[h] = _mm256_add_epi32(out[h], dots[h]);
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
    // SAFETY: the caller's promise; every access is to eight columns of slices that have `dim`.
    unsafe {
        let sign = _mm256_set1_ps(-0.0);
        let (mut top, mut norm, mut zero) = (_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps());
        for c in (0..dim).step_by(EIGHT) {
            let halves = |of: &[u8]| _mm256_cvtph_ps(_mm_loadu_si128(of[2 * c..2 * c + 16].as_ptr().cast()));
            let q = _mm256_loadu_ps(q[c..c + EIGHT].as_ptr());
            let x = _mm256_mul_ps(q, halves(scales));
            zero = _mm256_fmadd_ps(q, halves(zeros), zero);
            norm = _mm256_fmadd_ps(x, x, norm);
            top = _mm256_max_ps(top, _mm256_andnot_ps(sign, x));
            _mm256_storeu_ps(to.values[c..c + EIGHT].as_mut_ptr(), x);
        }
        (to.top, to.norm, to.rest) = (largest(top), lanes(norm), lanes(zero));
    }
}

/// # Safety
/// The CPU must have the instructions, and `dim` must be a multiple of 32.
#[inline(always)]
unsafe fn round(scaled: &mut Scaled, middle: f32, dim: usize, wide: bool) {
    let step = scaled.top / LARGEST[usize::from(wide)];
    // What is not finite must stay so; a query of next to nothing is nothing.
    scaled.step = if scaled.norm.is_finite() { step } else { f32::NAN };
    let inverse = if scaled.top > 1e-30 { step.recip() } else { 0.0 };
    // SAFETY: the caller's promise; every access is to 32 columns of arrays that have `dim`.
    unsafe {
        let inverse = _mm256_set1_ps(inverse);
        // Packing works within 128 bits: fours of columns 0, 2, 4, 6, 1, 3, 5, 7.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let mut lost = _mm256_setzero_ps();
        for c in (0..dim).step_by(GROUP) {
            let mut n = [_mm256_setzero_si256(); 4];
            for i in 0..4 {
                let values = scaled.values[c + EIGHT * i..][..EIGHT].as_ptr();
                let x = _mm256_mul_ps(_mm256_loadu_ps(values), inverse);
                n[i] = _mm256_cvtps_epi32(x);
                lost = _mm256_add_ps(lost, _mm256_sub_ps(x, _mm256_cvtepi32_ps(n[i])));
            }
            let pairs = [_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3])];
            if wide {
                for i in 0..2 {
                    // Quarters 0, 2, 1, 3 of the columns. Then the same within fours.
                    let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs[i]);
                    let x = _mm256_shufflelo_epi16::<0b11_01_10_00>(x);
                    let x = _mm256_shufflehi_epi16::<0b11_01_10_00>(x);
                    let to = scaled.words[c / 4 + 4 * i..][..4].as_mut_ptr();
                    _mm256_storeu_si256(to.cast(), x);
                }
            } else {
                let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(pairs[0], pairs[1]), order);
                _mm256_storeu_si256(scaled.bytes[c / 4..][..8].as_mut_ptr().cast(), bytes);
            }
        }
        scaled.rest += lanes(lost) * middle * step;
    }
}
