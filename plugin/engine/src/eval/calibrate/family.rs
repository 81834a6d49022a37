//! Policies of one method that differ in bits only: uniform ones, those of one part of a cache alone, and those by layer.

use std::collections::BTreeMap;

use cinch_protocol::{Bits, LayerBits, LayerOverrides, LayerRange, Policy, Quantize, QuantizeMethod};

/// Bits that are given out, fewest first.
pub(super) const BITS: [Bits; 4] = [Bits::B2, Bits::B3, Bits::B4, Bits::B8];

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Keys.
    K,
    /// Values.
    V,
}

/// Keys or values of a layer, or of several that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) layers: LayerRange,
    pub(super) side: Side,
}

impl Part {
    /// How many layers it has.
    pub(super) fn count(self) -> usize {
        (self.layers.last - self.layers.first) as usize + 1
    }

    /// The first of them.
    pub(super) fn first(self) -> usize {
        self.layers.first as usize
    }
}

/// All parts of a cache of `layers` layers, of which `together` are one: keys and values of each in turn.
pub(super) fn parts(layers: usize, together: usize) -> Vec<Part> {
    let layers = u32::try_from(layers).unwrap_or(u32::MAX);
    let together = u32::try_from(together).unwrap_or(u32::MAX).max(1);
    let both = |at: u32| {
        let layers = LayerRange {
            first: at * together,
            last: at.saturating_mul(together).saturating_add(together).min(layers) - 1,
        };
        [Side::K, Side::V].map(|side| Part { layers, side })
    };
    (0..layers.div_ceil(together)).flat_map(both).collect()
}

/// A policy with these bits in all layers but some. Keys are rotated where the method can: `rtn` breaks them in few bits
/// otherwise.
fn policy(method: QuantizeMethod, (k_bits, v_bits): (Bits, Bits), layers: LayerOverrides) -> Policy {
    let packed = k_bits != Bits::B16 || layers.values().any(|own| own.k_bits.is_some());
    // Values are packed alike by both methods, and only keys tell them apart.
    let method = if packed { method } else { QuantizeMethod::Rtn };
    Policy {
        quantize: Some(Quantize {
            method,
            rotate_k: packed && method == QuantizeMethod::Rtn,
            layers,
            ..Quantize::new(k_bits, v_bits)
        }),
        ..Policy::default()
    }
}

/// The same bits everywhere.
pub(super) fn uniform(method: QuantizeMethod, bits: (Bits, Bits)) -> Policy {
    policy(method, bits, LayerOverrides::new())
}

/// One part in `bits`, all else in f16.
pub(super) fn alone(method: QuantizeMethod, part: Part, bits: Bits) -> Policy {
    let own = match part.side {
        Side::K => of(Some(bits), None),
        Side::V => of(None, Some(bits)),
    };
    let layers = LayerOverrides::from([(part.layers, own)]);
    policy(method, (Bits::B16, Bits::B16), layers)
}

/// Both parts of a layer in 8 bits, all else in f16.
pub(super) fn next_to_nothing(layer: usize) -> Policy {
    let own = of(Some(Bits::B8), Some(Bits::B8));
    let layer = single(u32::try_from(layer).unwrap_or(u32::MAX));
    let layers = LayerOverrides::from([(layer, own)]);
    policy(QuantizeMethod::Rtn, (Bits::B16, Bits::B16), layers)
}

/// Bits of K and V by layer: most layers' are the policy's own, the others' are overrides.
pub(super) fn by_layer(method: QuantizeMethod, bits: &[(Bits, Bits)]) -> Policy {
    let mut counts: BTreeMap<(Bits, Bits), usize> = BTreeMap::new();
    for pair in bits {
        *counts.entry(*pair).or_default() += 1;
    }
    let most = counts.iter().max_by_key(|(_, count)| **count);
    let base = most.map_or((Bits::B16, Bits::B16), |(pair, _)| *pair);
    let mut layers: Vec<(LayerRange, LayerBits)> = Vec::new();
    for (layer, pair) in (0_u32..).zip(bits) {
        let other = |own: Bits, base: Bits| (own != base).then_some(own);
        let own = of(other(pair.0, base.0), other(pair.1, base.1));
        if own == LayerBits::default() {
            continue;
        }
        match layers.last_mut() {
            Some((range, before)) if *before == own && range.last + 1 == layer => range.last = layer,
            _ => layers.push((single(layer), own)),
        }
    }
    policy(method, base, layers.into_iter().collect())
}

fn of(k_bits: Option<Bits>, v_bits: Option<Bits>) -> LayerBits {
    LayerBits { k_bits, v_bits }
}

fn single(layer: u32) -> LayerRange {
    LayerRange {
        first: layer,
        last: layer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METHODS: [QuantizeMethod; 2] = [QuantizeMethod::Rtn, QuantizeMethod::Kivi];

    #[test]
    fn every_policy_can_be() {
        for method in METHODS {
            for bits in BITS {
                for part in parts(3, 1) {
                    let policy = alone(method, part, bits);
                    assert_eq!(policy.validate(), Ok(()), "{policy}");
                    let quantize = policy.quantize.unwrap();
                    for layer in 0..3 {
                        let wanted = |side| {
                            let own = part.first() == layer && part.side == side;
                            if own { bits } else { Bits::B16 }
                        };
                        assert_eq!(quantize.bits(layer), (wanted(Side::K), wanted(Side::V)));
                    }
                }
                let policy = uniform(method, (bits, Bits::B3));
                assert_eq!(policy.validate(), Ok(()), "{policy}");
            }
        }
        assert_eq!(next_to_nothing(2).validate(), Ok(()));
    }

    #[test]
    fn layers_together_are_one_part() {
        assert_eq!(parts(30, 1).len(), 60);
        let ranges = |layers, together| -> Vec<String> {
            let keys = parts(layers, together).into_iter().step_by(2);
            keys.map(|part| part.layers.to_string()).collect()
        };
        assert_eq!(ranges(7, 3), ["0-2", "3-5", "6"]);
        assert_eq!(ranges(2, 9), ["0-1"]);
        let counts: Vec<usize> = parts(7, 3).into_iter().map(Part::count).collect();
        assert_eq!(counts, [3, 3, 3, 3, 1, 1]);
        let policy = alone(QuantizeMethod::Rtn, parts(7, 3)[3], Bits::B2);
        let quantize = policy.quantize.unwrap();
        assert_eq!(quantize.bits(4), (Bits::B16, Bits::B2));
        assert_eq!(quantize.bits(6), (Bits::B16, Bits::B16));
    }

    #[test]
    fn bits_by_layer_are_kept_and_written_short() {
        let (a, b) = ((Bits::B3, Bits::B3), (Bits::B4, Bits::B2));
        let bits = [a, b, b, a, a, (Bits::B3, Bits::B8), a];
        for method in METHODS {
            let policy = by_layer(method, &bits);
            assert_eq!(policy.validate(), Ok(()), "{policy}");
            let quantize = policy.quantize.unwrap();
            let again: Vec<(Bits, Bits)> = (0..bits.len()).map(|layer| quantize.bits(layer)).collect();
            assert_eq!(again, bits);
            assert_eq!(quantize.layers.len(), 2, "{quantize}");
        }
        let policy = by_layer(QuantizeMethod::Rtn, &bits);
        assert_eq!(policy.to_string(), "k3 rotated v3, 1-2: k4 v2, 5: v8");
        assert_eq!(
            by_layer(QuantizeMethod::Kivi, &[b; 4]),
            uniform(QuantizeMethod::Kivi, b)
        );
    }
}
