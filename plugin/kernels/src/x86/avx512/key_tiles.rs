//! Logits of integer keys that lie in tiles: a vector of 64 bytes is four values of sixteen keys, as `vpdpbusd` takes
//! them. Otherwise as `keys`.

use std::arch::x86_64::*;

use super::super::query::{self, COLUMNS, Query};
use super::codes::{Bits, Int2, Int3, Int4};
use super::keys::dot;
use super::{Avx512, bytes};
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, KeyCodes};
use crate::layout::TILE;
use crate::simd::Ahead;

/// One group of a tile's sixteen keys as columns: lane `r` of column `c` has codes `4c` to `4c + 3` of key `r`.
pub(super) trait Tiled {
    const CODEC: Codec;

    /// # Safety
    /// `group` must be valid for reading sixteen times the bytes of a group, and the CPU must have the instructions.
    unsafe fn columns(group: *const u8) -> [__m512i; COLUMNS];
}

pub(super) struct Int8;

impl Tiled for Int8 {
    const CODEC: Codec = Codec::Int8;

    #[inline(always)]
    unsafe fn columns(group: *const u8) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise: eight vectors.
        unsafe {
            let mut out = [_mm512_setzero_si512(); COLUMNS];
            for c in 0..COLUMNS {
                out[c] = _mm512_loadu_si512(group.add(64 * c).cast());
            }
            out
        }
    }
}

impl<B: Bits> Tiled for B {
    const CODEC: Codec = B::CODEC;

    #[inline(always)]
    unsafe fn columns(group: *const u8) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise: as many vectors as a group has words.
        unsafe {
            let mut words = [_mm512_setzero_si512(); 4];
            for w in 0..B::CODEC.group_bytes(GROUP) / 4 {
                words[w] = _mm512_loadu_si512(group.add(64 * w).cast());
            }
            B::codes(words)
        }
    }
}

/// Makes the scores of all whole tiles. Returns their rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn score(job: &mut KeyCodes<'_>) -> usize {
    match (job.codec, query::prepare(job, bytes)) {
        (Codec::Int8, _) => heads::<Int8, 2>(job),
        (Codec::Int4, 1) => heads::<Int4, 1>(job),
        (Codec::Int3, 1) => heads::<Int3, 1>(job),
        (Codec::Int2, 1) => heads::<Int2, 1>(job),
        (Codec::Int4, _) => heads::<Int4, 2>(job),
        (Codec::Int3, _) => heads::<Int3, 2>(job),
        (Codec::Int2, _) => heads::<Int2, 2>(job),
        (Codec::F32 | Codec::F16 | Codec::Bf16 | Codec::Fp8, _) => {}
    }
    job.keys.len() / job.codec.row_bytes(job.heads.k_dim) / TILE * TILE
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
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
        // 64 bytes of parameters each; `g` is one of the queries' groups; the slices stored to have sixteen values.
        unsafe {
            let mut acc = [_mm512_setzero_ps(); H];
            for g in 0..groups {
                ahead.ask(Avx512(()), t * groups + g);
                let (scale, zero) = parameters(tile.add(params + 64 * g));
                let columns = G::columns(tile.add(g * group_bytes));
                for h in 0..H {
                    let (sum, rest) = queries[h].sums(g);
                    let dot = dot(&columns, queries[h].group(g));
                    let dot = _mm512_add_ps(dot, _mm512_set1_ps(rest));
                    acc[h] = _mm512_fmadd_ps(dot, scale, acc[h]);
                    acc[h] = _mm512_fmadd_ps(zero, _mm512_set1_ps(sum), acc[h]);
                }
            }
            for h in 0..H {
                let dots = _mm512_mul_ps(acc[h], _mm512_set1_ps(queries[h].step()));
                let out = &mut job.scores[(first + h) * BLOCK + t * TILE..][..TILE];
                _mm512_storeu_ps(out.as_mut_ptr(), dots);
            }
        }
    }
}

/// A group's scales and zeros of a tile's sixteen rows.
///
/// # Safety
/// `at` must be valid for reading 64 bytes, and the CPU must have the instructions.
#[inline(always)]
pub(super) unsafe fn parameters(at: *const u8) -> (__m512, __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        (
            _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
            _mm512_cvtph_ps(_mm256_loadu_si256(at.add(32).cast())),
        )
    }
}
