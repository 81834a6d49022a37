//! K or V of a block: how its rows lie, and how rows of other blocks come to lie there.

use cinch_hooks::HookError;
use cinch_kernels::{Codec, Kernels, Layout};

use super::block::LINE;
use super::extra::Extras;
use super::picked::Picked;
use crate::error::kernel;
use crate::project::Basis;
use crate::rotary::{Positions, Turns, Way};

/// Values that a row has at most: those of heads are hundreds.
pub(crate) const MOST_DIM: usize = u16::MAX as usize / size_of::<f32>();

/// How one side of a block is stored. Small, as every block has two.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side {
    pub(super) codec: Codec,
    pub(super) layout: Layout,
    dim: u16,
    /// Bytes of a row.
    row: u16,
}

impl Side {
    pub(super) fn new(codec: Codec, dim: usize, layout: Layout) -> Self {
        Self {
            codec,
            layout,
            dim: dim as u16,
            row: codec.row_bytes(dim) as u16,
        }
    }

    pub(super) fn dim(self) -> usize {
        usize::from(self.dim)
    }

    pub(super) fn row(self) -> usize {
        usize::from(self.row)
    }

    /// Bytes of so many rows, in whole lines.
    pub(super) fn bytes(self, rows: usize) -> usize {
        (self.layout.stored_rows(rows) * self.row()).next_multiple_of(LINE)
    }

    /// Whether a row is bytes of its own.
    pub(super) fn has_rows(self) -> bool {
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

/// Rows of one side of a block, of which some are picked.
pub(super) struct Part<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) side: Side,
    /// What is beside its codes.
    pub(super) extras: Option<&'a Extras>,
    /// Whether it is K.
    pub(super) key: bool,
    pub(super) stored: usize,
    /// Whether they are, and whether they are to be.
    pub(super) rotated: (bool, bool),
    /// Which way they are to turn, those at these positions.
    pub(super) turn: Option<(&'a Turns, Way, Positions<'a>)>,
    /// What they are to be projected with.
    pub(super) basis: Option<&'a Basis>,
    pub(super) rows: &'a Picked<'a>,
}

/// Puts the parts' rows, `rows` in all, one behind the other into `to`.
pub(super) fn gather<'a>(
    kernels: Kernels,
    side: Side,
    parts: impl Iterator<Item = Part<'a>>,
    rows: usize,
    to: &mut [u8],
    buffers: &mut Buffers,
) -> Result<(), HookError> {
    let (dim, row) = (side.dim(), side.row());
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
    // Rows that lie row by row go where they belong at once.
    let tiled = side.layout != Layout::Rows;
    if tiled {
        target.resize(rows * row, 0);
    }
    let plain = if tiled {
        &mut target[..rows * row]
    } else {
        &mut *to
    };
    let mut done = 0;
    for part in parts {
        let bytes = &mut plain[done * row..(done + part.rows.len()) * row];
        done += part.rows.len();
        let kept = part.rotated.0 == part.rotated.1 && part.turn.is_none() && part.basis.is_none();
        if part.side.codec == side.codec && part.side.has_rows() && kept && part.extras.is_none() {
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
    if tiled {
        let rows = &target[..rows * row];
        kernels
            .of_rows(side.layout, side.codec, dim, rows, to)
            .map_err(kernel)?;
    }
    Ok(())
}

/// The parts' rows as they are to be stored.
pub(super) fn moved<'a>(
    kernels: Kernels,
    side: Side,
    parts: impl Iterator<Item = Part<'a>>,
) -> Result<Vec<f32>, HookError> {
    let mut values = Vec::new();
    for part in parts {
        part.moved(kernels, side.dim(), &mut values)?;
    }
    Ok(values)
}

impl<'a> Part<'a> {
    /// All of the source's rows, row by row.
    fn plain<'b>(&self, kernels: Kernels, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], HookError>
    where
        'a: 'b,
    {
        let Side { codec, layout, .. } = self.side;
        if layout == Layout::Rows {
            return Ok(self.bytes);
        }
        buffer.resize(self.bytes.len(), 0);
        kernels
            .to_rows(layout, codec, self.side.dim(), self.bytes, buffer)
            .map_err(kernel)?;
        Ok(buffer)
    }

    /// Appends the picked rows' values as they are to be stored, in `dim` dimensions.
    fn moved(&self, kernels: Kernels, dim: usize, to: &mut Vec<f32>) -> Result<(), HookError> {
        let from = to.len();
        self.values(kernels, to)?;
        // A rotation is its own inverse. Keys turn, and bases are of keys, that are not rotated.
        let (mut rotated, wanted) = self.rotated;
        if rotated && (self.turn.is_some() || self.basis.is_some()) {
            kernels.rotate(self.side.dim(), &mut to[from..]).map_err(kernel)?;
            rotated = false;
        }
        if let Some((turns, way, positions)) = self.turn {
            let dim = self.side.dim();
            self.rows.for_runs(|at, run| {
                let keys = &mut to[from + at * dim..from + (at + run.len()) * dim];
                turns.turn(way, positions.after(run.start), dim, keys);
            });
        }
        if let Some(basis) = self.basis {
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
        let Side { codec, layout, .. } = self.side;
        let (from, dim) = (to.len(), self.side.dim());
        if layout == Layout::Rows && self.extras.is_none() {
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
        // Tiles come whole, and so does what is beside codes; the rows that are picked move to the front.
        to.resize(from + self.stored * dim, 0.0);
        match self.extras {
            Some(extras) if self.key => extras.keys(kernels, self.side, self.bytes, &mut to[from..])?,
            Some(extras) => extras.values(kernels, self.side, self.bytes, &mut to[from..])?,
            None => kernels
                .unpack_run(layout, codec, dim, self.bytes, &mut to[from..])
                .map_err(kernel)?,
        }
        self.rows.for_runs(|at, run| {
            to.copy_within(from + run.start * dim..from + run.end * dim, from + at * dim);
        });
        to.truncate(from + self.rows.len() * dim);
        Ok(())
    }
}
