//! The Walsh-Hadamard transform of rows, in log₂(size) passes of sums and differences.

use crate::scalar::parts;
use crate::{KernelError, check};

/// See [`crate::Kernels::rotate`].
pub(crate) fn rotate(dim: usize, rows: &mut [f32]) -> Result<(), KernelError> {
    check::rotate(dim, rows.len())?;
    rows.chunks_exact_mut(dim).for_each(row);
    Ok(())
}

/// Rotates one row.
pub(super) fn row(row: &mut [f32]) {
    for (start, size) in parts(row.len()) {
        let part = &mut row[start..start + size];
        let mut half = 1;
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
