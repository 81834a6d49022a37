//! One token's attention over a head's rows, whatever dimensions they keep. Invariant: rows that keep fewer are attended to
//! as they are stored: the query is projected once, and their weighted sum expanded once.

use std::ops::Range;

use cinch_hooks::HookError;
use cinch_kernels::{Heads, Partial, Scratch, Stat};

use super::Head;
use crate::error::kernel;

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
        if self.bases.is_none() {
            let segments = self.segments_of(rows);
            return self
                .dims
                .kernels
                .attend_decode(heads, &segments, q, partial, weights, scratch)
                .map_err(kernel);
        }
        partial.clear(heads);
        let (mut part, mut runs) = (Partial::default(), Vec::new());
        for (projected, run) in rows.iter().flat_map(|rows| self.runs(rows.clone())) {
            runs.push(self.attend_run(
                heads,
                projected,
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
        projected: bool,
        rows: Range<usize>,
        q: &[f32],
        partial: &mut Partial,
        part: &mut Partial,
        weighs: bool,
        scratch: &mut Scratch,
    ) -> Result<Run, HookError> {
        let bases = self.bases.as_deref().filter(|_| projected);
        let (k, v) = (
            bases.and_then(|bases| bases.k.as_ref()),
            bases.and_then(|bases| bases.v.as_ref()),
        );
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
        let mut weights = vec![0.0; if weighs { heads.q_heads * rows.len() } else { 0 }];
        self.dims
            .kernels
            .attend_decode(
                &own,
                &self.segments(rows.start, rows.end),
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

    /// The longest runs of rows that are all projected or all not.
    fn runs(&self, rows: Range<usize>) -> Vec<(bool, Range<usize>)> {
        let mut out: Vec<(bool, Range<usize>)> = Vec::new();
        let mut start = 0;
        for block in &self.blocks {
            let (from, to) = (rows.start.max(start), rows.end.min(start + block.rows()));
            start += block.rows();
            if from >= to {
                continue;
            }
            let projected = block.pair().projected;
            match out.last_mut() {
                Some((same, run)) if *same == projected => run.end = to,
                _ => out.push((projected, from..to)),
            }
        }
        out
    }
}
