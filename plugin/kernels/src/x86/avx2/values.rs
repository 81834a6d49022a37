//! Weighted sums of integer values: a vector is four rows of eight columns, as int8 and int4 lie in tiles. Rows of int3 and
//! int2 are brought into the order of int4 tiles first (see `value_rows`).
//!
//! A row's weight times its group's scale is rounded relative to the block's largest (see `weights`), and multiplied with
//! codes as an integer; zeros contribute Σ weight · zero a group. Codes of four bits and weights of a byte go to
//! `vpmaddubsw`, and a tile's sums fit 16 bits; codes of eight are widened to 16 bits first, for `vpmaddwd`.

use std::arch::x86_64::*;

use super::super::lanes;
use super::super::weights::{BYTE, PLACES, WORD};
use super::value_rows::{Int2, Int3};
use super::{Avx2, largest, parameters};
use crate::Layout;
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, ValueCodes};
use crate::layout::TILE;
use crate::simd::Ahead;

/// Rows, and columns, of a vector.
pub(super) const EIGHT: usize = 8;
pub(super) const CHUNKS: usize = BLOCK / EIGHT;
/// Tiles of a block.
const TILES: usize = BLOCK / TILE;

/// A head's weights of a block.
pub(super) type Block = [__m256; CHUNKS];
/// Room for one tile's group in the order of int4.
pub(super) type Buffer = [__m256i; 8];

/// Where codes lie and how they are multiplied and added. The CPU must have the instructions, which is part of every promise
/// below, as is that `block` is valid for reading the tiles at hand.
pub(super) trait Group {
    const CODEC: Codec;
    /// Rounded weights of four rows.
    type Fours: Copy + Default;
    /// Where each of the two vectors of columns that `add` adds to begins in a group's columns, for both parts.
    const AT: [[usize; 2]; 2];

    /// Scales and zeros of group `g` of rows `8c` to `8c + 7`.
    ///
    /// # Safety
    /// See above.
    #[inline(always)]
    unsafe fn parameters(block: *const u8, dim: usize, c: usize, g: usize) -> (__m256, __m256) {
        let (size, codes) = (
            TILE * Self::CODEC.row_bytes(dim),
            TILE * Self::CODEC.code_bytes(dim),
        );
        // SAFETY: the caller's promise; behind a tile's codes are 64 bytes of parameters a group.
        unsafe { parameters(block.add(c / 2 * size + codes + 64 * g + 16 * (c % 2))) }
    }

    /// Codes of group `g` of tile `t`, as `add` reads them.
    ///
    /// # Safety
    /// See above.
    #[inline(always)]
    unsafe fn group(block: *const u8, dim: usize, t: usize, g: usize, _: &mut Buffer) -> *const u8 {
        let size = TILE * Self::CODEC.row_bytes(dim);
        // SAFETY: the caller's promise; a tile begins with its codes, group by group.
        unsafe { block.add(t * size + g * TILE * Self::CODEC.group_bytes(GROUP)) }
    }

    /// Rounds a block's weights, none of them negative and none above `top`. Returns their step; corrects `zeros`, whose
    /// lanes' sum is added to every column, for what rounding changed on average.
    ///
    /// # Safety
    /// See above.
    unsafe fn round(scaled: &Block, top: f32, zeros: &mut __m256, to: &mut [Self::Fours; BLOCK / 4]) -> f32;

    /// Adds tile `t`'s rows to each head's sums of two vectors of columns: those of `part`.
    ///
    /// # Safety
    /// `group` must be what `group` returned.
    unsafe fn add<const H: usize>(
        group: *const u8,
        part: usize,
        weights: &[[Self::Fours; BLOCK / 4]; H],
        t: usize,
        sums: &mut [[__m256i; 2]; H],
    );
}

struct Int8;
struct Int4;

impl Group for Int4 {
    const CODEC: Codec = Codec::Int4;
    type Fours = i32;
    const AT: [[usize; 2]; 2] = NIBBLES;

    #[inline(always)]
    unsafe fn round(scaled: &Block, top: f32, zeros: &mut __m256, to: &mut [i32; BLOCK / 4]) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { round(scaled, top, 7.5, zeros, to) }
    }

    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        part: usize,
        weights: &[[i32; BLOCK / 4]; H],
        t: usize,
        sums: &mut [[__m256i; 2]; H],
    ) {
        // SAFETY: the caller's promise: sixteen times sixteen bytes.
        unsafe { add_nibbles(group, part, weights, t, sums) }
    }
}

/// Low and high nibbles of the same bytes.
pub(super) const NIBBLES: [[usize; 2]; 2] = [[0, 16], [8, 24]];

/// Weights of one byte, for codes of so many levels that `middle` is half of the largest: see `Group::round`.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
pub(super) unsafe fn round(
    scaled: &Block,
    top: f32,
    middle: f32,
    zeros: &mut __m256,
    to: &mut [i32; BLOCK / 4],
) -> f32 {
    // SAFETY: the caller's promise; eight places are left, and 32 bytes of weights.
    unsafe {
        let (inverse, step) = (_mm256_set1_ps(BYTE / top), top / BYTE);
        let (mut exact, mut rounded) = (_mm256_setzero_ps(), _mm256_setzero_si256());
        let mut w = [_mm256_setzero_si256(); CHUNKS];
        for c in 0..CHUNKS {
            let place = _mm256_loadu_ps(PLACES[EIGHT * c..].as_ptr());
            w[c] = _mm256_cvttps_epi32(_mm256_fmadd_ps(scaled[c], inverse, place));
            exact = _mm256_add_ps(exact, scaled[c]);
            rounded = _mm256_add_epi32(rounded, w[c]);
        }
        // Packing works within 128 bits: fours of rows 0, 2, 4, 6, 1, 3, 5, 7.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        for i in 0..2 {
            let (a, b) = (
                _mm256_packs_epi32(w[4 * i], w[4 * i + 1]),
                _mm256_packs_epi32(w[4 * i + 2], w[4 * i + 3]),
            );
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order);
            _mm256_storeu_si256(to[EIGHT * i..][..EIGHT].as_mut_ptr().cast(), bytes);
        }
        let rounded = _mm256_mul_ps(_mm256_cvtepi32_ps(rounded), _mm256_set1_ps(step));
        *zeros = _mm256_fmadd_ps(_mm256_sub_ps(exact, rounded), _mm256_set1_ps(middle), *zeros);
        step
    }
}

/// Adds codes of up to four bits: see `Group::add`.
///
/// # Safety
/// `group` must be valid for reading 256 bytes, and the CPU must have the instructions.
#[inline(always)]
pub(super) unsafe fn add_nibbles<const H: usize>(
    group: *const u8,
    part: usize,
    weights: &[[i32; BLOCK / 4]; H],
    t: usize,
    sums: &mut [[__m256i; 2]; H],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (mask, one) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
        let mut acc = [[_mm256_setzero_si256(); 2]; H];
        for j in 0..4 {
            let x = _mm256_loadu_si256(group.add(64 * j + 32 * part).cast());
            let (low, high) = (
                _mm256_and_si256(x, mask),
                _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask),
            );
            for h in 0..H {
                // At most 4 · 2 · 255 · 15: no overflow.
                let w = _mm256_set1_epi32(weights[h][4 * t + j]);
                acc[h][0] = _mm256_add_epi16(acc[h][0], _mm256_maddubs_epi16(w, low));
                acc[h][1] = _mm256_add_epi16(acc[h][1], _mm256_maddubs_epi16(w, high));
            }
        }
        for h in 0..H {
            for i in 0..2 {
                sums[h][i] = _mm256_add_epi32(sums[h][i], _mm256_madd_epi16(acc[h][i], one));
            }
        }
    }
}

impl Group for Int8 {
    const CODEC: Codec = Codec::Int8;
    /// The first and the third row, then the others, as codes are split.
    type Fours = [i32; 2];
    const AT: [[usize; 2]; 2] = [[0, 8], [16, 24]];

    #[inline(always)]
    unsafe fn round(scaled: &Block, top: f32, _: &mut __m256, to: &mut [[i32; 2]; BLOCK / 4]) -> f32 {
        // SAFETY: the caller's promise; 32 bytes of weights are four fours.
        unsafe {
            let inverse = _mm256_set1_ps(WORD / top);
            let integers = |x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse));
            for c in 0..CHUNKS / 2 {
                let x = _mm256_packs_epi32(integers(scaled[2 * c]), integers(scaled[2 * c + 1]));
                // Packing works within 128 bits: quarters 0, 2, 1, 3 of the rows. Then the same within fours.
                let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(x);
                let x = _mm256_shufflelo_epi16::<0b11_01_10_00>(x);
                let x = _mm256_shufflehi_epi16::<0b11_01_10_00>(x);
                _mm256_storeu_si256(to[4 * c..][..4].as_mut_ptr().cast(), x);
            }
        }
        top / WORD
    }

    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        part: usize,
        weights: &[[[i32; 2]; BLOCK / 4]; H],
        t: usize,
        sums: &mut [[__m256i; 2]; H],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let byte = _mm256_set1_epi16(0xff);
            for j in 0..4 {
                for i in 0..2 {
                    let x = _mm256_loadu_si256(group.add(64 * (4 * part + j) + 32 * i).cast());
                    let (even, odd) = (_mm256_and_si256(x, byte), _mm256_srli_epi16::<8>(x));
                    for h in 0..H {
                        let w = weights[h][4 * t + j];
                        let a = _mm256_madd_epi16(even, _mm256_set1_epi32(w[0]));
                        let b = _mm256_madd_epi16(odd, _mm256_set1_epi32(w[1]));
                        sums[h][i] = _mm256_add_epi32(sums[h][i], _mm256_add_epi32(a, b));
                    }
                }
            }
        }
    }
}

/// Adds all whole tiles to `out`, or as many rows. Returns them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add(job: &mut ValueCodes<'_>) -> usize {
    match (job.codec, job.layout) {
        (Codec::Int8, Layout::ValueTiles) => heads::<Int8>(job),
        (Codec::Int4, Layout::ValueTiles) => heads::<Int4>(job),
        (Codec::Int3, Layout::Rows) => heads::<Int3>(job),
        (Codec::Int2, Layout::Rows) => heads::<Int2>(job),
        _ => return 0,
    }
    job.values.len() / job.codec.row_bytes(job.heads.v_dim) / TILE * TILE
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn heads<G: Group>(job: &mut ValueCodes<'_>) {
    let mut h = 0;
    while h < job.heads.q_heads {
        // More sums than those of three heads would not stay in registers.
        h += match job.heads.q_heads - h {
            1 => dims::<G, 1>(job, h),
            2 | 4 => dims::<G, 2>(job, h),
            _ => dims::<G, 3>(job, h),
        };
    }
}

/// The usual dimensions are known to the compiler.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dims<G: Group, const H: usize>(job: &mut ValueCodes<'_>, first: usize) -> usize {
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
unsafe fn run<G: Group, const H: usize>(job: &mut ValueCodes<'_>, first: usize, dim: usize) {
    let (groups, size) = (dim / GROUP, TILE * G::CODEC.row_bytes(dim));
    let tiles = (job.values.len() / size).min(TILES);
    let ahead = match first {
        0 => Ahead::new(job.ahead, tiles * groups),
        _ => Ahead::NOTHING,
    };
    let block = job.values[..tiles * size].as_ptr();
    // SAFETY: the caller's promise; `block` has so many tiles of `groups` groups; the slices loaded from have eight values.
    unsafe {
        for g in 0..groups {
            let mut params_of = [(_mm256_setzero_ps(), _mm256_setzero_ps()); CHUNKS];
            for c in 0..2 * tiles {
                params_of[c] = G::parameters(block, dim, c, g);
            }
            let mut buffers = [[_mm256_setzero_si256(); 8]; TILES];
            let mut codes = [block; TILES];
            for t in 0..tiles {
                codes[t] = G::group(block, dim, t, g, &mut buffers[t]);
            }
            let mut rounded = [[G::Fours::default(); BLOCK / 4]; H];
            let mut finish = [(0.0, 0.0); H];
            for h in 0..H {
                let mut scaled = [_mm256_setzero_ps(); CHUNKS];
                let (mut zeros, mut top) = (_mm256_setzero_ps(), _mm256_setzero_ps());
                let weights = &job.weights[(first + h) * BLOCK..][..BLOCK];
                for c in 0..2 * tiles {
                    let w = _mm256_loadu_ps(weights[EIGHT * c..][..EIGHT].as_ptr());
                    let (scale, zero) = params_of[c];
                    scaled[c] = _mm256_mul_ps(w, scale);
                    top = _mm256_max_ps(scaled[c], top);
                    zeros = _mm256_fmadd_ps(w, zero, zeros);
                }
                // Less than the least adds nothing, and its inverse would overflow.
                let top = largest(top).max(1e-30);
                let step = G::round(&scaled, top, &mut zeros, &mut rounded[h]);
                finish[h] = (step, lanes(zeros));
            }
            for part in 0..2 {
                let mut sums = [[_mm256_setzero_si256(); 2]; H];
                for t in 0..tiles {
                    if part == 0 {
                        ahead.ask(Avx2(()), g * tiles + t);
                    }
                    G::add(codes[t], part, &rounded, t, &mut sums);
                }
                for h in 0..H {
                    let (step, zero) = finish[h];
                    for i in 0..2 {
                        let at = (first + h) * dim + g * GROUP + G::AT[part][i];
                        let out = job.out[at..][..EIGHT].as_mut_ptr();
                        let x = _mm256_cvtepi32_ps(sums[h][i]);
                        let x = _mm256_fmadd_ps(x, _mm256_set1_ps(step), _mm256_set1_ps(zero));
                        _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), x));
                    }
                }
            }
        }
    }
}
