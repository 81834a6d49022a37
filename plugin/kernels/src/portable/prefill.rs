//! Causal attention of many fresh tokens. Invariants: keys and values are fetched a tile at a time and
//! each tile is unpacked once for all queries of all heads; nothing grows with queries × keys.
//!
//! The softmax is computed on the fly (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3), tile by
//! tile as in FlashAttention-2 (arXiv 2307.08691, algorithm 1), with the loop over keys outside: outputs
//! are the accumulators.

use super::math::{exp, exps, logits, max, panel};
use super::{LANES, rotate, unpack, width};
use crate::types::Prefill;
use crate::{ColumnSums, Heads, KernelError, Rows, RowsMut, Scratch, check};

/// Keys in a tile.
const KEYS: usize = 64;
/// Queries in a tile.
const QUERIES: usize = 16;
/// Queries that share each load of a key: 4 × 16 accumulators fill half of 16 vector registers.
const SHARE: usize = 4;

const _: () = assert!(KEYS.is_multiple_of(LANES) && QUERIES.is_multiple_of(SHARE));

/// See [`crate::Kernels::attend_prefill`].
pub(crate) fn attend_prefill(
    call: &Prefill<'_>,
    out: &mut [RowsMut<'_>],
    sums: Option<ColumnSums<'_>>,
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let past_rows = check::prefill(call, out, sums.as_ref())?;
    let (heads, n_queries) = (call.heads, call.queries());
    // Rows before the first query; past and fresh rows differ only in how they are fetched.
    let before = past_rows + call.first_query;
    let keys = Keys { call, past_rows };
    let (k_width, v_width) = (width(heads.k_dim), width(heads.v_dim));
    let Scratch {
        tile,
        keys: transposed,
        scores,
        max: maxima,
        sum: totals,
        ..
    } = scratch;
    reset(tile, KEYS * k_width.max(v_width), 0.0);
    reset(transposed, KEYS * heads.k_dim, 0.0);
    reset(scores, QUERIES * KEYS, 0.0);
    reset(maxima, heads.q_heads * n_queries, f32::NEG_INFINITY);
    reset(totals, heads.q_heads * n_queries, 0.0);
    for out in out.iter_mut() {
        (0..n_queries).for_each(|i| out.row(i).fill(0.0));
    }

    for from in (0..before + n_queries).step_by(KEYS) {
        let n = KEYS.min(before + n_queries - from);
        keys.transpose_into(from, n, tile, transposed);
        keys.values_into(from, n, tile);
        let visible = |i: usize| n.min((before + i + 1).saturating_sub(from));
        for (h, (q, out)) in call.q.iter().zip(out.iter_mut()).enumerate() {
            // Queries before the tile's first key see none of it.
            for block in blocks(from.saturating_sub(before), n_queries) {
                block.logits(heads, q, transposed, visible(block.last()), scores);
                for i in 0..block.queries {
                    let row = &mut scores[i * KEYS..][..KEYS];
                    let (seen, hidden) = row.split_at_mut(visible(block.first + i));
                    hidden.fill(0.0);
                    let (m, sum) = (
                        &mut maxima[h * n_queries + block.first + i],
                        &mut totals[h * n_queries + block.first + i],
                    );
                    let top = max(seen);
                    if top > *m {
                        let shrink = exp(*m - top);
                        *m = top;
                        *sum *= shrink;
                        out.row(block.first + i).iter_mut().for_each(|o| *o *= shrink);
                    }
                    *sum += exps(seen, *m);
                }
                block.add_values(scores, tile, visible(block.last()), out);
            }
        }
    }

    for (out, totals) in out.iter_mut().zip(totals.chunks_exact(n_queries.max(1))) {
        for (i, total) in totals.iter().enumerate() {
            let factor = 1.0 / total;
            out.row(i).iter_mut().for_each(|o| *o *= factor);
        }
    }
    let Some(sums) = sums else { return Ok(()) };

    let first = n_queries.saturating_sub(sums.last_queries);
    for from in (0..before + n_queries).step_by(KEYS) {
        let n = KEYS.min(before + n_queries - from);
        keys.transpose_into(from, n, tile, transposed);
        let visible = |i: usize| n.min((before + i + 1).saturating_sub(from));
        for (h, q) in call.q.iter().enumerate() {
            for block in blocks(first.max(from.saturating_sub(before)), n_queries) {
                block.logits(heads, q, transposed, visible(block.last()), scores);
                for i in 0..block.queries {
                    let query = h * n_queries + block.first + i;
                    let (m, factor) = (maxima[query], 1.0 / totals[query]);
                    let row = &scores[i * KEYS..][..visible(block.first + i)];
                    for (sum, logit) in sums.out[from..].iter_mut().zip(row) {
                        *sum += exp(*logit - m) * factor;
                    }
                }
            }
        }
    }
    Ok(())
}

fn reset(buffer: &mut Vec<f32>, len: usize, value: f32) {
    buffer.clear();
    buffer.resize(len, value);
}

/// Keys and values in order: past rows, then fresh ones.
struct Keys<'a> {
    call: &'a Prefill<'a>,
    past_rows: usize,
}

impl Keys<'_> {
    /// Writes the tile's keys to `transposed`, `k_dim × KEYS`: neighbours in memory are neighbouring keys.
    fn transpose_into(&self, from: usize, n: usize, tile: &mut [f32], transposed: &mut [f32]) {
        let (dim, width) = (self.call.heads.k_dim, width(self.call.heads.k_dim));
        self.rows_into(from, n, tile, width, true);
        for (d, column) in transposed.chunks_exact_mut(KEYS).enumerate().take(dim) {
            for (key, row) in column.iter_mut().zip(tile.chunks_exact(width)).take(n) {
                *key = row[d];
            }
        }
    }

    fn values_into(&self, from: usize, n: usize, tile: &mut [f32]) {
        self.rows_into(from, n, tile, width(self.call.heads.v_dim), false);
    }

    fn rows_into(&self, from: usize, n: usize, tile: &mut [f32], stride: usize, keys: bool) {
        let (mut start, mut done) = (0, 0);
        for s in self.call.past {
            // Rows of the tile that lie in this segment.
            let (a, b) = (from.max(start), (from + n).min(start + s.rows));
            if a < b {
                let (codec, dim, bytes) = if keys {
                    (s.k_codec, self.call.heads.k_dim, s.k)
                } else {
                    (s.v_codec, self.call.heads.v_dim, s.v)
                };
                let row = codec.row_bytes(dim);
                let bytes = &bytes[(a - start) * row..(b - start) * row];
                unpack::rows(codec, dim, bytes, &mut tile[done * stride..], stride);
                if keys && s.k_rotated {
                    let rows = tile[done * stride..].chunks_mut(stride).take(b - a);
                    rows.for_each(|row| rotate::row(&mut row[..dim]));
                }
                done += b - a;
            }
            start += s.rows;
        }
        let fresh = if keys {
            &self.call.fresh_k
        } else {
            &self.call.fresh_v
        };
        for key in from + done..from + n {
            tile[(key - from) * stride..][..fresh.dim].copy_from_slice(fresh.row(key - self.past_rows));
        }
    }
}

/// Up to `QUERIES` neighbouring queries.
#[derive(Clone, Copy)]
struct Block {
    first: usize,
    queries: usize,
}

fn blocks(first: usize, t: usize) -> impl Iterator<Item = Block> {
    (first..t).step_by(QUERIES).map(move |first| Block {
        first,
        queries: QUERIES.min(t - first),
    })
}

impl Block {
    fn last(self) -> usize {
        self.first + self.queries - 1
    }

    /// Logits of the block's queries with the tile's first `visible` keys, `queries × KEYS`. What is
    /// past them holds nothing of use.
    fn logits(self, heads: &Heads, q: &Rows<'_>, transposed: &[f32], visible: usize, scores: &mut [f32]) {
        let matrix = transposed.as_chunks::<LANES>().0;
        for i in (0..self.queries).step_by(SHARE) {
            // The last rows may repeat: the repeated results are not stored.
            let rows: [&[f32]; SHARE] = std::array::from_fn(|s| q.row(self.last().min(self.first + i + s)));
            for p in 0..visible.div_ceil(LANES) {
                let acc = panel(rows, heads.k_dim, matrix, KEYS / LANES, p);
                for (acc, row) in acc.iter().zip(scores[i * KEYS..].chunks_exact_mut(KEYS)) {
                    row[p * LANES..][..LANES].copy_from_slice(acc);
                }
            }
        }
        for row in scores.chunks_exact_mut(KEYS).take(self.queries) {
            logits(heads, &mut row[..visible]);
        }
    }

    /// Adds weights (`queries × KEYS`) times the tile's first `visible` value rows to the outputs.
    fn add_values(self, weights: &[f32], tile: &[f32], visible: usize, out: &mut RowsMut<'_>) {
        let matrix = tile.as_chunks::<LANES>().0;
        let panels = out.dim.div_ceil(LANES);
        for i in (0..self.queries).step_by(SHARE) {
            let rows: [&[f32]; SHARE] = std::array::from_fn(|s| {
                let row = (i + s).min(self.queries - 1);
                &weights[row * KEYS..][..KEYS]
            });
            for p in 0..panels {
                let acc = panel(rows, visible, matrix, panels, p);
                for (s, acc) in acc.iter().enumerate().take(self.queries - i) {
                    for (out, acc) in out.row(self.first + i + s)[p * LANES..].iter_mut().zip(acc) {
                        *out += acc;
                    }
                }
            }
        }
    }
}
