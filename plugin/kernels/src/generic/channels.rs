//! Keys quantized channel by channel (KIVI, arXiv 2402.02750, section 4.1): see [`crate::layout`]. Invariant: the same
//! bytes and values as the oracle, bit for bit.

use std::ops::Range;

use super::arrange;
use super::pack::{finite, planes2, planes3, planes4, saturate};
use crate::codec::GROUP;
use crate::layout::{CHANNEL_TILE, TILE, channel_scale};
use crate::simd::{LANES, Simd};
use crate::{Codec, KernelError};

/// Packs tiles of 32 rows, the last one filled up. Lengths were checked.
#[inline(always)]
pub(super) fn pack<S: Simd>(
    s: S,
    codec: Codec,
    dim: usize,
    src: &[f32],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    let (row, codes) = (codec.row_bytes(dim), codec.code_bytes(dim));
    let mut bytes = vec![0; CHANNEL_TILE * codes];
    let tiles = src
        .chunks(CHANNEL_TILE * dim)
        .zip(dst.chunks_exact_mut(CHANNEL_TILE * row));
    for (t, (src, tile)) in tiles.enumerate() {
        finite(dim, t * CHANNEL_TILE, src)?;
        parameters(s, codec, dim, src, tile);
        bytes.fill(0);
        for (src, bytes) in src.chunks_exact(dim).zip(bytes.chunks_exact_mut(codes)) {
            let groups = bytes.chunks_exact_mut(codec.group_bytes(GROUP)).enumerate();
            for (g, bytes) in groups {
                let codes = quantize(s, codec, dim, tile, src, g);
                match codec {
                    Codec::Int4 => bytes.copy_from_slice(&planes4(&codes)),
                    Codec::Int3 => bytes.copy_from_slice(&planes3(&codes)),
                    Codec::Int2 => bytes.copy_from_slice(&planes2(&codes)),
                    _ => bytes.copy_from_slice(&codes),
                }
            }
        }
        for (rows, tile) in bytes
            .chunks_exact(TILE * codes)
            .zip(tile.chunks_exact_mut(TILE * codes))
        {
            arrange::words_to(rows, codes, codes, tile);
        }
    }
    Ok(())
}

/// Writes every column's scale and zero.
#[inline(always)]
fn parameters<S: Simd>(s: S, codec: Codec, dim: usize, src: &[f32], tile: &mut [u8]) {
    let levels = f32::from(codec.levels().unwrap_or(u8::MAX));
    for c in (0..dim).step_by(LANES) {
        let (mut min, mut max) = (s.splat(f32::INFINITY), s.splat(f32::NEG_INFINITY));
        for row in src.chunks_exact(dim) {
            let x = s.load(lanes(&row[c..]));
            (min, max) = (s.min(min, x), s.max(max, x));
        }
        let (mut low, mut high) = ([0.0; LANES], [0.0; LANES]);
        s.store(min, &mut low);
        s.store(max, &mut high);
        for i in 0..LANES {
            let (scale, zero) = s.parameters(low[i], high[i], levels);
            let at = channel_scale(codec, dim, c + i);
            tile[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            tile[at + 2 * dim..at + 2 * dim + 2].copy_from_slice(&zero.to_le_bytes());
        }
    }
}

/// The codes of one row's group.
#[inline(always)]
fn quantize<S: Simd>(s: S, codec: Codec, dim: usize, tile: &[u8], src: &[f32], g: usize) -> [u8; GROUP] {
    let levels = s.splat(f32::from(codec.levels().unwrap_or(u8::MAX)));
    let mut codes = [0; GROUP];
    for (i, codes) in codes.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let c = g * GROUP + i * LANES;
        let (scale, zero) = column(s, codec, dim, tile, c);
        let x = saturate(s, s.load(lanes(&src[c..])));
        let x = s.div(s.sub(x, zero), scale);
        // A scale of 0 makes 0 / 0 of values that are their zero: `max` turns NaN into 0.
        *codes = s.to_u8s(s.min(s.max(x, s.splat(0.0)), levels));
    }
    codes
}

/// Scales and zeros of sixteen columns.
#[inline(always)]
fn column<S: Simd>(s: S, codec: Codec, dim: usize, tile: &[u8], c: usize) -> (S::V, S::V) {
    let at = channel_scale(codec, dim, c);
    (s.f16s(halves(&tile[at..])), s.f16s(halves(&tile[at + 2 * dim..])))
}

/// Unpacks some rows to `dst`, one each `stride ≥ dim` values.
#[inline(always)]
pub(super) fn unpack<S: Simd>(
    s: S,
    codec: Codec,
    dim: usize,
    src: &[u8],
    part: Range<usize>,
    dst: &mut [f32],
    stride: usize,
) {
    let (size, codes) = (CHANNEL_TILE * codec.row_bytes(dim), codec.code_bytes(dim));
    let group = codec.group_bytes(GROUP);
    for (r, dst) in part.zip(dst.chunks_mut(stride)) {
        let tile = &src[r / CHANNEL_TILE * size..][..size];
        let half = &tile[r % CHANNEL_TILE / TILE * TILE * codes..][..TILE * codes];
        for g in 0..dim / GROUP {
            // A group's bytes, gathered from words that lie 64 bytes apart.
            let mut bytes = [0; GROUP];
            let words = half[TILE * g * group..].as_chunks::<64>().0.iter();
            for (to, words) in bytes[..group].as_chunks_mut::<4>().0.iter_mut().zip(words) {
                to.copy_from_slice(&words[4 * (r % TILE)..][..4]);
            }
            let x = match codec {
                Codec::Int4 => s.codes4(first(&bytes)),
                Codec::Int3 => s.codes3(first(&bytes)),
                Codec::Int2 => s.codes2(first(&bytes)),
                _ => s.codes8(&bytes),
            };
            for (i, x) in x.into_iter().enumerate() {
                let c = g * GROUP + i * LANES;
                let (scale, zero) = column(s, codec, dim, tile, c);
                if let Some(dst) = dst[c..].first_chunk_mut() {
                    s.store(s.madd(scale, x, zero), dst);
                }
            }
        }
    }
}

#[inline(always)]
fn lanes(x: &[f32]) -> &[f32; LANES] {
    // `dim` is a multiple of the lanes.
    x.first_chunk().unwrap_or(&[0.0; LANES])
}

#[inline(always)]
fn halves(x: &[u8]) -> &[u8; 2 * LANES] {
    x.first_chunk().unwrap_or(&[0; 2 * LANES])
}

#[inline(always)]
fn first<const N: usize>(x: &[u8; GROUP]) -> &[u8; N] {
    x.first_chunk().unwrap_or(&[0; N])
}
