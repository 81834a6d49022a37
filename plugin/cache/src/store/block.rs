//! A run of rows in one codec pair, in one allocation of exactly its capacity. A closed block never
//! changes, so forks share it; only a block that nobody shares is appended to.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cinch_hooks::HookError;
use cinch_kernels::{Codec, Kernels, Layout, Segment};

use super::ledger::{Charge, Ledger};
use super::picked::Picked;
use crate::error::kernel;
use crate::project::{Bases, Basis};

/// What the allocator holds for a block besides its rows: the struct and its two reference counts.
pub(crate) const HEADER: usize = size_of::<Block>() + 2 * size_of::<usize>();

/// What K and V are rounded up to. Vectors of 64 bytes that cross two cache lines take twice as long.
pub(crate) const LINE: usize = size_of::<Line>();

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Head dimensions of one KV head, and what packs its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dims {
    pub(crate) k: usize,
    pub(crate) v: usize,
    pub(crate) kernels: Kernels,
}

/// Codecs of a run of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) k: Codec,
    pub(crate) v: Codec,
    /// Keys are stored as [`Kernels::rotate`] left them.
    pub(crate) rotated: bool,
    /// Tokens share a channel's scale and zero, not a token's channels: [`Layout::KeyChannels`].
    pub(crate) channels: bool,
    /// Rows are coordinates in the head's bases.
    pub(crate) projected: bool,
}

impl Pair {
    pub(crate) fn both(codec: Codec) -> Self {
        Self {
            k: codec,
            v: codec,
            rotated: false,
            channels: false,
            projected: false,
        }
    }

    /// Bytes of K and V of a block of so many rows.
    pub(crate) fn bytes(self, dims: Dims, rows: usize) -> (usize, usize) {
        let (k, v) = self.sides(dims);
        let bytes = |side: Side| (side.layout.stored_rows(rows) * side.row()).next_multiple_of(LINE);
        (bytes(k), bytes(v))
    }

    fn sides(self, dims: Dims) -> (Side, Side) {
        let k = if self.channels {
            Layout::KeyChannels
        } else {
            dims.kernels.key_layout(self.k, dims.k)
        };
        let side = |codec, dim, layout| Side { codec, dim, layout };
        (
            side(self.k, dims.k, k),
            side(self.v, dims.v, dims.kernels.value_layout(self.v, dims.v)),
        )
    }
}

/// How one side of a block is stored.
#[derive(Debug, Clone, Copy)]
struct Side {
    codec: Codec,
    dim: usize,
    layout: Layout,
}

impl Side {
    fn row(self) -> usize {
        self.codec.row_bytes(self.dim)
    }

    /// Whether a row is bytes of its own.
    fn has_rows(self) -> bool {
        self.layout != Layout::KeyChannels
    }
}

/// Buffers for what rows go through on their way from block to block.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    values: Vec<f32>,
    /// A source's rows, row by row.
    source: Vec<u8>,
    /// A target's.
    target: Vec<u8>,
}

/// Rows of K, then rows of V; a few hundred at most.
#[derive(Debug)]
pub(crate) struct Block {
    dims: Dims,
    pair: Pair,
    rows: u32,
    /// Rows when it was filled; what was cut off since is still there.
    filled: u32,
    capacity: u32,
    data: Box<[Line]>,
    charge: Charge,
}

impl Block {
    pub(crate) fn new(ledger: &Arc<Ledger>, dims: Dims, pair: Pair, capacity: usize) -> Self {
        let (k, v) = pair.bytes(dims, capacity);
        let data = vec![Line::zeroed(); (k + v) / LINE].into_boxed_slice();
        let charge = Charge::new(ledger, k + v + HEADER);
        Self {
            dims,
            pair,
            rows: 0,
            filled: 0,
            capacity: capacity as u32,
            data,
            charge,
        }
    }

    /// A block of rows of others, transcoded where codecs differ, and projected where they were not.
    pub(crate) fn gather<'a>(
        ledger: &Arc<Ledger>,
        (dims, bases): (Dims, Option<&'a Bases>),
        pair: Pair,
        capacity: usize,
        pieces: impl Iterator<Item = (&'a Self, &'a Picked<'a>)> + Clone,
        buffers: &mut Buffers,
    ) -> Result<Self, HookError> {
        let mut block = Self::new(ledger, dims, pair, capacity);
        let rows = pieces.clone().map(|(_, rows)| rows.len()).sum();
        let (k_side, v_side) = pair.sides(dims);
        let (k, v) = block.sides_mut();
        let kernels = dims.kernels;
        let basis = |source: &Self| bases.filter(|_| pair.projected && !source.pair.projected);
        let keys = pieces.clone().map(|(source, rows)| Part {
            bytes: source.k(0, source.rows()),
            side: source.pair.sides(source.dims).0,
            stored: source.rows(),
            rotated: (source.pair.rotated, pair.rotated),
            basis: basis(source).and_then(|bases| bases.k.as_ref()),
            rows,
        });
        gather(kernels, k_side, keys, rows, k, buffers)?;
        let values = pieces.map(|(source, rows)| Part {
            bytes: source.v(0, source.rows()),
            side: source.pair.sides(source.dims).1,
            stored: source.rows(),
            rotated: (false, false),
            basis: basis(source).and_then(|bases| bases.v.as_ref()),
            rows,
        });
        gather(kernels, v_side, values, rows, v, buffers)?;
        (block.rows, block.filled) = (rows as u32, rows as u32);
        Ok(block)
    }

    pub(crate) fn pair(&self) -> Pair {
        self.pair
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows as usize
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity as usize
    }

    pub(crate) fn room(&self) -> usize {
        self.capacity() - self.rows()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.charge.bytes()
    }

    pub(crate) fn truncate(&mut self, rows: usize) {
        self.rows = self.rows.min(rows as u32);
    }

    /// Rows can be attended to from every multiple of this on.
    pub(crate) fn step(&self) -> usize {
        let (k, v) = self.pair.sides(self.dims);
        k.layout.step().max(v.layout.step())
    }

    /// The last row at or before `row` from which on rows can be attended to.
    pub(crate) fn cut(&self, row: usize) -> usize {
        row / self.step() * self.step()
    }

    /// Some of the rows as the kernels take them, from a cut on.
    pub(crate) fn segment(&self, rows: Range<usize>) -> Segment<'_> {
        let (k, v) = self.pair.sides(self.dims);
        Segment {
            k_codec: self.pair.k,
            v_codec: self.pair.v,
            k_layout: k.layout,
            v_layout: v.layout,
            k_rotated: self.pair.rotated,
            rows: rows.len(),
            k: self.k(rows.start, rows.end),
            v: self.v(rows.start, rows.end),
        }
    }

    fn k(&self, from: usize, to: usize) -> &[u8] {
        self.part(self.pair.sides(self.dims).0, 0, from, to)
    }

    fn v(&self, from: usize, to: usize) -> &[u8] {
        let base = self.pair.bytes(self.dims, self.capacity()).0;
        self.part(self.pair.sides(self.dims).1, base, from, to)
    }

    /// Rows from a cut on, and what else is in the last one's tile.
    fn part(&self, side: Side, base: usize, from: usize, to: usize) -> &[u8] {
        let stored = side.layout.stored_rows(self.filled as usize);
        let span = side.layout.span(stored, from, to - from);
        let bytes: &[u8] = bytemuck::cast_slice(&self.data);
        &bytes[base + span.start * side.row()..base + span.end * side.row()]
    }

    fn sides_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        let base = self.pair.bytes(self.dims, self.capacity()).0;
        bytemuck::cast_slice_mut(&mut self.data).split_at_mut(base)
    }

    /// Packs `rows` contiguous fresh rows behind the others; only rows of the store's own codec come fresh, and those
    /// lie row by row and are not rotated.
    pub(crate) fn push(&mut self, k: &[f32], v: &[f32], rows: usize) -> Result<(), HookError> {
        let (
            Dims {
                k: k_dim,
                v: v_dim,
                kernels,
            },
            pair,
        ) = (self.dims, self.pair);
        let (from, to) = (self.rows(), self.rows() + rows);
        let (to_k, to_v) = self.sides_mut();
        for (codec, dim, values, bytes) in [(pair.k, k_dim, k, to_k), (pair.v, v_dim, v, to_v)] {
            let row = codec.row_bytes(dim);
            kernels
                .pack(codec, dim, values, &mut bytes[from * row..to * row])
                .map_err(kernel)?;
        }
        (self.rows, self.filled) = (to as u32, to as u32);
        Ok(())
    }

    /// Packs one row again, with other values (`None`: its key stays). In a tile whose tokens share parameters, those are
    /// made anew.
    pub(crate) fn replace(&mut self, row: usize, k: Option<&[f32]>, v: &[f32]) -> Result<(), HookError> {
        let Dims { kernels, k: dim, .. } = self.dims;
        let (k_side, v_side) = self.pair.sides(self.dims);
        let filled = self.filled as usize;
        let rotated = self.pair.rotated;
        let (to_k, to_v) = self.sides_mut();
        if let Some(k) = k {
            let mut k = k.to_vec();
            if rotated {
                kernels.rotate(dim, &mut k).map_err(kernel)?;
            }
            replace(kernels, k_side, filled, row, &k, to_k)?;
        }
        replace(kernels, v_side, filled, row, v, to_v)
    }

    /// A copy of its own with the same capacity, to append to where a fork shares this one.
    pub(crate) fn duplicate(&self) -> Self {
        Self {
            dims: self.dims,
            pair: self.pair,
            rows: self.rows,
            filled: self.filled,
            capacity: self.capacity,
            data: self.data.clone(),
            charge: Charge::new(self.charge.ledger(), self.charge.bytes()),
        }
    }

    /// Unpacks all keys, out of their rotation.
    pub(crate) fn unpack_keys(&self, to: &mut [f32]) -> Result<(), HookError> {
        let (kernels, side) = (self.dims.kernels, self.pair.sides(self.dims).0);
        let bytes = self.k(0, self.rows());
        kernels
            .unpack_run(side.layout, side.codec, side.dim, bytes, to)
            .map_err(kernel)?;
        if self.pair.rotated {
            kernels.rotate(side.dim, to).map_err(kernel)?;
        }
        Ok(())
    }

    /// Unpacks all values.
    pub(crate) fn unpack_values(&self, to: &mut [f32]) -> Result<(), HookError> {
        let (kernels, side) = (self.dims.kernels, self.pair.sides(self.dims).1);
        let bytes = self.v(0, self.rows());
        kernels
            .unpack_run(side.layout, side.codec, side.dim, bytes, to)
            .map_err(kernel)
    }
}

/// Rows of one side of a block, of which some are picked.
struct Part<'a> {
    bytes: &'a [u8],
    side: Side,
    stored: usize,
    /// Whether they are, and whether they are to be.
    rotated: (bool, bool),
    /// What they are to be projected with.
    basis: Option<&'a Basis>,
    rows: &'a Picked<'a>,
}

/// Puts the parts' rows, `rows` in all, one behind the other into `to`.
fn gather<'a>(
    kernels: Kernels,
    side: Side,
    parts: impl Iterator<Item = Part<'a>>,
    rows: usize,
    to: &mut [u8],
    buffers: &mut Buffers,
) -> Result<(), HookError> {
    let (dim, row) = (side.dim, side.row());
    let Buffers {
        values,
        source,
        target,
    } = buffers;
    let to = &mut to[..side.layout.stored_rows(rows) * row];
    if !side.has_rows() {
        // Parameters are made of all rows of a tile.
        values.clear();
        for part in parts {
            part.moved(kernels, dim, values)?;
        }
        return kernels
            .pack_run(side.layout, side.codec, dim, values, to)
            .map_err(kernel);
    }
    target.clear();
    target.resize(rows * row, 0);
    let mut done = 0;
    for part in parts {
        let bytes = &mut target[done * row..(done + part.rows.len()) * row];
        done += part.rows.len();
        let kept = part.rotated.0 == part.rotated.1 && part.basis.is_none();
        if part.side.codec == side.codec && part.side.has_rows() && kept {
            let from = part.plain(kernels, source)?;
            part.rows.for_runs(|at, run| {
                bytes[at * row..(at + run.len()) * row]
                    .copy_from_slice(&from[run.start * row..run.end * row]);
            });
            continue;
        }
        values.clear();
        part.moved(kernels, dim, values)?;
        kernels.pack(side.codec, dim, values, bytes).map_err(kernel)?;
    }
    kernels
        .of_rows(side.layout, side.codec, dim, target, to)
        .map_err(kernel)
}

impl<'a> Part<'a> {
    /// All of the source's rows, row by row.
    fn plain<'b>(&self, kernels: Kernels, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], HookError>
    where
        'a: 'b,
    {
        let Side { codec, dim, layout } = self.side;
        if layout == Layout::Rows {
            return Ok(self.bytes);
        }
        buffer.resize(self.bytes.len(), 0);
        kernels
            .to_rows(layout, codec, dim, self.bytes, buffer)
            .map_err(kernel)?;
        Ok(buffer)
    }

    /// Appends the picked rows' values as they are to be stored, in `dim` dimensions.
    fn moved(&self, kernels: Kernels, dim: usize, to: &mut Vec<f32>) -> Result<(), HookError> {
        let from = to.len();
        self.values(kernels, to)?;
        // A rotation is its own inverse. Bases are of keys that are not rotated.
        let (mut rotated, wanted) = self.rotated;
        if let Some(basis) = self.basis {
            if rotated {
                kernels.rotate(self.side.dim, &mut to[from..]).map_err(kernel)?;
                rotated = false;
            }
            let whole = to.split_off(from);
            basis.project(&whole, to);
        }
        if rotated != wanted {
            kernels.rotate(dim, &mut to[from..]).map_err(kernel)?;
        }
        Ok(())
    }

    /// Appends the picked rows' values.
    fn values(&self, kernels: Kernels, to: &mut Vec<f32>) -> Result<(), HookError> {
        let Side { codec, dim, layout } = self.side;
        let from = to.len();
        if layout == Layout::Rows {
            to.resize(from + self.rows.len() * dim, 0.0);
            let (row, mut failed) = (self.side.row(), None);
            self.rows.for_runs(|at, run| {
                let wide = &mut to[from + at * dim..from + (at + run.len()) * dim];
                let bytes = &self.bytes[run.start * row..run.end * row];
                if let Err(error) = kernels.unpack(codec, dim, bytes, wide) {
                    failed = Some(error);
                }
            });
            return failed.map_or(Ok(()), |error| Err(kernel(error)));
        }
        // Tiles come whole; the rows that are picked move to the front.
        to.resize(from + self.stored * dim, 0.0);
        kernels
            .unpack_run(layout, codec, dim, self.bytes, &mut to[from..])
            .map_err(kernel)?;
        self.rows.for_runs(|at, run| {
            to.copy_within(from + run.start * dim..from + run.end * dim, from + at * dim);
        });
        to.truncate(from + self.rows.len() * dim);
        Ok(())
    }
}

/// Packs one row of a run of `filled` rows again.
fn replace(
    kernels: Kernels,
    side: Side,
    filled: usize,
    row: usize,
    values: &[f32],
    run: &mut [u8],
) -> Result<(), HookError> {
    let Side { codec, dim, layout } = side;
    let bytes = side.row();
    let stored = layout.stored_rows(filled);
    let start = row / layout.step() * layout.step();
    let span = layout.span(stored, start, layout.step());
    let tile = &mut run[span.start * bytes..span.end * bytes];
    if !side.has_rows() {
        let mut all = vec![0.0; (filled - start).min(layout.step()) * dim];
        kernels
            .unpack_run(layout, codec, dim, tile, &mut all)
            .map_err(kernel)?;
        all[(row - start) * dim..(row - start + 1) * dim].copy_from_slice(values);
        return kernels.pack_run(layout, codec, dim, &all, tile).map_err(kernel);
    }
    let mut rows = vec![0; tile.len()];
    kernels
        .to_rows(layout, codec, dim, tile, &mut rows)
        .map_err(kernel)?;
    let to = &mut rows[(row - start) * bytes..(row - start + 1) * bytes];
    kernels.pack(codec, dim, values, to).map_err(kernel)?;
    kernels.of_rows(layout, codec, dim, &rows, tile).map_err(kernel)
}
