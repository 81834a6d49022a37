//! Rows of which salient ones have more bits than the others (`ZipCache`, arXiv 2405.14256, algorithms 2 and 3): values by
//! token, with their channels separated; keys by channel, salient ones and others each with scales of their own.

use cinch_hooks::HookError;
use cinch_kernels::{Codec, Kernels};
use half::f16;

use super::side::Side;
use crate::error::kernel;
use crate::quantize::zipcache::{self, Marks};

/// What lies beside a block's own bytes.
#[derive(Debug, Clone)]
pub(super) enum Salient {
    /// All keys.
    Keys { high: Columns, low: Columns },
    /// Salient values; the others are where a block's rows are. And what channels were divided by.
    Values {
        codec: Codec,
        rows: Box<[u8]>,
        roots: Box<[f16]>,
    },
}

/// Rows, channel by channel, so that scales are of 32 tokens of a channel. Unlike
/// [`cinch_kernels::Layout::KeyChannels`] without a last tile filled up, of which there would be two in each block.
#[derive(Debug, Clone)]
pub(super) struct Columns {
    codec: Codec,
    rows: u16,
    bytes: Box<[u8]>,
}

impl Salient {
    /// Packs keys, salient ones in the first codec and others in the second.
    pub(super) fn of_keys(
        kernels: Kernels,
        (high, low): (Codec, Codec),
        dim: usize,
        marks: &Marks,
        keys: &[f32],
    ) -> Result<Self, HookError> {
        let (salient, others) = marks.split(keys, dim);
        Ok(Self::Keys {
            high: Columns::pack(kernels, high, dim, &salient)?,
            low: Columns::pack(kernels, low, dim, &others)?,
        })
    }

    /// Packs values, salient ones in `codec`, and others as `side` has it, row by row to `to`.
    pub(super) fn of_values(
        kernels: Kernels,
        (side, codec): (Side, Codec),
        marks: &Marks,
        mut values: Vec<f32>,
        to: &mut [u8],
    ) -> Result<Self, HookError> {
        let dim = side.dim();
        let roots = zipcache::separate(&mut values, dim);
        let (salient, others) = marks.split(&values, dim);
        let to = &mut to[..others.len() / dim * side.row()];
        kernels.pack(side.codec, dim, &others, to).map_err(kernel)?;
        let mut rows = vec![0; salient.len() / dim * codec.row_bytes(dim)].into_boxed_slice();
        kernels.pack(codec, dim, &salient, &mut rows).map_err(kernel)?;
        Ok(Self::Values { codec, rows, roots })
    }

    /// Unpacks the first rows; `bytes` are the block's own.
    pub(super) fn unpack(
        &self,
        kernels: Kernels,
        side: Side,
        marks: &Marks,
        bytes: &[u8],
        to: &mut [f32],
    ) -> Result<(), HookError> {
        let dim = side.dim();
        match self {
            Self::Keys { high, low } => {
                marks.join(&high.unpack(kernels, dim)?, &low.unpack(kernels, dim)?, dim, to);
            }
            Self::Values { codec, rows, roots } => {
                let mut low = vec![0.0; bytes.len() / side.row() * dim];
                let mut high = vec![0.0; rows.len() / codec.row_bytes(dim) * dim];
                kernels.unpack(side.codec, dim, bytes, &mut low).map_err(kernel)?;
                kernels.unpack(*codec, dim, rows, &mut high).map_err(kernel)?;
                marks.join(&high, &low, dim, to);
                zipcache::join(to, dim, roots);
            }
        }
        Ok(())
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Keys { high, low } => high.bytes.len() + low.bytes.len(),
            Self::Values { rows, roots, .. } => rows.len() + size_of_val(&**roots),
        }
    }
}

impl Columns {
    fn pack(kernels: Kernels, codec: Codec, dim: usize, values: &[f32]) -> Result<Self, HookError> {
        let rows = values.len() / dim;
        let mut bytes = vec![0; dim * codec.row_bytes(rows)].into_boxed_slice();
        if rows > 0 {
            let columns = transposed(values, dim);
            kernels.pack(codec, rows, &columns, &mut bytes).map_err(kernel)?;
        }
        Ok(Self {
            codec,
            rows: rows as u16,
            bytes,
        })
    }

    fn unpack(&self, kernels: Kernels, dim: usize) -> Result<Vec<f32>, HookError> {
        let rows = usize::from(self.rows);
        let mut columns = vec![0.0; dim * rows];
        if rows > 0 {
            kernels
                .unpack(self.codec, rows, &self.bytes, &mut columns)
                .map_err(kernel)?;
        }
        Ok(transposed(&columns, rows))
    }

    /// How much more so many channels take than as many rows do: parameters of a last group that is not full, and the bits
    /// that are left of a byte.
    pub(super) fn padding(codec: Codec, dim: usize) -> usize {
        dim * codec.row_bytes(1)
    }
}

/// Rows of `dim` values, column by column.
fn transposed(values: &[f32], dim: usize) -> Vec<f32> {
    (0..dim)
        .flat_map(|column| values.iter().skip(column).step_by(dim))
        .copied()
        .collect()
}
