//! f32 rows to bytes. Invariant: the same bytes as [`crate::scalar::pack`], bit for bit.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::codec::{F16_MAX, GROUP, PARAM_BYTES};
use crate::scalar::{parameters, put};
use crate::{Codec, KernelError, check};

/// See [`crate::Kernels::pack`].
pub(crate) fn pack(codec: Codec, dim: usize, src: &[f32], dst: &mut [u8]) -> Result<(), KernelError> {
    check::codec(codec, dim, src.len(), dst.len())?;
    finite(dim, src)?;
    let rows = src
        .chunks_exact(dim)
        .zip(dst.chunks_exact_mut(codec.row_bytes(dim)));
    match codec {
        Codec::F32 => {
            for (x, bytes) in src.iter().zip(dst.as_chunks_mut::<4>().0) {
                *bytes = x.to_le_bytes();
            }
        }
        Codec::F16 => pack_f16(src, dst),
        Codec::Bf16 => pack_bf16(src, dst),
        Codec::Int8 => rows.for_each(|(src, dst)| pack_int8(src, dst)),
        Codec::Int4 => rows.for_each(|(src, dst)| pack_int4(src, dst)),
        Codec::Int3 | Codec::Int2 => rows.for_each(|(src, dst)| pack_planes(codec, src, dst)),
    }
    Ok(())
}

fn finite(dim: usize, src: &[f32]) -> Result<(), KernelError> {
    // An exponent of all ones is an infinity or a NaN. Integer `or` vectorizes, an early exit would not.
    let bad = src.iter().fold(0, |bad, x| {
        bad | u32::from(x.to_bits() & 0x7f80_0000 == 0x7f80_0000)
    });
    if bad == 0 {
        return Ok(());
    }
    match src.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(KernelError::NonFinite {
            row: i / dim,
            column: i % dim,
            given: src[i],
        }),
        None => Ok(()),
    }
}

fn pack_f16(src: &[f32], dst: &mut [u8]) {
    // Values are contiguous over rows: no padding, so rows do not matter here.
    for (src, dst) in src.chunks(64).zip(dst.chunks_mut(128)) {
        let mut saturated = [0.0f32; 64];
        let mut halves = [f16::ZERO; 64];
        for (s, x) in saturated.iter_mut().zip(src) {
            *s = saturate(*x);
        }
        halves[..src.len()].convert_from_f32_slice(&saturated[..src.len()]);
        for (bytes, x) in dst.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
            *bytes = x.to_le_bytes();
        }
    }
}

fn pack_bf16(src: &[f32], dst: &mut [u8]) {
    let largest = bf16::MAX.to_f32();
    for (x, bytes) in src.iter().zip(dst.as_chunks_mut::<2>().0) {
        *bytes = bf16::from_f32(x.clamp(-largest, largest)).to_le_bytes();
    }
}

fn pack_int8(src: &[f32], dst: &mut [u8]) {
    let (codes, params) = dst.split_at_mut(src.len());
    let params = params.as_chunks_mut::<PARAM_BYTES>().0;
    for ((group, codes), params) in src.chunks(GROUP).zip(codes.chunks_mut(GROUP)).zip(params) {
        codes.copy_from_slice(&quantize(group, 255.0, params)[..group.len()]);
    }
}

fn pack_int4(src: &[f32], dst: &mut [u8]) {
    let (codes, params) = dst.split_at_mut(src.len().div_ceil(2));
    let params = params.as_chunks_mut::<PARAM_BYTES>().0;
    for ((group, bytes), params) in src.chunks(GROUP).zip(codes.chunks_mut(GROUP / 2)).zip(params) {
        let codes = quantize(group, 15.0, params);
        // Past the group's end, codes are 0: an odd group's last high nibble is too.
        let (low, high) = codes.split_at(bytes.len());
        for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
            *byte = low | high << 4;
        }
    }
}

fn pack_planes(codec: Codec, src: &[f32], dst: &mut [u8]) {
    let (bytes, params) = dst.split_at_mut(codec.code_bytes(src.len()));
    bytes.fill(0);
    let levels = f32::from(codec.levels().unwrap_or(u8::MAX));
    let params = params.as_chunks_mut::<PARAM_BYTES>().0;
    let groups = bytes.chunks_mut(codec.group_bytes(GROUP));
    for ((group, bytes), params) in src.chunks(GROUP).zip(groups).zip(params) {
        let codes = quantize(group, levels, params);
        for (i, code) in codes.iter().enumerate().take(group.len()) {
            put(codec, bytes, group.len(), i, *code);
        }
    }
}

/// Writes a group's parameters and returns its codes, 0 past its end.
#[inline(always)]
fn quantize(group: &[f32], levels: f32, params: &mut [u8; PARAM_BYTES]) -> [u8; GROUP] {
    // A short group is filled up with its first value, which changes neither extreme.
    let mut values = [group[0]; GROUP];
    values[..group.len()].copy_from_slice(group);
    let (mut low, mut high) = ([values[0]; 8], [values[0]; 8]);
    for chunk in values.as_chunks::<8>().0 {
        for i in 0..8 {
            low[i] = low[i].min(chunk[i]);
            high[i] = high[i].max(chunk[i]);
        }
    }
    let min = low.into_iter().fold(low[0], f32::min);
    let max = high.into_iter().fold(high[0], f32::max);
    let (scale, zero) = parameters(min, max, levels);
    let ([a, b], [c, d]) = (scale.to_le_bytes(), zero.to_le_bytes());
    *params = [a, b, c, d];

    let mut codes = [0; GROUP];
    let (scale, zero) = (scale.to_f32(), zero.to_f32());
    if scale != 0.0 {
        for (code, x) in codes.iter_mut().zip(values) {
            let x = ((saturate(x) - zero) / scale).clamp(0.0, levels);
            // 2^23 has an ulp of 1: the sum is rounded to nearest, ties to even, and its low byte
            // is the code.
            *code = (x + 8_388_608.0).to_bits() as u8;
        }
        codes[group.len()..].fill(0);
    }
    codes
}

#[inline(always)]
fn saturate(x: f32) -> f32 {
    x.clamp(-F16_MAX, F16_MAX)
}
