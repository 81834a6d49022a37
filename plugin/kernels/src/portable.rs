//! Safe code that the compiler vectorizes: vectors are arrays, and every operation is a loop over one.
//!
//! Speed needs the target's vector features at compile time (`-C target-cpu=native` or `x86-64-v3`); without them
//! the results are the same up to the rounding of multiply-add.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::generic::entries;
use crate::simd::{LANES, Simd};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Portable;

entries!(Portable);

type Lanes = [f32; LANES];

/// `a · b + c`, fused where the target has an instruction for it (elsewhere `mul_add` is a slow call).
#[inline(always)]
fn madd(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

#[inline(always)]
fn map2(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    let mut out = a;
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

/// All lanes to one, halves first.
#[inline(always)]
fn fold(v: Lanes, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut v = v;
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            v[i] = f(v[i], v[i + n]);
        }
        n /= 2;
    }
    v[0]
}

/// e^x without a branch, so that loops over it vectorize; 0 below 2^-126, e^88 above that.
///
/// Cody-Waite reduction and the polynomial of Cephes' `expf`: x = n·ln 2 + r with |r| ≤ ln 2 / 2.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// ln(2^-126): the smallest normal result.
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.0;
    /// 1.5 · 2^23: adding it leaves the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the high one has 9 bits, so n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;

    // Comparisons instead of `max`/`min`, which would turn NaN into a number.
    let y = if x < LOW { LOW } else { x };
    let y = if y > HIGH { HIGH } else { y };
    let shifted = madd(y, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = madd(n, -LN2_LOW, madd(n, -LN2_HIGH, y));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = madd(p, r, c);
    }
    let e = madd(p, r * r, r) + 1.0;
    // 2^n: the low bits of `shifted` hold n, the shift drops the rest.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LOW { 0.0 } else { e * power }
}

impl Simd for Portable {
    type V = Lanes;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &Lanes) -> Lanes {
        *x
    }
    #[inline(always)]
    fn store(self, v: Lanes, to: &mut Lanes) {
        *to = v;
    }
    #[inline(always)]
    fn f32s(self, x: &[u8; 4 * LANES]) -> Lanes {
        let (x, _) = x.as_chunks();
        std::array::from_fn(|i| f32::from_le_bytes(x[i]))
    }
    #[inline(always)]
    fn f16s(self, x: &[u8; 2 * LANES]) -> Lanes {
        let (x, _) = x.as_chunks();
        let halves: [f16; LANES] = std::array::from_fn(|i| f16::from_le_bytes(x[i]));
        let mut out = [0.0; LANES];
        halves.convert_to_f32_slice(&mut out);
        out
    }
    #[inline(always)]
    fn bf16s(self, x: &[u8; 2 * LANES]) -> Lanes {
        let (x, _) = x.as_chunks();
        std::array::from_fn(|i| f32::from_bits(u32::from(u16::from_le_bytes(x[i])) << 16))
    }
    #[inline(always)]
    fn u8s(self, x: &[u8; LANES]) -> Lanes {
        x.map(f32::from)
    }
    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn madd(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        let mut out = c;
        for i in 0..LANES {
            out[i] = madd(a[i], b[i], c[i]);
        }
        out
    }
    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn exp(self, x: Lanes) -> Lanes {
        let mut out = x;
        for x in &mut out {
            *x = exp(*x);
        }
        out
    }
    #[inline(always)]
    fn sum(self, v: Lanes) -> f32 {
        fold(v, |a, b| a + b)
    }
    #[inline(always)]
    fn top(self, v: Lanes) -> f32 {
        fold(v, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn bottom(self, v: Lanes) -> f32 {
        fold(v, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn to_u8s(self, v: Lanes) -> [u8; LANES] {
        // 2^23 has an ulp of 1: the sum is rounded to nearest, ties to even, and its low byte is the code.
        v.map(|x| (x + 8_388_608.0).to_bits() as u8)
    }
    #[inline(always)]
    fn to_f16s(self, v: Lanes) -> [u8; 2 * LANES] {
        let mut halves = [f16::ZERO; LANES];
        halves.convert_from_f32_slice(&v);
        let mut out = [0; 2 * LANES];
        for (bytes, x) in out.as_chunks_mut().0.iter_mut().zip(halves) {
            *bytes = x.to_le_bytes();
        }
        out
    }
}
