//! The Walsh-Hadamard transform of rows, in log₂(size) passes of sums and differences.

use crate::scalar::parts;
use crate::simd::{LANES, Simd};
use crate::{KernelError, check};

/// See [`crate::Kernels::rotate`].
#[inline(always)]
pub(crate) fn rotate<S: Simd>(_: S, dim: usize, rows: &mut [f32]) -> Result<(), KernelError> {
    check::rotate(dim, rows.len())?;
    for r in rows.chunks_exact_mut(dim) {
        row(r);
    }
    Ok(())
}

/// Rotates one row.
#[inline(always)]
pub(super) fn row(row: &mut [f32]) {
    for (start, size) in parts(row.len()) {
        let part = &mut row[start..start + size];
        if size >= 8 {
            // The first three passes at once, on eight values that stay in registers.
            for chunk in part.as_chunks_mut::<8>().0 {
                let [a, b, c, d, e, f, g, h] = *chunk;
                let (a, b, c, d) = (a + b, a - b, c + d, c - d);
                let (e, f, g, h) = (e + f, e - f, g + h, g - h);
                let (a, c, b, d) = (a + c, a - c, b + d, b - d);
                let (e, g, f, h) = (e + g, e - g, f + h, f - h);
                *chunk = [a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h];
            }
        }
        let mut half = if size >= 8 { 8 } else { 1 };
        while half < size {
            for pair in part.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let norm = 1.0 / (size as f32).sqrt();
        part.iter_mut().for_each(|x| *x *= norm);
    }
}

/// Rotates many rows that lie transposed: row `d` of `matrix` is value `d` of each of them.
#[inline(always)]
pub(super) fn columns<S: Simd, const P: usize>(s: S, dim: usize, matrix: &mut [[[f32; LANES]; P]]) {
    for (start, size) in parts(dim) {
        let part = &mut matrix[start..start + size];
        let mut half = 1;
        while half < size {
            // The last pass normalizes.
            let norm = s.splat(if 2 * half == size {
                1.0 / (size as f32).sqrt()
            } else {
                1.0
            });
            for pair in part.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (low, high) in low.iter_mut().zip(high) {
                    for (low, high) in low.iter_mut().zip(high) {
                        let (a, b) = (s.load(low), s.load(high));
                        s.store(s.mul(s.add(a, b), norm), low);
                        s.store(s.mul(s.sub(a, b), norm), high);
                    }
                }
            }
            half *= 2;
        }
    }
}
