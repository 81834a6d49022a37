//! Sums of int8 values that lie row by row: weights in 15 bits, codes widened to 16, a pair of rows side by side, so that `vpdpwssd`
//! multiplies and adds both. The rounding is 2^-16 of the block's largest contribution.

use std::arch::x86_64::*;

use super::super::weights::WORD;
use super::codes::ROWS;
use super::values::{CHUNKS, Group, MOST, Scaled, halved, top};
use crate::codec::Codec;

pub(super) struct Int8;

impl Group for Int8 {
    const CODEC: Codec = Codec::Int8;
    /// 16 bits a row.
    type Weights = __m256i;
    /// Columns 0, 2, 4, 6 and 16, 18, 20, 22 of two pairs of rows, 128 bits each; 1, 3, …; and those 8 to the right of
    /// both.
    const SUMS: usize = 4;

    #[inline(always)]
    unsafe fn nothing() -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    unsafe fn round(scaled: &Scaled, _: &mut __m512) -> ([__m256i; CHUNKS], f32) {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let top = top(scaled);
            let inverse = _mm512_set1_ps(WORD / top);
            let mut weights = [_mm256_setzero_si256(); CHUNKS];
            for c in 0..CHUNKS {
                weights[c] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(scaled[c], inverse)));
            }
            (weights, top / WORD)
        }
    }

    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        stride: usize,
        weights: [__m256i; H],
        sums: &mut [[__m512i; MOST]; H],
    ) {
        // SAFETY: see above; 32 bytes a row.
        unsafe {
            let byte = _mm512_set1_epi16(0xff);
            for j in 0..ROWS / 4 {
                let at = group.add(4 * j * stride);
                let (a, b) = (two(at, stride), two(at.add(stride), stride));
                // Words are two neighbouring columns of a row; the rows of a pair are side by side.
                let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
                let x = [
                    _mm512_and_si512(low, byte),
                    _mm512_srli_epi16::<8>(low),
                    _mm512_and_si512(high, byte),
                    _mm512_srli_epi16::<8>(high),
                ];
                let pair = 2 * j as i32;
                let index = _mm512_inserti64x4::<1>(_mm512_set1_epi32(pair), _mm256_set1_epi32(pair + 1));
                for h in 0..H {
                    let w = _mm512_permutexvar_epi32(index, _mm512_castsi256_si512(weights[h]));
                    for c in 0..4 {
                        sums[h][c] = _mm512_dpwssd_epi32(sums[h][c], x[c], w);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn columns(sums: [__m512i; MOST]) -> [__m512i; 2] {
        // SAFETY: see above.
        unsafe {
            let (a, b) = (halved(sums[0], sums[1]), halved(sums[2], sums[3]));
            let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
            [
                _mm512_permutexvar_epi32(order, _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b)),
                _mm512_permutexvar_epi32(order, _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b)),
            ]
        }
    }
}

/// 32 bytes of a row, and of the second one after it.
///
/// # Safety
/// `at` must be valid for reading both, and the CPU must have the instructions.
#[inline(always)]
unsafe fn two(at: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_castsi256_si512(_mm256_loadu_si256(at.cast()));
        _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(at.add(2 * stride).cast()))
    }
}
