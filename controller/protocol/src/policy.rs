//! What a request's KV cache is compressed with: select × project × quantize over a store.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::layers::{self, LayerBits, LayerOverrides};
use crate::project::Project;
use crate::select::Select;

/// Values a group-quantized row shares a scale and a zero point among.
pub const GROUP: u32 = 32;

/// One request's or class's compression. The default is level 0: everything kept, in f16.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The dtype of rows that no codec packs.
    #[serde(default)]
    pub store: Store,
    /// Which tokens stay; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<Select>,
    /// How many dimensions older rows keep; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<Project>,
    /// How many bits older rows keep; absent: the store's own dtype.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantize>,
}

/// The dtype of full-precision rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Store {
    /// f16: level 0.
    #[default]
    Full,
    /// The engine's own activation dtype, for exact comparison with the unhooked engine.
    Exact,
}

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
    /// Bits of layers that keep others than these, such as the ones that matter most to a model.
    #[serde(default, skip_serializing_if = "LayerOverrides::is_empty")]
    pub layers: LayerOverrides,
    /// Most recent tokens kept in full precision. 16 ..= 1024.
    #[serde(default = "Quantize::default_residual")]
    pub residual: u32,
}

/// Quantization methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizeMethod {
    /// Round to nearest, asymmetric, per token in groups of 32 along the head dim, f16 scale and zero.
    #[default]
    Rtn,
    /// KIVI (arXiv 2402.02750): K per channel over 32 tokens, V per token as `rtn`.
    Kivi,
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

impl Quantize {
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
    fn all_bits(&self) -> impl Iterator<Item = Bits> {
        let layers = self.layers.values().flat_map(|own| [own.k_bits, own.v_bits]);
        [self.k_bits, self.v_bits].into_iter().chain(layers.flatten())
    }
}

impl Policy {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// The first field out of range.
    pub fn validate(&self) -> Result<(), PolicyError> {
        if let Some(select) = &self.select {
            select.validate()?;
        }
        if let Some(project) = &self.project {
            project.validate()?;
            if self.store == Store::Exact {
                let allowed = "full, when project drops dimensions";
                return Err(PolicyError::new("store", "exact", allowed));
            }
        }
        if let Some(quantize) = &self.quantize {
            range("quantize.residual", quantize.residual, 16, 1024)?;
            layers::validate(&quantize.layers)?;
            if self.store == Store::Exact && quantize.all_bits().any(|bits| bits != Bits::B16) {
                return Err(PolicyError::new(
                    "store",
                    "exact",
                    "full, when quantize packs K or V",
                ));
            }
            let keys = quantize.layers.values().filter_map(|own| own.k_bits);
            let no_keys = keys.chain([quantize.k_bits]).all(|bits| bits == Bits::B16);
            if quantize.method == QuantizeMethod::Kivi && no_keys {
                let allowed = "rtn, when k_bits is 16: kivi is about how keys are packed";
                return Err(PolicyError::new("quantize.method", "kivi", allowed));
            }
            if quantize.rotate_k && no_keys {
                let allowed = "false, when k_bits is 16: only packed keys are rotated";
                return Err(PolicyError::new("quantize.rotate_k", true, allowed));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Policy {
    /// For logs: `h2o 0.5 × k4 v4`, `lowrank k32 v48 × k4 v4`, `k4 rotated v4`, `k4 v4, 0-2: k8`, `exact`, `full`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(select) = &self.select {
            parts.push(select.to_string());
        }
        if let Some(project) = &self.project {
            let side =
                |name, rank: Option<u32>| rank.map_or_else(String::new, |rank| format!(" {name}{rank}"));
            let (k, v) = (side("k", project.k_rank), side("v", project.v_rank));
            parts.push(format!("{}{k}{v}", project.method.name()));
        }
        if let Some(quantize) = &self.quantize {
            let side = |name, bits: Option<Bits>| {
                bits.map_or_else(String::new, |bits| format!(" {name}{}", u32::from(bits)))
            };
            let layers = quantize
                .layers
                .iter()
                .map(|(range, own)| format!(", {range}:{}{}", side("k", own.k_bits), side("v", own.v_bits)));
            parts.push(format!(
                "{}k{}{} v{}{}",
                if quantize.method == QuantizeMethod::Kivi {
                    "kivi "
                } else {
                    ""
                },
                u32::from(quantize.k_bits),
                if quantize.rotate_k { " rotated" } else { "" },
                u32::from(quantize.v_bits),
                layers.collect::<String>()
            ));
        }
        if parts.is_empty() {
            parts.push(if self.store == Store::Exact {
                "exact".into()
            } else {
                "full".into()
            });
        }
        f.write_str(&parts.join(" × "))
    }
}

/// A field out of its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{field}: given {given}, allowed {allowed}")]
pub struct PolicyError {
    /// Dotted path of the field; empty for the whole.
    pub field: String,
    /// What was given.
    pub given: String,
    /// What is allowed.
    pub allowed: String,
}

impl PolicyError {
    /// A new error.
    pub fn new(field: &str, given: impl fmt::Display, allowed: &str) -> Self {
        Self {
            field: field.into(),
            given: given.to_string(),
            allowed: allowed.into(),
        }
    }

    /// The same error of a value that lies in the field `outer`.
    pub(crate) fn within(mut self, outer: &str) -> Self {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

pub(crate) fn range<T: PartialOrd + fmt::Display>(
    field: &str,
    given: T,
    low: T,
    high: T,
) -> Result<(), PolicyError> {
    // Written so that NaN is out of range.
    if given >= low && given <= high {
        Ok(())
    } else {
        Err(PolicyError::new(field, given, &format!("{low} to {high}")))
    }
}
