//! Bytes to f32 rows. Invariant: the same values as [`crate::scalar::unpack`], bit for bit: a code has 8
//! bits and a scale 11, so their product is exact in f32 and the sum rounds once, fused or not.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::math::madd;
use crate::codec::{GROUP, PARAM_BYTES};
use crate::{Codec, KernelError, check, scalar};

/// See [`crate::Kernels::unpack`].
pub(crate) fn unpack(codec: Codec, dim: usize, src: &[u8], dst: &mut [f32]) -> Result<(), KernelError> {
    check::codec(codec, dim, dst.len(), src.len())?;
    rows(codec, dim, src, dst, dim);
    Ok(())
}

/// Unpacks whole rows to `dst`, one each `stride ≥ dim` values; what lies between is left alone.
/// The last row needs no padding after it.
pub(super) fn rows(codec: Codec, dim: usize, src: &[u8], dst: &mut [f32], stride: usize) {
    let rows = src.chunks_exact(codec.row_bytes(dim)).zip(dst.chunks_mut(stride));
    // The codec is chosen here, once a run of rows, not once a row.
    match codec {
        Codec::F32 => rows.for_each(|(src, dst)| f32s(src, &mut dst[..dim])),
        Codec::F16 => rows.for_each(|(src, dst)| f16s(src, &mut dst[..dim])),
        Codec::Bf16 => rows.for_each(|(src, dst)| bf16s(src, &mut dst[..dim])),
        Codec::Int8 => rows.for_each(|(src, dst)| int8s(src, &mut dst[..dim])),
        Codec::Int4 => rows.for_each(|(src, dst)| int4s(src, &mut dst[..dim])),
        Codec::Int3 | Codec::Int2 => rows.for_each(|(src, dst)| planes(codec, src, &mut dst[..dim])),
    }
}

#[inline(always)]
fn f32s(src: &[u8], dst: &mut [f32]) {
    for (x, bytes) in dst.iter_mut().zip(src.as_chunks::<4>().0) {
        *x = f32::from_le_bytes(*bytes);
    }
}

#[inline(always)]
fn bf16s(src: &[u8], dst: &mut [f32]) {
    for (x, bytes) in dst.iter_mut().zip(src.as_chunks::<2>().0) {
        *x = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

#[inline(always)]
fn f16s(src: &[u8], dst: &mut [f32]) {
    let (chunks, rest) = src.as_chunks::<2>().0.as_chunks::<8>();
    let (out, out_rest) = dst.as_chunks_mut::<8>();
    for (out, bytes) in out.iter_mut().zip(chunks) {
        bytes.map(f16::from_le_bytes).convert_to_f32_slice(out);
    }
    for (x, bytes) in out_rest.iter_mut().zip(rest) {
        *x = f16::from_le_bytes(*bytes).to_f32();
    }
}

#[inline(always)]
fn int8s(src: &[u8], dst: &mut [f32]) {
    let (codes, params) = src.split_at(dst.len());
    let (groups, rest) = dst.as_chunks_mut::<GROUP>();
    let (codes, codes_rest) = codes.as_chunks::<GROUP>();
    let (params, _) = params.as_chunks::<PARAM_BYTES>();
    for ((out, codes), params) in groups.iter_mut().zip(codes).zip(params) {
        let (scale, zero) = parameters(params);
        for (x, code) in out.iter_mut().zip(codes) {
            *x = madd(scale, f32::from(*code), zero);
        }
    }
    if let (false, Some(params)) = (rest.is_empty(), params.last()) {
        let (scale, zero) = parameters(params);
        for (x, code) in rest.iter_mut().zip(codes_rest) {
            *x = madd(scale, f32::from(*code), zero);
        }
    }
}

#[inline(always)]
fn int4s(src: &[u8], dst: &mut [f32]) {
    const HALF: usize = GROUP / 2;
    let (codes, params) = src.split_at(dst.len().div_ceil(2));
    let (groups, rest) = dst.as_chunks_mut::<GROUP>();
    let (codes, codes_rest) = codes.as_chunks::<HALF>();
    let (params, _) = params.as_chunks::<PARAM_BYTES>();
    for ((out, codes), params) in groups.iter_mut().zip(codes).zip(params) {
        let (scale, zero) = parameters(params);
        for i in 0..HALF {
            out[i] = madd(scale, f32::from(codes[i] & 15), zero);
            out[HALF + i] = madd(scale, f32::from(codes[i] >> 4), zero);
        }
    }
    if let (false, Some(params)) = (rest.is_empty(), params.last()) {
        // ⌈n/2⌉ bytes: codes of a whole chunk only when n is 31, as a group of 32 is not a rest.
        let bytes = if codes_rest.is_empty() {
            codes.last().map_or(&[][..], |c| &c[..])
        } else {
            codes_rest
        };
        let (scale, zero) = parameters(params);
        let (low, high) = rest.split_at_mut(bytes.len());
        for (x, byte) in low.iter_mut().zip(bytes) {
            *x = madd(scale, f32::from(byte & 15), zero);
        }
        for (x, byte) in high.iter_mut().zip(bytes) {
            *x = madd(scale, f32::from(byte >> 4), zero);
        }
    }
}

fn planes(codec: Codec, src: &[u8], dst: &mut [f32]) {
    let (codes, params) = src.split_at(codec.code_bytes(dst.len()));
    let params = params.as_chunks::<PARAM_BYTES>().0;
    let groups = codes.chunks(codec.group_bytes(GROUP)).zip(params);
    for (out, (codes, params)) in dst.chunks_mut(GROUP).zip(groups) {
        let (scale, zero) = parameters(params);
        let n = out.len();
        for (i, x) in out.iter_mut().enumerate() {
            *x = madd(scale, f32::from(scalar::code(codec, codes, n, i)), zero);
        }
    }
}

#[inline(always)]
fn parameters(bytes: &[u8; PARAM_BYTES]) -> (f32, f32) {
    let [a, b, c, d] = *bytes;
    (
        f16::from_le_bytes([a, b]).to_f32(),
        f16::from_le_bytes([c, d]).to_f32(),
    )
}
