//! Q8_0 products: a vector holds a block of one column for one row. Each block of weights is prepared once for four
//! rows, each block of activations read once for two columns. A single row has a loop of its own: it waits for memory,
//! not for arithmetic.
//!
//! Products are of the weights' absolute values, which may be 128, with activations that took over their signs: their
//! sums in pairs fit 16 bits, because activations are at most 127.

use std::arch::x86_64::*;

use super::super::lanes;
use super::Avx2;
use crate::q8_0::{BLOCK, CODES, Pair, Product, SUMS};

/// Bytes that a stream of weights is asked for ahead: what memory delivers in its latency.
const AHEAD: usize = 1024;
/// Pairs of rows that share a block of weights.
const PAIRS: usize = 2;
/// Columns that share a block of activations: with four rows 8 accumulators, half of the registers.
const COLUMNS: usize = 2;

impl Avx2 {
    pub(crate) fn q8_0_matmul(self, product: &Product<'_>, out: &mut [&mut [f32]]) {
        // SAFETY: `self` is the proof that the instructions exist.
        unsafe { matmul(product, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul(product: &Product<'_>, out: &mut [&mut [f32]]) {
    if let [out] = out {
        for (out, column) in out.iter_mut().zip(product.columns.clone()) {
            *out = single(product, column);
        }
        return;
    }
    let columns = product.columns.len();
    let mut column = 0;
    while column < columns {
        let wide = columns - column >= COLUMNS;
        let mut pair = product.pairs.start;
        while pair < product.pairs.end {
            let (at, left) = (2 * (pair - product.pairs.start), product.pairs.end - pair);
            let out = &mut out[at..];
            pair += match (wide, left) {
                (true, PAIRS..) => tile::<PAIRS, COLUMNS>(product, pair, column, out),
                (true, _) => tile::<1, COLUMNS>(product, pair, column, out),
                (false, PAIRS..) => tile::<PAIRS, 1>(product, pair, column, out),
                (false, _) => tile::<1, 1>(product, pair, column, out),
            };
        }
        column += if wide { COLUMNS } else { 1 };
    }
}

/// `P` pairs of rows times `C` columns, to the first rows of `out` at `column`. Answers with `P`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
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
    let rows: [&[Pair]; P] = std::array::from_fn(|p| {
        let first = (pair + p) * blocks;
        &product.activations.pairs[first..first + blocks]
    });
    let mut acc = [[[_mm256_setzero_ps(); C]; 2]; P];
    for b in 0..blocks {
        let mut codes = [_mm256_setzero_si256(); C];
        let mut scale = [_mm256_setzero_ps(); C];
        for c in 0..C {
            (codes[c], scale[c]) = block(&weights[c][b]);
        }
        for p in 0..P {
            let pair = &rows[p][b];
            let both = [row(pair, 0), row(pair, 1)];
            for r in 0..2 {
                let (x, scales) = both[r];
                for c in 0..C {
                    let sum = _mm256_cvtepi32_ps(products(codes[c], x));
                    acc[p][r][c] = _mm256_fmadd_ps(_mm256_mul_ps(scale[c], scales), sum, acc[p][r][c]);
                }
            }
        }
    }
    for (p, acc) in acc.iter().enumerate() {
        for (r, acc) in acc.iter().enumerate() {
            // The last pair may have one row only.
            if let Some(out) = out.get_mut(2 * p + r) {
                for (c, acc) in acc.iter().enumerate() {
                    out[column + c] = lanes(*acc);
                }
            }
        }
    }
    P
}

/// The first row of the first pair times one column: weights are read as one stream, which is what memory is
/// fastest at.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn single(product: &Product<'_>, column: usize) -> f32 {
    let blocks = product.activations.blocks;
    let weights = &product.weights[column * blocks..][..blocks];
    let pairs = &product.activations.pairs[product.pairs.start * blocks..][..blocks];
    let mut acc = _mm256_setzero_ps();
    for (weights, pair) in weights.iter().zip(pairs) {
        _mm_prefetch::<_MM_HINT_T0>(weights.as_ptr().wrapping_add(AHEAD).cast());
        let ((codes, scale), (x, scales)) = (block(weights), row(pair, 0));
        let sum = _mm256_cvtepi32_ps(products(codes, x));
        acc = _mm256_fmadd_ps(_mm256_mul_ps(scale, scales), sum, acc);
    }
    lanes(acc)
}

/// A block's codes and its scale.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn block(block: &[u8; BLOCK]) -> (__m256i, __m256) {
    // SAFETY: the block has 32 codes behind its scale.
    let codes = unsafe { _mm256_loadu_si256(block[2..].as_ptr().cast()) };
    let scale = i32::from(u16::from_le_bytes([block[0], block[1]]));
    (
        codes,
        _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(scale))),
    )
}

/// One row's signed codes and its scales.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn row(pair: &Pair, r: usize) -> (__m256i, __m256) {
    let (codes, scales) = (
        &pair.codes[r * CODES..][..CODES],
        &pair.scales[r * SUMS..][..SUMS],
    );
    // SAFETY: 32 codes and 8 scales.
    let (codes, scales) = unsafe {
        (
            _mm256_loadu_si256(codes.as_ptr().cast()),
            _mm256_loadu_ps(scales.as_ptr()),
        )
    };
    (_mm256_xor_si256(codes, _mm256_set1_epi8(-128)), scales)
}

/// Sums of four products each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products(weights: __m256i, x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}
