//! Weighted sums of int8 and int4 values that lie in tiles: a vector of 64 bytes is four rows of sixteen columns, as
//! `vpdpbusd` takes them. Weights are rounded as in `values8` and `values4`.

use std::arch::x86_64::*;

use super::Avx512;
use super::codes::{Int4, ROWS};
use super::key_tiles::parameters;
use super::values::{CHUNKS, Group, Scaled, finish};
use super::values4::Small;
use super::values8::Int8;
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, ValueCodes};
use crate::layout::TILE;
use crate::simd::Ahead;

const _: () = assert!(TILE == ROWS);

/// How a tile's codes are multiplied and added.
trait Tiled: Group {
    /// A head's rounded weights of four rows, as often as a vector takes them.
    type Fours: Copy;

    /// The weights of the tile's four fours.
    ///
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn fours(weights: Self::Weights) -> [Self::Fours; 4];

    /// Adds the four rows `j` of a tile's group to each head's sums.
    ///
    /// # Safety
    /// `group` must be valid for reading sixteen times a group's bytes, and the CPU must have the instructions.
    unsafe fn add<const H: usize>(
        group: *const u8,
        j: usize,
        weights: [Self::Fours; H],
        sums: &mut [[__m512i; 4]; H],
    );

    /// Each column's sum, in order.
    ///
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn columns(sums: [__m512i; 4]) -> [__m512i; 2];
}

impl Tiled for Small<Int4, 15> {
    type Fours = i32;

    #[inline(always)]
    unsafe fn fours(weights: __m128i) -> [i32; 4] {
        let mut out = [0; 4];
        // SAFETY: the array has the sixteen bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), weights) };
        out
    }

    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        j: usize,
        weights: [i32; H],
        sums: &mut [[__m512i; 4]; H],
    ) {
        // SAFETY: the caller's promise: four vectors.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let x = _mm512_loadu_si512(group.add(64 * j).cast());
            // Low nibbles are columns 0 to 15, high ones 16 to 31.
            let (low, high) = (
                _mm512_and_si512(x, mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask),
            );
            for h in 0..H {
                let w = _mm512_set1_epi32(weights[h]);
                sums[h][0] = _mm512_dpbusd_epi32(sums[h][0], w, low);
                sums[h][1] = _mm512_dpbusd_epi32(sums[h][1], w, high);
            }
        }
    }

    #[inline(always)]
    unsafe fn columns(sums: [__m512i; 4]) -> [__m512i; 2] {
        [sums[0], sums[1]]
    }
}

impl Tiled for Int8 {
    /// The upper bytes of four rows, then the lower ones, which are signed.
    type Fours = [i32; 2];

    #[inline(always)]
    unsafe fn fours(weights: __m256i) -> [[i32; 2]; 4] {
        let (mut upper, mut lower) = ([0; 4], [0; 4]);
        // SAFETY: the caller's promise; the arrays have the sixteen bytes.
        unsafe {
            // w = 256 · upper + lower, lower from −128 to 127.
            let up = _mm256_srai_epi16::<8>(_mm256_add_epi16(weights, _mm256_set1_epi16(128)));
            _mm_storeu_si128(upper.as_mut_ptr().cast(), _mm256_cvtepi16_epi8(up));
            _mm_storeu_si128(lower.as_mut_ptr().cast(), _mm256_cvtepi16_epi8(weights));
        }
        let mut out = [[0; 2]; 4];
        for j in 0..4 {
            out[j] = [upper[j], lower[j]];
        }
        out
    }

    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        j: usize,
        weights: [[i32; 2]; H],
        sums: &mut [[__m512i; 4]; H],
    ) {
        // SAFETY: the caller's promise: eight vectors, of columns 0 to 15 and then of 16 to 31.
        unsafe {
            let low = _mm512_loadu_si512(group.add(64 * j).cast());
            let high = _mm512_loadu_si512(group.add(64 * (4 + j)).cast());
            for h in 0..H {
                for b in 0..2 {
                    let w = _mm512_set1_epi32(weights[h][b]);
                    sums[h][b] = _mm512_dpbusd_epi32(sums[h][b], low, w);
                    sums[h][2 + b] = _mm512_dpbusd_epi32(sums[h][2 + b], high, w);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn columns(sums: [__m512i; 4]) -> [__m512i; 2] {
        let [a, b, c, d] = sums;
        // SAFETY: the caller's promise. At most 64 · 255 · 32639: no overflow.
        unsafe {
            [
                _mm512_add_epi32(_mm512_slli_epi32::<8>(a), b),
                _mm512_add_epi32(_mm512_slli_epi32::<8>(c), d),
            ]
        }
    }
}

/// Adds all whole tiles to `out`. Returns their rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn add(job: &mut ValueCodes<'_>) -> usize {
    match job.codec {
        Codec::Int8 => heads::<Int8>(job),
        Codec::Int4 => heads::<Small<Int4, 15>>(job),
        _ => return 0,
    }
    job.values.len() / job.codec.row_bytes(job.heads.v_dim) / TILE * TILE
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn heads<G: Tiled>(job: &mut ValueCodes<'_>) {
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
fn dims<G: Tiled, const H: usize>(job: &mut ValueCodes<'_>, first: usize) -> usize {
    // SAFETY: this function has the instructions.
    unsafe {
        match job.heads.v_dim {
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
unsafe fn run<G: Tiled, const H: usize>(job: &mut ValueCodes<'_>, first: usize, dim: usize) {
    let (groups, size) = (dim / GROUP, TILE * G::CODEC.row_bytes(dim));
    let (params, group_bytes) = (
        TILE * G::CODEC.code_bytes(dim),
        TILE * G::CODEC.group_bytes(GROUP),
    );
    let tiles = (job.values.len() / size).min(CHUNKS);
    let ahead = match first {
        0 => Ahead::new(job.ahead, tiles * groups),
        _ => Ahead::NOTHING,
    };
    let tile = |t: usize| job.values[t * size..][..size].as_ptr();
    // SAFETY: the caller's promise; a tile has `size` bytes: the codes of `groups` groups of sixteen rows, then 64 bytes of
    // parameters each; the slices loaded from have sixteen values.
    unsafe {
        for g in 0..groups {
            let mut scaled: [Scaled; H] = [[_mm512_setzero_ps(); CHUNKS]; H];
            let mut zeros = [_mm512_setzero_ps(); H];
            for t in 0..tiles {
                let (scale, zero) = parameters(tile(t).add(params + 64 * g));
                for h in 0..H {
                    let weights = &job.weights[(first + h) * BLOCK + t * TILE..][..TILE];
                    let w = _mm512_loadu_ps(weights.as_ptr());
                    scaled[h][t] = _mm512_mul_ps(w, scale);
                    zeros[h] = _mm512_fmadd_ps(w, zero, zeros[h]);
                }
            }
            let mut rounded = [([G::nothing(); CHUNKS], 0.0); H];
            for h in 0..H {
                rounded[h] = G::round(&scaled[h], &mut zeros[h]);
            }
            let mut sums = [[_mm512_setzero_si512(); 4]; H];
            for t in 0..tiles {
                ahead.ask(Avx512(()), g * tiles + t);
                let group = tile(t).add(g * group_bytes);
                let mut fours = [G::fours(G::nothing()); H];
                for h in 0..H {
                    fours[h] = G::fours(rounded[h].0[t]);
                }
                for j in 0..4 {
                    let mut weights = [fours[0][j]; H];
                    for h in 1..H {
                        weights[h] = fours[h][j];
                    }
                    <G as Tiled>::add(group, j, weights, &mut sums);
                }
            }
            for h in 0..H {
                let zero = _mm512_reduce_add_ps(zeros[h]);
                let out = &mut job.out[(first + h) * dim + g * GROUP..][..GROUP];
                finish(<G as Tiled>::columns(sums[h]), rounded[h].1, zero, out);
            }
        }
    }
}
