//! f32 rows to bytes. Invariant: the same bytes as the oracle, bit for bit.

use half::bf16;

use crate::codec::{F16_MAX, GROUP, PARAM_BYTES};
use crate::scalar::put;
use crate::simd::{LANES, Simd};
use crate::{Codec, KernelError, check, fp8};

/// See [`crate::Kernels::pack`].
#[inline(always)]
pub(crate) fn pack<S: Simd>(
    s: S,
    codec: Codec,
    dim: usize,
    src: &[f32],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::codec(codec, dim, src.len(), dst.len())?;
    let row_bytes = codec.row_bytes(dim);
    // Some kilobytes at a time, so that what was checked is still at hand when it is packed.
    let run = 2048usize.div_ceil(dim);
    for (r, (src, dst)) in src
        .chunks(run * dim)
        .zip(dst.chunks_mut(run * row_bytes))
        .enumerate()
    {
        finite(dim, r * run, src)?;
        let rows = src.chunks_exact(dim).zip(dst.chunks_exact_mut(row_bytes));
        match codec {
            Codec::F32 => {
                for (x, bytes) in src.iter().zip(dst.as_chunks_mut::<4>().0) {
                    *bytes = x.to_le_bytes();
                }
            }
            Codec::F16 => pack_f16(s, src, dst),
            Codec::Bf16 => pack_bf16(src, dst),
            Codec::Fp8 => {
                for (x, byte) in src.iter().zip(dst) {
                    *byte = fp8::encode(*x);
                }
            }
            Codec::Int8 => {
                for (src, dst) in rows {
                    groups(s, codec, src, dst, |codes| *codes);
                }
            }
            Codec::Int4 => {
                for (src, dst) in rows {
                    groups(s, codec, src, dst, planes4);
                }
            }
            Codec::Int3 => {
                for (src, dst) in rows {
                    groups(s, codec, src, dst, planes3);
                }
            }
            Codec::Int2 => {
                for (src, dst) in rows {
                    groups(s, codec, src, dst, planes2);
                }
            }
        }
    }
    Ok(())
}

#[inline(always)]
pub(super) fn finite(dim: usize, first_row: usize, src: &[f32]) -> Result<(), KernelError> {
    // An exponent of all ones is an infinity or a NaN. Integer `or` vectorizes, an early exit would not.
    let bad = src.iter().fold(0, |bad, x| {
        bad | u32::from(x.to_bits() & 0x7f80_0000 == 0x7f80_0000)
    });
    if bad == 0 {
        return Ok(());
    }
    match src.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(KernelError::NonFinite {
            row: first_row + i / dim,
            column: i % dim,
            given: src[i],
        }),
        None => Ok(()),
    }
}

#[inline(always)]
fn pack_f16<S: Simd>(s: S, src: &[f32], dst: &mut [u8]) {
    // Values are contiguous over rows: no padding, so rows do not matter here.
    let (chunks, rest) = src.as_chunks::<LANES>();
    let (out, out_rest) = dst.as_chunks_mut::<{ 2 * LANES }>();
    for (chunk, out) in chunks.iter().zip(out) {
        *out = s.to_f16s(saturate(s, s.load(chunk)));
    }
    if !rest.is_empty() {
        let mut chunk = [0.0; LANES];
        chunk[..rest.len()].copy_from_slice(rest);
        let bytes = s.to_f16s(saturate(s, s.load(&chunk)));
        out_rest.copy_from_slice(&bytes[..2 * rest.len()]);
    }
}

#[inline(always)]
fn pack_bf16(src: &[f32], dst: &mut [u8]) {
    let largest = bf16::MAX.to_f32();
    for (x, bytes) in src.iter().zip(dst.as_chunks_mut::<2>().0) {
        // To nearest, ties to even; the values are finite.
        let bits = x.clamp(-largest, largest).to_bits();
        let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        *bytes = (rounded as u16).to_le_bytes();
    }
}

/// One row of codes in groups of `B` bytes.
#[inline(always)]
fn groups<S: Simd, const B: usize>(
    s: S,
    codec: Codec,
    src: &[f32],
    dst: &mut [u8],
    planes: impl Fn(&[u8; GROUP]) -> [u8; B],
) {
    let levels = f32::from(codec.levels().unwrap_or(u8::MAX));
    let (bytes, params) = dst.split_at_mut(codec.code_bytes(src.len()));
    let (params, _) = params.as_chunks_mut::<PARAM_BYTES>();
    let (groups, rest) = src.as_chunks::<GROUP>();
    let (out, out_rest) = bytes.split_at_mut(B * groups.len());
    for ((group, out), params) in groups
        .iter()
        .zip(out.as_chunks_mut::<B>().0)
        .zip(params.iter_mut())
    {
        *out = planes(&quantize(s, group, levels, params));
    }
    if let (false, Some(params)) = (rest.is_empty(), params.last_mut()) {
        // A short group is filled up with its first value, which changes neither extreme.
        let mut group = [rest[0]; GROUP];
        group[..rest.len()].copy_from_slice(rest);
        let codes = quantize(s, &group, levels, params);
        out_rest.fill(0);
        for (i, code) in codes.iter().enumerate().take(rest.len()) {
            put(codec, out_rest, rest.len(), i, *code);
        }
    }
}

/// Writes a group's parameters and returns its codes.
#[inline(always)]
fn quantize<S: Simd>(s: S, group: &[f32; GROUP], levels: f32, params: &mut [u8; PARAM_BYTES]) -> [u8; GROUP] {
    let (halves, _) = group.as_chunks::<LANES>();
    let x = [s.load(&halves[0]), s.load(&halves[1])].map(|x| saturate(s, x));
    let (min, max) = (s.bottom(s.min(x[0], x[1])), s.top(s.max(x[0], x[1])));
    let (scale, zero) = s.parameters(min, max, levels);
    let ([a, b], [c, d]) = (scale.to_le_bytes(), zero.to_le_bytes());
    *params = [a, b, c, d];

    let (scale, zero) = (s.f16(scale), s.f16(zero));
    let mut codes = [0; GROUP];
    if scale != 0.0 {
        let (scale, zero) = (s.splat(scale), s.splat(zero));
        for (codes, x) in codes.as_chunks_mut().0.iter_mut().zip(x) {
            let x = s.div(s.sub(x, zero), scale);
            let x = s.min(s.max(x, s.splat(0.0)), s.splat(levels));
            *codes = s.to_u8s(x);
        }
    }
    codes
}

#[inline(always)]
pub(super) fn saturate<S: Simd>(s: S, x: S::V) -> S::V {
    s.min(s.max(x, s.splat(-F16_MAX)), s.splat(F16_MAX))
}

// The planes of a full group, eight codes at a time: no code has bits beyond its own, so whole words shift.

#[inline(always)]
fn words(codes: &[u8; GROUP]) -> [u64; 4] {
    let (words, _) = codes.as_chunks();
    std::array::from_fn(|i| u64::from_le_bytes(words[i]))
}

#[inline(always)]
pub(super) fn planes4(codes: &[u8; GROUP]) -> [u8; 16] {
    let [a, b, c, d] = words(codes);
    (u128::from(a | (c << 4)) | (u128::from(b | (d << 4)) << 64)).to_le_bytes()
}

#[inline(always)]
pub(super) fn planes2(codes: &[u8; GROUP]) -> [u8; 8] {
    let [a, b, c, d] = words(codes);
    (a | (b << 2) | (c << 4) | (d << 6)).to_le_bytes()
}

#[inline(always)]
pub(super) fn planes3(codes: &[u8; GROUP]) -> [u8; 12] {
    const HIGH: u64 = 0x0101_0101_0101_0101;
    let w = words(codes);
    let [a, b, c, d] = w.map(|w| w & (3 * HIGH));
    let low = a | (b << 2) | (c << 4) | (d << 6);
    // Bit 2k of byte b of `high` belongs to value 8k + b; those of bytes 4 to 7 go to the odd bits.
    let [a, b, c, d] = w.map(|w| (w >> 2) & HIGH);
    let high = a | (b << 2) | (c << 4) | (d << 6);
    let high = (high | (high >> 31)) as u32;
    let mut out = [0; 12];
    out[..8].copy_from_slice(&low.to_le_bytes());
    out[8..].copy_from_slice(&high.to_le_bytes());
    out
}
