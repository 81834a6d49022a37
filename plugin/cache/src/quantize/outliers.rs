//! Values that are kept as they are, beside the codes of all others (dense and sparse: KVQuant, arXiv 2401.18079, section
//! 3.4; GEAR, arXiv 2403.05527, section 3). A few of them would stretch the range that a group's codes share.
//!
//! Both papers take a fraction of each channel's keys and each token's values, from both ends. Here a fraction of all, by
//! how many standard deviations a value is off the mean of its channel or token: where a head has 64 channels, one in a
//! hundred of each token is none or too many.

use cinch_protocol::{PolicyError, QuantizeMethod};
use half::f16;

/// Values that blocks of 256 rows may have a row at most: places are numbered in 16 bits.
const MOST: usize = 256;

/// A value and where it is: row times dimensions plus column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Outlier {
    pub(crate) place: u16,
    pub(crate) value: f16,
}

/// Whether rows of so many values can have outliers.
pub(super) fn check(method: QuantizeMethod, dim: usize) -> Result<(), PolicyError> {
    if dim <= MOST {
        return Ok(());
    }
    let name = method.name();
    let allowed = format!("rtn or kivi: {name} takes heads of up to {MOST} values, these have {dim}");
    Err(PolicyError::new("quantize.method", name, &allowed))
}

/// Takes the `count` values farthest off the mean of their vector, a column or else a row, out of `values`, in the order
/// of their places. What they leave is their vector's mean.
pub(crate) fn take(values: &mut [f32], dim: usize, by_column: bool, count: usize) -> Vec<Outlier> {
    if count == 0 {
        return Vec::new();
    }
    let vector = |place: usize| if by_column { place % dim } else { place / dim };
    let vectors = if by_column { dim } else { values.len() / dim };
    let length = (values.len() / vectors) as f64;
    let mut sums = vec![(0.0, 0.0); vectors];
    for (place, x) in values.iter().enumerate() {
        let (sum, squares) = &mut sums[vector(place)];
        *sum += f64::from(*x);
        *squares += f64::from(*x).powi(2);
    }
    let spread: Vec<(f32, f32)> = sums
        .into_iter()
        .map(|(sum, squares)| {
            let mean = sum / length;
            let variance = (squares / length - mean * mean).max(0.0);
            (
                mean as f32,
                if variance > 0.0 {
                    variance.sqrt().recip() as f32
                } else {
                    0.0
                },
            )
        })
        .collect();
    let mut far: Vec<(f32, u16)> = values
        .iter()
        .enumerate()
        .map(|(place, x)| {
            let (mean, inverse) = spread[vector(place)];
            ((x - mean).abs() * inverse, place as u16)
        })
        .collect();
    let count = count.min(far.len());
    if count < far.len() {
        // Of equals, the earlier ones.
        far.select_nth_unstable_by(count, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        far.truncate(count);
    }
    far.sort_unstable_by_key(|(_, place)| *place);
    far.into_iter()
        .map(|(_, place)| {
            let at = usize::from(place);
            let largest = f16::MAX.to_f32();
            let value = f16::from_f32(values[at].clamp(-largest, largest));
            values[at] = spread[vector(at)].0;
            Outlier { place, value }
        })
        .collect()
}

/// Puts them back, those of the first rows.
pub(crate) fn restore(outliers: &[Outlier], values: &mut [f32]) {
    for Outlier { place, value } in outliers {
        if let Some(x) = values.get_mut(usize::from(*place)) {
            *x = value.to_f32();
        }
    }
}
