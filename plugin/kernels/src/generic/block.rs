//! A block of one head's queries against a tile: the two matrix products of attention.

use super::math::{add_to, gemm, logits};
use super::tile::{KEYS, PANELS};
use crate::simd::{Ahead, LANES, Simd, Tile};
use crate::{Heads, Rows, RowsMut};

/// Queries in a block: their scores take 6 KiB.
pub(super) const QUERIES: usize = 24;
/// Queries that share each load of a tile. With 32 registers, 6 × 4 accumulators, four vectors of the tile and a
/// query's value take 29; with 16 of half the width, 4 × 1 accumulators take 8.
const WIDE: usize = 6;
const NARROW: usize = 4;

const _: () = assert!(QUERIES.is_multiple_of(WIDE) && QUERIES.is_multiple_of(NARROW));

/// Up to `QUERIES` neighbouring queries.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) first: usize,
    pub(super) queries: usize,
}

/// The queries from `first` to `end`.
pub(super) fn blocks(first: usize, end: usize) -> impl Iterator<Item = Block> {
    (first..end).step_by(QUERIES).map(move |first| Block {
        first,
        queries: QUERIES.min(end - first),
    })
}

impl Block {
    pub(super) fn last(self) -> usize {
        self.first + self.queries - 1
    }

    /// Logits of the block's queries with the tile's first `visible` keys, `queries × KEYS`. What is
    /// past them holds nothing of use.
    #[inline(always)]
    pub(super) fn score<S: Simd>(
        self,
        s: S,
        heads: &Heads,
        q: &Rows<'_>,
        transposed: &[f32],
        visible: usize,
        scores: &mut [f32],
    ) {
        let (matrix, _) = transposed.as_chunks::<LANES>();
        let panels = visible.div_ceil(LANES);
        let mut i = 0;
        while i < self.queries {
            let mut p = 0;
            while p < panels {
                p += match panels - p {
                    PANELS.. if S::WIDE => self.dots::<S, WIDE, PANELS>(s, heads, q, i, matrix, p, scores),
                    2.. if S::WIDE => self.dots::<S, WIDE, 2>(s, heads, q, i, matrix, p, scores),
                    _ if S::WIDE => self.dots::<S, WIDE, 1>(s, heads, q, i, matrix, p, scores),
                    _ => self.dots::<S, NARROW, 1>(s, heads, q, i, matrix, p, scores),
                };
            }
            i += if S::WIDE { WIDE } else { NARROW };
        }
    }

    /// M queries and P × 16 keys. Returns P.
    #[expect(clippy::too_many_arguments, reason = "a step of the loop above")]
    #[inline(always)]
    fn dots<S: Simd, const M: usize, const P: usize>(
        self,
        s: S,
        heads: &Heads,
        q: &Rows<'_>,
        first: usize,
        matrix: &[[f32; LANES]],
        panel: usize,
        scores: &mut [f32],
    ) -> usize {
        // The last rows may repeat: the repeated results are past the block's queries.
        let mut rows: [&[f32]; M] = [&[]; M];
        for (m, row) in rows.iter_mut().enumerate() {
            *row = q.row(self.last().min(self.first + first + m));
        }
        let acc = gemm::<S, Tile, M, P>(s, rows, heads.k_dim, matrix, PANELS, panel, Ahead::NOTHING);
        for (row, acc) in scores[first * KEYS..].chunks_exact_mut(KEYS).zip(acc) {
            for (chunk, x) in row[LANES * panel..].as_chunks_mut().0.iter_mut().zip(acc) {
                s.store(logits(s, heads, x), chunk);
            }
        }
        P
    }

    /// Adds weights (`queries × KEYS`) times the tile's first `visible` value rows to the outputs.
    #[inline(always)]
    pub(super) fn add_values<S: Simd>(
        self,
        s: S,
        weights: &[f32],
        tile: &[f32],
        visible: usize,
        out: &mut RowsMut<'_>,
    ) {
        let (matrix, _) = tile.as_chunks::<LANES>();
        let panels = out.dim.div_ceil(LANES);
        let mut i = 0;
        while i < self.queries {
            let mut p = 0;
            while p < panels {
                p += match panels - p {
                    4.. if S::WIDE => self.add::<S, WIDE, 4>(s, weights, i, matrix, p, visible, out),
                    2.. if S::WIDE => self.add::<S, WIDE, 2>(s, weights, i, matrix, p, visible, out),
                    _ if S::WIDE => self.add::<S, WIDE, 1>(s, weights, i, matrix, p, visible, out),
                    _ => self.add::<S, NARROW, 1>(s, weights, i, matrix, p, visible, out),
                };
            }
            i += if S::WIDE { WIDE } else { NARROW };
        }
    }

    /// M queries and P × 16 columns. Returns P.
    #[expect(clippy::too_many_arguments, reason = "a step of the loop above")]
    #[inline(always)]
    fn add<S: Simd, const M: usize, const P: usize>(
        self,
        s: S,
        weights: &[f32],
        first: usize,
        matrix: &[[f32; LANES]],
        panel: usize,
        visible: usize,
        out: &mut RowsMut<'_>,
    ) -> usize {
        let mut rows: [&[f32]; M] = [&[]; M];
        for (m, row) in rows.iter_mut().enumerate() {
            *row = &weights[(first + m).min(self.queries - 1) * KEYS..][..KEYS];
        }
        let panels = out.dim.div_ceil(LANES);
        let acc = gemm::<S, Tile, M, P>(s, rows, visible, matrix, panels, panel, Ahead::NOTHING);
        for (m, acc) in acc.into_iter().enumerate().take(self.queries - first) {
            let row = out.row(self.first + first + m);
            for (p, v) in acc.into_iter().enumerate() {
                add_to(s, v, &mut row[LANES * (panel + p)..]);
            }
        }
        P
    }
}
