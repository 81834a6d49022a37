//! x86-64 with vector instructions beyond the baseline. The only place with `unsafe` code.
//!
//! Invariant: an [`Avx2`] or [`Avx512`] is made by its `detect` only, which asks the CPU first.
#![allow(unsafe_code)]

mod avx2;
mod avx512;
mod query;
mod weights;

pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;

/// Asks for each feature; on failure, the error names all that are missing.
macro_rules! detect {
    ($name:literal, $token:expr, $($feature:tt),*) => {{
        let missing: Vec<&str> = [$(($feature, is_x86_feature_detected!($feature))),*]
            .into_iter()
            .filter_map(|(name, found)| (!found).then_some(name))
            .collect();
        if missing.is_empty() {
            Ok($token)
        } else {
            Err(crate::KernelError::Unsupported {
                given: $name,
                missing: missing.join(", "),
            })
        }
    }};
}
use detect;

/// The constants of e^x = 2^n · e^r, with n·ln 2 + r = x and the polynomial of Cephes' `expf` for e^r.
mod exp {
    /// ln 2 in two parts; the high one has 9 bits, so n times it is exact.
    pub(super) const LN2_HIGH: f32 = 0.693_359_4;
    pub(super) const LN2_LOW: f32 = -2.121_944_4e-4;
    pub(super) const POLYNOMIAL: [f32; 6] = [
        1.987_569_1e-4,
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
}

use std::arch::x86_64::*;

use half::f16;

/// A sum's eight lanes, added in the order of [`crate::q8_0`]: `((0+4)+(2+6)) + ((1+5)+(3+7))`.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_extractf128_ps::<1>(x), _mm256_castps256_ps128(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// Asks for every cache line of `bytes`.
#[inline(always)]
fn prefetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        // SAFETY: a prefetch accesses nothing, and every x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// The codes of a full int4 group, values 0 to 15 and 16 to 31.
#[inline]
#[target_feature(enable = "avx2")]
fn codes4(group: &[u8; 16]) -> [__m128i; 2] {
    // SAFETY: the array has the 16 bytes.
    let x = unsafe { _mm_loadu_si128(group.as_ptr().cast()) };
    let mask = _mm_set1_epi8(15);
    [
        _mm_and_si128(x, mask),
        _mm_and_si128(_mm_srli_epi16::<4>(x), mask),
    ]
}

/// The same of int2: byte `i` has values `i`, `8 + i`, `16 + i` and `24 + i`.
#[inline]
#[target_feature(enable = "avx2")]
fn codes2(group: &[u8; 8]) -> [__m128i; 2] {
    let x = u64::from_le_bytes(*group);
    let x = _mm_set_epi64x((x >> 2) as i64, x as i64);
    let mask = _mm_set1_epi8(3);
    [
        _mm_and_si128(x, mask),
        _mm_and_si128(_mm_srli_epi16::<4>(x), mask),
    ]
}

/// The same of int3: the low bits as int2, then a high bit of values `i`, `4 + i`, … in byte `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn codes3(group: &[u8; 12]) -> [__m128i; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *group;
    let [low, low2] = codes2(&[a, b, c, d, e, f, g, h]);
    let high = i32::from_le_bytes([i, j, k, l]);
    let bit = _mm_set1_epi8(4);
    // Bit n of the bytes belongs to values 4n to 4n + 3, in which it is bit 2.
    let first = _mm_srlv_epi32(_mm_set1_epi32(high), _mm_setr_epi32(0, 1, 2, 3));
    let first = _mm_and_si128(_mm_slli_epi32::<2>(first), bit);
    let second = _mm_srlv_epi32(_mm_set1_epi32(high), _mm_setr_epi32(2, 3, 4, 5));
    let second = _mm_and_si128(second, bit);
    [_mm_or_si128(low, first), _mm_or_si128(low2, second)]
}

/// Byte `i` of row `b` to byte `4i + b`.
#[inline]
#[target_feature(enable = "avx2")]
fn zip(rows: [[u8; 16]; 4]) -> [u8; 64] {
    let mut out = [0; 64];
    // SAFETY: the arrays have the bytes that are loaded and stored.
    unsafe {
        let [a, b, c, d] = rows.map(|row| _mm_loadu_si128(row.as_ptr().cast()));
        let (low, low2) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
        let (high, high2) = (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
        let blocks = [
            _mm_unpacklo_epi16(low, low2),
            _mm_unpackhi_epi16(low, low2),
            _mm_unpacklo_epi16(high, high2),
            _mm_unpackhi_epi16(high, high2),
        ];
        for (i, x) in blocks.into_iter().enumerate() {
            _mm_storeu_si128(out[16 * i..].as_mut_ptr().cast(), x);
        }
    }
    out
}

/// The other way round.
#[inline]
#[target_feature(enable = "avx2")]
fn unzip(block: &[u8; 64]) -> [[u8; 16]; 4] {
    let mut out = [[0; 16]; 4];
    // SAFETY: the arrays have the bytes that are loaded and stored.
    unsafe {
        let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let mut x = [_mm_setzero_si128(); 4];
        for i in 0..4 {
            x[i] = _mm_shuffle_epi8(_mm_loadu_si128(block[16 * i..].as_ptr().cast()), order);
        }
        // Words are four bytes of a row each: of columns 4i to 4i + 3 in x[i].
        let (low, low2) = (_mm_unpacklo_epi32(x[0], x[1]), _mm_unpacklo_epi32(x[2], x[3]));
        let (high, high2) = (_mm_unpackhi_epi32(x[0], x[1]), _mm_unpackhi_epi32(x[2], x[3]));
        let rows = [
            _mm_unpacklo_epi64(low, low2),
            _mm_unpackhi_epi64(low, low2),
            _mm_unpacklo_epi64(high, high2),
            _mm_unpackhi_epi64(high, high2),
        ];
        for (out, x) in out.iter_mut().zip(rows) {
            _mm_storeu_si128(out.as_mut_ptr().cast(), x);
        }
    }
    out
}

/// As [`crate::scalar::parameters`]: the conversion itself rounds down or up.
#[inline]
#[target_feature(enable = "f16c")]
fn parameters(min: f32, max: f32, levels: f32) -> (f16, f16) {
    let largest = crate::codec::F16_MAX;
    // Adding 0.0 turns −0.0 into 0.0.
    let (min, max) = (
        min.clamp(-largest, largest) + 0.0,
        max.clamp(-largest, largest) + 0.0,
    );
    let zero = _mm_cvtps_ph::<_MM_FROUND_TO_NEG_INF>(_mm_set_ss(min));
    let wanted = (max - _mm_cvtss_f32(_mm_cvtph_ps(zero))) / levels;
    let scale = _mm_cvtps_ph::<_MM_FROUND_TO_POS_INF>(_mm_set_ss(wanted));
    let bits = |x| f16::from_bits(_mm_cvtsi128_si32(x) as u16);
    (bits(scale), bits(zero))
}

#[inline]
#[target_feature(enable = "f16c")]
fn f16(x: f16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(x.to_bits()))))
}
