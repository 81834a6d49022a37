//! Sums over a row's channels, in lanes: the compiler makes vectors of a fixed number of sums, but never reorders one.

const LANES: usize = 16;

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
