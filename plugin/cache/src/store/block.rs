//! A run of rows in one codec pair, in one allocation of exactly its capacity. A closed block never
//! changes, so forks share it; only a block that nobody shares is appended to.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cinch_hooks::HookError;
use cinch_kernels::{Codec, Kernels, Layout, Segment};

use super::ledger::{Charge, Ledger};
use super::picked::Picked;
use super::side::{self, Buffers, Part, Side, gather};
use crate::error::kernel;
use crate::project::Bases;

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

    fn sides(self, dims: Dims) -> (Side, Side) {
        let k = if self.channels {
            Layout::KeyChannels
        } else {
            dims.kernels.key_layout(self.k, dims.k)
        };
        (
            Side::new(self.k, dims.k, k),
            Side::new(self.v, dims.v, dims.kernels.value_layout(self.v, dims.v)),
        )
    }
}

/// Rows of K, then rows of V; a few hundred at most.
#[derive(Debug)]
pub(crate) struct Block {
    kernels: Kernels,
    pair: Pair,
    k: Side,
    v: Side,
    rows: u32,
    /// Rows when it was filled; what was cut off since is still there.
    filled: u32,
    capacity: u32,
    data: Box<[Line]>,
    charge: Charge,
}

impl Block {
    pub(crate) fn new(ledger: &Arc<Ledger>, dims: Dims, pair: Pair, capacity: usize) -> Self {
        let (k, v) = pair.sides(dims);
        let bytes = k.bytes(capacity) + v.bytes(capacity);
        let data = vec![Line::zeroed(); bytes / LINE].into_boxed_slice();
        let charge = Charge::new(ledger, bytes + HEADER);
        Self {
            kernels: dims.kernels,
            pair,
            k,
            v,
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
        let (kernels, k_side, v_side) = (dims.kernels, block.k, block.v);
        let (k, v) = block.bytes_mut();
        let basis = |source: &Self| bases.filter(|_| pair.projected && !source.pair.projected);
        let keys = pieces.clone().map(|(source, rows)| Part {
            bytes: source.k_bytes(0..source.rows()),
            side: source.k,
            stored: source.rows(),
            rotated: (source.pair.rotated, pair.rotated),
            basis: basis(source).and_then(|bases| bases.k.as_ref()),
            rows,
        });
        gather(kernels, k_side, keys, rows, k, buffers)?;
        let values = pieces.map(|(source, rows)| Part {
            bytes: source.v_bytes(0..source.rows()),
            side: source.v,
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

    /// The last row at or before `row` from which on rows can be attended to.
    pub(crate) fn cut(&self, row: usize) -> usize {
        let step = self.k.layout.step().max(self.v.layout.step());
        row / step * step
    }

    /// Some of the rows as the kernels take them, from a cut on.
    pub(crate) fn segment(&self, rows: Range<usize>) -> Segment<'_> {
        Segment {
            k_codec: self.k.codec,
            v_codec: self.v.codec,
            k_layout: self.k.layout,
            v_layout: self.v.layout,
            k_rotated: self.pair.rotated,
            rows: rows.len(),
            k: self.k_bytes(rows.clone()),
            v: self.v_bytes(rows),
        }
    }

    fn k_bytes(&self, rows: Range<usize>) -> &[u8] {
        self.part(self.k, 0, rows)
    }

    fn v_bytes(&self, rows: Range<usize>) -> &[u8] {
        self.part(self.v, self.k.bytes(self.capacity()), rows)
    }

    /// Rows from a cut on, and what else is in the last one's tile.
    fn part(&self, side: Side, base: usize, rows: Range<usize>) -> &[u8] {
        let stored = side.layout.stored_rows(self.filled as usize);
        let span = side.layout.span(stored, rows.start, rows.len());
        let bytes: &[u8] = bytemuck::cast_slice(&self.data);
        &bytes[base + span.start * side.row()..base + span.end * side.row()]
    }

    fn bytes_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        let base = self.k.bytes(self.capacity());
        bytemuck::cast_slice_mut(&mut self.data).split_at_mut(base)
    }

    /// Packs `rows` contiguous fresh rows behind the others; only rows of the store's own codec come fresh, and those
    /// lie row by row and are not rotated.
    pub(crate) fn push(&mut self, k: &[f32], v: &[f32], rows: usize) -> Result<(), HookError> {
        let (kernels, k_side, v_side) = (self.kernels, self.k, self.v);
        let (from, to) = (self.rows(), self.rows() + rows);
        let (to_k, to_v) = self.bytes_mut();
        for (side, values, bytes) in [(k_side, k, to_k), (v_side, v, to_v)] {
            let bytes = &mut bytes[from * side.row()..to * side.row()];
            kernels
                .pack(side.codec, side.dim(), values, bytes)
                .map_err(kernel)?;
        }
        (self.rows, self.filled) = (to as u32, to as u32);
        Ok(())
    }

    /// Packs one row again, with other values. In a tile whose tokens share parameters, those are made anew.
    pub(crate) fn replace(&mut self, row: usize, k: &[f32], v: &[f32]) -> Result<(), HookError> {
        let (kernels, k_side, v_side) = (self.kernels, self.k, self.v);
        let filled = self.filled as usize;
        let mut rotated = k.to_vec();
        if self.pair.rotated {
            kernels.rotate(k_side.dim(), &mut rotated).map_err(kernel)?;
        }
        let (to_k, to_v) = self.bytes_mut();
        side::replace(kernels, k_side, filled, row, &rotated, to_k)?;
        side::replace(kernels, v_side, filled, row, v, to_v)
    }

    /// A copy of its own with the same capacity, to append to where a fork shares this one.
    pub(crate) fn duplicate(&self) -> Self {
        Self {
            kernels: self.kernels,
            pair: self.pair,
            k: self.k,
            v: self.v,
            rows: self.rows,
            filled: self.filled,
            capacity: self.capacity,
            data: self.data.clone(),
            charge: Charge::new(self.charge.ledger(), self.charge.bytes()),
        }
    }

    /// Unpacks all keys, out of their rotation.
    pub(crate) fn unpack_keys(&self, to: &mut [f32]) -> Result<(), HookError> {
        let (kernels, side) = (self.kernels, self.k);
        let bytes = self.k_bytes(0..self.rows());
        kernels
            .unpack_run(side.layout, side.codec, side.dim(), bytes, to)
            .map_err(kernel)?;
        if self.pair.rotated {
            kernels.rotate(side.dim(), to).map_err(kernel)?;
        }
        Ok(())
    }

    /// Unpacks all values.
    pub(crate) fn unpack_values(&self, to: &mut [f32]) -> Result<(), HookError> {
        let (side, bytes) = (self.v, self.v_bytes(0..self.rows()));
        self.kernels
            .unpack_run(side.layout, side.codec, side.dim(), bytes, to)
            .map_err(kernel)
    }
}
