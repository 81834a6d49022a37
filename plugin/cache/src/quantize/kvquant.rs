//! `KVQuant` (arXiv 2401.18079): keys per channel and values per token as KIVI, codes that stand for levels where the values
//! are (section 3.3, by k-means), a hundredth of the values kept as they are (section 3.4).
//!
//! Keys are packed as they were before their rotary embedding, which mixes pairs of channels, and turned by it anew at every
//! step (section 3.2). As the engine caches them after it, they are turned back by their positions first. Where how a model's
//! keys turn is not known, or they are in a basis of their head, a policy must ask for `rope = "after"`.
//!
//! What differs from the paper: levels are a block's own, of its 256 tokens, and each value counts alike; the paper's are a
//! layer's, by k-means on calibration data weighed by the loss's sensitivity.
//!
//! When not to use it: where speed counts, since blocks are unpacked at every step; 4 bits, where KIVI or rotated keys are
//! as good in fewer bytes.

use half::f16;

use cinch_kernels::GROUP;

/// The paper's fraction of outliers.
pub(super) const OUTLIERS: f64 = 0.01;

/// What the range of a group is counted in.
const BINS: usize = 512;

/// Steps of k-means; levels hardly move after these.
const STEPS: usize = 16;

/// Levels of codes 0 ..= `largest` for rows of `dim` values, of which a column's 32 share a range, or else a row's 32: the
/// means that values are nearest to, each in its range from 0 to `largest`.
pub(crate) fn levels(values: &[f32], dim: usize, by_column: bool, largest: u8) -> Vec<f16> {
    let (counts, most) = (histogram(values, dim, by_column), f32::from(largest));
    let at = |bin: usize| bin as f32 * most / (BINS - 1) as f32;
    let mut levels: Vec<f32> = (0..=largest).map(f32::from).collect();
    for _ in 0..STEPS {
        let mut sums = vec![(0.0, 0.0); levels.len()];
        let mut level = 0;
        for (bin, count) in counts.iter().enumerate() {
            // Bins and levels both ascend.
            while level + 1 < levels.len() && at(bin) > (levels[level] + levels[level + 1]) / 2.0 {
                level += 1;
            }
            sums[level].0 += f64::from(*count) * f64::from(at(bin));
            sums[level].1 += f64::from(*count);
        }
        for (level, (sum, count)) in levels.iter_mut().zip(sums) {
            // A level that nothing is near stays.
            if count > 0.0 {
                *level = (sum / count) as f32;
            }
        }
    }
    levels.into_iter().map(f16::from_f32).collect()
}

/// How many values lie where in their group's range.
fn histogram(values: &[f32], dim: usize, by_column: bool) -> Vec<u32> {
    let mut counts = vec![0; BINS];
    let mut count = |group: &mut dyn Iterator<Item = f32>, (min, max): (f32, f32)| {
        if max > min {
            let scale = (BINS - 1) as f32 / (max - min);
            group.for_each(|x| counts[(((x - min) * scale).round() as usize).min(BINS - 1)] += 1);
        }
    };
    let range = |group: &mut dyn Iterator<Item = f32>| {
        group.fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), x| {
            (min.min(x), max.max(x))
        })
    };
    if by_column {
        for tile in values.chunks(GROUP * dim) {
            for column in 0..dim {
                let group = || tile[column..].iter().step_by(dim).copied();
                count(&mut group(), range(&mut group()));
            }
        }
    } else {
        for group in values.chunks_exact(dim).flat_map(|row| row.chunks(GROUP)) {
            let group = || group.iter().copied();
            count(&mut group(), range(&mut group()));
        }
    }
    counts
}
