//! Sums over a row's channels, in lanes: the compiler makes vectors of a fixed number of sums, but never reorders one.

/// Sums that are made at a time.
pub(super) const LANES: usize = 16;

/// Rows that are multiplied at a time: as many sums as hide the time that one addition takes.
pub(super) const TILE: usize = 4;

/// Σ row·column of every row and lane, `columns` being sixteen vectors side by side, over as many channels as it has.
#[inline]
pub(super) fn products(rows: [&[f32]; TILE], columns: &[[f32; LANES]]) -> [[f32; LANES]; TILE] {
    let rows = rows.map(|row| &row[..columns.len()]);
    let mut sums = [[0.0; LANES]; TILE];
    for (c, column) in columns.iter().enumerate() {
        for r in 0..TILE {
            let x = rows[r][c];
            for lane in 0..LANES {
                sums[r][lane] += x * column[lane];
            }
        }
    }
    sums
}

/// Vectors of `dim` side by side: up to sixteen; what is left of `columns` stays as it was.
#[inline]
pub(super) fn transpose<'a>(vectors: impl Iterator<Item = &'a [f32]>, columns: &mut [[f32; LANES]]) {
    for (lane, vector) in vectors.take(LANES).enumerate() {
        for (column, x) in columns.iter_mut().zip(vector) {
            column[lane] = *x;
        }
    }
}

/// Σ a·b over the shorter of the two.
#[inline]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// Euclidean length.
#[inline]
pub(super) fn norm(a: &[f32]) -> f32 {
    dot(a, a).sqrt()
}

/// Σ a.
#[inline]
pub(super) fn sum(a: &[f32]) -> f32 {
    let (a, rest) = a.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for a in a {
        for lane in 0..LANES {
            sums[lane] += a[lane];
        }
    }
    sums.iter().sum::<f32>() + rest.iter().sum::<f32>()
}
