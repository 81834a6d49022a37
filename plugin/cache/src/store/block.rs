//! A run of rows in one codec pair, in one allocation of exactly its capacity. A closed block never
//! changes, so forks share it; only a block that nobody shares is appended to.

use std::ops::Range;
use std::sync::Arc;

use cinch_hooks::HookError;
use cinch_kernels::{Codec, Kernels, Segment};

use super::ledger::{Charge, Ledger};
use crate::error::kernel;

/// What the allocator holds for a block besides its rows: the struct and its two reference counts.
pub(crate) const HEADER: usize = size_of::<Block>() + 2 * size_of::<usize>();

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
}

impl Pair {
    pub(crate) fn both(codec: Codec) -> Self {
        Self {
            k: codec,
            v: codec,
            rotated: false,
        }
    }
}

/// Rows of K, then rows of V, each packed row by row.
#[derive(Debug)]
pub(crate) struct Block {
    pair: Pair,
    k_row: usize,
    v_row: usize,
    rows: usize,
    capacity: usize,
    /// `capacity * k_row` bytes of K, then `capacity * v_row` of V.
    data: Box<[u8]>,
    charge: Charge,
}

impl Block {
    pub(crate) fn new(ledger: &Arc<Ledger>, dims: Dims, pair: Pair, capacity: usize) -> Self {
        let (k_row, v_row) = (pair.k.row_bytes(dims.k), pair.v.row_bytes(dims.v));
        let data = vec![0_u8; capacity * (k_row + v_row)].into_boxed_slice();
        let charge = Charge::new(ledger, data.len() + HEADER);
        Self {
            pair,
            k_row,
            v_row,
            rows: 0,
            capacity,
            data,
            charge,
        }
    }

    pub(crate) fn pair(&self) -> Pair {
        self.pair
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn room(&self) -> usize {
        self.capacity - self.rows
    }

    pub(crate) fn bytes(&self) -> usize {
        self.charge.bytes()
    }

    pub(crate) fn truncate(&mut self, rows: usize) {
        self.rows = self.rows.min(rows);
    }

    /// Some of the rows as the kernels take them.
    pub(crate) fn segment(&self, rows: Range<usize>) -> Segment<'_> {
        Segment {
            k_codec: self.pair.k,
            v_codec: self.pair.v,
            k_rotated: self.pair.rotated,
            rows: rows.len(),
            k: self.k(rows.start, rows.end),
            v: self.v(rows.start, rows.end),
        }
    }

    fn k(&self, from: usize, to: usize) -> &[u8] {
        &self.data[from * self.k_row..to * self.k_row]
    }

    fn v(&self, from: usize, to: usize) -> &[u8] {
        let base = self.capacity * self.k_row;
        &self.data[base + from * self.v_row..base + to * self.v_row]
    }

    /// Where `rows` more rows go. They count once the caller has filled them.
    fn room_for(&mut self, rows: usize) -> (&mut [u8], &mut [u8]) {
        let (from, to) = (self.rows, self.rows + rows);
        let (k, v) = self.data.split_at_mut(self.capacity * self.k_row);
        (
            &mut k[from * self.k_row..to * self.k_row],
            &mut v[from * self.v_row..to * self.v_row],
        )
    }

    /// Packs `rows` contiguous fresh rows behind the others; only rows of the store's own codec come fresh, and those
    /// are not rotated.
    pub(crate) fn push(&mut self, dims: Dims, k: &[f32], v: &[f32], rows: usize) -> Result<(), HookError> {
        let pair = self.pair;
        let (to_k, to_v) = self.room_for(rows);
        dims.kernels.pack(pair.k, dims.k, k, to_k).map_err(kernel)?;
        dims.kernels.pack(pair.v, dims.v, v, to_v).map_err(kernel)?;
        self.rows += rows;
        Ok(())
    }

    /// Packs one row again, with other values.
    pub(crate) fn replace(&mut self, dims: Dims, row: usize, k: &[f32], v: &[f32]) -> Result<(), HookError> {
        let (pair, base) = (self.pair, self.capacity * self.k_row);
        let (to_k, to_v) = self.data.split_at_mut(base);
        let to_k = &mut to_k[row * self.k_row..(row + 1) * self.k_row];
        let to_v = &mut to_v[row * self.v_row..(row + 1) * self.v_row];
        if pair.rotated {
            let mut rotated = k.to_vec();
            dims.kernels.rotate(dims.k, &mut rotated).map_err(kernel)?;
            dims.kernels
                .pack(pair.k, dims.k, &rotated, to_k)
                .map_err(kernel)?;
        } else {
            dims.kernels.pack(pair.k, dims.k, k, to_k).map_err(kernel)?;
        }
        dims.kernels.pack(pair.v, dims.v, v, to_v).map_err(kernel)
    }

    /// Copies rows out of `source`, transcoding K and V where the codecs differ.
    pub(crate) fn push_from(
        &mut self,
        dims: Dims,
        source: &Block,
        rows: &Picked<'_>,
        scratch: &mut Vec<f32>,
    ) -> Result<(), HookError> {
        let pair = self.pair;
        let (to_k, to_v) = self.room_for(rows.len());
        for (dim, from, to, rotate, row, bytes, dst) in [
            (
                dims.k,
                source.pair.k,
                pair.k,
                source.pair.rotated != pair.rotated,
                source.k_row,
                source.k(0, source.rows),
                to_k,
            ),
            (
                dims.v,
                source.pair.v,
                pair.v,
                false,
                source.v_row,
                source.v(0, source.rows),
                to_v,
            ),
        ] {
            if from == to && !rotate {
                rows.for_runs(|at, run| {
                    let len = run.len() * row;
                    dst[at * row..at * row + len].copy_from_slice(&bytes[run.start * row..run.end * row]);
                });
                continue;
            }
            scratch.clear();
            scratch.resize(rows.len() * dim, 0.0);
            let mut failed = None;
            rows.for_runs(|at, run| {
                let wide = &mut scratch[at * dim..(at + run.len()) * dim];
                if let Err(error) =
                    dims.kernels
                        .unpack(from, dim, &bytes[run.start * row..run.end * row], wide)
                {
                    failed = Some(error);
                }
            });
            if let Some(error) = failed {
                return Err(kernel(error));
            }
            if rotate {
                // Its own inverse: out of the source's basis, or into ours.
                dims.kernels.rotate(dim, scratch).map_err(kernel)?;
            }
            dims.kernels.pack(to, dim, scratch, dst).map_err(kernel)?;
        }
        self.rows += rows.len();
        Ok(())
    }

    /// A copy of its own with the same capacity, to append to where a fork shares this one.
    pub(crate) fn duplicate(&self) -> Self {
        Self {
            pair: self.pair,
            k_row: self.k_row,
            v_row: self.v_row,
            rows: self.rows,
            capacity: self.capacity,
            data: self.data.clone(),
            charge: Charge::new(self.charge.ledger(), self.charge.bytes()),
        }
    }

    /// Unpacks all keys, out of their rotation.
    pub(crate) fn unpack_keys(&self, dims: Dims, to: &mut [f32]) -> Result<(), HookError> {
        let kernels = dims.kernels;
        kernels
            .unpack(self.pair.k, dims.k, self.k(0, self.rows), to)
            .map_err(kernel)?;
        if self.pair.rotated {
            kernels.rotate(dims.k, to).map_err(kernel)?;
        }
        Ok(())
    }

    /// Unpacks all values.
    pub(crate) fn unpack_values(&self, dims: Dims, to: &mut [f32]) -> Result<(), HookError> {
        dims.kernels
            .unpack(self.pair.v, dims.v, self.v(0, self.rows), to)
            .map_err(kernel)
    }
}

/// Rows of a block that stay.
#[derive(Debug, Clone)]
pub(crate) enum Picked<'a> {
    /// A contiguous run.
    Run(Range<usize>),
    /// Row numbers, strictly increasing, each less `offset`.
    Some {
        /// Row numbers in the whole store.
        rows: &'a [u32],
        /// The block's first row in the whole store.
        offset: usize,
    },
}

impl Picked<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Run(run) => run.len(),
            Self::Some { rows, .. } => rows.len(),
        }
    }

    /// The first `at` rows (at most all) and the rest.
    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::Run(run) => {
                let at = run.end.min(run.start.saturating_add(at));
                (Self::Run(run.start..at), Self::Run(at..run.end))
            }
            Self::Some { rows, offset } => {
                let (first, rest) = rows.split_at(at.min(rows.len()));
                (
                    Self::Some { rows: first, offset },
                    Self::Some { rows: rest, offset },
                )
            }
        }
    }

    /// Calls `f(rows already done, run of source rows)` for each maximal contiguous run.
    fn for_runs(&self, mut f: impl FnMut(usize, Range<usize>)) {
        match self {
            Self::Run(run) => f(0, run.clone()),
            Self::Some { rows, offset } => {
                let mut done = 0;
                while done < rows.len() {
                    let start = rows[done] as usize;
                    let mut end = done + 1;
                    while end < rows.len() && rows[end] as usize == start + (end - done) {
                        end += 1;
                    }
                    f(done, start - offset..start - offset + (end - done));
                    done = end;
                }
            }
        }
    }
}
