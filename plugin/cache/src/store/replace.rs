//! Other values in the place of a row that is stored.

use cinch_hooks::HookError;
use cinch_kernels::Kernels;

use super::extra::Extras;
use super::side::Side;
use super::{Block, Dims};
use crate::error::kernel;

impl Block {
    /// Packs one row again, with other values (`None`: its key stays). In a tile whose tokens share parameters, those are
    /// made anew.
    pub(crate) fn replace(&mut self, row: usize, k: Option<&[f32]>, v: &[f32]) -> Result<(), HookError> {
        let (kernels, k_side, v_side) = (self.kernels, self.k, self.v);
        let filled = self.filled as usize;
        let mut k = k.map(<[f32]>::to_vec);
        if let Some(k) = k.as_mut().filter(|_| self.pair.rotated) {
            kernels.rotate(k_side.dim(), k).map_err(kernel)?;
        }
        if self.extras.is_some() {
            return self.replace_coded(row, k.as_deref(), v);
        }
        let (to_k, to_v) = self.bytes_mut();
        if let Some(k) = k {
            replace(kernels, k_side, filled, row, &k, to_k)?;
        }
        replace(kernels, v_side, filled, row, v, to_v)
    }

    /// The same where codes alone do not make a row: all are made anew, but for which are salient.
    fn replace_coded(&mut self, row: usize, k: Option<&[f32]>, v: &[f32]) -> Result<(), HookError> {
        let (kernels, pair, filled) = (self.kernels, self.pair, self.filled as usize);
        let (k_side, v_side) = (self.k, self.v);
        let Some(extras) = self.extras.clone() else {
            return Ok(());
        };
        let mut values = [vec![0.0; filled * k_side.dim()], vec![0.0; filled * v_side.dim()]];
        let [all_k, all_v] = &mut values;
        extras.keys(kernels, k_side, self.k_bytes(0..filled), all_k)?;
        extras.values(kernels, v_side, self.v_bytes(0..filled), all_v)?;
        if let Some(k) = k {
            all_k[row * k_side.dim()..(row + 1) * k_side.dim()].copy_from_slice(k);
        }
        all_v[row * v_side.dim()..(row + 1) * v_side.dim()].copy_from_slice(v);
        if self.is_twin() {
            return self.part_with(all_k, all_v);
        }
        let [all_k, all_v] = values;
        let (sides, marks) = ((k_side, v_side), extras.marks);
        let extras = Extras::pack(kernels, pair, sides, marks, (all_k, all_v), self.bytes_mut())?;
        self.set_extras(extras);
        Ok(())
    }

    /// Makes a twin a block of rows of its own, which wait to be merged again.
    fn part_with(&mut self, k: &[f32], v: &[f32]) -> Result<(), HookError> {
        let (kernels, k_side, v_side) = (self.kernels, self.k, self.v);
        let dims = Dims {
            k: k_side.dim(),
            v: v_side.dim(),
            kernels,
        };
        let mut own = Self::new(self.charge.ledger(), dims, self.pair, self.filled as usize);
        (own.rows, own.filled) = (self.rows, self.filled);
        let (to_k, to_v) = own.bytes_mut();
        for (side, values, to) in [(k_side, k, to_k), (v_side, v, to_v)] {
            let to = &mut to[..side.layout.stored_rows(values.len() / side.dim()) * side.row()];
            kernels
                .pack_run(side.layout, side.codec, side.dim(), values, to)
                .map_err(kernel)?;
        }
        *self = own;
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
    let Side { codec, layout, .. } = side;
    let (dim, bytes) = (side.dim(), side.row());
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
