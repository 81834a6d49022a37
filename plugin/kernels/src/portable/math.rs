//! The arithmetic that both attentions share. Invariant: NaN goes through, it is never swallowed.

use super::LANES;
use crate::Heads;

/// `a · b + c`, fused where the target has an instruction for it (elsewhere `mul_add` is a slow call).
#[inline(always)]
pub(super) fn madd(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// e^x without a branch, so that loops over it vectorize. Relative error at most 2e-7 on [−87.3, 88];
/// below that 0, above it e^88.
///
/// Cody-Waite reduction and the polynomial of Cephes' `expf`: x = n·ln 2 + r with |r| ≤ ln 2 / 2.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// ln(2^-126): the smallest normal result.
    const LOW: f32 = -87.336_54;
    const HIGH: f32 = 88.0;
    /// 1.5 · 2^23: adding it leaves the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; the high one has 9 bits, so n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;

    // Comparisons instead of `max`/`min`, which would turn NaN into a number.
    let y = if x < LOW { LOW } else { x };
    let y = if y > HIGH { HIGH } else { y };
    let shifted = madd(y, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = madd(n, -LN2_LOW, madd(n, -LN2_HIGH, y));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = madd(p, r, c);
    }
    let e = madd(p, r * r, r) + 1.0;
    // 2^n: the low bits of `shifted` hold n, the shift drops the rest.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < LOW { 0.0 } else { e * power }
}

/// Turns dot products into logits: scale, then cap.
#[inline(always)]
pub(super) fn logits(heads: &Heads, scores: &mut [f32]) {
    match heads.softcap {
        None => scores.iter_mut().for_each(|s| *s *= heads.scale),
        Some(cap) => {
            let factor = heads.scale / cap;
            for s in scores {
                let x = *s * factor;
                // tanh |x| = (1 − e^(−2|x|)) / (1 + e^(−2|x|)): absolute error 1e-7, which is what
                // rounding of a logit near the cap costs anyway.
                let e = exp(-2.0 * x.abs());
                *s = cap * ((1.0 - e) / (1.0 + e)).copysign(x);
            }
        }
    }
}

/// The largest value, NaN aside; −∞ of nothing.
#[inline(always)]
pub(super) fn max(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m })
}

/// Replaces logits by e^(logit − max). Returns their sum.
#[inline(always)]
pub(super) fn exps(values: &mut [f32], max: f32) -> f32 {
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - max);
            lanes[i] += chunk[i];
        }
    }
    let mut sum = lanes.iter().sum();
    for x in rest {
        *x = exp(*x - max);
        sum += *x;
    }
    sum
}

/// `rows` (H of them, `depth` long) times a `depth` × `width` matrix, columns `16·panel` to `16·panel + 16`.
///
/// `matrix` holds whole chunks of 16, row by row. Each of its values is loaded once for all H rows.
#[inline(always)]
pub(super) fn panel<const H: usize>(
    rows: [&[f32]; H],
    depth: usize,
    matrix: &[[f32; LANES]],
    panels: usize,
    panel: usize,
) -> [[f32; LANES]; H] {
    let rows: [&[f32]; H] = rows.map(|r| &r[..depth]);
    let mut acc = [[0.0f32; LANES]; H];
    for (d, chunk) in matrix[panel..].iter().step_by(panels).take(depth).enumerate() {
        for h in 0..H {
            // In bounds: `take` ends at depth, which is the length of every row.
            let x = rows[h][d];
            for i in 0..LANES {
                acc[h][i] = madd(x, chunk[i], acc[h][i]);
            }
        }
    }
    acc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 500th f32 between the ends, against f64.
    #[test]
    fn exp_is_within_two_ulp_over_its_range() {
        let mut worst = 0.0f64;
        for (from, to) in [(1e-30f32, 87.3f32), (1e-30, 88.0)] {
            for bits in (from.to_bits()..to.to_bits()).step_by(500) {
                let x = if to == 88.0 {
                    f32::from_bits(bits)
                } else {
                    -f32::from_bits(bits)
                };
                let right = f64::from(x).exp();
                worst = worst.max(((f64::from(exp(x)) - right) / right).abs());
            }
        }
        assert!(worst <= 2e-7, "relative error {worst:e}");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-87.4), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn softcap_follows_tanh() {
        let heads = Heads {
            q_heads: 1,
            k_dim: 1,
            v_dim: 1,
            scale: 0.5,
            softcap: Some(30.0),
        };
        for i in -4000..4000 {
            let raw = i as f32 * 0.1;
            let mut s = [raw];
            logits(&heads, &mut s);
            let right = 30.0 * (f64::from(raw) * 0.5 / 30.0).tanh();
            assert!(
                (f64::from(s[0]) - right).abs() < 1e-5,
                "{raw}: {} for {right}",
                s[0]
            );
        }
    }

    #[test]
    fn nan_is_not_swallowed() {
        let mut values = vec![0.5; 40];
        values[17] = f32::NAN;
        assert_eq!(max(&values), 0.5);
        assert!(exps(&mut values, 0.5).is_nan());
        assert_eq!(max(&[]), f32::NEG_INFINITY);
    }
}
