//! A run of rows in one codec pair, in one allocation of exactly its capacity. A closed block never
//! changes, so forks share it; only a block that nobody shares is appended to.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cinch_hooks::HookError;
use cinch_kernels::{Kernels, Segment};

use super::extra::Extras;
use super::ledger::{Charge, Ledger};
use super::pair::{Dims, Pair};
use super::picked::Picked;
use super::side::{Buffers, Part, Side, gather, moved};
use super::twin::Twin;
use crate::error::kernel;
use crate::project::Bases;
use crate::quantize::Beside;
use crate::quantize::zipcache::Marks;
use crate::rotary::{Positions, Turns, Way};

/// What the allocator holds for a block besides its rows: the struct and its two reference counts.
pub(crate) const HEADER: usize = size_of::<Block>() + 2 * size_of::<usize>();

/// What K and V are rounded up to. Vectors of 64 bytes that cross two cache lines take twice as long.
pub(crate) const LINE: usize = size_of::<Line>();

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Rows of a block that go to another one.
#[derive(Clone, Copy)]
pub(super) struct Taken<'a> {
    pub(super) block: &'a Block,
    /// Where all of the block's rows are.
    pub(super) positions: Positions<'a>,
    pub(super) rows: &'a Picked<'a>,
}

/// Rows of K, then rows of V; a few hundred at most.
#[derive(Debug)]
pub(crate) struct Block {
    pub(super) kernels: Kernels,
    pub(super) pair: Pair,
    pub(super) k: Side,
    pub(super) v: Side,
    pub(super) rows: u32,
    /// Rows when it was filled; what was cut off since is still there.
    pub(super) filled: u32,
    capacity: u32,
    /// Where V begins, in bytes.
    values_at: u32,
    data: Box<[Line]>,
    pub(super) extras: Option<Box<Extras>>,
    pub(super) charge: Charge,
}

impl Block {
    pub(crate) fn new(ledger: &Arc<Ledger>, dims: Dims, pair: Pair, capacity: usize) -> Self {
        Self::with_room(ledger, dims, pair, capacity, 0)
    }

    /// The same, for rows of which so many are salient.
    fn with_room(ledger: &Arc<Ledger>, dims: Dims, pair: Pair, capacity: usize, salient: usize) -> Self {
        let (k, v) = pair.sides(dims);
        let (k_held, v_held) = pair.held(capacity, salient);
        let (k_bytes, v_bytes) = (k.bytes(k_held), v.bytes(v_held));
        let bytes = k_bytes + v_bytes;
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
            values_at: k_bytes as u32,
            extras: None,
            data,
            charge,
        }
    }

    /// A block of rows of others, transcoded where codecs differ, projected where they were not, and turned where they are
    /// to be on the other side of their rotary embedding.
    #[expect(clippy::too_many_arguments, reason = "a step of a compaction")]
    pub(super) fn gather<'a>(
        ledger: &Arc<Ledger>,
        dims: Dims,
        (bases, rotary): (Option<&'a Bases>, Option<&'a Turns>),
        pair: Pair,
        capacity: usize,
        pieces: impl Iterator<Item = Taken<'a>> + Clone,
        salience: &[f32],
        buffers: &mut Buffers,
    ) -> Result<Self, HookError> {
        let rows = pieces.clone().map(|taken| taken.rows.len()).sum();
        let marks = match pair.beside {
            Beside::Salient { share, .. } => Marks::of(salience, &low(pieces.clone()), share),
            Beside::Nothing | Beside::Levels { .. } | Beside::Error { .. } | Beside::Shared { .. } => {
                Marks::default()
            }
        };
        let mut block = Self::with_room(ledger, dims, pair, capacity, marks.count());
        let (kernels, k_side, v_side) = (dims.kernels, block.k, block.v);
        let (k, v) = block.bytes_mut();
        let basis = |source: &Self| bases.filter(|_| pair.projected && !source.pair.projected);
        let turn = |source: &Self, positions| {
            let way = if pair.before_rope { Way::Back } else { Way::Forth };
            let turns = rotary.filter(|_| source.pair.before_rope != pair.before_rope);
            turns.map(|turns| (turns, way, positions))
        };
        let keys = pieces.clone().map(|taken| {
            let Taken {
                block: source,
                positions,
                rows,
            } = taken;
            Part {
                bytes: source.k_bytes(0..source.rows()),
                side: source.k,
                extras: source.extras.as_deref(),
                key: true,
                stored: source.rows(),
                rotated: (source.pair.rotated, pair.rotated),
                turn: turn(source, positions),
                basis: basis(source).and_then(|bases| bases.k.as_ref()),
                rows,
            }
        });
        let values = pieces.map(
            |Taken {
                 block: source, rows, ..
             }| Part {
                bytes: source.v_bytes(0..source.rows()),
                side: source.v,
                extras: source.extras.as_deref(),
                key: false,
                stored: source.rows(),
                rotated: (false, false),
                turn: None,
                basis: basis(source).and_then(|bases| bases.v.as_ref()),
                rows,
            },
        );
        if pair.beside.is_plain() {
            gather(kernels, k_side, keys, rows, k, buffers)?;
            gather(kernels, v_side, values, rows, v, buffers)?;
        } else {
            let sides = (k_side, v_side);
            let rows = (moved(kernels, k_side, keys)?, moved(kernels, v_side, values)?);
            let extras = Extras::pack(kernels, pair, sides, marks, rows, (k, v))?;
            block.set_extras(extras);
        }
        (block.rows, block.filled) = (rows as u32, rows as u32);
        Ok(block)
    }

    /// The block whose rows are `twin`, in the place of `block`.
    pub(super) fn twin(ledger: &Arc<Ledger>, block: &Self, twin: Twin) -> Self {
        let extras = Extras {
            twin: Some(twin),
            ..Extras::default()
        };
        let mut own = Self {
            rows: block.rows,
            filled: block.filled,
            capacity: block.capacity,
            values_at: 0,
            extras: None,
            data: Box::default(),
            charge: Charge::new(ledger, HEADER),
            ..*block
        };
        own.set_extras(extras);
        own
    }

    /// Whether the kernels can take its rows as they are stored.
    pub(super) fn is_plain(&self) -> bool {
        self.extras.is_none()
    }

    pub(super) fn is_twin(&self) -> bool {
        self.extras.as_ref().is_some_and(|extras| extras.twin.is_some())
    }

    /// All rows as they are stored: keys in their rotation.
    pub(super) fn stored(&self) -> Result<(Vec<f32>, Vec<f32>), HookError> {
        let mut k = vec![0.0; self.rows() * self.k.dim()];
        let mut v = vec![0.0; self.rows() * self.v.dim()];
        self.stored_keys(&mut k)?;
        self.unpack_values(&mut v)?;
        Ok((k, v))
    }

    pub(super) fn set_extras(&mut self, extras: Extras) {
        let before = self.extras.as_ref().map_or(0, |extras| extras.own_bytes());
        // What is shared has a charge of its own.
        self.charge.set(self.charge.bytes() - before + extras.own_bytes());
        self.extras = Some(Box::new(extras));
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
        let shared = self.extras.as_ref().map_or(0, |extras| extras.shared_bytes());
        self.charge.bytes() + shared
    }

    pub(crate) fn truncate(&mut self, rows: usize) {
        self.rows = self.rows.min(rows as u32);
    }

    /// Rows can be attended to from every multiple of this on.
    pub(crate) fn step(&self) -> usize {
        if self.is_plain() {
            self.k.layout.step().max(self.v.layout.step())
        } else {
            // Unpacked whole.
            self.rows().max(1)
        }
    }

    /// The last row at or before `row` from which on rows can be attended to.
    pub(crate) fn cut(&self, row: usize) -> usize {
        row / self.step() * self.step()
    }

    /// Some of the rows as the kernels take them, from a cut on. Of a block with nothing beside its codes.
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

    pub(super) fn k_bytes(&self, rows: Range<usize>) -> &[u8] {
        self.part(self.k, 0, self.held().0, rows)
    }

    pub(super) fn v_bytes(&self, rows: Range<usize>) -> &[u8] {
        self.part(self.v, self.values_at as usize, self.held().1, rows)
    }

    /// Rows of K and V whose codes are among its own bytes.
    fn held(&self) -> (usize, usize) {
        let salient = self.extras.as_ref().map_or(0, |extras| extras.marks.count());
        self.pair.held(self.filled as usize, salient)
    }

    /// Rows from a cut on, and what else is in the last one's tile. Where there is something beside codes, all of them.
    fn part(&self, side: Side, base: usize, held: usize, rows: Range<usize>) -> &[u8] {
        let stored = side.layout.stored_rows(held);
        let span = match self.extras {
            Some(_) => 0..stored,
            None => side.layout.span(stored, rows.start, rows.len()),
        };
        let bytes: &[u8] = bytemuck::cast_slice(&self.data);
        if self.is_twin() {
            return bytes;
        }
        &bytes[base + span.start * side.row()..base + span.end * side.row()]
    }

    pub(super) fn bytes_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        bytemuck::cast_slice_mut(&mut self.data).split_at_mut(self.values_at as usize)
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
            values_at: self.values_at,
            extras: self.extras.clone(),
            data: self.data.clone(),
            charge: Charge::new(self.charge.ledger(), self.charge.bytes()),
        }
    }

    /// Unpacks all keys, out of their rotation.
    pub(crate) fn unpack_keys(&self, to: &mut [f32]) -> Result<(), HookError> {
        self.stored_keys(to)?;
        if self.pair.rotated {
            self.kernels.rotate(self.k.dim(), to).map_err(kernel)?;
        }
        Ok(())
    }

    fn stored_keys(&self, to: &mut [f32]) -> Result<(), HookError> {
        let (kernels, side, bytes) = (self.kernels, self.k, self.k_bytes(0..self.rows()));
        match &self.extras {
            Some(extras) => extras.keys(kernels, side, bytes, to),
            None => kernels
                .unpack_run(side.layout, side.codec, side.dim(), bytes, to)
                .map_err(kernel),
        }
    }

    /// Unpacks all values.
    pub(crate) fn unpack_values(&self, to: &mut [f32]) -> Result<(), HookError> {
        let (kernels, side, bytes) = (self.kernels, self.v, self.v_bytes(0..self.rows()));
        match &self.extras {
            Some(extras) => extras.values(kernels, side, bytes, to),
            None => kernels
                .unpack_run(side.layout, side.codec, side.dim(), bytes, to)
                .map_err(kernel),
        }
    }
}

/// Which rows have lost the bits of salient ones.
fn low<'a>(pieces: impl Iterator<Item = Taken<'a>>) -> Vec<bool> {
    let mut low = Vec::new();
    for Taken { block, rows, .. } in pieces {
        let marks = match block.pair.beside {
            Beside::Salient { .. } => block.extras.as_ref().map(|extras| extras.marks),
            Beside::Nothing | Beside::Levels { .. } | Beside::Error { .. } | Beside::Shared { .. } => None,
        };
        rows.for_runs(|_, run| low.extend(run.map(|row| marks.is_some_and(|marks| !marks.has(row)))));
    }
    low
}
