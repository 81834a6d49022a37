//! Causal attention of many fresh tokens. Invariants: keys and values are fetched a tile at a time and
//! each tile is unpacked once for all queries of all heads; nothing grows with queries × keys but weights that are kept, up
//! to a bound.
//!
//! The softmax is computed on the fly (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3), tile by
//! tile as in FlashAttention-2 (arXiv 2307.08691, algorithm 1), with the loop over keys outside: outputs
//! are the accumulators.

use super::block::{Block, QUERIES, blocks};
use super::kept::Kept;
use super::math::{scale, take_to, weigh};
use super::tile::{KEYS, Keys};
use super::{reset, width};
use crate::simd::{LANES, Simd};
use crate::types::Prefill;
use crate::{ColumnSums, KernelError, RowsMut, Scratch, check};

/// See [`crate::Kernels::attend_prefill`].
#[inline(always)]
pub(crate) fn attend_prefill<S: Simd>(
    s: S,
    call: &Prefill<'_>,
    out: &mut [RowsMut<'_>],
    sums: Option<ColumnSums<'_>>,
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let past_rows = check::prefill(call, out, sums.as_ref())?;
    let (heads, queries) = (call.heads, call.queries());
    // Rows before the first query; past and fresh rows differ only in how they are fetched.
    let before = past_rows + call.first_query;
    let keys = Keys { call, past_rows };
    let Scratch {
        tile,
        rows: packed,
        keys: transposed,
        scores,
        max: maxima,
        sum: totals,
        kept,
        ..
    } = scratch;
    let tile = reset(tile, KEYS * width(heads.k_dim.max(heads.v_dim)), 0.0);
    let transposed = reset(transposed, KEYS * width(heads.k_dim), 0.0);
    let scores = reset(scores, QUERIES * KEYS, 0.0);
    let maxima = reset(maxima, heads.q_heads * queries, f32::NEG_INFINITY);
    let totals = reset(totals, heads.q_heads * queries, 0.0);
    for out in out.iter_mut() {
        for i in 0..queries {
            out.row(i).fill(0.0);
        }
    }
    let end = before + queries;
    // Of few queries, another pass takes no time.
    let kept_keys = match &sums {
        Some(sums) if sums.last_queries >= queries => end,
        _ => 0,
    };
    let mut kept = Kept::new(heads.q_heads * queries, kept_keys, kept);

    for (number, (from, n)) in keys.tiles(end).enumerate() {
        keys.transpose_into(s, from, n, tile, transposed, packed);
        keys.values_into(s, from, n, tile, packed);
        let visible = |i: usize| n.min((before + i + 1).saturating_sub(from));
        for h in 0..heads.q_heads {
            // Queries before the tile's first key see none of it.
            for block in blocks(from.saturating_sub(before), queries) {
                block.score(s, heads, &call.q[h], transposed, visible(block.last()), scores);
                for i in 0..block.queries {
                    let query = h * queries + block.first + i;
                    let row = &mut scores[i * KEYS..][..KEYS];
                    let out = out[h].row(block.first + i);
                    let seen = visible(block.first + i);
                    row[seen..].fill(f32::NEG_INFINITY);
                    totals[query] = weigh(s, row, out, &mut maxima[query], totals[query]);
                    kept.keep(number, query, row, maxima[query]);
                }
                block.add_values(s, scores, tile, visible(block.last()), &mut out[h]);
            }
        }
    }

    for h in 0..heads.q_heads {
        for i in 0..queries {
            scale(s, out[h].row(i), 1.0 / totals[h * queries + i]);
        }
    }
    let Some(sums) = sums.filter(|sums| sums.last_queries.min(queries) > 0) else {
        return Ok(());
    };

    for (number, (from, n)) in keys.tiles(end).enumerate() {
        let out = &mut sums.out[from..from + n];
        let first = from.saturating_sub(before);
        if kept.has(number) {
            kept.columns(s, number, first..queries, maxima, totals, sums.largest, out);
            continue;
        }
        keys.transpose_into(s, from, n, tile, transposed, packed);
        let visible = |i: usize| n.min((before + i + 1).saturating_sub(from));
        let first = first.max(queries.saturating_sub(sums.last_queries));
        for h in 0..heads.q_heads {
            let softmax = |i| (maxima[h * queries + i], 1.0 / totals[h * queries + i]);
            for block in blocks(first, queries) {
                block.score(s, heads, &call.q[h], transposed, visible(block.last()), scores);
                columns(s, block, scores, visible, softmax, sums.largest, out);
            }
        }
    }
    Ok(())
}

/// Takes a block's softmax weights, made of its logits, to its keys' values.
#[inline(always)]
fn columns<S: Simd>(
    s: S,
    block: Block,
    scores: &mut [f32],
    visible: impl Fn(usize) -> usize,
    softmax: impl Fn(usize) -> (f32, f32),
    largest: bool,
    out: &mut [f32],
) {
    for (i, row) in scores.chunks_exact_mut(KEYS).enumerate().take(block.queries) {
        row[visible(block.first + i)..].fill(f32::NEG_INFINITY);
        let (max, factor) = softmax(block.first + i);
        let (max, factor) = (s.splat(max), s.splat(factor));
        for (row, out) in row.as_chunks().0.iter().zip(out.chunks_mut(LANES)) {
            let e = s.exp(s.sub(s.load(row), max));
            take_to(s, s.mul(e, factor), out, largest);
        }
    }
}
