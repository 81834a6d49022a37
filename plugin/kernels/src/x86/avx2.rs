//! AVX2, FMA and F16C (Haswell and Zen on): a vector is two registers.
#![expect(
    clippy::needless_range_loop,
    reason = "a closure of an iterator that is not inlined empties the registers"
)]

mod key_channels;
mod keys;
mod q8_0;
mod value_rows;
mod values;

use std::arch::x86_64::*;

use half::f16;

use super::exp::{LN2_HIGH, LN2_LOW, POLYNOMIAL};
use crate::generic::decode::{KeyCodes, ValueCodes};
use crate::generic::entries;
use crate::simd::{LANES, Simd};
use crate::{KernelError, Layout};

/// The proof that this CPU has the instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Avx2(());

entries!(Avx2, "avx2,fma,f16c");

impl Avx2 {
    pub(crate) fn detect() -> Result<Self, KernelError> {
        super::detect!("avx2", Self(()), "avx2", "fma", "f16c")
    }
}

const ROUND: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

type V = [__m256; 2];

/// An instruction on both halves.
macro_rules! both {
    ($f:ident, $a:expr $(, $b:expr)*) => {
        // SAFETY: the `Avx2` at hand is the proof that the instruction exists.
        unsafe { [$f($a[0] $(, $b[0])*), $f($a[1] $(, $b[1])*)] }
    };
}

// SAFETY of every block below: `self` is the proof that the instructions exist, and loads and stores go through
// references to arrays of exactly as many bytes.
impl Simd for Avx2 {
    type V = V;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> V {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, v: V, to: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        }
    }
    #[inline(always)]
    fn f32s(self, x: &[u8; 4 * LANES]) -> V {
        // SAFETY: see above.
        unsafe {
            [
                _mm256_loadu_ps(x.as_ptr().cast()),
                _mm256_loadu_ps(x.as_ptr().add(32).cast()),
            ]
        }
    }
    #[inline(always)]
    fn f16s(self, x: &[u8; 2 * LANES]) -> V {
        // SAFETY: see above.
        unsafe {
            let half = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(at).cast()));
            [half(0), half(16)]
        }
    }
    #[inline(always)]
    fn bf16s(self, x: &[u8; 2 * LANES]) -> V {
        // SAFETY: see above.
        unsafe {
            let half = |at: usize| {
                let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().add(at).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
            };
            [half(0), half(16)]
        }
    }
    #[inline(always)]
    fn u8s(self, x: &[u8; LANES]) -> V {
        // SAFETY: see above.
        unsafe { numbers(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn madd(self, a: V, b: V, c: V) -> V {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        // The instruction answers with `b` where either is NaN.
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn exp(self, x: V) -> V {
        both!(exp, x)
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        // SAFETY: see above.
        unsafe { super::lanes(_mm256_add_ps(v[0], v[1])) }
    }
    #[inline(always)]
    fn sums(self, v: [V; 4]) -> [f32; 4] {
        // SAFETY: see above; the array has the 16 bytes that are stored.
        unsafe {
            let [a, b, c, d] = v;
            let (a, b) = (_mm256_add_ps(a[0], a[1]), _mm256_add_ps(b[0], b[1]));
            let (c, d) = (_mm256_add_ps(c[0], c[1]), _mm256_add_ps(d[0], d[1]));
            let x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let mut out = [0.0; 4];
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            _mm_storeu_ps(out.as_mut_ptr(), x);
            out
        }
    }
    #[inline(always)]
    fn top(self, v: V) -> f32 {
        // SAFETY: see above.
        unsafe { largest(_mm256_max_ps(v[0], v[1])) }
    }
    #[inline(always)]
    fn bottom(self, v: V) -> f32 {
        // SAFETY: see above.
        unsafe {
            let x = _mm256_min_ps(v[0], v[1]);
            let x = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_min_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn codes4(self, group: &[u8; 16]) -> [V; 2] {
        // SAFETY: see above.
        unsafe {
            let [a, b] = super::codes4(group);
            [numbers(a), numbers(b)]
        }
    }
    #[inline(always)]
    fn codes3(self, group: &[u8; 12]) -> [V; 2] {
        // SAFETY: see above.
        unsafe {
            let [a, b] = super::codes3(group);
            [numbers(a), numbers(b)]
        }
    }
    #[inline(always)]
    fn codes2(self, group: &[u8; 8]) -> [V; 2] {
        // SAFETY: see above.
        unsafe {
            let [a, b] = super::codes2(group);
            [numbers(a), numbers(b)]
        }
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
    fn to_u8s(self, v: V) -> [u8; LANES] {
        let mut out = [0; LANES];
        // SAFETY: see above.
        unsafe {
            let (a, b) = (_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
            // Packing works within 128 bits: quarters 0, 2, 1, 3 of the values.
            let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
            let x = _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            _mm_storeu_si128(out.as_mut_ptr().cast(), x);
        }
        out
    }
    #[inline(always)]
    fn to_f16s(self, v: V) -> [u8; 2 * LANES] {
        let mut out = [0; 2 * LANES];
        // SAFETY: see above.
        unsafe {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]);
            _mm_storeu_si128(out.as_mut_ptr().cast(), low);
            _mm_storeu_si128(out.as_mut_ptr().add(16).cast(), high);
        }
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
        unsafe {
            match job.layout {
                Layout::KeyTiles => keys::score(job),
                Layout::KeyChannels => key_channels::score(job),
                Layout::Rows | Layout::ValueTiles => 0,
            }
        }
    }
    #[inline(always)]
    fn value_codes(self, job: &mut ValueCodes<'_>) -> usize {
        // SAFETY: see above.
        unsafe { values::add(job) }
    }
}

/// Scales and zeros of eight rows of a tile.
///
/// # Safety
/// `at` must be valid for reading 48 bytes, and the CPU must have the instructions.
#[inline(always)]
unsafe fn parameters(at: *const u8) -> (__m256, __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        (
            _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(at.add(32).cast())),
        )
    }
}

// Vectors that cross a call go through memory: what the softmax does for every sixteen weights is inlined, always.

/// Sixteen bytes as numbers.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn numbers(x: __m128i) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        [
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(x))),
        ]
    }
}

/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn exp(x: __m256) -> __m256 {
    // Below ln(2^-126) the result is 0; the bounds keep n in the exponent's range. NaN is the second operand,
    // and stays.
    // SAFETY: the caller's promise.
    unsafe {
        let lowest = _mm256_set1_ps(-87.336_54);
        let y = _mm256_min_ps(_mm256_set1_ps(88.0), _mm256_max_ps(lowest, x));
        let n = _mm256_round_ps::<ROUND>(_mm256_mul_ps(y, _mm256_set1_ps(std::f32::consts::LOG2_E)));
        let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), y);
        let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
        let mut p = _mm256_set1_ps(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
        }
        let e = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0));
        let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        let e = _mm256_mul_ps(e, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n)));
        _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, lowest), e)
    }
}

/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn largest(x: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
    }
}
