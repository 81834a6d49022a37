//! Sums of values of four bits or fewer: weights are unsigned bytes, codes signed ones, four rows side by side, so
//! that `vpdpbusd` multiplies and adds them.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::super::query::COLUMNS;
use super::super::weights::{BYTE, PLACES};
use super::codes::{Bits, ROWS, interleave};
use super::values::{CHUNKS, Group, MOST, Scaled, halved, top};
use crate::codec::Codec;

/// Codes from 0 to `LEVELS`.
pub(super) struct Small<B: Bits, const LEVELS: u8>(PhantomData<B>);

impl<B: Bits, const LEVELS: u8> Group for Small<B, LEVELS> {
    const CODEC: Codec = B::CODEC;
    /// A byte a row.
    type Weights = __m128i;
    /// Columns `4c` to `4c + 3` of four fours of rows.
    const SUMS: usize = 8;

    #[inline(always)]
    unsafe fn nothing() -> __m128i {
        // SAFETY: the caller's promise.
        unsafe { _mm_setzero_si128() }
    }

    #[inline(always)]
    unsafe fn round(scaled: &Scaled, zeros: &mut __m512) -> ([__m128i; CHUNKS], f32) {
        // SAFETY: the caller's promise, here and below; sixteen places are left.
        unsafe {
            let top = top(scaled);
            let (inverse, step) = (_mm512_set1_ps(BYTE / top), top / BYTE);
            let (mut exact, mut rounded) = (_mm512_setzero_ps(), _mm512_setzero_si512());
            let mut weights = [_mm_setzero_si128(); CHUNKS];
            for c in 0..CHUNKS {
                let place = _mm512_loadu_ps(PLACES[ROWS * c..].as_ptr());
                let w = _mm512_cvttps_epi32(_mm512_fmadd_ps(scaled[c], inverse, place));
                exact = _mm512_add_ps(exact, scaled[c]);
                rounded = _mm512_add_epi32(rounded, w);
                weights[c] = _mm512_cvtepi32_epi8(w);
            }
            let rounded = _mm512_mul_ps(_mm512_cvtepi32_ps(rounded), _mm512_set1_ps(step));
            let middle = _mm512_set1_ps(f32::from(LEVELS) / 2.0);
            *zeros = _mm512_fmadd_ps(_mm512_sub_ps(exact, rounded), middle, *zeros);
            (weights, step)
        }
    }

    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        stride: usize,
        weights: [__m128i; H],
        sums: &mut [[__m512i; MOST]; H],
    ) {
        // SAFETY: see above.
        unsafe {
            let fours = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let mut spread = [_mm512_setzero_si512(); H];
            for h in 0..H {
                spread[h] = _mm512_permutexvar_epi32(fours, _mm512_castsi128_si512(weights[h]));
            }
            let codes = B::codes(interleave(group, stride));
            for c in 0..COLUMNS {
                for h in 0..H {
                    sums[h][c] = _mm512_dpbusd_epi32(sums[h][c], spread[h], codes[c]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn columns(sums: [__m512i; MOST]) -> [__m512i; 2] {
        // SAFETY: see above.
        unsafe {
            let [a, b, c, d, e, f, g, h] = sums;
            [quarters(a, b, c, d), quarters(e, f, g, h)]
        }
    }
}

/// The quarters of each added: those of the first, and so on.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn quarters(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (halved(a, b), halved(c, d));
        let low = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        _mm512_add_epi32(low, _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
    }
}
