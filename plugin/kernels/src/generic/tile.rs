//! Keys and values for prefill, a tile at a time. Invariant: a tile's keys are all in one basis as they are
//! stored, and in the queries' basis when they are handed out.

use std::iter::successors;

use super::arrange::unpack_part;
use super::{rotate, width};
use crate::simd::{LANES, Simd};
use crate::types::Prefill;

/// Keys in a tile, at most.
pub(super) const KEYS: usize = 64;
/// Vectors of a tile's keys.
pub(super) const PANELS: usize = KEYS / LANES;

/// Keys and values in order: past rows, then fresh ones.
pub(super) struct Keys<'a> {
    pub(super) call: &'a Prefill<'a>,
    pub(super) past_rows: usize,
}

impl Keys<'_> {
    /// First key and number of keys of each tile, of those before `end`.
    pub(super) fn tiles(&self, end: usize) -> impl Iterator<Item = (usize, usize)> {
        let first = (end > 0).then(|| (0, self.tile(0, end)));
        successors(first, move |&(from, n)| {
            let from = from + n;
            (from < end).then(|| (from, self.tile(from, end)))
        })
    }

    /// How many keys from `from` on make a tile, of those before `end`.
    fn tile(&self, from: usize, end: usize) -> usize {
        let basis = self.is_rotated(from);
        let (mut start, mut to) = (0, from);
        for s in self.call.past {
            start += s.rows;
            if s.rows == 0 || start <= from {
                continue;
            }
            if s.k_rotated != basis || to - from >= KEYS {
                return (to - from).min(KEYS);
            }
            to = start;
        }
        // Fresh keys are not rotated.
        let to = if basis { to } else { end };
        (to - from).min(KEYS)
    }

    fn is_rotated(&self, key: usize) -> bool {
        let mut start = 0;
        for s in self.call.past {
            start += s.rows;
            if key < start {
                return s.k_rotated;
            }
        }
        false
    }

    /// Writes the tile's keys to `transposed`, `k_dim × KEYS`: neighbours in memory are neighbouring keys. What
    /// is past the tile's keys is finite.
    #[inline(always)]
    pub(super) fn transpose_into<S: Simd>(
        &self,
        s: S,
        from: usize,
        n: usize,
        tile: &mut [f32],
        transposed: &mut [f32],
        packed: &mut Vec<u8>,
    ) {
        let dim = self.call.heads.k_dim;
        self.rows_into(s, from, n, tile, width(dim), true, packed);
        let (rows, _) = tile.as_chunks::<LANES>();
        let (columns, _) = transposed.as_chunks_mut::<LANES>();
        let (columns, _) = columns.as_chunks_mut::<PANELS>();
        let panels = width(dim) / LANES;
        for p in 0..n.div_ceil(LANES) {
            for d in 0..panels {
                let block = std::array::from_fn(|i| s.load(&rows[(LANES * p + i) * panels + d]));
                for (i, v) in s.transpose(block).into_iter().enumerate() {
                    s.store(v, &mut columns[LANES * d + i][p]);
                }
            }
        }
        // A few passes of sums and differences over whole vectors: far less than the queries of all heads.
        if self.is_rotated(from) {
            rotate::columns(s, dim, &mut columns[..dim]);
        }
    }

    #[inline(always)]
    pub(super) fn values_into<S: Simd>(
        &self,
        s: S,
        from: usize,
        n: usize,
        tile: &mut [f32],
        packed: &mut Vec<u8>,
    ) {
        self.rows_into(s, from, n, tile, width(self.call.heads.v_dim), false, packed);
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "a tile's rows, and what they go through"
    )]
    #[inline(always)]
    fn rows_into<S: Simd>(
        &self,
        simd: S,
        from: usize,
        n: usize,
        tile: &mut [f32],
        stride: usize,
        keys: bool,
        packed: &mut Vec<u8>,
    ) {
        let (mut start, mut done) = (0, 0);
        for s in self.call.past {
            // Rows of the tile that lie in this segment.
            let (a, b) = (from.max(start), (from + n).min(start + s.rows));
            if a < b {
                let (layout, codec, dim, bytes) = if keys {
                    (s.k_layout, s.k_codec, self.call.heads.k_dim, s.k)
                } else {
                    (s.v_layout, s.v_codec, self.call.heads.v_dim, s.v)
                };
                let (part, to) = (a - start..b - start, &mut tile[done * stride..]);
                unpack_part(simd, layout, codec, dim, bytes, part, to, stride, packed);
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
