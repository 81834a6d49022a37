//! What groups of values become, in f64: written from the papers, and from what is said of parameters where codecs are
//! described.

use std::collections::HashSet;

use half::f16;

use crate::matrix::{Rows, transposed};

/// Values that share a scale and a zero.
pub(crate) const GROUP: usize = 32;

/// A value and how far apart the levels are that it is one of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Coded {
    pub(crate) value: f64,
    pub(crate) step: f64,
}

pub(crate) fn half(x: f64) -> f64 {
    f16::from_f64(x).to_f64()
}

/// The f16 next to `x`, not below it or not above it.
fn nudged(x: f64, up: bool) -> f64 {
    let near = f16::from_f64(x);
    let right = if up {
        near.to_f64() >= x
    } else {
        near.to_f64() <= x
    };
    if right {
        return near.to_f64();
    }
    let away = (near.to_f64() > 0.0) == up;
    let bits = i32::from(near.to_bits()) + if away { 1 } else { -1 };
    f16::from_bits(bits as u16).to_f64()
}

/// One group: nearest of evenly spread levels over its range, parameters in f16, the zero rounded down and the scale up.
pub(crate) fn group(x: &[f64], bits: u32) -> Vec<Coded> {
    let levels = f64::from((1_u32 << bits) - 1);
    let min = x.iter().copied().fold(f64::INFINITY, f64::min);
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let zero = nudged(min, false);
    let scale = nudged((max - zero) / levels, true);
    let code = |x: &f64| {
        if scale == 0.0 {
            return 0.0;
        }
        ((x - zero) / scale).round_ties_even().clamp(0.0, levels)
    };
    x.iter()
        .map(|x| Coded {
            value: zero + scale * code(x),
            step: scale,
        })
        .collect()
}

/// A token's groups, along its channels.
pub(crate) fn by_token(rows: &Rows, bits: u32) -> Vec<Vec<Coded>> {
    let token = |row: &Vec<f64>| row.chunks(GROUP).flat_map(|x| group(x, bits)).collect();
    rows.iter().map(token).collect()
}

/// A channel's groups, of 32 tokens each.
pub(crate) fn by_channel(rows: &Rows, bits: u32) -> Vec<Vec<Coded>> {
    let tile = |tile: &[Vec<f64>]| {
        let channels: Vec<Vec<Coded>> = transposed(&tile.to_vec())
            .iter()
            .map(|x| group(x, bits))
            .collect();
        let token = |t: usize| channels.iter().map(|channel| channel[t]).collect::<Vec<_>>();
        (0..tile.len()).map(token).collect::<Vec<_>>()
    };
    rows.chunks(GROUP).flat_map(tile).collect()
}

/// E4M3: 2^e times 8 to 15 eighths, from 2^-6 on; below, steps of 2^-9.
pub(crate) fn fp8(x: f64) -> Coded {
    let step = 2_f64.powi(x.abs().max(2_f64.powi(-6)).log2().floor() as i32 - 3);
    Coded {
        value: ((x / step).round_ties_even() * step).clamp(-448.0, 448.0),
        step,
    }
}

/// H·x with H = H₂ ⊗ … ⊗ H₂ / √n: entry (i, j) is −1 to the number of ones that i and j share.
pub(crate) fn hadamard(x: &[f64]) -> Vec<f64> {
    let n = x.len();
    let sign = |i: usize, j: usize| f64::from(1 - 2 * ((i & j).count_ones() as i32 % 2));
    (0..n)
        .map(|i| (0..n).map(|j| sign(i, j) * x[j]).sum::<f64>() / (n as f64).sqrt())
        .collect()
}

/// Rows and columns of some values.
pub(crate) type Places = HashSet<(usize, usize)>;

/// The places of values farthest off the mean of their channel, or else of their token, in standard
/// deviations.
pub(crate) fn outliers(rows: &Rows, of_channels: bool, fraction: f64) -> Places {
    let vectors = if of_channels {
        transposed(rows)
    } else {
        rows.clone()
    };
    let mut far = Vec::new();
    for (i, x) in vectors.iter().enumerate() {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let spread = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
        far.extend(x.iter().enumerate().map(|(j, x)| {
            let place = if of_channels { (j, i) } else { (i, j) };
            ((x - mean).abs() / spread, place)
        }));
    }
    far.sort_by(|a, b| b.0.total_cmp(&a.0));
    far.truncate((fraction * far.len() as f64).round() as usize);
    far.into_iter().map(|(_, place)| place).collect()
}

/// `rows` with means of channels, or else of tokens, in the places of outliers.
pub(crate) fn without(rows: &Rows, places: &Places, of_channels: bool) -> Rows {
    let mut dense = rows.clone();
    for (r, c) in places {
        dense[*r][*c] = if of_channels {
            rows.iter().map(|row| row[*c]).sum::<f64>() / rows.len() as f64
        } else {
            rows[*r].iter().sum::<f64>() / rows[*r].len() as f64
        };
    }
    dense
}

/// Levels where k-means puts them for values in the ranges of their groups, from evenly spread ones on.
pub(crate) fn k_means(normal: &[f64], largest: u32) -> Vec<f64> {
    let mut levels: Vec<f64> = (0..=largest).map(f64::from).collect();
    for _ in 0..100 {
        let mut sums = vec![(0.0, 0.0); levels.len()];
        for x in normal {
            let (sum, count) = &mut sums[nearest(&levels, *x)];
            *sum += x;
            *count += 1.0;
        }
        let mut moved = 0.0_f64;
        for (level, (sum, count)) in levels.iter_mut().zip(sums) {
            if count > 0.0 {
                moved = moved.max((*level - sum / count).abs());
                *level = sum / count;
            }
        }
        if moved < 1e-9 {
            break;
        }
    }
    levels
}

/// Which of ascending levels is nearest.
pub(crate) fn nearest(levels: &[f64], x: f64) -> usize {
    let after = levels
        .partition_point(|level| *level < x)
        .clamp(1, levels.len() - 1);
    if x - levels[after - 1] <= levels[after] - x {
        after - 1
    } else {
        after
    }
}
