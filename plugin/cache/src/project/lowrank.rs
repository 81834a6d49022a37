//! Low rank (Eigen Attention, arXiv 2408.05646, section 4; Palu, arXiv 2407.21118, section 3): the directions that hold most
//! of a head's rows, the leading eigenvectors of XᵀX. Both papers take them from calibration data or weights, ahead of time;
//! here they are the prompt's own, which needs neither, and K is taken as it is cached, with its rotary embedding.
//!
//! When not to use it: prompts that change their subject after the first rows are packed; K of fewer than half of its
//! dimensions on small models.

use nalgebra::{DMatrix, SymmetricEigen};

/// `rank` orthonormal directions of `dim` values, row by row, strongest first.
pub(super) fn basis(rows: &[f32], dim: usize, rank: usize) -> Vec<f32> {
    let mut moments = DMatrix::<f64>::zeros(dim, dim);
    for row in rows.chunks_exact(dim) {
        for (i, a) in row.iter().enumerate() {
            for (j, b) in row.iter().enumerate().take(i + 1) {
                moments[(i, j)] += f64::from(*a) * f64::from(*b);
            }
        }
    }
    moments.fill_upper_triangle_with_lower_triangle();
    let SymmetricEigen {
        eigenvectors,
        eigenvalues,
    } = SymmetricEigen::new(moments);
    let mut order: Vec<usize> = (0..dim).collect();
    order.sort_by(|a, b| eigenvalues[*b].total_cmp(&eigenvalues[*a]));
    let directions = order.iter().take(rank);
    directions
        .flat_map(|i| {
            eigenvectors
                .column(*i)
                .iter()
                .map(|x| *x as f32)
                .collect::<Vec<_>>()
        })
        .collect()
}
