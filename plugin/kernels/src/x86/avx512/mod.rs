//! AVX-512 F, BW, DQ, VL and VNNI (Ice Lake and Zen 4 on): a vector is a register.
#![expect(
    clippy::needless_range_loop,
    reason = "a closure of an iterator that is not inlined empties the registers"
)]

mod codes;
mod key_channels;
mod key_tiles;
mod keys;
mod q8_0;
mod value_tiles;
mod values;
mod values4;
mod values8;

use std::arch::x86_64::*;

use half::f16;

use super::exp::{LN2_HIGH, LN2_LOW, POLYNOMIAL};
use super::query::four_bytes;
use crate::KernelError;
use crate::generic::decode::{BLOCK, KeyCodes, ValueCodes};
use crate::generic::entries;
use crate::simd::{LANES, Simd};

/// The proof that this CPU has the instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Avx512(());

entries!(
    Avx512,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
);

impl Avx512 {
    pub(crate) fn detect() -> Result<Self, KernelError> {
        super::detect!(
            "avx512",
            Self(()),
            "avx512f",
            "avx512bw",
            "avx512dq",
            "avx512vl",
            "avx512vnni",
            "avx2",
            "fma",
            "f16c"
        )
    }
}

const ROUND: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// SAFETY of every block below: `self` is the proof that the instructions exist, and loads and stores go through
// references to arrays of exactly as many bytes.
impl Simd for Avx512 {
    type V = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn f32s(self, x: &[u8; 4 * LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn f16s(self, x: &[u8; 2 * LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn bf16s(self, x: &[u8; 2 * LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe {
            let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(x, 16))
        }
    }
    #[inline(always)]
    fn u8s(self, x: &[u8; LANES]) -> __m512 {
        // SAFETY: see above.
        unsafe { numbers(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn madd(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above. The instruction answers with `b` where either is NaN.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn exp(self, x: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe {
            // Below −104, e^x is 0 in f32; the bounds keep n and r finite. NaN is the second operand, and stays.
            let x = _mm512_max_ps(_mm512_set1_ps(-110.0), x);
            let x = _mm512_min_ps(_mm512_set1_ps(88.7), x);
            let n = _mm512_roundscale_ps::<ROUND>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
            let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
            for c in &POLYNOMIAL[1..] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
            }
            let e = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
            _mm512_scalef_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0)), n)
        }
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    fn sums(self, v: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see above; the array has the 16 bytes that are stored.
        unsafe {
            let [a, b, c, d] = v;
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            let x = _mm512_add_ps(low, high);
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), x);
            out
        }
    }
    #[inline(always)]
    fn top(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    fn bottom(self, v: __m512) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_min_ps(v) }
    }
    #[inline(always)]
    fn transpose(self, v: [__m512; LANES]) -> [__m512; LANES] {
        // SAFETY: see above.
        unsafe {
            let mut a = v;
            // Pairs, then fours within 128 bits; then the 128-bit parts across rows.
            for i in 0..8 {
                let (x, y) = (v[2 * i], v[2 * i + 1]);
                (a[2 * i], a[2 * i + 1]) = (_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
            }
            let mut b = a;
            for i in 0..4 {
                for j in 0..2 {
                    let (x, y) = (_mm512_castps_pd(a[4 * i + j]), _mm512_castps_pd(a[4 * i + 2 + j]));
                    b[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                    b[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
                }
            }
            // b[4i + c]: part p holds rows 4i to 4i + 3 of column 4p + c.
            let mut out = v;
            for c in 0..4 {
                let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(b[c], b[4 + c]);
                let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(b[c], b[4 + c]);
                let low2 = _mm512_shuffle_f32x4::<0b01_00_01_00>(b[8 + c], b[12 + c]);
                let high2 = _mm512_shuffle_f32x4::<0b11_10_11_10>(b[8 + c], b[12 + c]);
                out[c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(low, low2);
                out[4 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(low, low2);
                out[8 + c] = _mm512_shuffle_f32x4::<0b10_00_10_00>(high, high2);
                out[12 + c] = _mm512_shuffle_f32x4::<0b11_01_11_01>(high, high2);
            }
            out
        }
    }
    #[inline(always)]
    fn codes4(self, group: &[u8; 16]) -> [__m512; 2] {
        // SAFETY: see above.
        unsafe { super::codes4(group).map(|x| numbers(x)) }
    }
    #[inline(always)]
    fn codes3(self, group: &[u8; 12]) -> [__m512; 2] {
        // SAFETY: see above.
        unsafe { super::codes3(group).map(|x| numbers(x)) }
    }
    #[inline(always)]
    fn codes2(self, group: &[u8; 8]) -> [__m512; 2] {
        // SAFETY: see above.
        unsafe { super::codes2(group).map(|x| numbers(x)) }
    }
    #[inline(always)]
    fn zip(self, rows: [[u8; 16]; 4]) -> [u8; 64] {
        // SAFETY: see above.
        unsafe { super::zip(rows) }
    }
    #[inline(always)]
    fn unzip(self, block: &[u8; 64]) -> [[u8; 16]; 4] {
        // SAFETY: see above.
        unsafe { super::unzip(block) }
    }
    #[inline(always)]
    fn to_u8s(self, v: __m512) -> [u8; LANES] {
        let mut out = [0; LANES];
        // SAFETY: see above.
        unsafe {
            _mm_storeu_si128(
                out.as_mut_ptr().cast(),
                _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)),
            )
        };
        out
    }
    #[inline(always)]
    fn to_f16s(self, v: __m512) -> [u8; 2 * LANES] {
        let mut out = [0; 2 * LANES];
        // SAFETY: see above.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtps_ph::<ROUND>(v)) };
        out
    }
    #[inline(always)]
    fn parameters(self, min: f32, max: f32, levels: f32) -> (f16, f16) {
        // SAFETY: see above.
        unsafe { super::parameters(min, max, levels) }
    }
    #[inline(always)]
    fn prefetch(self, bytes: &[u8]) {
        super::prefetch(bytes);
    }
    #[inline(always)]
    fn f16(self, x: f16) -> f32 {
        // SAFETY: see above.
        unsafe { super::f16(x) }
    }
    #[inline(always)]
    fn key_codes(self, job: &mut KeyCodes<'_>) -> usize {
        // SAFETY: see above.
        if unsafe { keys::score(job) } { BLOCK } else { 0 }
    }
    #[inline(always)]
    fn value_codes(self, job: &mut ValueCodes<'_>) -> usize {
        // SAFETY: see above.
        if unsafe { values::add(job) } { BLOCK } else { 0 }
    }
}

/// Sixteen bytes as numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn numbers(x: __m128i) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x))
}

/// Four integers of two bytes, of which the lower is signed: the upper bytes, then the lower ones.
fn bytes(x: [i32; 4]) -> [i32; 2] {
    [
        four_bytes(x.map(|x| (x - i32::from(x as i8)) >> 8)),
        four_bytes(x),
    ]
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_bytes_add_up_to_what_was_split() {
        for x in [0, 1, -1, 127, 128, -128, -129, 255, 256, 32_639, -32_639] {
            let [upper, lower] = super::bytes([x, 0, -x, 7]).map(i32::to_le_bytes);
            let of = |i: usize| 256 * i32::from(upper[i] as i8) + i32::from(lower[i] as i8);
            assert_eq!([of(0), of(1), of(2), of(3)], [x, 0, -x, 7]);
        }
    }
}
