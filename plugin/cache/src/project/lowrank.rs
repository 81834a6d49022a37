//! Low rank (Eigen Attention, arXiv 2408.05646, section 4; Palu, arXiv 2407.21118, section 3). Of V, the directions that hold
//! most of a head's rows: the leading eigenvectors of VᵀV. Of K, those that hold most of its logits: keys are few
//! dimensions' worth of large numbers that queries hardly ask for, so that the error to keep small is that of q·k. With
//! C_q = L·Lᵀ the queries' second moment, Σ (q·(k − k̂))² is least for k̂ = L⁻ᵀ·U·Uᵀ·Lᵀ·k, U the leading eigenvectors of
//! Lᵀ·KᵀK·L; Eigen Attention comes near it by a basis of keys and queries together.
//!
//! Both papers take bases from calibration data or weights, ahead of time; here they are the prompt's own, which needs
//! neither, and K is taken as it is cached, with its rotary embedding.
//!
//! When not to use it: answers much longer than their prompt, whose keys turn out of its subspace; less than three quarters
//! of the dimensions on small models.

use nalgebra::{Cholesky, DMatrix, SymmetricEigen};

use super::Made;

/// What is added to the queries' moments, of their mean over dimensions: directions nobody has asked for yet still count.
const RIDGE: f64 = 1e-3;

/// Of V: `rank` orthonormal directions, strongest first.
pub(super) fn values(rows: &[f32], dim: usize, rank: usize) -> Made {
    let directions = leading(moments(rows, dim), rank);
    Made {
        encode: row_by_row(&directions.transpose()),
        decode: None,
    }
}

/// Of K, `q_moments` being Σ q·qᵀ.
pub(super) fn keys(rows: &[f32], dim: usize, q_moments: &[f64], rank: usize) -> Made {
    let mut queries = DMatrix::from_row_slice(dim, dim, q_moments);
    let ridge = RIDGE * queries.trace() / dim as f64;
    for i in 0..dim {
        queries[(i, i)] += ridge;
    }
    let keys = moments(rows, dim);
    let Some(cholesky) = Cholesky::new(queries) else {
        // No queries, or none that are finite: keys for themselves.
        let directions = leading(keys, rank);
        return Made {
            encode: row_by_row(&directions.transpose()),
            decode: None,
        };
    };
    let lower = cholesky.l();
    let directions = leading(lower.transpose() * keys * &lower, rank);
    let encode = directions.transpose() * lower.transpose();
    // L⁻ᵀ·U: the solution of Lᵀ·D = U.
    let decode = lower
        .transpose()
        .solve_upper_triangular(&directions)
        .map(|decode| row_by_row(&decode.transpose()));
    Made {
        encode: row_by_row(&encode),
        decode,
    }
}

/// Σ x·xᵀ.
fn moments(rows: &[f32], dim: usize) -> DMatrix<f64> {
    let mut moments = DMatrix::<f64>::zeros(dim, dim);
    for row in rows.chunks_exact(dim) {
        for (i, a) in row.iter().enumerate() {
            for (j, b) in row.iter().enumerate().take(i + 1) {
                moments[(i, j)] += f64::from(*a) * f64::from(*b);
            }
        }
    }
    moments.fill_upper_triangle_with_lower_triangle();
    moments
}

/// The `rank` leading eigenvectors as columns.
fn leading(matrix: DMatrix<f64>, rank: usize) -> DMatrix<f64> {
    let SymmetricEigen {
        eigenvectors,
        eigenvalues,
    } = SymmetricEigen::new(matrix);
    let mut order: Vec<usize> = (0..eigenvalues.len()).collect();
    order.sort_by(|a, b| eigenvalues[*b].total_cmp(&eigenvalues[*a]));
    eigenvectors.select_columns(&order[..rank])
}

fn row_by_row(matrix: &DMatrix<f64>) -> Vec<f32> {
    matrix
        .row_iter()
        .flat_map(|row| row.iter().map(|x| *x as f32).collect::<Vec<_>>())
        .collect()
}
