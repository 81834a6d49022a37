//! The arithmetic that both attentions share. Invariant: NaN goes through, it is never swallowed.

use crate::Heads;
use crate::simd::{Ahead, Chunk, LANES, Simd};

/// Turns sixteen dot products into logits: scale, then cap.
#[inline(always)]
pub(super) fn logits<S: Simd>(s: S, heads: &Heads, x: S::V) -> S::V {
    match heads.softcap {
        None => s.mul(x, s.splat(heads.scale)),
        Some(cap) => {
            // tanh y = 1 − 2 / (1 + e^2y): absolute error 1e-7, which is what rounding of a logit near the cap
            // costs anyway.
            let e = s.exp(s.mul(x, s.splat(2.0 * (heads.scale / cap))));
            let one = s.splat(1.0);
            let tanh = s.sub(one, s.div(s.splat(2.0), s.add(one, e)));
            s.mul(tanh, s.splat(cap))
        }
    }
}

/// e^x of one number, with an implementation's own rounding.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: f32) -> f32 {
    let mut out = [0.0; LANES];
    s.store(s.exp(s.splat(x)), &mut out);
    out[0]
}

/// Turns a query's logits, a multiple of sixteen, into e^(logit − max). The maximum grows to the largest of them, and
/// the output and the sum, which were added up under a lower one, shrink. Returns the sum.
#[inline(always)]
pub(super) fn weigh<S: Simd>(s: S, row: &mut [f32], out: &mut [f32], max: &mut f32, mut sum: f32) -> f32 {
    let (chunks, _) = row.as_chunks_mut::<LANES>();
    let mut top = s.splat(f32::NEG_INFINITY);
    for chunk in chunks.iter() {
        top = s.max(s.load(chunk), top);
    }
    let top = s.top(top);
    if top > *max {
        let shrink = exp(s, *max - top);
        scale(s, out, shrink);
        sum *= shrink;
        *max = top;
    }
    let mut sums = s.splat(0.0);
    for chunk in chunks {
        let e = s.exp(s.sub(s.load(chunk), s.splat(*max)));
        sums = s.add(sums, e);
        s.store(e, chunk);
    }
    sum + s.sum(sums)
}

/// `rows` (M of them, `depth` long) times a `depth` × `16·panels` matrix, columns from `16·first` on, P × 16 of
/// them. Each of the matrix' values is loaded once for all M rows.
#[inline(always)]
pub(super) fn gemm<S: Simd, C: Chunk, const M: usize, const P: usize>(
    s: S,
    mut rows: [&[f32]; M],
    depth: usize,
    matrix: &[C::Data],
    panels: usize,
    first: usize,
    ahead: Ahead<'_>,
) -> [[S::V; P]; M] {
    for row in &mut rows {
        *row = &row[..depth];
    }
    let mut acc = [[s.splat(0.0); P]; M];
    for (d, chunks) in matrix.chunks_exact(panels).take(depth).enumerate() {
        ahead.ask(s, d);
        let chunks = &chunks[first..first + P];
        // Indices, not closures or iterators: those are functions of their own, without the instructions that are
        // enabled here. Where they are not inlined, a call in this loop spills every accumulator: a third of the speed.
        let mut b = [s.splat(0.0); P];
        for p in 0..P {
            b[p] = C::get(s, &chunks[p]);
        }
        for m in 0..M {
            // In bounds: `take` ends at depth, which is the length of every row.
            let a = s.splat(rows[m][d]);
            for p in 0..P {
                acc[m][p] = s.madd(a, b[p], acc[m][p]);
            }
        }
    }
    acc
}

/// Takes a vector to up to sixteen values: the largest of both, or the sum.
#[inline(always)]
pub(super) fn take_to<S: Simd>(s: S, v: S::V, out: &mut [f32], largest: bool) {
    if largest {
        raise_to(s, v, out);
    } else {
        add_to(s, v, out);
    }
}

/// Adds a vector to up to sixteen values.
#[inline(always)]
pub(super) fn add_to<S: Simd>(s: S, v: S::V, out: &mut [f32]) {
    if let Some(out) = out.first_chunk_mut::<LANES>() {
        s.store(s.add(s.load(out), v), out);
    } else {
        let mut lanes = [0.0; LANES];
        s.store(v, &mut lanes);
        out.iter_mut().zip(lanes).for_each(|(out, x)| *out += x);
    }
}

/// Raises to what is larger.
#[inline(always)]
fn raise_to<S: Simd>(s: S, v: S::V, out: &mut [f32]) {
    if let Some(out) = out.first_chunk_mut::<LANES>() {
        s.store(s.max(s.load(out), v), out);
    } else {
        let mut lanes = [0.0; LANES];
        s.store(v, &mut lanes);
        out.iter_mut().zip(lanes).for_each(|(out, x)| *out = out.max(x));
    }
}

/// Multiplies by a factor.
#[inline(always)]
pub(super) fn scale<S: Simd>(s: S, values: &mut [f32], factor: f32) {
    let (chunks, rest) = values.as_chunks_mut();
    for chunk in chunks {
        s.store(s.mul(s.load(chunk), s.splat(factor)), chunk);
    }
    rest.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
mod tests;
