//! Rows of two heads that become one direction and two lengths (`MiniCache`, arXiv 2405.14366, section 4): of heads of
//! adjacent layers, or of the heads of one layer, as where several heads are made one (GQA, arXiv 2305.13245, section 2.1, by
//! the mean; here by the arc, and lengths stay each head's own).
//!
//! What is between two directions is the point of the arc from one to the other (SLERP) at [`AT`]. Rows whose directions are
//! farthest apart stay as they are, each head its own.
//!
//! What differs from `MiniCache`: a head's rows by themselves, not a layer's whole token; a fixed share of a block's rows is
//! retained, not those above a threshold between the least and the largest angle.
//!
//! When not to use it: models whose adjacent layers or heads are not alike. Those of `SmolLM2`-135M are not: rows of its
//! layers 14 and 15 have a mean cosine of 0.00 to -0.04, by head, and merging the latter half of its layers ruins it. Where
//! heads keep different tokens, nothing is merged and nothing saved.

/// Where on the arc, from the earlier to the later layer: the paper's.
const AT: f64 = 0.6;

/// Two heads' rows, merged.
pub(crate) struct Merged {
    /// The direction of each row, of length 1.
    pub(crate) directions: Vec<f32>,
    /// Of each head's rows.
    pub(crate) lengths: [Vec<f32>; 2],
    /// Radians between each row's two directions.
    pub(crate) angles: Vec<f32>,
}

/// Merges rows of `dim` values.
pub(crate) fn merge(a: &[f32], b: &[f32], dim: usize) -> Merged {
    let rows = a.len() / dim;
    let mut merged = Merged {
        directions: Vec::with_capacity(a.len()),
        lengths: [Vec::with_capacity(rows), Vec::with_capacity(rows)],
        angles: Vec::with_capacity(rows),
    };
    for (a, b) in a.chunks_exact(dim).zip(b.chunks_exact(dim)) {
        let (a_length, b_length) = (length(a), length(b));
        let angle = cosine(a, b).acos();
        let (mut of_a, mut of_b) = (((1.0 - AT) * angle).sin(), (AT * angle).sin());
        if angle.sin() < 1e-6 {
            // The same direction, or opposite ones, between which there is no arc.
            (of_a, of_b) = (1.0 - AT, AT);
        }
        let (of_a, of_b) = (
            of_a / a_length.max(f64::MIN_POSITIVE),
            of_b / b_length.max(f64::MIN_POSITIVE),
        );
        let between: Vec<f64> = a
            .iter()
            .zip(b)
            .map(|(a, b)| of_a * f64::from(*a) + of_b * f64::from(*b))
            .collect();
        let norm = between.iter().map(|x| x * x).sum::<f64>().sqrt();
        let scale = if norm > 0.0 { norm.recip() } else { 0.0 };
        merged
            .directions
            .extend(between.iter().map(|x| (x * scale) as f32));
        merged.lengths[0].push(a_length as f32);
        merged.lengths[1].push(b_length as f32);
        merged.angles.push(angle as f32);
    }
    merged
}

/// The mean cosine of two heads' rows, of `dim` values each.
pub(crate) fn similarity(a: &[f32], b: &[f32], dim: usize) -> f64 {
    let rows = (a.len() / dim).max(1) as f64;
    let pairs = a.chunks_exact(dim).zip(b.chunks_exact(dim));
    pairs.map(|(a, b)| cosine(a, b)).sum::<f64>() / rows
}

/// 0 where one of them is nothing.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    let both = length(a) * length(b);
    if both > 0.0 {
        (dot / both).clamp(-1.0, 1.0)
    } else {
        0.0
    }
}

fn length(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

    use nalgebra::DVector;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const DIM: usize = 32;

    /// Against the definition: the rotation in the plane of both that takes one direction to the other, 0.6 of the way.
    #[test]
    fn directions_are_on_the_arc_and_lengths_stay() {
        let mut rng = StdRng::seed_from_u64(8);
        let a: Vec<f32> = (0..50 * DIM).map(|_| rng.random::<f32>() - 0.5).collect();
        let b: Vec<f32> = a.iter().map(|x| 3.0 * x + rng.random::<f32>() - 0.5).collect();
        let merged = merge(&a, &b, DIM);
        for row in 0..50 {
            let of =
                |x: &[f32]| DVector::from_iterator(DIM, x[row * DIM..][..DIM].iter().map(|x| f64::from(*x)));
            let (a, b) = (of(&a), of(&b));
            let (u, w) = (a.normalize(), b.normalize());
            let angle = u.angle(&w);
            // An orthonormal basis of the plane.
            let across = (&w - &u * u.dot(&w)).normalize();
            let right = &u * (0.6 * angle).cos() + across * (0.6 * angle).sin();
            let own = of(&merged.directions);
            assert!((own - right).norm() < 1e-6);
            assert!((f64::from(merged.angles[row]) - angle).abs() < 1e-6);
            assert!((f64::from(merged.lengths[0][row]) - a.norm()).abs() < 1e-6 * a.norm());
            assert!((f64::from(merged.lengths[1][row]) - b.norm()).abs() < 1e-6 * b.norm());
        }
    }

    #[test]
    fn equal_rows_come_back_and_none_is_nan() {
        let mut rows: Vec<f32> = (0..3 * DIM).map(|i| (i as f32).sin()).collect();
        rows[DIM..2 * DIM].fill(0.0);
        let opposite: Vec<f32> = rows.iter().map(|x| -x).collect();
        let merged = merge(&rows, &rows, DIM);
        for (row, direction) in rows.chunks(DIM).zip(merged.directions.chunks(DIM)) {
            let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            assert!(
                row.iter()
                    .zip(direction)
                    .all(|(x, u)| (x - u * length).abs() < 1e-5)
            );
        }
        assert!((similarity(&rows, &rows, DIM) - 2.0 / 3.0).abs() < 1e-6);
        assert!((similarity(&rows, &opposite, DIM) + 2.0 / 3.0).abs() < 1e-6);
        let merged = merge(&rows, &opposite, DIM);
        assert!(merged.directions.iter().all(|x| x.is_finite()));
        assert!((merged.angles[0] - std::f32::consts::PI).abs() < 1e-3);
    }
}
