//! What the kernels need of a machine: sixteen `f32` lanes and a few conversions.
//!
//! Invariant: a value of a [`Simd`] type is the proof that this CPU has its instructions, so its methods are
//! safe. Everything generic over it is `inline(always)`: it is compiled once an implementation, inside of
//! functions that enable that implementation's instructions.

use half::f16;

use crate::generic::decode::{KeyCodes, ValueCodes};
use crate::scalar;

/// Lanes of a vector, whatever the registers are.
pub(crate) const LANES: usize = 16;

pub(crate) trait Simd: Copy {
    type V: Copy;

    /// 32 registers of 16 lanes: kernels may keep dozens of accumulators.
    const WIDE: bool;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn store(self, v: Self::V, to: &mut [f32; LANES]);
    /// Little-endian f32.
    fn f32s(self, x: &[u8; 4 * LANES]) -> Self::V;
    fn f16s(self, x: &[u8; 2 * LANES]) -> Self::V;
    fn bf16s(self, x: &[u8; 2 * LANES]) -> Self::V;
    fn u8s(self, x: &[u8; LANES]) -> Self::V;

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, fused if the machine can.
    fn madd(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// As `max`.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// e^x, relative error at most 2e-7 down to 2^-126, towards 0 below; NaN goes through.
    fn exp(self, x: Self::V) -> Self::V;

    /// All lanes added up.
    fn sum(self, v: Self::V) -> f32;
    /// Each vector's lanes added up.
    fn sums(self, v: [Self::V; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }
    /// The largest lane.
    fn top(self, v: Self::V) -> f32;
    /// The smallest lane.
    fn bottom(self, v: Self::V) -> f32;
    /// Lane `i` of vector `j` becomes lane `j` of vector `i`.
    fn transpose(self, v: [Self::V; LANES]) -> [Self::V; LANES] {
        let mut rows = [[0.0; LANES]; LANES];
        for (row, v) in rows.iter_mut().zip(v) {
            self.store(v, row);
        }
        std::array::from_fn(|i| self.load(&rows.map(|row| row[i])))
    }

    /// A full group's codes as numbers.
    fn codes8(self, group: &[u8; 32]) -> [Self::V; 2] {
        let (halves, _) = group.as_chunks();
        [self.u8s(&halves[0]), self.u8s(&halves[1])]
    }
    fn codes4(self, group: &[u8; 16]) -> [Self::V; 2] {
        [self.u8s(&group.map(|b| b & 15)), self.u8s(&group.map(|b| b >> 4))]
    }
    fn codes3(self, group: &[u8; 12]) -> [Self::V; 2] {
        let half = |k: usize| {
            std::array::from_fn(|i| {
                let i = LANES * k + i;
                (group[i % 8] >> (2 * (i / 8))) & 3 | ((group[8 + i % 4] >> (i / 4)) & 1) << 2
            })
        };
        [self.u8s(&half(0)), self.u8s(&half(1))]
    }
    fn codes2(self, group: &[u8; 8]) -> [Self::V; 2] {
        let half = |k: usize| {
            std::array::from_fn(|i| {
                let i = LANES * k + i;
                (group[i % 8] >> (2 * (i / 8))) & 3
            })
        };
        [self.u8s(&half(0)), self.u8s(&half(1))]
    }

    /// Byte `i` of row `b` to byte `4i + b`.
    fn zip(self, rows: [[u8; 16]; 4]) -> [u8; 64] {
        std::array::from_fn(|i| rows[i % 4][i / 4])
    }
    /// The other way round.
    fn unzip(self, block: &[u8; 64]) -> [[u8; 16]; 4] {
        std::array::from_fn(|b| std::array::from_fn(|i| block[4 * i + b]))
    }

    /// Integers from 0 to 255, rounded to nearest, ties to even.
    fn to_u8s(self, v: Self::V) -> [u8; LANES];
    /// Rounded to nearest, ties to even; finite and within f16's range.
    fn to_f16s(self, v: Self::V) -> [u8; 2 * LANES];
    /// As [`scalar::parameters`], bit for bit.
    fn parameters(self, min: f32, max: f32, levels: f32) -> (f16, f16) {
        scalar::parameters(min, max, levels)
    }
    fn f16(self, x: f16) -> f32 {
        x.to_f32()
    }

    /// Asks for bytes that will be read soon.
    fn prefetch(self, _bytes: &[u8]) {}

    /// Logits of up to 64 rows of integer codes, in a way that beats unpacking them. Returns how many rows, from the
    /// first on, are done; more than there are counts as all.
    fn key_codes(self, _job: &mut KeyCodes<'_>) -> usize {
        0
    }
    /// Weighted sums of up to 64 rows of integer codes, likewise.
    fn value_codes(self, _job: &mut ValueCodes<'_>) -> usize {
        0
    }
}

/// How sixteen neighbours in a row are stored.
pub(crate) trait Chunk {
    type Data: Copy;
    fn get<S: Simd>(s: S, data: &Self::Data) -> S::V;
}

/// A tile's values.
pub(crate) struct Tile;
/// Packed rows, whose dimension is a multiple of 16.
pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Chunk for Tile {
    type Data = [f32; LANES];
    #[inline(always)]
    fn get<S: Simd>(s: S, data: &Self::Data) -> S::V {
        s.load(data)
    }
}

impl Chunk for F32 {
    type Data = [u8; 4 * LANES];
    #[inline(always)]
    fn get<S: Simd>(s: S, data: &Self::Data) -> S::V {
        s.f32s(data)
    }
}

impl Chunk for F16 {
    type Data = [u8; 2 * LANES];
    #[inline(always)]
    fn get<S: Simd>(s: S, data: &Self::Data) -> S::V {
        s.f16s(data)
    }
}

impl Chunk for Bf16 {
    type Data = [u8; 2 * LANES];
    #[inline(always)]
    fn get<S: Simd>(s: S, data: &Self::Data) -> S::V {
        s.bf16s(data)
    }
}

/// Bytes that will be read after the work at hand. They are asked for bit by bit while it goes on: all at once would
/// wait for themselves, and hardware prefetching starts anew with each block, as blocks are about a page.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<'a> {
    bytes: &'a [u8],
    step: usize,
}

impl<'a> Ahead<'a> {
    pub(crate) const NOTHING: Ahead<'static> = Ahead { bytes: &[], step: 0 };

    /// To be asked for in so many steps.
    #[inline(always)]
    pub(crate) fn new(bytes: &'a [u8], steps: usize) -> Self {
        Self {
            bytes,
            step: bytes.len().div_ceil(steps.max(1)),
        }
    }

    #[inline(always)]
    pub(crate) fn ask<S: Simd>(self, s: S, step: usize) {
        let from = step * self.step;
        if from < self.bytes.len() {
            s.prefetch(&self.bytes[from..self.bytes.len().min(from + self.step)]);
        }
    }
}
