//! Bytes to f32 rows. Invariant: the same values as the oracle, bit for bit: a code has 8 bits and a scale 11, so
//! their product is exact in f32 and the sum rounds once, fused or not.

use half::f16;

use crate::codec::{GROUP, PARAM_BYTES};
use crate::scalar;
use crate::simd::{Bf16, Chunk, F16, LANES, Simd};
use crate::{Codec, KernelError, check, fp8};

/// See [`crate::Kernels::unpack`].
#[inline(always)]
pub(crate) fn unpack<S: Simd>(
    s: S,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [f32],
) -> Result<(), KernelError> {
    check::codec(codec, dim, dst.len(), src.len())?;
    rows(s, codec, dim, src, dst, dim);
    Ok(())
}

/// Unpacks whole rows to `dst`, one each `stride ≥ dim` values; what lies between is left alone.
/// The last row needs no padding after it.
#[inline(always)]
pub(super) fn rows<S: Simd>(s: S, codec: Codec, dim: usize, src: &[u8], dst: &mut [f32], stride: usize) {
    let rows = src.chunks_exact(codec.row_bytes(dim)).zip(dst.chunks_mut(stride));
    // The codec is chosen here, once a run of rows, not once a row.
    match codec {
        Codec::F32 => {
            for (src, dst) in rows {
                for (x, bytes) in dst.iter_mut().zip(src.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*bytes);
                }
            }
        }
        Codec::F16 => {
            for (src, dst) in rows {
                halves::<S, F16>(s, src, &mut dst[..dim], |x| f16::from_le_bytes(x).to_f32());
            }
        }
        Codec::Bf16 => {
            for (src, dst) in rows {
                let one = |x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16);
                halves::<S, Bf16>(s, src, &mut dst[..dim], one);
            }
        }
        Codec::Fp8 => {
            for (src, dst) in rows {
                eighths(s, src, &mut dst[..dim]);
            }
        }
        Codec::Int8 => {
            for (src, dst) in rows {
                groups::<S, Int8, 32>(s, codec, src, &mut dst[..dim]);
            }
        }
        Codec::Int4 => {
            for (src, dst) in rows {
                groups::<S, Int4, 16>(s, codec, src, &mut dst[..dim]);
            }
        }
        Codec::Int3 => {
            for (src, dst) in rows {
                groups::<S, Int3, 12>(s, codec, src, &mut dst[..dim]);
            }
        }
        Codec::Int2 => {
            for (src, dst) in rows {
                groups::<S, Int2, 8>(s, codec, src, &mut dst[..dim]);
            }
        }
    }
}

#[inline(always)]
fn halves<S: Simd, C: Chunk<Data = [u8; 2 * LANES]>>(
    s: S,
    src: &[u8],
    dst: &mut [f32],
    one: impl Fn([u8; 2]) -> f32,
) {
    let (chunks, rest) = src.as_chunks();
    let (out, out_rest) = dst.as_chunks_mut();
    for (out, bytes) in out.iter_mut().zip(chunks) {
        s.store(C::get(s, bytes), out);
    }
    for (x, bytes) in out_rest.iter_mut().zip(rest.as_chunks().0) {
        *x = one(*bytes);
    }
}

#[inline(always)]
fn eighths<S: Simd>(s: S, src: &[u8], dst: &mut [f32]) {
    let scale = s.splat(fp8::SCALE);
    let (chunks, rest) = src.as_chunks::<LANES>();
    let (out, out_rest) = dst.as_chunks_mut();
    for (out, codes) in out.iter_mut().zip(chunks) {
        let mut halves = [0; 2 * LANES];
        for (half, code) in halves.as_chunks_mut().0.iter_mut().zip(codes) {
            *half = fp8::half(*code);
        }
        s.store(s.mul(s.f16s(&halves), scale), out);
    }
    for (x, code) in out_rest.iter_mut().zip(rest) {
        *x = f16::from_le_bytes(fp8::half(*code)).to_f32() * fp8::SCALE;
    }
}

/// Codes of a full group of `B` bytes, as numbers. A trait, not a closure: see [`gemm`](super::math::gemm).
trait Codes<const B: usize> {
    fn codes<S: Simd>(s: S, group: &[u8; B]) -> [S::V; 2];
}

struct Int8;
struct Int4;
struct Int3;
struct Int2;

impl Codes<32> for Int8 {
    #[inline(always)]
    fn codes<S: Simd>(s: S, group: &[u8; 32]) -> [S::V; 2] {
        s.codes8(group)
    }
}

impl Codes<16> for Int4 {
    #[inline(always)]
    fn codes<S: Simd>(s: S, group: &[u8; 16]) -> [S::V; 2] {
        s.codes4(group)
    }
}

impl Codes<12> for Int3 {
    #[inline(always)]
    fn codes<S: Simd>(s: S, group: &[u8; 12]) -> [S::V; 2] {
        s.codes3(group)
    }
}

impl Codes<8> for Int2 {
    #[inline(always)]
    fn codes<S: Simd>(s: S, group: &[u8; 8]) -> [S::V; 2] {
        s.codes2(group)
    }
}

/// A row of codes in groups of `B` bytes.
#[inline(always)]
fn groups<S: Simd, C: Codes<B>, const B: usize>(s: S, codec: Codec, src: &[u8], dst: &mut [f32]) {
    let (bytes, params) = src.split_at(codec.code_bytes(dst.len()));
    let params = params.as_chunks::<PARAM_BYTES>().0;
    let (groups, rest) = dst.as_chunks_mut::<GROUP>();
    let full = bytes.as_chunks::<B>().0;
    for (g, out) in groups.iter_mut().enumerate() {
        let (scale, zero) = parameters(s, &params[g]);
        let (scale, zero) = (s.splat(scale), s.splat(zero));
        let [a, b] = C::codes(s, &full[g]);
        let (halves, _) = out.as_chunks_mut::<LANES>();
        s.store(s.madd(scale, a, zero), &mut halves[0]);
        s.store(s.madd(scale, b, zero), &mut halves[1]);
    }
    if let (false, Some(params)) = (rest.is_empty(), params.last()) {
        let (scale, zero) = parameters(s, params);
        let (n, bytes) = (rest.len(), &bytes[B * groups.len()..]);
        for (i, x) in rest.iter_mut().enumerate() {
            // Not fused and as exact: see above.
            *x = scale * f32::from(scalar::code(codec, bytes, n, i)) + zero;
        }
    }
}

#[inline(always)]
fn parameters<S: Simd>(s: S, bytes: &[u8; PARAM_BYTES]) -> (f32, f32) {
    let [a, b, c, d] = *bytes;
    (
        s.f16(f16::from_le_bytes([a, b])),
        s.f16(f16::from_le_bytes([c, d])),
    )
}
