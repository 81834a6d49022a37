//! Softmax weights that a prefill's pass over values leaves for its pass over columns, which then multiplies no query with
//! a key again. Invariant: of the first tiles only, as many as have room, so that nothing grows with queries × keys.

use std::ops::Range;

use super::math::{exp, take_to};
use super::tile::KEYS;
use crate::simd::{LANES, Simd};

/// Weights that have room: 8 MiB.
const ROOM: usize = 1 << 21;

/// Weights of some tiles, each row under the maximum that its query had by then.
pub(super) struct Kept<'a> {
    /// Queries of all heads.
    rows: usize,
    tiles: usize,
    weights: &'a mut [f32],
    maxima: &'a mut [f32],
    /// Of a tile's rows, once it is taken.
    factors: &'a mut [f32],
}

impl<'a> Kept<'a> {
    /// Room for `rows` queries, against `keys` keys at most.
    pub(super) fn new(rows: usize, keys: usize, scratch: &'a mut (Vec<f32>, Vec<f32>, Vec<f32>)) -> Self {
        let (weights, maxima, factors) = scratch;
        let tiles = (ROOM / (rows * KEYS).max(1)).min(keys.div_ceil(KEYS));
        Self {
            rows,
            tiles,
            weights: room(weights, tiles * rows * KEYS),
            maxima: room(maxima, tiles * rows),
            factors: room(factors, rows),
        }
    }

    pub(super) fn has(&self, tile: usize) -> bool {
        tile < self.tiles
    }

    /// Keeps a query's weights of a tile, if that has room.
    #[inline(always)]
    pub(super) fn keep(&mut self, tile: usize, query: usize, weights: &[f32], max: f32) {
        if self.has(tile) {
            let row = tile * self.rows + query;
            self.weights[row * KEYS..][..KEYS].copy_from_slice(weights);
            self.maxima[row] = max;
        }
    }

    /// Takes a tile's weights, as those of a softmax with these maxima and sums, to its keys' values. Of each head's
    /// queries those of the range were kept.
    #[expect(clippy::too_many_arguments, reason = "a softmax, and where it goes")]
    #[inline(always)]
    pub(super) fn columns<S: Simd>(
        &mut self,
        s: S,
        tile: usize,
        queries: Range<usize>,
        maxima: &[f32],
        sums: &[f32],
        largest: bool,
        out: &mut [f32],
    ) {
        self.find_factors(s, tile, maxima, sums);
        for head in (0..self.rows).step_by(queries.end) {
            for query in head + queries.start..head + queries.end {
                let factor = s.splat(self.factors[query]);
                let row = &self.weights[(tile * self.rows + query) * KEYS..][..KEYS];
                for (weights, out) in row.as_chunks().0.iter().zip(out.chunks_mut(LANES)) {
                    take_to(s, s.mul(s.load(weights), factor), out, largest);
                }
            }
        }
    }

    /// What a tile's rows are multiplied by, for weights of a softmax with these maxima and sums.
    #[inline(always)]
    fn find_factors<S: Simd>(&mut self, s: S, tile: usize, maxima: &[f32], sums: &[f32]) {
        let own = &self.maxima[tile * self.rows..][..self.rows];
        let (chunks, rest) = self.factors.as_chunks_mut::<LANES>();
        let done = chunks.len() * LANES;
        for (i, chunk) in chunks.iter_mut().enumerate() {
            let at = |values: &[f32]| s.load(values[i * LANES..].first_chunk().unwrap_or(&[0.0; LANES]));
            let e = s.exp(s.sub(at(own), at(maxima)));
            s.store(s.div(e, at(sums)), chunk);
        }
        for (i, to) in rest.iter_mut().enumerate() {
            *to = exp(s, own[done + i] - maxima[done + i]) / sums[done + i];
        }
    }
}

/// The first `length` values, whatever they are.
fn room(values: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if values.len() < length {
        values.resize(length, 0.0);
    }
    &mut values[..length]
}
