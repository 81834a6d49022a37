//! Runs of rows in every layout. Invariant: the same bytes and the same values as the oracle, bit for bit.

use std::ops::Range;

use super::{channels, pack, unpack};
use crate::codec::{GROUP, PARAM_BYTES};
use crate::layout::{TILE, tile_scale};
use crate::simd::Simd;
use crate::{Codec, KernelError, Layout, check};

/// See [`crate::Kernels::pack_run`].
#[inline(always)]
pub(crate) fn pack_run<S: Simd>(
    s: S,
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[f32],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::run(layout, codec, dim, src.len(), dst.len())?;
    match layout {
        Layout::Rows => pack(s, codec, dim, src, dst),
        Layout::KeyChannels => channels::pack(s, codec, dim, src, dst),
        Layout::KeyTiles | Layout::ValueTiles => {
            pack(s, codec, dim, src, dst)?;
            let tile = TILE * codec.row_bytes(dim);
            let mut rows = vec![0; tile];
            for tile in dst.chunks_exact_mut(tile) {
                rows.copy_from_slice(tile);
                to_tile(s, layout, codec, dim, &rows, tile);
            }
            Ok(())
        }
    }
}

/// See [`crate::Kernels::unpack_run`].
#[inline(always)]
pub(crate) fn unpack_run<S: Simd>(
    s: S,
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [f32],
) -> Result<(), KernelError> {
    check::first(layout, codec, dim, dst.len(), src.len())?;
    let rows = dst.len() / dim;
    unpack_part(s, layout, codec, dim, src, 0..rows, dst, dim, &mut Vec::new());
    Ok(())
}

/// See [`crate::Kernels::to_rows`].
#[inline(always)]
pub(crate) fn to_rows<S: Simd>(
    s: S,
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::movable(layout, codec, dim, src.len(), dst.len())?;
    let tile = |tile: &[u8], rows: &mut [u8]| of_tile(s, layout, codec, dim, tile, rows);
    tile_by_tile(layout, TILE * codec.row_bytes(dim), src, dst, tile);
    Ok(())
}

/// See [`crate::Kernels::of_rows`].
#[inline(always)]
pub(crate) fn of_rows<S: Simd>(
    s: S,
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::movable(layout, codec, dim, src.len(), dst.len())?;
    let tile = |rows: &[u8], tile: &mut [u8]| to_tile(s, layout, codec, dim, rows, tile);
    tile_by_tile(layout, TILE * codec.row_bytes(dim), src, dst, tile);
    Ok(())
}

/// Moves a run's tiles of `size` bytes one by one; rows that fill none lie row by row.
#[inline(always)]
fn tile_by_tile(layout: Layout, size: usize, src: &[u8], dst: &mut [u8], tile: impl Fn(&[u8], &mut [u8])) {
    if layout == Layout::Rows {
        dst.copy_from_slice(src);
        return;
    }
    for (src, dst) in src.chunks(size).zip(dst.chunks_mut(size)) {
        if src.len() == size {
            tile(src, dst);
        } else {
            dst.copy_from_slice(src);
        }
    }
}

/// Unpacks some rows of a run to `dst`, one each `stride ≥ dim` values; what lies between is left alone. `buffer` is
/// used for a tile's rows.
#[expect(
    clippy::too_many_arguments,
    reason = "a run, a part of it, and where that goes"
)]
#[inline(always)]
pub(super) fn unpack_part<S: Simd>(
    s: S,
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    part: Range<usize>,
    dst: &mut [f32],
    stride: usize,
    buffer: &mut Vec<u8>,
) {
    let row = codec.row_bytes(dim);
    match layout {
        Layout::Rows => unpack::rows(s, codec, dim, &src[part.start * row..part.end * row], dst, stride),
        Layout::KeyChannels => channels::unpack(s, codec, dim, src, part, dst, stride),
        Layout::KeyTiles | Layout::ValueTiles => {
            let tiled = src.len() / row / TILE * TILE;
            buffer.resize(TILE * row, 0);
            let mut at = part.start;
            while at < part.end {
                // To the end of the tile, or of all rows behind the tiles.
                let to = if at < tiled {
                    (at / TILE + 1) * TILE
                } else {
                    part.end
                };
                let to = to.min(part.end);
                let rows = if at < tiled {
                    let tile = at / TILE * TILE;
                    of_tile(s, layout, codec, dim, &src[tile * row..][..TILE * row], buffer);
                    &buffer[(at - tile) * row..(to - tile) * row]
                } else {
                    &src[at * row..to * row]
                };
                unpack::rows(
                    s,
                    codec,
                    dim,
                    rows,
                    &mut dst[(at - part.start) * stride..],
                    stride,
                );
                at = to;
            }
        }
    }
}

/// Sixteen rows as a tile.
#[inline(always)]
fn to_tile<S: Simd>(s: S, layout: Layout, codec: Codec, dim: usize, rows: &[u8], tile: &mut [u8]) {
    let (row, codes) = (codec.row_bytes(dim), codec.code_bytes(dim));
    if layout == Layout::KeyTiles {
        words_to(rows, row, codes, tile);
    } else {
        for (q, block) in tile[..TILE * codes]
            .as_chunks_mut::<64>()
            .0
            .iter_mut()
            .enumerate()
        {
            let (q, j) = (q / 4, q % 4);
            *block = s.zip(std::array::from_fn(|b| {
                sixteen(&rows[(4 * j + b) * row + 16 * q..])
            }));
        }
    }
    for g in 0..dim / GROUP {
        for r in 0..TILE {
            let (from, to) = (r * row + codes + PARAM_BYTES * g, tile_scale(codec, dim, g, r));
            let (scale, zero) = (pair(&rows[from..]), pair(&rows[from + 2..]));
            tile[to..to + 2].copy_from_slice(&scale);
            tile[to + 32..to + 34].copy_from_slice(&zero);
        }
    }
}

/// A tile as sixteen rows.
#[inline(always)]
fn of_tile<S: Simd>(s: S, layout: Layout, codec: Codec, dim: usize, tile: &[u8], rows: &mut [u8]) {
    let (row, codes) = (codec.row_bytes(dim), codec.code_bytes(dim));
    if layout == Layout::KeyTiles {
        words_of(tile, row, codes, rows);
    } else {
        for (q, block) in tile[..TILE * codes].as_chunks::<64>().0.iter().enumerate() {
            let (q, j) = (q / 4, q % 4);
            for (b, bytes) in s.unzip(block).iter().enumerate() {
                rows[(4 * j + b) * row + 16 * q..][..16].copy_from_slice(bytes);
            }
        }
    }
    for g in 0..dim / GROUP {
        for r in 0..TILE {
            let (to, from) = (r * row + codes + PARAM_BYTES * g, tile_scale(codec, dim, g, r));
            let (scale, zero) = (pair(&tile[from..]), pair(&tile[from + 32..]));
            rows[to..to + 2].copy_from_slice(&scale);
            rows[to + 2..to + 4].copy_from_slice(&zero);
        }
    }
}

/// The first `codes` bytes of sixteen rows, `row` bytes from one to the next, as words side by side.
#[inline(always)]
pub(super) fn words_to(rows: &[u8], row: usize, codes: usize, tile: &mut [u8]) {
    let (words, _) = tile[..TILE * codes].as_chunks_mut::<64>();
    for (w, words) in words.iter_mut().enumerate() {
        for (r, word) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            word.copy_from_slice(&rows[r * row + 4 * w..][..4]);
        }
    }
}

/// The other way round.
#[inline(always)]
fn words_of(tile: &[u8], row: usize, codes: usize, rows: &mut [u8]) {
    for (w, words) in tile[..TILE * codes].as_chunks::<64>().0.iter().enumerate() {
        for (r, word) in words.as_chunks::<4>().0.iter().enumerate() {
            rows[r * row + 4 * w..][..4].copy_from_slice(word);
        }
    }
}

#[inline(always)]
fn sixteen(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&bytes[..16]);
    out
}

#[inline(always)]
fn pair(bytes: &[u8]) -> [u8; 2] {
    [bytes[0], bytes[1]]
}
