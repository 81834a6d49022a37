//! Matrices in f64, row by row.

pub(crate) type Rows = Vec<Vec<f64>>;

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// A·x.
pub(crate) fn times(a: &Rows, x: &[f64]) -> Vec<f64> {
    a.iter().map(|row| dot(row, x)).collect()
}

pub(crate) fn transposed(a: &Rows) -> Rows {
    (0..a[0].len())
        .map(|c| a.iter().map(|row| row[c]).collect())
        .collect()
}

/// Σ x·xᵀ.
pub(crate) fn moments(rows: &Rows) -> Rows {
    let columns = transposed(rows);
    columns.iter().map(|a| times(&columns, a)).collect()
}

/// L of A = L·Lᵀ, by Cholesky and Banachiewicz.
pub(crate) fn cholesky(a: &Rows) -> Rows {
    let n = a.len();
    let mut l = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let left = a[i][j] - dot(&l[i][..j], &l[j][..j]);
            l[i][j] = if i == j { left.sqrt() } else { left / l[j][j] };
        }
    }
    l
}

/// Eigenvalues of a symmetric matrix and their vectors, largest first, by Jacobi's rotations.
pub(crate) fn eigen(mut a: Rows) -> Vec<(f64, Vec<f64>)> {
    let n = a.len();
    let mut vectors: Rows = (0..n)
        .map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect())
        .collect();
    let all: f64 = a.iter().map(|row| dot(row, row)).sum();
    for _ in 0..60 {
        let beside: f64 = (0..n).map(|i| dot(&a[i], &a[i]) - a[i][i].powi(2)).sum();
        if beside <= 1e-28 * all {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q] == 0.0 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                let s = t * c;
                for row in &mut a {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                for rows in [&mut a, &mut vectors] {
                    let (first, rest) = rows.split_at_mut(q);
                    for (x, y) in first[p].iter_mut().zip(&mut rest[0]) {
                        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                    }
                }
            }
        }
    }
    let mut pairs: Vec<(f64, Vec<f64>)> = (0..n).map(|i| a[i][i]).zip(vectors).collect();
    pairs.sort_by(|x, y| y.0.total_cmp(&x.0));
    pairs
}
