//! Logits of integer keys that lie in tiles: a vector is four values of eight keys.
//!
//! A query is rounded to integers of one or two signed bytes (see `query`). With one byte, `vpmaddubsw` multiplies and adds
//! two codes at once, and the eight sums of a group fit 16 bits; with two, or codes of eight bits, codes are widened to 16
//! bits first, for `vpmaddwd`. Scales and zeros apply to whole groups: q·k = Σ_g scale_g · (Σ q·code) + zero_g · Σ q.

use std::arch::x86_64::*;

use super::super::query::{self, COLUMNS, Query};
use super::{Avx2, parameters};
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, KeyCodes};
use crate::layout::TILE;
use crate::simd::Ahead;

/// Keys of a vector.
pub(super) const KEYS: usize = 8;

/// A group of eight of a tile's keys as columns: lane `r` of column `c` has codes `4c` to `4c + 3` of key `r`.
pub(super) trait Tiled {
    const CODEC: Codec;

    /// # Safety
    /// `group` must be valid for reading 32 bytes at each of a group's words of four bytes, which are 64 bytes apart, and
    /// the CPU must have the instructions.
    unsafe fn columns(group: *const u8) -> [__m256i; COLUMNS];
}

pub(super) struct Int8;
pub(super) struct Int4;
pub(super) struct Int3;
pub(super) struct Int2;

/// # Safety
/// As for `columns`, of word `w`.
#[inline(always)]
unsafe fn word(group: *const u8, w: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_si256(group.add(4 * TILE * w).cast()) }
}

impl Tiled for Int8 {
    const CODEC: Codec = Codec::Int8;

    #[inline(always)]
    unsafe fn columns(group: *const u8) -> [__m256i; COLUMNS] {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let mut out = [_mm256_setzero_si256(); COLUMNS];
            for c in 0..COLUMNS {
                out[c] = word(group, c);
            }
            out
        }
    }
}

impl Tiled for Int4 {
    const CODEC: Codec = Codec::Int4;

    #[inline(always)]
    unsafe fn columns(group: *const u8) -> [__m256i; COLUMNS] {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let mut out = [_mm256_setzero_si256(); COLUMNS];
            for w in 0..4 {
                let x = word(group, w);
                // Low nibbles are codes 0 to 15, high ones 16 to 31.
                out[w] = _mm256_and_si256(x, mask);
                out[4 + w] = _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask);
            }
            out
        }
    }
}

impl Tiled for Int2 {
    const CODEC: Codec = Codec::Int2;

    #[inline(always)]
    unsafe fn columns(group: *const u8) -> [__m256i; COLUMNS] {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi8(3);
            let mut out = [_mm256_setzero_si256(); COLUMNS];
            for w in 0..2 {
                let x = word(group, w);
                out[w] = _mm256_and_si256(x, mask);
                out[2 + w] = _mm256_and_si256(_mm256_srli_epi16::<2>(x), mask);
                out[4 + w] = _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask);
                out[6 + w] = _mm256_and_si256(_mm256_srli_epi16::<6>(x), mask);
            }
            out
        }
    }
}

impl Tiled for Int3 {
    const CODEC: Codec = Codec::Int3;

    #[inline(always)]
    unsafe fn columns(group: *const u8) -> [__m256i; COLUMNS] {
        // SAFETY: see above.
        unsafe {
            let (mut out, bit) = (Int2::columns(group), _mm256_set1_epi8(4));
            // Bit c of the high plane's bytes belongs to codes 4c to 4c + 3, in which it is bit 2.
            let high = word(group, 2);
            let high = [
                _mm256_slli_epi16::<2>(high),
                _mm256_slli_epi16::<1>(high),
                high,
                _mm256_srli_epi16::<1>(high),
                _mm256_srli_epi16::<2>(high),
                _mm256_srli_epi16::<3>(high),
                _mm256_srli_epi16::<4>(high),
                _mm256_srli_epi16::<5>(high),
            ];
            for c in 0..COLUMNS {
                out[c] = _mm256_or_si256(out[c], _mm256_and_si256(high[c], bit));
            }
            out
        }
    }
}

/// Makes the scores of all whole tiles. Returns their rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn score(job: &mut KeyCodes<'_>) -> usize {
    match (job.codec, query::prepare(job, words)) {
        (Codec::Int8, _) => heads::<Int8, 2>(job),
        (Codec::Int4, 1) => heads::<Int4, 1>(job),
        (Codec::Int3, 1) => heads::<Int3, 1>(job),
        (Codec::Int2, 1) => heads::<Int2, 1>(job),
        (Codec::Int4, _) => heads::<Int4, 2>(job),
        (Codec::Int3, _) => heads::<Int3, 2>(job),
        (Codec::Int2, _) => heads::<Int2, 2>(job),
        (Codec::F32 | Codec::F16 | Codec::Bf16 | Codec::Fp8, _) => return 0,
    }
    job.keys.len() / job.codec.row_bytes(job.heads.k_dim) / TILE * TILE
}

/// Four integers of 16 bits: the first and the third, then the others, as codes are split.
fn words(x: [i32; 4]) -> [i32; 2] {
    [(x[2] << 16) | (x[0] & 0xffff), (x[3] << 16) | (x[1] & 0xffff)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn heads<G: Tiled, const BYTES: usize>(job: &mut KeyCodes<'_>) {
    let mut h = 0;
    while h < job.heads.q_heads {
        h += match job.heads.q_heads - h {
            1 => dims::<G, BYTES, 1>(job, h),
            2 => dims::<G, BYTES, 2>(job, h),
            3 => dims::<G, BYTES, 3>(job, h),
            _ => dims::<G, BYTES, 4>(job, h),
        };
    }
}

/// The usual dimensions are known to the compiler.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dims<G: Tiled, const BYTES: usize, const H: usize>(job: &mut KeyCodes<'_>, first: usize) -> usize {
    // SAFETY: this function has the instructions.
    unsafe {
        match job.heads.k_dim {
            64 => run::<G, BYTES, H>(job, first, 64),
            128 => run::<G, BYTES, H>(job, first, 128),
            dim => run::<G, BYTES, H>(job, first, dim),
        }
    }
    H
}

/// H heads from `first` on, with queries of so many bytes.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn run<G: Tiled, const BYTES: usize, const H: usize>(
    job: &mut KeyCodes<'_>,
    first: usize,
    dim: usize,
) {
    let (groups, size) = (dim / GROUP, TILE * G::CODEC.row_bytes(dim));
    let (params, group_bytes) = (
        TILE * G::CODEC.code_bytes(dim),
        TILE * G::CODEC.group_bytes(GROUP),
    );
    let mut queries = [Query::<BYTES>::of(job.prepared, groups, first); H];
    for h in 1..H {
        queries[h] = Query::of(job.prepared, groups, first + h);
    }
    let tiles = job.keys.len() / size;
    let ahead = match first {
        0 => Ahead::new(job.ahead, tiles * groups),
        _ => Ahead::NOTHING,
    };
    for t in 0..tiles {
        let tile = job.keys[t * size..][..size].as_ptr();
        // SAFETY: the caller's promise; `tile` has `size` bytes: the codes of `groups` groups of sixteen rows, then
        // 64 bytes of parameters each; `g` is one of the queries' groups; the slices stored to have eight values.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 2]; H];
            for g in 0..groups {
                ahead.ask(Avx2(()), t * groups + g);
                for half in 0..2 {
                    let (scale, zero) = parameters(tile.add(params + 64 * g + 16 * half));
                    let columns = G::columns(tile.add(g * group_bytes + 4 * KEYS * half));
                    let dots = dots::<BYTES, H>(&columns, |h, c| queries[h].group(g)[c]);
                    for h in 0..H {
                        let (sum, rest) = queries[h].sums(g);
                        let dot = _mm256_add_ps(_mm256_cvtepi32_ps(dots[h]), _mm256_set1_ps(rest));
                        let x = _mm256_fmadd_ps(dot, scale, acc[h][half]);
                        acc[h][half] = _mm256_fmadd_ps(zero, _mm256_set1_ps(sum), x);
                    }
                }
            }
            for h in 0..H {
                let step = _mm256_set1_ps(queries[h].step());
                let out = &mut job.scores[(first + h) * BLOCK + t * TILE..][..TILE];
                for half in 0..2 {
                    let out = out[KEYS * half..][..KEYS].as_mut_ptr();
                    _mm256_storeu_ps(out, _mm256_mul_ps(acc[h][half], step));
                }
            }
        }
    }
}

/// Products of a group's columns with H queries, in steps: `q` gives what a query has for a column, in one byte each or in two.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
pub(super) unsafe fn dots<const BYTES: usize, const H: usize>(
    columns: &[__m256i; COLUMNS],
    q: impl Fn(usize, usize) -> [i32; BYTES],
) -> [__m256i; H] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [_mm256_setzero_si256(); H];
        if BYTES == 1 {
            for h in 0..H {
                // At most 8 · 2 · 15 · 127: no overflow.
                for c in 0..COLUMNS {
                    let products = _mm256_maddubs_epi16(columns[c], _mm256_set1_epi32(q(h, c)[0]));
                    acc[h] = _mm256_add_epi16(acc[h], products);
                }
                acc[h] = _mm256_madd_epi16(acc[h], _mm256_set1_epi16(1));
            }
            return acc;
        }
        let byte = _mm256_set1_epi16(0xff);
        for c in 0..COLUMNS {
            let even = _mm256_and_si256(columns[c], byte);
            let odd = _mm256_srli_epi16::<8>(columns[c]);
            for h in 0..H {
                let q = q(h, c);
                // At most 32 · 255 · 32639: no overflow.
                let a = _mm256_madd_epi16(even, _mm256_set1_epi32(q[0]));
                let b = _mm256_madd_epi16(odd, _mm256_set1_epi32(q[BYTES - 1]));
                acc[h] = _mm256_add_epi32(acc[h], _mm256_add_epi32(a, b));
            }
        }
        acc
    }
}
