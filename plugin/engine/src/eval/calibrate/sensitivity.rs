//! What a part of the cache in few bits does to the next token, and what that says of other bits.
//!
//! A part's damage is the KL divergence that it alone causes in the fewest bits, less what *any* change of its layer
//! causes: the model's products round their activations, to 8 bits with Q8_0 weights, so that the least change before them
//! draws other roundings, and these differ from level 0's by more than 4 bits of one part do. That floor falls from the
//! first layer to the last, is measured at some layers and drawn straight between them.
//!
//! Divergence goes with the square of a small error, and the error of uniform levels over a range with their distance:
//! damage in `b` bits is that in `a` times ((2^a - 1) / (2^b - 1))².

use cinch_protocol::Bits;
use serde::{Deserialize, Serialize};

use super::super::figures::{self, Estimate};
use super::super::runner::Piece;
use super::allocate::Choice;
use super::family::BITS;

/// Standard errors between the ends of an interval of 95 %.
const STANDARD_ERRORS: f64 = 3.92;

/// Keys or values of a layer. Of layers that were measured together, each has all figures, and its share of damage and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Sensitivity {
    /// Mean KL divergence from level 0 with only them in 2 bits, nats.
    pub(super) kl: Estimate,
    /// What of it is theirs: less the layer's floor, and no less than the standard error.
    pub(super) damage: f64,
    /// Bytes that 2 bits save of a request, mean.
    pub(super) saved_bytes: u64,
    /// Relative error of attention output, as the engine measures it, mean over all layers.
    pub(super) attention_error: Option<f64>,
}

/// Mean KL divergence of a policy's pieces.
pub(super) fn kl(pieces: &[&Piece]) -> Estimate {
    figures::mean_of_runs(&kls(pieces))
}

/// Mean difference of two policies' KL divergences on the same tokens, the second one's less the first one's.
pub(super) fn change(from: &[&Piece], to: &[&Piece]) -> Estimate {
    let (from, to) = (kls(from), kls(to));
    let run = |(from, to): (&Vec<f64>, &Vec<f64>)| from.iter().zip(to).map(|(from, to)| to - from).collect();
    figures::mean_of_runs(&from.iter().zip(&to).map(run).collect::<Vec<Vec<f64>>>())
}

fn kls(pieces: &[&Piece]) -> Vec<Vec<f64>> {
    let of = |piece: &&Piece| piece.steps.iter().flatten().map(|step| step.kl).collect();
    pieces.iter().map(of).collect()
}

/// Bytes at the end of the prompt, mean over `pieces`.
pub(super) fn bytes(pieces: &[&Piece]) -> u64 {
    let sum: u64 = pieces.iter().map(|piece| piece.prompt_bytes).sum();
    sum / pieces.len().max(1) as u64
}

/// Each of `layers` layers that were alone in the fewest bits together, beside level 0's bytes and their floor.
pub(super) fn of(pieces: &[&Piece], layers: usize, full_bytes: u64, floor: f64) -> Sensitivity {
    let kl = kl(pieces);
    let errors: Vec<f64> = pieces.iter().filter_map(|piece| piece.attention_error).collect();
    let saved_bytes = full_bytes.saturating_sub(bytes(pieces)) / layers.max(1) as u64;
    let least = (kl.high - kl.low) / STANDARD_ERRORS;
    Sensitivity {
        kl,
        // A layer that is not compressed has none.
        damage: if saved_bytes == 0 {
            0.0
        } else {
            (kl.value - floor).max(least) / layers.max(1) as f64
        },
        saved_bytes,
        attention_error: (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64),
    }
}

/// The floor at each of `layers` layers, from those measured, which are in order.
pub(super) fn floors(measured: &[(usize, f64)], layers: usize) -> Vec<f64> {
    let at = |layer: usize| {
        let after = measured.iter().position(|(other, _)| *other >= layer);
        let (Some(after), Some(last)) = (after, measured.last()) else {
            return measured.last().map_or(0.0, |last| last.1);
        };
        let (right, left) = (
            measured.get(after).unwrap_or(last),
            measured.get(after.wrapping_sub(1)),
        );
        match left {
            Some(left) if right.0 > left.0 => {
                let share = (layer - left.0) as f64 / (right.0 - left.0) as f64;
                left.1 + share * (right.1 - left.1)
            }
            _ => right.1,
        }
    };
    (0..layers).map(at).collect()
}

/// What `bits` do of the damage that the fewest do.
pub(super) fn decay(bits: Bits) -> f64 {
    let levels = |bits: Bits| f64::from(u32::from(bits)).exp2() - 1.0;
    (levels(BITS[0]) / levels(bits)).powi(2)
}

/// What each part may get: bytes over the fewest bits', and damage. `uniform` are the bytes of caches with the same bits in all
/// parts, a value an entry of [`BITS`]: what more of them take is each part's by what the fewest save of it.
pub(super) fn choices(parts: &[Sensitivity], uniform: &[u64]) -> Vec<Vec<Choice>> {
    let all: u64 = parts.iter().map(|part| part.saved_bytes).sum();
    let first = uniform.first().copied().unwrap_or_default();
    let of = |part: &Sensitivity| {
        let share = part.saved_bytes as f64 / all.max(1) as f64;
        let choice = |(bits, bytes): (&Bits, &u64)| Choice {
            bytes: (bytes.saturating_sub(first) as f64 * share).round() as u64,
            damage: part.damage * decay(*bits),
        };
        BITS.iter().zip(uniform).map(choice).collect()
    };
    parts.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(saved_bytes: u64, damage: f64) -> Sensitivity {
        Sensitivity {
            kl: Estimate::default(),
            damage,
            saved_bytes,
            attention_error: None,
        }
    }

    #[test]
    fn a_bit_more_is_about_a_fifth_of_the_damage() {
        let wanted = [1.0, 9.0 / 49.0, 9.0 / 225.0, 9.0 / 65_025.0];
        for (bits, wanted) in BITS.into_iter().zip(wanted) {
            assert!((decay(bits) - wanted).abs() < 1e-15, "{bits}");
        }
    }

    #[test]
    fn floors_are_drawn_between_those_measured() {
        let floors = floors(&[(0, 4.0), (2, 2.0), (5, 0.5)], 7);
        assert_eq!(floors, [4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.5]);
        assert_eq!(super::floors(&[(1, 3.0)], 3), [3.0, 3.0, 3.0]);
        assert_eq!(super::floors(&[], 2), [0.0, 0.0]);
    }

    #[test]
    fn parts_pay_by_their_size() {
        let choices = choices(
            &[part(300, 1.0), part(100, 0.5), part(0, 0.0)],
            &[1000, 1400, 1800, 3400],
        );
        let bytes = |part: usize| {
            choices[part]
                .iter()
                .map(|choice| choice.bytes)
                .collect::<Vec<u64>>()
        };
        assert_eq!(bytes(0), [0, 300, 600, 1800]);
        assert_eq!(bytes(1), [0, 100, 200, 600]);
        assert_eq!(bytes(2), [0; 4]);
        assert!((choices[1][2].damage - 0.5 * 0.04).abs() < 1e-15);
    }
}
