//! How many bits K and V keep: a method, bits, and what only some methods have.
//!
//! Invariant: a field that the chosen method has no use for is refused, not ignored.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::layers::{self, LayerBits, LayerOverrides};
use crate::methods::{self, methods};
use crate::policy::{PolicyError, range};

/// Values a group-quantized row shares a scale and a zero point among.
pub const GROUP: u32 = 32;

/// How many bits older rows keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    /// How values map to codes.
    #[serde(default)]
    pub method: QuantizeMethod,
    /// Bits of K: 2, 3, 4, 8 or 16 (16: stays in the store's dtype).
    pub k_bits: Bits,
    /// Bits of V: 2, 3, 4, 8 or 16.
    pub v_bits: Bits,
    /// Whether K is rotated by a Hadamard matrix along the head dim before it is packed, and queries likewise:
    /// outlier channels are spread over all (`QuaRot`, arXiv 2404.00456, section 4.2). Not with `k_bits` of 16.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rotate_k: bool,
    /// Fraction of the values that is kept as it is, those farthest off the mean of their channel (K) or token (V). 0.0 ..=
    /// 0.05, by default 0.01 with `kvquant` and 0.02 with `gear`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outliers: Option<f64>,
    /// Rank of what is kept of the quantization error. 1 ..= 16, by default 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// Fraction of the packed tokens that keeps `k_bits` and `v_bits`, those attended to most. 0.05 ..= 0.95, by default 0.4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salient: Option<f64>,
    /// Bits of K and V of the other tokens. By default 2; fewer than `k_bits` and `v_bits`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_bits: Option<Bits>,
    /// Whether K is packed as it was before its rotary embedding, or as it is cached, after it. By default before: channels then
    /// keep their ranges along a text (`KVQuant`, arXiv 2401.18079, section 3.2). A model whose rotary frequencies are not
    /// known is refused with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<Rope>,
    /// Bits of layers that keep others than these, such as the ones that matter most to a model.
    #[serde(default, skip_serializing_if = "LayerOverrides::is_empty")]
    pub layers: LayerOverrides,
    /// Most recent tokens kept in full precision. 16 ..= 1024.
    #[serde(default = "Quantize::default_residual")]
    pub residual: u32,
}

methods! {
    /// Quantization methods.
    #[derive(Default)]
    pub enum QuantizeMethod {
        /// Round to nearest, asymmetric, per token in groups of 32 along the head dim, f16 scale and zero.
        #[default]
        Rtn = "rtn" ["rotate_k"];
        /// KIVI (arXiv 2402.02750): K per channel over 32 tokens, V per token as `rtn`.
        Kivi = "kivi" ["rotate_k"];
        /// `KVQuant` (arXiv 2401.18079): as `kivi`, with levels where the values are, and outliers kept as they are.
        Kvquant = "kvquant" ["outliers", "rope"];
        /// GEAR (arXiv 2403.05527): as `kivi`, with a low-rank part of the error, and outliers kept as they are.
        Gear = "gear" ["outliers", "rank"];
        /// `ZipCache` (arXiv 2405.14256) and `MiKV` (arXiv 2402.18096): tokens that matter keep more bits than the others.
        Zipcache = "zipcache" ["salient", "low_bits"];
        /// FP8 E4M3, unscaled: 8 bits only.
        Fp8 = "fp8" [];
    }
}

impl QuantizeMethod {
    /// Whether a row is its codes and their parameters, and nothing else.
    #[must_use]
    pub const fn codes_alone(self) -> bool {
        match self {
            Self::Rtn | Self::Kivi | Self::Fp8 => true,
            Self::Kvquant | Self::Gear | Self::Zipcache => false,
        }
    }
}

/// On which side of their rotary embedding keys are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rope {
    /// As they are before it: turned back by their positions, and forth again when they are read.
    Before,
    /// As they are cached.
    After,
}

impl fmt::Display for Rope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Before => "before",
            Self::After => "after",
        })
    }
}

/// Bits a value keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Bits {
    /// 2 bits.
    B2,
    /// 3 bits.
    B3,
    /// 4 bits.
    B4,
    /// 8 bits.
    B8,
    /// The store's own dtype.
    B16,
}

impl TryFrom<u32> for Bits {
    type Error = PolicyError;
    fn try_from(given: u32) -> Result<Self, PolicyError> {
        match given {
            2 => Ok(Self::B2),
            3 => Ok(Self::B3),
            4 => Ok(Self::B4),
            8 => Ok(Self::B8),
            16 => Ok(Self::B16),
            _ => Err(PolicyError::new("bits", given, "2, 3, 4, 8 or 16")),
        }
    }
}

impl From<Bits> for u32 {
    fn from(bits: Bits) -> Self {
        match bits {
            Bits::B2 => 2,
            Bits::B3 => 3,
            Bits::B4 => 4,
            Bits::B8 => 8,
            Bits::B16 => 16,
        }
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        u32::from(*self).fmt(f)
    }
}

impl Quantize {
    /// These bits in all layers, by the default method, everything else as it is by default.
    #[must_use]
    pub fn new(k_bits: Bits, v_bits: Bits) -> Self {
        Self {
            method: QuantizeMethod::default(),
            k_bits,
            v_bits,
            rotate_k: false,
            rope: None,
            outliers: None,
            rank: None,
            salient: None,
            low_bits: None,
            layers: LayerOverrides::new(),
            residual: Self::default_residual(),
        }
    }

    fn default_residual() -> u32 {
        32
    }

    /// Bits of K and V in a layer.
    #[must_use]
    pub fn bits(&self, layer: usize) -> (Bits, Bits) {
        let own = self
            .layers
            .iter()
            .find(|(range, _)| (range.first as usize..=range.last as usize).contains(&layer))
            .map_or_else(LayerBits::default, |(_, bits)| *bits);
        (
            own.k_bits.unwrap_or(self.k_bits),
            own.v_bits.unwrap_or(self.v_bits),
        )
    }

    /// All bits that some layer may have.
    pub fn all_bits(&self) -> impl Iterator<Item = Bits> {
        self.fields().map(|(_, bits)| bits)
    }

    /// The same, with the field that gives them.
    fn fields(&self) -> impl Iterator<Item = (String, Bits)> {
        let own = [("k_bits", Some(self.k_bits)), ("v_bits", Some(self.v_bits))];
        let own = own
            .into_iter()
            .map(|(side, bits)| (format!("quantize.{side}"), bits));
        let layers = self.layers.iter().flat_map(|(range, own)| {
            let of = |side| format!("quantize.layers.{range}.{side}");
            [(of("k_bits"), own.k_bits), (of("v_bits"), own.v_bits)]
        });
        own.chain(layers).filter_map(|(field, bits)| Some((field, bits?)))
    }

    /// Checks every field against its range, and that the method has a use for it.
    pub(crate) fn validate(&self) -> Result<(), PolicyError> {
        range("quantize.residual", self.residual, 16, 1024)?;
        layers::validate(&self.layers)?;
        self.own("rotate_k", self.rotate_k.then_some(true))?;
        if let Some(outliers) = self.own("outliers", self.outliers)? {
            range("quantize.outliers", outliers, 0.0, 0.05)?;
        }
        if let Some(rank) = self.own("rank", self.rank)? {
            range("quantize.rank", rank, 1, 16)?;
        }
        if let Some(salient) = self.own("salient", self.salient)? {
            range("quantize.salient", salient, 0.05, 0.95)?;
        }
        self.own("low_bits", self.low_bits)?;
        self.own("rope", self.rope)?;
        let packed = |bits: Bits| bits != Bits::B16;
        let keys = self.layers.values().filter_map(|own| own.k_bits);
        let no_keys = !keys.chain([self.k_bits]).any(packed);
        let by_channel = match self.method {
            QuantizeMethod::Kivi | QuantizeMethod::Kvquant | QuantizeMethod::Gear => true,
            QuantizeMethod::Rtn | QuantizeMethod::Zipcache | QuantizeMethod::Fp8 => false,
        };
        if by_channel && no_keys {
            let name = self.method.name();
            let allowed = format!("rtn, when k_bits is 16: {name} is about how keys are packed");
            return Err(PolicyError::new("quantize.method", name, &allowed));
        }
        if self.rotate_k && no_keys {
            let allowed = "false, when k_bits is 16: only packed keys are rotated";
            return Err(PolicyError::new("quantize.rotate_k", true, allowed));
        }
        for (field, bits) in self.fields().filter(|(_, bits)| packed(*bits)) {
            let allowed = match self.method {
                QuantizeMethod::Fp8 if bits != Bits::B8 => "8 or 16, with method fp8",
                QuantizeMethod::Kvquant if bits == Bits::B8 => "2, 3, 4 or 16, with method kvquant",
                QuantizeMethod::Zipcache if bits <= self.low() => {
                    "16, or more than low_bits, with method zipcache"
                }
                _ => continue,
            };
            return Err(PolicyError::new(&field, bits, allowed));
        }
        Ok(())
    }

    /// Whether packed keys are turned back to what they were before their rotary embedding.
    #[must_use]
    pub fn before_rope(&self) -> bool {
        self.method == QuantizeMethod::Kvquant && self.rope != Some(Rope::After)
    }

    /// Bits of tokens that are not salient.
    #[must_use]
    pub fn low(&self) -> Bits {
        self.low_bits.unwrap_or(Bits::B2)
    }

    /// Refuses a value of a field that the method does not have.
    fn own<T: fmt::Display>(&self, field: &str, given: Option<T>) -> Result<Option<T>, PolicyError> {
        methods::own(self.method, ("quantize", field), given, "")
    }
}

impl fmt::Display for Quantize {
    /// For logs: `k4 v4`, `k4 rotated v4`, `kivi k2 v2`, `k4 v4, 0-2: k8`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.method != QuantizeMethod::default() {
            write!(f, "{} ", self.method.name())?;
        }
        let rotated = if self.rotate_k { " rotated" } else { "" };
        let after = if self.rope == Some(Rope::After) {
            " after rope"
        } else {
            ""
        };
        write!(f, "k{}{rotated}{after} v{}", self.k_bits, self.v_bits)?;
        if self.method == QuantizeMethod::Zipcache {
            write!(f, " low {}", self.low())?;
        }
        for (range, own) in &self.layers {
            write!(f, ", {range}:")?;
            for (side, bits) in [("k", own.k_bits), ("v", own.v_bits)] {
                if let Some(bits) = bits {
                    write!(f, " {side}{bits}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

    use super::*;

    fn quantize(json: &str) -> Quantize {
        serde_json::from_str(json).unwrap()
    }

    fn refused(json: &str) -> String {
        quantize(json).validate().unwrap_err().to_string()
    }

    #[test]
    fn a_field_of_another_method_is_refused_by_name() {
        let fields = [
            ("rotate_k", "true"),
            ("outliers", "0.01"),
            ("rank", "2"),
            ("salient", "0.5"),
            ("low_bits", "3"),
            ("rope", "\"before\""),
        ];
        for method in QuantizeMethod::ALL {
            let bits = if *method == QuantizeMethod::Fp8 { 8 } else { 4 };
            let name = method.name();
            let of = |rest: &str| {
                quantize(&format!(
                    r#"{{"method": "{name}", "k_bits": {bits}, "v_bits": {bits}{rest}}}"#
                ))
            };
            assert_eq!(of("").validate(), Ok(()));
            for (field, value) in fields {
                let given = of(&format!(r#", "{field}": {value}"#)).validate();
                if method.fields().contains(&field) {
                    assert_eq!(given, Ok(()), "{name}");
                } else {
                    let error = given.unwrap_err();
                    assert_eq!(error.field, format!("quantize.{field}"));
                    assert!(error.allowed.starts_with("only with method "), "{error}");
                }
            }
        }
        assert_eq!(
            refused(r#"{"k_bits": 4, "v_bits": 4, "outliers": 0.01}"#),
            "quantize.outliers: given 0.01, allowed only with method kvquant or gear"
        );
    }

    #[test]
    fn bits_fit_the_method() {
        assert_eq!(
            refused(r#"{"method": "fp8", "k_bits": 8, "v_bits": 4}"#),
            "quantize.v_bits: given 4, allowed 8 or 16, with method fp8"
        );
        assert_eq!(
            refused(r#"{"method": "kvquant", "k_bits": 4, "v_bits": 4, "layers": {"0-1": {"k_bits": 8}}}"#),
            "quantize.layers.0-1.k_bits: given 8, allowed 2, 3, 4 or 16, with method kvquant"
        );
        assert_eq!(
            refused(r#"{"method": "zipcache", "k_bits": 4, "v_bits": 2}"#),
            "quantize.v_bits: given 2, allowed 16, or more than low_bits, with method zipcache"
        );
        assert_eq!(
            refused(r#"{"method": "gear", "k_bits": 16, "v_bits": 4}"#),
            "quantize.method: given gear, allowed rtn, when k_bits is 16: gear is about how keys are packed"
        );
    }

    #[test]
    fn fields_have_ranges() {
        for rest in [
            r#""method": "kvquant", "outliers": 0.06"#,
            r#""method": "kvquant", "outliers": -0.01"#,
            r#""method": "gear", "rank": 0"#,
            r#""method": "gear", "rank": 17"#,
            r#""method": "zipcache", "salient": 0.01"#,
            r#""method": "zipcache", "salient": 1.0"#,
            r#""residual": 8"#,
        ] {
            let error = quantize(&format!(r#"{{"k_bits": 4, "v_bits": 4, {rest}}}"#)).validate();
            assert!(error.is_err(), "{rest}");
        }
    }

    #[test]
    fn a_new_one_is_what_a_file_without_other_fields_gives() {
        let new = Quantize::new(Bits::B8, Bits::B4);
        assert_eq!(new, quantize(r#"{"k_bits": 8, "v_bits": 4}"#));
    }

    #[test]
    fn what_logs_show() {
        for (json, shown) in [
            (r#"{"k_bits": 4, "v_bits": 4}"#, "k4 v4"),
            (r#"{"k_bits": 4, "rotate_k": true, "v_bits": 3}"#, "k4 rotated v3"),
            (r#"{"method": "kivi", "k_bits": 2, "v_bits": 2}"#, "kivi k2 v2"),
            (
                r#"{"method": "kvquant", "k_bits": 2, "v_bits": 3, "rope": "after"}"#,
                "kvquant k2 after rope v3",
            ),
            (
                r#"{"method": "zipcache", "k_bits": 4, "v_bits": 4}"#,
                "zipcache k4 v4 low 2",
            ),
            (
                r#"{"k_bits": 4, "v_bits": 4, "layers": {"0-2": {"k_bits": 8}}}"#,
                "k4 v4, 0-2: k8",
            ),
        ] {
            assert_eq!(quantize(json).to_string(), shown);
        }
    }
}
