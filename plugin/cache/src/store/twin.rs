//! Blocks of two heads whose rows are one direction and two lengths. Invariant: twins hold the same positions; a block that
//! is rewritten is a twin no more, and its former twin keeps the directions to itself.

use std::sync::Arc;

use cinch_hooks::HookError;
use cinch_kernels::Kernels;
use half::f16;

use super::block::Block;
use super::ledger::{Charge, Ledger};
use super::side::Side;
use super::{Dims, Head};
use crate::error::kernel;
use crate::project::twins;
use crate::quantize::zipcache::Marks;
use crate::quantize::{Beside, Fraction};

/// Directions of two blocks' rows.
#[derive(Debug)]
struct Shared {
    k: Box<[u8]>,
    v: Box<[u8]>,
    charge: Charge,
}

/// What a block has of its own.
#[derive(Debug, Clone)]
pub(super) struct Twin {
    shared: Arc<Shared>,
    k: Own,
    v: Own,
}

/// The same of one side.
#[derive(Debug, Clone)]
struct Own {
    lengths: Box<[f16]>,
    /// Rows that are not merged, one behind the other.
    retained: Box<[u8]>,
    marks: Marks,
}

impl Twin {
    /// Of what is shared, this block's part.
    pub(super) fn shared_bytes(&self) -> usize {
        self.shared.charge.bytes() / Arc::strong_count(&self.shared)
    }

    /// Bytes of what is not shared.
    pub(super) fn own_bytes(&self) -> usize {
        let own = |own: &Own| size_of_val(&*own.lengths) + own.retained.len();
        own(&self.k) + own(&self.v)
    }

    pub(super) fn keys(&self, kernels: Kernels, side: Side, to: &mut [f32]) -> Result<(), HookError> {
        self.k.unpack(kernels, side, &self.shared.k, to)
    }

    pub(super) fn values(&self, kernels: Kernels, side: Side, to: &mut [f32]) -> Result<(), HookError> {
        self.v.unpack(kernels, side, &self.shared.v, to)
    }
}

impl Own {
    /// The first rows, as they are stored.
    fn unpack(
        &self,
        kernels: Kernels,
        side: Side,
        directions: &[u8],
        to: &mut [f32],
    ) -> Result<(), HookError> {
        let dim = side.dim();
        let stored = directions.len() / side.row();
        let span = side.layout.span(stored, 0, to.len() / dim).end * side.row();
        kernels
            .unpack_run(side.layout, side.codec, dim, &directions[..span], to)
            .map_err(kernel)?;
        let bytes = side.codec.row_bytes(dim);
        let mut retained = vec![0.0; self.retained.len() / bytes * dim];
        kernels
            .unpack(side.codec, dim, &self.retained, &mut retained)
            .map_err(kernel)?;
        let mut retained = retained.chunks_exact(dim);
        for (row, (to, length)) in to.chunks_exact_mut(dim).zip(&self.lengths).enumerate() {
            if self.marks.has(row) {
                to.copy_from_slice(retained.next().unwrap_or_default());
            } else {
                let length = length.to_f32();
                to.iter_mut().for_each(|x| *x *= length);
            }
        }
        Ok(())
    }
}

/// Merges the blocks of two heads that hold the same positions and wait for it. `a` is of the earlier layer. Answers with
/// the rows merged.
pub(crate) fn merge(a: &mut Head, b: &mut Head) -> Result<usize, HookError> {
    let mut merged = 0;
    for (ia, ib) in matches(a, b) {
        let (of_a, of_b) = (&a.blocks[ia], &b.blocks[ib]);
        let Beside::Shared { retained } = of_a.pair().beside else {
            continue;
        };
        let (first, second) = twins_of(&a.ledger, a.dims, of_a, of_b, retained)?;
        merged += first.rows();
        for (head, index, twin) in [(&mut *a, ia, first), (&mut *b, ib, second)] {
            head.blocks[index] = Arc::new(twin);
            if let Some(pages) = &mut head.pages {
                pages.forget(index);
            }
        }
    }
    Ok(merged)
}

/// The mean cosine of two heads' rows that could be merged, of keys and of values; `None`: there are none.
pub(crate) fn similarity(a: &Head, b: &Head) -> Result<Option<f64>, HookError> {
    let Some((ia, ib)) = matches(a, b).first().copied() else {
        return Ok(None);
    };
    let (ka, va) = a.blocks[ia].stored()?;
    let (kb, vb) = b.blocks[ib].stored()?;
    let (k, v) = (
        twins::similarity(&ka, &kb, a.dims.k),
        twins::similarity(&va, &vb, a.dims.v),
    );
    Ok(Some(f64::midpoint(k, v)))
}

/// Blocks of the same rows that wait to be merged, by their numbers in each head.
fn matches(a: &Head, b: &Head) -> Vec<(usize, usize)> {
    let mut out = Vec::new();
    let (mut ib, mut start, mut other) = (0, 0, 0);
    for (ia, block) in a.blocks.iter().enumerate() {
        while ib < b.blocks.len() && other < start {
            other += b.blocks[ib].rows();
            ib += 1;
        }
        let rows = start..start + block.rows();
        start = rows.end;
        let Some(twin) = b.blocks.get(ib).filter(|_| other == rows.start) else {
            continue;
        };
        let positions = |head: &Head| match head.positions() {
            Some(positions) => positions[rows.clone()].to_vec(),
            None => rows.clone().map(|row| row as u32).collect(),
        };
        let waits = |block: &Block| matches!(block.pair().beside, Beside::Shared { .. }) && !block.is_twin();
        if waits(block)
            && waits(twin)
            && twin.rows() == block.rows()
            && twin.pair() == block.pair()
            && positions(a) == positions(b)
        {
            out.push((ia, ib));
        }
    }
    out
}

fn twins_of(
    ledger: &Arc<Ledger>,
    dims: Dims,
    a: &Block,
    b: &Block,
    retained: Fraction,
) -> Result<(Block, Block), HookError> {
    let kernels = dims.kernels;
    let ((ka, va), (kb, vb)) = (a.stored()?, b.stored()?);
    let (k, [own_ka, own_kb]) = side(kernels, a.k, (&ka, &kb), retained)?;
    let (v, [own_va, own_vb]) = side(kernels, a.v, (&va, &vb), retained)?;
    // Two share it alike.
    let bytes = (size_of::<Shared>() + k.len() + v.len()).next_multiple_of(2);
    let shared = Arc::new(Shared {
        k,
        v,
        charge: Charge::new(ledger, bytes),
    });
    let twin = |block: &Block, k, v| {
        let shared = shared.clone();
        Block::twin(ledger, block, Twin { shared, k, v })
    };
    Ok((twin(a, own_ka, own_va), twin(b, own_kb, own_vb)))
}

/// One side's directions, and what each of the two has of its own.
fn side(
    kernels: Kernels,
    side: Side,
    (a, b): (&[f32], &[f32]),
    retained: Fraction,
) -> Result<(Box<[u8]>, [Own; 2]), HookError> {
    let dim = side.dim();
    let merged = twins::merge(a, b, dim);
    let rows = merged.angles.len();
    let marks = Marks::of(&merged.angles, &vec![false; rows], retained);
    let mut directions = vec![0; side.layout.stored_rows(rows) * side.row()].into_boxed_slice();
    kernels
        .pack_run(side.layout, side.codec, dim, &merged.directions, &mut directions)
        .map_err(kernel)?;
    let own = |values: &[f32], lengths: &[f32]| {
        let kept = (0..rows).filter(|row| marks.has(*row));
        let kept: Vec<f32> = kept
            .flat_map(|row| &values[row * dim..][..dim])
            .copied()
            .collect();
        let mut retained = vec![0; kept.len() / dim * side.codec.row_bytes(dim)].into_boxed_slice();
        kernels
            .pack(side.codec, dim, &kept, &mut retained)
            .map_err(kernel)?;
        let largest = f16::MAX.to_f32();
        let lengths = lengths
            .iter()
            .map(|length| f16::from_f32(length.min(largest)))
            .collect();
        Ok::<_, HookError>(Own {
            lengths,
            retained,
            marks,
        })
    };
    let [of_a, of_b] = &merged.lengths;
    let own = [own(a, of_a)?, own(b, of_b)?];
    Ok((directions, own))
}

/// The most that a twin holds of its own, and of what it waits as until it is one.
pub(crate) fn most_bytes(retained: Fraction, rows: usize, row: usize) -> usize {
    size_of::<Shared>() + 2 * rows * size_of::<f16>() + (retained.of(rows) + 1) * row
}
