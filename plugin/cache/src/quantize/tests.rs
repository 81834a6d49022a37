#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

use nalgebra::DMatrix;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::gear::LowRank;
use super::zipcache::{self, Marks};
use super::{Fraction, kvquant, outliers};

const DIM: usize = 64;

/// Bell-shaped values, a channel of large ones, and a few that are far off.
fn rows(n: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(n as u64);
    (0..n * DIM)
        .map(|i| {
            let bell: f32 = (0..6).map(|_| rng.random::<f32>() - 0.5).sum();
            let shifted = if i % DIM == 5 { 8.0 * bell + 20.0 } else { bell };
            if rng.random_range(0..150) == 0 {
                shifted * 4.0
            } else {
                shifted
            }
        })
        .collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

#[test]
fn outliers_are_those_farthest_off_in_standard_deviations() {
    let values = rows(100);
    for by_column in [true, false] {
        let vector = |place: usize| if by_column { place % DIM } else { place / DIM };
        let of = |v: usize| -> Vec<f64> {
            let all = wide(&values).into_iter().enumerate();
            all.filter(|(place, _)| vector(*place) == v)
                .map(|(_, x)| x)
                .collect()
        };
        let distance = |place: usize| {
            let own = of(vector(place));
            let mean = own.iter().sum::<f64>() / own.len() as f64;
            let variance = own.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / own.len() as f64;
            (f64::from(values[place]) - mean).abs() / variance.sqrt()
        };
        let mut order: Vec<usize> = (0..values.len()).collect();
        let distances: Vec<f64> = order.iter().map(|place| distance(*place)).collect();
        order.sort_by(|a, b| distances[*b].total_cmp(&distances[*a]));
        let mut right: Vec<usize> = order[..64].to_vec();
        right.sort_unstable();
        let mut dense = values.clone();
        let taken = outliers::take(&mut dense, DIM, by_column, 64);
        let places: Vec<usize> = taken.iter().map(|outlier| usize::from(outlier.place)).collect();
        assert_eq!(places, right);
        for (place, x) in dense.iter().enumerate() {
            let own = of(vector(place));
            let mean = own.iter().sum::<f64>() / own.len() as f64;
            let left = if right.contains(&place) {
                mean
            } else {
                f64::from(values[place])
            };
            assert!((f64::from(*x) - left).abs() < 1e-4);
        }
        outliers::restore(&taken, &mut dense);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 2048.0;
        assert!(
            dense.iter().zip(&values).all(near),
            "f16, and nothing else is touched"
        );
    }
}

#[test]
fn no_outliers_and_all_of_them() {
    let mut values = rows(3);
    let before = values.clone();
    assert!(outliers::take(&mut values, DIM, true, 0).is_empty());
    assert_eq!(values, before);
    assert_eq!(outliers::take(&mut values, DIM, false, 1000).len(), 3 * DIM);
    // Equal values are no outliers, and no reason to divide by nothing.
    let mut equal = vec![0.5; 2 * DIM];
    assert_eq!(outliers::take(&mut equal, DIM, true, 3).len(), 3);
    assert!(equal.iter().all(|x| *x == 0.5));
}

/// Mean square of what nearest levels leave of values in their ranges.
fn left(normal: &[f64], levels: &[f64]) -> f64 {
    let nearest = |x: &f64| {
        levels
            .iter()
            .map(|level| (x - level).powi(2))
            .fold(f64::INFINITY, f64::min)
    };
    normal.iter().map(nearest).sum::<f64>() / normal.len() as f64
}

#[test]
fn levels_are_where_k_means_puts_them() {
    let values = rows(256);
    for (by_column, bits) in [(true, 2), (true, 3), (true, 4), (false, 2), (false, 4)] {
        let most = f64::from((1_u32 << bits) - 1);
        let groups: Vec<Vec<f64>> = if by_column {
            let tiles = values.chunks(32 * DIM);
            tiles
                .flat_map(|tile| {
                    (0..DIM).map(|c| wide(&tile.iter().copied().skip(c).step_by(DIM).collect::<Vec<_>>()))
                })
                .collect()
        } else {
            values.chunks(32).map(wide).collect()
        };
        let mut normal = Vec::new();
        for group in groups {
            let (min, max) = group
                .iter()
                .fold((f64::MAX, f64::MIN), |(min, max), x| (min.min(*x), max.max(*x)));
            normal.extend(group.iter().map(|x| (x - min) / (max - min) * most));
        }
        let even: Vec<f64> = (0..=most as u32).map(f64::from).collect();
        let mut right = even.clone();
        for _ in 0..100 {
            let mut sums = vec![(0.0, 0.0); right.len()];
            for x in &normal {
                let distance = |i: &usize| (right[*i] - x).abs();
                let nearest = (0..right.len())
                    .min_by(|a, b| distance(a).total_cmp(&distance(b)))
                    .unwrap();
                sums[nearest].0 += x;
                sums[nearest].1 += 1.0;
            }
            for (level, (sum, n)) in right.iter_mut().zip(sums) {
                if n > 0.0 {
                    *level = sum / n;
                }
            }
        }
        let levels = kvquant::levels(&values, DIM, by_column, most as u8);
        let levels: Vec<f64> = levels.iter().map(|level| level.to_f64()).collect();
        assert!(levels.is_sorted() && levels[0] >= 0.0 && levels[levels.len() - 1] <= most);
        let (own, oracle, plain) = (
            left(&normal, &levels),
            left(&normal, &right),
            left(&normal, &even),
        );
        assert!(own < 1.05 * oracle, "{bits} bits: {own} beside {oracle}");
        assert!(own < 0.95 * plain, "{bits} bits: {own}, evenly {plain}");
    }
}

/// No matrix of that rank is nearer than what the largest singular values leave (Eckart and Young). Of directions that are
/// as strong as one another, power iteration finds some.
#[test]
fn low_rank_is_nearly_the_nearest() {
    let mut rng = StdRng::seed_from_u64(3);
    for (n, rank) in [(256, 2), (64, 4), (40, 16), (3, 4), (1, 1)] {
        // Five strong directions beside noise.
        let factors: Vec<f32> = (0..5 * (n + DIM)).map(|_| rng.random::<f32>() - 0.5).collect();
        let values: Vec<f32> = (0..n * DIM)
            .map(|i| {
                let (r, c) = (i / DIM, i % DIM);
                let strong: f32 = (0..5)
                    .map(|k| factors[5 * r + k] * factors[5 * n + 5 * c + k] * (5 - k) as f32)
                    .sum();
                strong + 0.2 * (rng.random::<f32>() - 0.5)
            })
            .collect();
        let singular = DMatrix::from_row_slice(n, DIM, &wide(&values)).singular_values();
        let least: f64 = singular.iter().skip(rank).map(|s| s * s).sum();
        let all: f64 = singular.iter().map(|s| s * s).sum();
        let mut product = vec![0.0; values.len()];
        LowRank::of(&values, DIM, rank).add_to(&mut product, DIM);
        let own: f64 = product
            .iter()
            .zip(&values)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum();
        assert!(
            own <= 1.06 * least + 1e-6 * all,
            "{n} rows, rank {rank}: {own} beside {least}"
        );
    }
    // Nothing comes of nothing, and no NaN.
    let mut product = vec![0.0; 4 * DIM];
    LowRank::of(&product.clone(), DIM, 4).add_to(&mut product, DIM);
    assert!(product.iter().all(|x| *x == 0.0));
}

#[test]
fn salient_rows_are_those_attended_to_most_by_the_queries_that_could() {
    let mut rng = StdRng::seed_from_u64(5);
    let positions: Vec<u32> = (0..200).map(|i| 3 * i + i % 2).collect();
    let scores: Vec<f32> = (0..200).map(|_| rng.random::<f32>()).collect();
    let low: Vec<bool> = (0..200).map(|i| i % 7 == 0).collect();
    for every in [true, false] {
        let salience = zipcache::salience(&scores, Some(&positions), 700, every);
        let right = |i: usize| {
            let queries = if every {
                700.0 - f64::from(positions[i])
            } else {
                1.0
            };
            f64::from(scores[i]) / queries
        };
        assert!((0..200).all(|i| (f64::from(salience[i]) - right(i)).abs() < 1e-6));
        let marks = Marks::of(&salience, &low, Fraction::new(0.3));
        let mut order: Vec<usize> = (0..200).filter(|i| !low[*i]).collect();
        order.sort_by(|a, b| right(*b).total_cmp(&right(*a)));
        assert_eq!(marks.count(), 60);
        assert!(order[..60].iter().all(|i| marks.has(*i)));
        assert!(order[60..].iter().all(|i| !marks.has(*i)) && (0..200).all(|i| !(low[i] && marks.has(i))));
    }
    // Where fewer rows have their bits than the share is of all.
    let marks = Marks::of(&scores[..10], &[true; 10], Fraction::new(0.5));
    assert_eq!(marks.count(), 0);
}

#[test]
fn channels_are_separated_by_the_root_of_their_largest_magnitude() {
    let values = rows(50);
    let mut separated = values.clone();
    let roots = zipcache::separate(&mut separated, DIM);
    for (c, root) in roots.iter().enumerate() {
        let largest = values
            .iter()
            .skip(c)
            .step_by(DIM)
            .map(|x| f64::from(x.abs()))
            .fold(0.0, f64::max);
        assert!((root.to_f64() - largest.sqrt()).abs() < largest.sqrt() / 1024.0);
    }
    zipcache::join(&mut separated, DIM, &roots);
    assert!(
        separated
            .iter()
            .zip(&values)
            .all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs())
    );
    let mut zeros = vec![0.0; DIM];
    assert!(
        zipcache::separate(&mut zeros, DIM)
            .iter()
            .all(|root| root.to_f32() == 1.0)
    );
}
