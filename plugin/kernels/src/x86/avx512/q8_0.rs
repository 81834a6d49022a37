//! Q8_0 products: a vector holds a block of one column for two rows, so that each row's eight lanes add in the
//! order of an AVX2 register. Each block of weights is read once for eight rows. A single row has vectors of half
//! the width: it waits for memory, not for arithmetic.

use std::arch::x86_64::*;

use half::f16;

use super::super::lanes;
use super::Avx512;
use crate::q8_0::{BLOCK, CODES, Product};

/// Bytes that a stream of weights is asked for ahead: what memory delivers in its latency.
const AHEAD: usize = 2048;
/// Pairs of rows that share a block of weights.
const PAIRS: usize = 4;
/// Columns that share a block of activations: 8 accumulators, which hide the latency of a multiply-add.
const COLUMNS: usize = 2;

impl Avx512 {
    pub(crate) fn q8_0_matmul(self, product: &Product<'_>, out: &mut [&mut [f32]]) {
        // SAFETY: `self` is the proof that the instructions exist.
        unsafe { matmul(product, out) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn matmul(product: &Product<'_>, out: &mut [&mut [f32]]) {
    let columns = product.columns.len();
    let mut column = 0;
    if let [out] = out {
        for (out, column) in out.iter_mut().zip(product.columns.clone()) {
            *out = single(product, column);
        }
        return;
    }
    while column < columns {
        let wide = columns - column >= COLUMNS;
        let mut pair = product.pairs.start;
        while pair < product.pairs.end {
            let (at, left) = (2 * (pair - product.pairs.start), product.pairs.end - pair);
            let out = &mut out[at..];
            pair += match (wide, left) {
                (true, PAIRS..) => tile::<PAIRS, COLUMNS>(product, pair, column, out),
                (true, 2..) => tile::<2, COLUMNS>(product, pair, column, out),
                (true, _) => tile::<1, COLUMNS>(product, pair, column, out),
                (false, PAIRS..) => tile::<PAIRS, 1>(product, pair, column, out),
                (false, 2..) => tile::<2, 1>(product, pair, column, out),
                (false, _) => tile::<1, 1>(product, pair, column, out),
            };
        }
        column += if wide { COLUMNS } else { 1 };
    }
}

/// `P` pairs of rows times `C` columns, to the first rows of `out` at `column`. Answers with `P`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn tile<const P: usize, const C: usize>(
    product: &Product<'_>,
    pair: usize,
    column: usize,
    out: &mut [&mut [f32]],
) -> usize {
    let blocks = product.activations.blocks;
    let weights: [&[[u8; BLOCK]]; C] = std::array::from_fn(|c| {
        let first = (product.columns.start + column + c) * blocks;
        &product.weights[first..first + blocks]
    });
    let rows: [&[_]; P] = std::array::from_fn(|p| {
        let first = (pair + p) * blocks;
        &product.activations.pairs[first..first + blocks]
    });
    let offset = _mm512_set1_epi8(-128);
    let mut acc = [[_mm512_setzero_ps(); C]; P];
    for b in 0..blocks {
        // What adding 128 to every code of the activations adds to each sum of four products, negated.
        let mut codes = [_mm512_setzero_si512(); C];
        let mut excess = [_mm512_setzero_si512(); C];
        let mut scale = [_mm512_setzero_ps(); C];
        for c in 0..C {
            let block = &weights[c][b];
            // SAFETY: the block has 32 codes behind its scale.
            let half = unsafe { _mm256_loadu_si256(block[2..].as_ptr().cast()) };
            codes[c] = _mm512_broadcast_i64x4(half);
            let zero = _mm512_setzero_si512();
            excess[c] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, codes[c]));
            scale[c] = _mm512_set1_ps(f16::from_le_bytes([block[0], block[1]]).to_f32());
        }
        for p in 0..P {
            let row = &rows[p][b];
            // SAFETY: arrays of exactly 64 bytes.
            let (x, scales) = unsafe {
                (
                    _mm512_loadu_si512(row.codes.as_ptr().cast()),
                    _mm512_loadu_ps(row.scales.as_ptr()),
                )
            };
            for c in 0..C {
                let sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(excess[c], x, codes[c]));
                acc[p][c] = _mm512_fmadd_ps(_mm512_mul_ps(scale[c], scales), sum, acc[p][c]);
            }
        }
    }
    for (p, acc) in acc.iter().enumerate() {
        for (c, acc) in acc.iter().enumerate() {
            let halves = [_mm512_castps512_ps256(*acc), _mm512_extractf32x8_ps::<1>(*acc)];
            for (half, sum) in halves.into_iter().enumerate() {
                // The last pair may have one row only.
                if let Some(out) = out.get_mut(2 * p + half) {
                    out[column + c] = lanes(sum);
                }
            }
        }
    }
    P
}

/// The first row of the first pair times one column: weights are read as one stream, which is what memory is
/// fastest at.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn single(product: &Product<'_>, column: usize) -> f32 {
    let blocks = product.activations.blocks;
    let weights = &product.weights[column * blocks..][..blocks];
    let row = &product.activations.pairs[product.pairs.start * blocks..][..blocks];
    let offset = _mm256_set1_epi8(-128);
    let mut acc = _mm256_setzero_ps();
    for (block, row) in weights.iter().zip(row) {
        // SAFETY: the first row's 32 codes, its scale eight times, and the block's 32 codes behind its scale. The
        // prefetch accesses nothing.
        let (x, scales, codes) = unsafe {
            _mm_prefetch::<_MM_HINT_T0>(block.as_ptr().wrapping_add(AHEAD).cast());
            (
                _mm256_loadu_si256(row.codes.as_ptr().cast()),
                _mm256_loadu_ps(row.scales.as_ptr()),
                _mm256_loadu_si256(block[2..].as_ptr().cast()),
            )
        };
        // Both signs: what the other way of adding 128 would need is a sum over the weights.
        let x = _mm256_xor_si256(x, offset);
        let sum = _mm256_dpbusd_epi32(
            _mm256_setzero_si256(),
            _mm256_abs_epi8(codes),
            _mm256_sign_epi8(x, codes),
        );
        let scale = _mm256_set1_ps(f16::from_le_bytes([block[0], block[1]]).to_f32());
        acc = _mm256_fmadd_ps(_mm256_mul_ps(scale, scales), _mm256_cvtepi32_ps(sum), acc);
    }
    lanes(acc)
}

const _: () = assert!(CODES == 32 && BLOCK == 34);
