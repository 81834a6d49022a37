//! Queries as integers, for products with codes.
//!
//! Invariant: rounding a query costs a logit at most a sixth of what rounding the keys to their codes did. Two signed
//! bytes always do. One does if the query's own rounding error allows: with codes evenly spread over their levels,
//! a key's error is scale/√12 in every value, and a query's error meets codes of a standard deviation around the
//! middle. What meets the middle itself is known exactly and added.

use crate::Codec;
use crate::codec::GROUP;
use crate::generic::decode::KeyCodes;

/// Four neighbours in a group each.
pub(super) const COLUMNS: usize = GROUP / 4;
/// The largest magnitude in one byte, and in two of which the lower is signed: all then fit −128 to 127.
pub(super) const LARGEST: [f32; 2] = [127.0, (127 * 256 + 127) as f32];
/// How many times below the keys' error a query's must be.
const MARGIN: f64 = 6.0;
/// Bytes a value and the codec, before the queries.
const HEADER: usize = 2;

/// Four integers of two bytes each, in an implementation's own order.
pub(super) type Wide = fn([i32; 4]) -> [i32; 2];

/// One head's query: the step; each group's sum, and the rest of its rounding times the middle code, both in steps;
/// each column's four bytes, or its four integers of two bytes.
#[derive(Clone, Copy)]
pub(super) struct Query<'a, const BYTES: usize> {
    numbers: &'a [i32],
    columns: &'a [[[i32; BYTES]; COLUMNS]],
}

impl<'a, const BYTES: usize> Query<'a, BYTES> {
    #[inline(always)]
    pub(super) fn of(prepared: &'a [i32], groups: usize, head: usize) -> Self {
        let len = 1 + 2 * groups + BYTES * COLUMNS * groups;
        let (numbers, columns) = prepared[HEADER + head * len..][..len].split_at(1 + 2 * groups);
        Self {
            numbers,
            columns: columns.as_chunks().0.as_chunks().0,
        }
    }

    #[inline(always)]
    pub(super) fn step(self) -> f32 {
        f32::from_bits(self.numbers[0].cast_unsigned())
    }

    /// The sum of a group, and what is to be added to its product with codes.
    ///
    /// # Safety
    /// `g` must be one of the query's groups.
    #[inline(always)]
    pub(super) unsafe fn sums(self, g: usize) -> (f32, f32) {
        // SAFETY: the caller's promise.
        let (sum, rest) = unsafe {
            (
                *self.numbers.get_unchecked(1 + 2 * g),
                *self.numbers.get_unchecked(2 + 2 * g),
            )
        };
        (
            f32::from_bits(sum.cast_unsigned()),
            f32::from_bits(rest.cast_unsigned()),
        )
    }

    /// A group's columns.
    ///
    /// # Safety
    /// `g` must be one of the query's groups.
    #[inline(always)]
    pub(super) unsafe fn group(self, g: usize) -> &'a [[i32; BYTES]; COLUMNS] {
        // SAFETY: the caller's promise.
        unsafe { self.columns.get_unchecked(g) }
    }
}

/// Rounds the queries, if that has not been done for this codec. Returns their bytes a value.
pub(super) fn prepare(job: &mut KeyCodes<'_>, wide: Wide) -> i32 {
    let codec = job.codec as i32;
    match job.prepared[..] {
        [bytes, of, ..] if of == codec => return bytes,
        _ => {}
    }
    let levels = job.codec.levels().unwrap_or(u8::MAX);
    let mut queries = job.q.chunks_exact(job.heads.k_dim);
    let one = job.codec != Codec::Int8 && queries.all(|q| one_byte(q, levels));
    let bytes = if one { 1 } else { 2 };
    job.prepared.clear();
    job.prepared.extend([bytes, codec]);
    for q in job.q.chunks_exact(job.heads.k_dim) {
        let wide = (bytes == 2).then_some(wide);
        round(q, wide, f32::from(levels) / 2.0, job.prepared);
    }
    bytes
}

/// Steps in one, and the other way round; 0 for a query of nothing.
fn steps(q: &[f32], bytes: usize) -> (f32, f32) {
    let largest = q.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if largest > 1e-30 {
        (LARGEST[bytes - 1] / largest, largest / LARGEST[bytes - 1])
    } else {
        (0.0, 0.0)
    }
}

/// Whether one byte is enough for a query of `dim` values, the largest of them `top` and their squares' sum `norm`, that was
/// multiplied with scales of codes up to `levels`: a rounding error has a variance of step²/12, codes have one of
/// ((levels + 1)² − 1)/12.
#[inline(always)]
pub(super) fn scaled_fits_one_byte(levels: u8, dim: usize, top: f32, norm: f32) -> bool {
    let codes = (f64::from(levels) + 1.0).powi(2) - 1.0;
    let error = (f64::from(top) / f64::from(LARGEST[0])).powi(2) * dim as f64 / 12.0;
    MARGIN * MARGIN * error * codes <= f64::from(norm)
}

fn one_byte(q: &[f32], levels: u8) -> bool {
    let (inverse, step) = steps(q, 1);
    let (mut error, mut norm) = (0.0, 0.0);
    for x in q {
        error += f64::from((x * inverse).round_ties_even() * step - x).powi(2);
        norm += f64::from(*x).powi(2);
    }
    // Variances, both times 12: of codes from 0 to `levels`, and of a rounding error.
    let (codes, rounding) = ((f64::from(levels) + 1.0).powi(2) - 1.0, 1.0);
    // False for what is not finite.
    MARGIN * MARGIN * error * codes <= norm * rounding
}

/// To one byte, or to two in the given order.
fn round(q: &[f32], wide: Option<Wide>, middle: f32, out: &mut Vec<i32>) {
    let bits = |x: f32| x.to_bits().cast_signed();
    let (inverse, step) = steps(q, if wide.is_some() { 2 } else { 1 });
    let integer = |x: f32| (x * inverse).round_ties_even();
    // What is not finite must stay so.
    let finite = q.iter().all(|x| x.is_finite());
    out.push(bits(if finite { step } else { f32::NAN }));
    for group in q.chunks_exact(GROUP) {
        let sum: f32 = group.iter().map(|x| x * inverse).sum();
        let rest: f32 = group.iter().map(|x| x * inverse - integer(*x)).sum();
        out.extend([bits(sum), bits(middle * rest)]);
    }
    for four in q.as_chunks::<4>().0 {
        let x = four.map(|x| integer(x) as i32);
        match wide {
            Some(wide) => out.extend(wide(x)),
            None => out.push(four_bytes(x)),
        }
    }
}

/// The lower bytes of four integers.
pub(super) fn four_bytes(x: [i32; 4]) -> i32 {
    i32::from_le_bytes(x.map(|x| x as u8))
}
