//! One token's attention over a head's rows, whatever they keep. Invariant: rows that keep fewer dimensions are attended to
//! in those: the query is projected once, and their weighted sum expanded once.

use std::ops::Range;

use cinch_hooks::HookError;
use cinch_kernels::{Codec, Heads, Layout, Partial, Scratch, Segment, Stat};
use smallvec::smallvec;

use super::{Head, Pair};
use crate::error::kernel;
use crate::rotary::Way;

/// What a run of rows of one kind gave.
struct Run {
    rows: Range<usize>,
    stats: Vec<Stat>,
    /// q_heads × rows.
    weights: Vec<f32>,
}

impl Head {
    /// As [`cinch_kernels::Kernels::attend_decode`], over runs of rows from a cut on, in order.
    pub(crate) fn attend(
        &self,
        heads: &Heads,
        rows: &[Range<usize>],
        q: &[f32],
        partial: &mut Partial,
        weights: Option<&mut [f32]>,
        scratch: &mut Scratch,
    ) -> Result<(), HookError> {
        if self.is_plain() {
            let segments = self.segments_of(rows);
            return self
                .dims
                .kernels
                .attend_decode(heads, &segments, q, partial, weights, scratch)
                .map_err(kernel);
        }
        partial.reset(heads);
        let (mut part, mut runs) = (Partial::default(), Vec::new());
        for (pair, plain, run) in rows.iter().flat_map(|rows| self.runs(rows.clone())) {
            runs.push(self.attend_run(
                heads,
                (pair, plain),
                run,
                q,
                partial,
                &mut part,
                weights.is_some(),
                scratch,
            )?);
        }
        let Some(weights) = weights else { return Ok(()) };
        // Each run's weights are relative to its own maxima.
        let (mut at, all) = (0, weights.len() / heads.q_heads);
        for run in runs {
            for (h, (stat, total)) in run.stats.iter().zip(partial.stats()).enumerate() {
                let factor = (stat.max - total.max).exp();
                let from = &run.weights[h * run.rows.len()..][..run.rows.len()];
                let to = &mut weights[h * all + at..][..run.rows.len()];
                for (to, from) in to.iter_mut().zip(from) {
                    *to = factor * from;
                }
            }
            at += run.rows.len();
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "a step of the loop above")]
    fn attend_run(
        &self,
        heads: &Heads,
        (pair, plain): (Pair, bool),
        rows: Range<usize>,
        q: &[f32],
        partial: &mut Partial,
        part: &mut Partial,
        weighs: bool,
        scratch: &mut Scratch,
    ) -> Result<Run, HookError> {
        let (k, v) = self.bases_of(pair);
        let own = Heads {
            k_dim: k.map_or(heads.k_dim, |basis| basis.rank()),
            v_dim: v.map_or(heads.v_dim, |basis| basis.rank()),
            ..*heads
        };
        let mut coordinates = Vec::new();
        let q = match k {
            Some(basis) => {
                basis.project_queries(q, &mut coordinates);
                &coordinates
            }
            None => q,
        };
        let unpacked;
        let segments = if plain {
            self.segments(rows.start, rows.end)
        } else {
            unpacked = self.coordinates(rows.clone())?;
            smallvec![whole(rows.len(), &unpacked.0, &unpacked.1)]
        };
        let mut weights = vec![0.0; if weighs { heads.q_heads * rows.len() } else { 0 }];
        self.dims
            .kernels
            .attend_decode(
                &own,
                &segments,
                q,
                part,
                weighs.then_some(&mut weights[..]),
                scratch,
            )
            .map_err(kernel)?;
        partial
            .add(heads, part, v.map(|basis| basis.directions()))
            .map_err(kernel)?;
        Ok(Run {
            rows,
            stats: part.stats().to_vec(),
            weights,
        })
    }

    /// Rows in f32 as they are stored, in the dimensions that they keep.
    fn coordinates(&self, rows: Range<usize>) -> Result<(Vec<f32>, Vec<f32>), HookError> {
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let mut start = 0;
        for block in &self.blocks {
            let (from, to) = (rows.start.max(start), rows.end.min(start + block.rows()));
            if from < to {
                let dims = self.block_dims(block.pair());
                let (keys, values) = (k.len(), v.len());
                k.resize(keys + block.rows() * dims.k, 0.0);
                v.resize(values + block.rows() * dims.v, 0.0);
                block.unpack_keys(&mut k[keys..])?;
                self.turn(block.pair(), Way::Forth, start, &mut k[keys..]);
                block.unpack_values(&mut v[values..])?;
                k.truncate(keys + (to - start) * dims.k);
                v.truncate(values + (to - start) * dims.v);
                k.drain(keys..keys + (from - start) * dims.k);
                v.drain(values..values + (from - start) * dims.v);
            }
            start += block.rows();
        }
        Ok((k, v))
    }

    /// The longest runs of rows of one kind, all projected or all not and all plain or all not, each with the pair of its
    /// first.
    fn runs(&self, rows: Range<usize>) -> Vec<(Pair, bool, Range<usize>)> {
        let mut out: Vec<(Pair, bool, Range<usize>)> = Vec::new();
        let mut start = 0;
        for block in &self.blocks {
            let (from, to) = (rows.start.max(start), rows.end.min(start + block.rows()));
            start += block.rows();
            if from >= to {
                continue;
            }
            let (pair, plain) = (block.pair(), block.is_plain());
            match out.last_mut() {
                Some((same, as_plain, run)) if (same.projected, *as_plain) == (pair.projected, plain) => {
                    run.end = to
                }
                _ => out.push((pair, plain, from..to)),
            }
        }
        out
    }
}

/// Rows in f32 as the kernels take them.
pub(crate) fn whole<'a>(rows: usize, k: &'a [f32], v: &'a [f32]) -> Segment<'a> {
    Segment {
        k_codec: Codec::F32,
        v_codec: Codec::F32,
        k_layout: Layout::Rows,
        v_layout: Layout::Rows,
        k_rotated: false,
        rows,
        k: bytemuck::cast_slice(k),
        v: bytemuck::cast_slice(v),
    }
}
