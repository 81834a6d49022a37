//! Layouts, byte by byte as [`crate::layout`] describes them.

use half::f16;

use super::{code, level, nearest, pack_by, parameters, put, saturate, value};
use crate::codec::{GROUP, PARAM_BYTES};
use crate::layout::{CHANNEL_TILE, TILE, channel_scale, tile_scale};
use crate::{Codec, KernelError, Layout, check};

/// See [`crate::Kernels::pack_run`].
pub(crate) fn pack_run(
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[f32],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    pack_table(layout, codec, dim, None, src, dst)
}

/// See [`crate::Kernels::pack_levels`].
pub(crate) fn pack_levels(
    layout: Layout,
    codec: Codec,
    dim: usize,
    levels: &[f32],
    src: &[f32],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::levels(codec, levels)?;
    pack_table(layout, codec, dim, Some(levels), src, dst)
}

fn pack_table(
    layout: Layout,
    codec: Codec,
    dim: usize,
    table: Option<&[f32]>,
    src: &[f32],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::run(layout, codec, dim, src.len(), dst.len())?;
    match layout {
        Layout::Rows => pack_by(codec, dim, src, dst, table),
        Layout::KeyTiles | Layout::ValueTiles => {
            let mut rows = vec![0; dst.len()];
            pack_by(codec, dim, src, &mut rows, table)?;
            of_rows(layout, codec, dim, &rows, dst)
        }
        Layout::KeyChannels => pack_channels(codec, dim, src, dst, table),
    }
}

/// See [`crate::Kernels::to_rows`].
pub(crate) fn to_rows(
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::movable(layout, codec, dim, src.len(), dst.len())?;
    for (at, byte) in dst.iter_mut().enumerate() {
        *byte = src[moved(layout, codec, dim, src.len(), at)];
    }
    Ok(())
}

/// See [`crate::Kernels::of_rows`].
pub(crate) fn of_rows(
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [u8],
) -> Result<(), KernelError> {
    check::movable(layout, codec, dim, src.len(), dst.len())?;
    for (at, byte) in src.iter().enumerate() {
        dst[moved(layout, codec, dim, src.len(), at)] = *byte;
    }
    Ok(())
}

/// Where byte `at` of rows that lie row by row is in a run of a layout.
fn moved(layout: Layout, codec: Codec, dim: usize, bytes: usize, at: usize) -> usize {
    let row = codec.row_bytes(dim);
    match layout {
        Layout::Rows => at,
        _ => place(layout, codec, dim, bytes / row, at / row, at % row),
    }
}

/// Where byte `i` of row `r` is, of a run of `stored` rows in tiles.
fn place(layout: Layout, codec: Codec, dim: usize, stored: usize, r: usize, i: usize) -> usize {
    let row = codec.row_bytes(dim);
    if r >= stored - stored % TILE {
        return r * row + i;
    }
    let (tile, r, codes) = (r / TILE * TILE * row, r % TILE, codec.code_bytes(dim));
    tile + if i >= codes {
        let (g, byte) = ((i - codes) / PARAM_BYTES, (i - codes) % PARAM_BYTES);
        tile_scale(codec, dim, g, r) + byte % 2 + 32 * (byte / 2)
    } else if layout == Layout::KeyTiles {
        4 * (TILE * (i / 4) + r) + i % 4
    } else {
        64 * (4 * (i / 16) + r / 4) + 4 * (i % 16) + r % 4
    }
}

fn pack_channels(
    codec: Codec,
    dim: usize,
    src: &[f32],
    dst: &mut [u8],
    table: Option<&[f32]>,
) -> Result<(), KernelError> {
    let levels = f32::from(codec.levels().unwrap_or(u8::MAX));
    let row = codec.row_bytes(dim);
    for (i, &given) in src.iter().enumerate() {
        if !given.is_finite() {
            let (row, column) = (i / dim, i % dim);
            return Err(KernelError::NonFinite { row, column, given });
        }
    }
    dst.fill(0);
    for (src, dst) in src
        .chunks(CHANNEL_TILE * dim)
        .zip(dst.chunks_exact_mut(CHANNEL_TILE * row))
    {
        let rows = src.len() / dim;
        let mut codes = vec![vec![0; dim]; CHANNEL_TILE];
        for c in 0..dim {
            let column = || (0..rows).map(|r| src[r * dim + c]);
            let min = column().fold(f32::INFINITY, f32::min);
            let max = column().fold(f32::NEG_INFINITY, f32::max);
            let (scale, zero) = parameters(min, max, levels);
            let at = channel_scale(codec, dim, c);
            dst[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            dst[at + 2 * dim..at + 2 * dim + 2].copy_from_slice(&zero.to_le_bytes());
            let (scale, zero) = (scale.to_f32(), zero.to_f32());
            for (r, x) in column().enumerate() {
                if scale != 0.0 {
                    codes[r][c] = nearest((saturate(x) - zero) / scale, levels, table);
                }
            }
        }
        let group = codec.group_bytes(GROUP);
        for (r, codes) in codes.iter().enumerate() {
            let mut bytes = vec![0; codec.code_bytes(dim)];
            for (c, code) in codes.iter().enumerate() {
                put(codec, &mut bytes[c / GROUP * group..], GROUP, c % GROUP, *code);
            }
            for (i, byte) in bytes.iter().enumerate() {
                dst[channel_code(codec, dim, r, i)] = *byte;
            }
        }
    }
    Ok(())
}

/// Where code byte `i` of row `r` is in a channel tile.
fn channel_code(codec: Codec, dim: usize, r: usize, i: usize) -> usize {
    r / 16 * 16 * codec.code_bytes(dim) + 4 * (16 * (i / 4) + r % 16) + i % 4
}

/// See [`crate::Kernels::unpack_run`].
pub(crate) fn unpack_run(
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [f32],
) -> Result<(), KernelError> {
    check::first(layout, codec, dim, dst.len(), src.len())?;
    unpack_first(layout, codec, dim, src, dst, None);
    Ok(())
}

/// See [`crate::Kernels::unpack_levels`].
pub(crate) fn unpack_levels(
    layout: Layout,
    codec: Codec,
    dim: usize,
    levels: &[f32],
    src: &[u8],
    dst: &mut [f32],
) -> Result<(), KernelError> {
    check::levels(codec, levels)?;
    check::first(layout, codec, dim, dst.len(), src.len())?;
    unpack_first(layout, codec, dim, src, dst, Some(levels));
    Ok(())
}

/// Unpacks a run's first rows, as many as there is room for.
pub(super) fn unpack_first(
    layout: Layout,
    codec: Codec,
    dim: usize,
    src: &[u8],
    dst: &mut [f32],
    table: Option<&[f32]>,
) {
    let row = codec.row_bytes(dim);
    let stored = src.len() / row;
    for (r, dst) in dst.chunks_exact_mut(dim).enumerate() {
        if layout == Layout::KeyChannels {
            let tile = &src[r / CHANNEL_TILE * CHANNEL_TILE * row..];
            for (c, x) in dst.iter_mut().enumerate() {
                let (group, at) = (codec.group_bytes(GROUP), channel_scale(codec, dim, c));
                let bytes: Vec<u8> = (c / GROUP * group..(c / GROUP + 1) * group)
                    .map(|i| tile[channel_code(codec, dim, r % CHANNEL_TILE, i)])
                    .collect();
                let number = |at: usize| f16::from_le_bytes([tile[at], tile[at + 1]]).to_f32();
                let code = code(codec, &bytes, GROUP, c % GROUP);
                *x = number(at) * level(code, table) + number(at + 2 * dim);
            }
            continue;
        }
        let bytes: Vec<u8> = (0..row)
            .map(|i| match layout {
                Layout::Rows => src[r * row + i],
                _ => src[place(layout, codec, dim, stored, r, i)],
            })
            .collect();
        for (i, x) in dst.iter_mut().enumerate() {
            *x = value(codec, dim, &bytes, i, table);
        }
    }
}
