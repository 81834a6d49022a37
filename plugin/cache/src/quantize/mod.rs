//! How rows are packed: which codecs a policy's bits mean, what a block holds beside codes, and that codecs only ever go
//! down for rows already stored. One method a file.

mod fp8;
pub(crate) mod gear;
pub(crate) mod kivi;
pub(crate) mod kvquant;
pub(crate) mod outliers;
mod rtn;
#[cfg(test)]
mod tests;
pub(crate) mod zipcache;

use cinch_kernels::Codec;
use cinch_protocol::{Bits, PolicyError, Quantize, QuantizeMethod};

/// What fractions are counted in.
const PARTS: f64 = 10_000.0;

/// What a block holds beside the codes of its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Beside {
    #[default]
    Nothing,
    /// Levels of its own that codes stand for, and outliers.
    Levels { outliers: Fraction },
    /// A low-rank part of the error, and outliers.
    Error { outliers: Fraction, rank: u8 },
    /// Rows wait to be merged with another head's, of which so many are not, or are merged already.
    Shared { retained: Fraction },
    /// Salient rows in the pair's codecs; the others are in this one.
    Salient { share: Fraction, low: Codec },
}

/// A fraction, in ten thousandths: exact, so that blocks can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fraction(u16);

impl Fraction {
    pub(crate) fn new(fraction: f64) -> Self {
        Self((fraction * PARTS).round() as u16)
    }

    /// Of so many.
    pub(crate) fn of(self, n: usize) -> usize {
        (n as f64 * f64::from(self.0) / PARTS).round() as usize
    }
}

impl Beside {
    /// Its name, if it is anything.
    pub(crate) const fn name(self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::Levels { .. } => Some("levels"),
            Self::Error { .. } => Some("error"),
            Self::Salient { .. } => Some("salient"),
            Self::Shared { .. } => Some("shared"),
        }
    }

    /// Whether codes are all there is of rows, but where they are merged.
    pub(crate) const fn is_plain(self) -> bool {
        matches!(self, Self::Nothing | Self::Shared { .. })
    }

    /// The codec of rows that keep the fewest bits.
    pub(crate) fn least(self, codec: Codec) -> Codec {
        match self {
            Self::Salient { low, .. } => lower(codec, low),
            Self::Nothing | Self::Levels { .. } | Self::Error { .. } | Self::Shared { .. } => codec,
        }
    }
}

/// Bits a value takes, without scales.
pub(crate) fn bits(codec: Codec) -> u32 {
    match codec {
        Codec::F32 => 32,
        Codec::F16 | Codec::Bf16 => 16,
        Codec::Fp8 | Codec::Int8 => 8,
        Codec::Int4 => 4,
        Codec::Int3 => 3,
        Codec::Int2 => 2,
    }
}

/// The codec a stored row ends up in: information that is gone does not come back, so never one of more bits.
pub(crate) fn lower(current: Codec, target: Codec) -> Codec {
    if bits(target) < bits(current) {
        target
    } else {
        current
    }
}

/// Codecs of K and V that a policy packs a layer's rows into; `None`: they stay in the store's own.
pub(crate) fn codecs(quantize: &Quantize, layer: usize) -> (Option<Codec>, Option<Codec>) {
    let (k, v) = quantize.bits(layer);
    let codec = |bits| match quantize.method {
        QuantizeMethod::Fp8 => fp8::codec(bits),
        // These give a value as many bits; they differ in which values share a scale, and in what is beside them.
        QuantizeMethod::Rtn
        | QuantizeMethod::Kivi
        | QuantizeMethod::Kvquant
        | QuantizeMethod::Gear
        | QuantizeMethod::Zipcache => rtn::codec(bits),
    };
    (codec(k), codec(v))
}

/// What a policy's blocks hold beside codes.
pub(crate) fn beside(quantize: &Quantize) -> Beside {
    match quantize.method {
        QuantizeMethod::Rtn | QuantizeMethod::Kivi | QuantizeMethod::Fp8 => Beside::Nothing,
        QuantizeMethod::Kvquant => Beside::Levels {
            outliers: Fraction::new(quantize.outliers.unwrap_or(kvquant::OUTLIERS)),
        },
        QuantizeMethod::Gear => Beside::Error {
            outliers: Fraction::new(quantize.outliers.unwrap_or(gear::OUTLIERS)),
            rank: quantize.rank.unwrap_or(gear::RANK) as u8,
        },
        QuantizeMethod::Zipcache => match rtn::codec(quantize.low()) {
            Some(low) => Beside::Salient {
                share: Fraction::new(quantize.salient.unwrap_or(zipcache::SALIENT)),
                low,
            },
            None => Beside::Nothing,
        },
    }
}

/// Whether a policy packs anything in any layer.
pub(crate) fn packs(quantize: &Quantize) -> bool {
    quantize.all_bits().any(|bits| bits != Bits::B16)
}

/// Whether the tokens of a tile share a channel's scale and zero.
pub(crate) fn by_channel(quantize: &Quantize) -> bool {
    match quantize.method {
        QuantizeMethod::Kivi | QuantizeMethod::Kvquant | QuantizeMethod::Gear => true,
        QuantizeMethod::Rtn | QuantizeMethod::Zipcache | QuantizeMethod::Fp8 => false,
    }
}

/// Whether a layer's keys are packed as they were before their rotary embedding.
pub(crate) fn before_rope(quantize: &Quantize, layer: usize) -> bool {
    quantize.before_rope() && codecs(quantize, layer).0.is_some()
}

/// Whether heads of these dimensions, those that projection leaves, can be packed by a policy's method.
pub(crate) fn fits(quantize: &Quantize, layer: usize, k_dim: usize, v_dim: usize) -> Result<(), PolicyError> {
    if let (Some(codec), _) = codecs(quantize, layer)
        && by_channel(quantize)
    {
        kivi::check(quantize.method, codec, k_dim)?;
    }
    if beside(quantize) != Beside::Nothing {
        outliers::check(quantize.method, k_dim.max(v_dim))?;
    }
    Ok(())
}
