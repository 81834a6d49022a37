//! Bits of some layers: where a policy spends more or less than elsewhere.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::policy::PolicyError;
use crate::quantize::Bits;

/// A run of layers, `"3"` or `"0-2"` in files, counted from 0; both ends are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LayerRange {
    /// The first layer.
    pub first: u32,
    /// The last one.
    pub last: u32,
}

/// What layers keep instead of the policy's own bits; at least one of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerBits {
    /// Bits of K.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k_bits: Option<Bits>,
    /// Bits of V.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v_bits: Option<Bits>,
}

/// Bits by layer; ranges do not overlap.
pub type LayerOverrides = BTreeMap<LayerRange, LayerBits>;

impl TryFrom<String> for LayerRange {
    type Error = PolicyError;
    fn try_from(given: String) -> Result<Self, PolicyError> {
        let number = |text: &str| match text.len() {
            1..=4 if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
            _ => None,
        };
        let (first, last) = given.split_once('-').unwrap_or((&given, &given));
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self { first, last }),
            _ => Err(PolicyError::new(
                "layers",
                format!("{given:?}"),
                "a layer like \"3\" or layers like \"0-2\", from 0 to 9999",
            )),
        }
    }
}

impl From<LayerRange> for String {
    fn from(range: LayerRange) -> Self {
        range.to_string()
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// Checks each range's bits, and that none overlap.
pub(crate) fn validate(layers: &LayerOverrides) -> Result<(), PolicyError> {
    let mut before: Option<LayerRange> = None;
    for (range, bits) in layers {
        if *bits == LayerBits::default() {
            let field = format!("quantize.layers.{range}");
            return Err(PolicyError::new(&field, "nothing", "k_bits, v_bits or both"));
        }
        // In order of their first layers.
        if let Some(before) = before.filter(|before| range.first <= before.last) {
            let given = format!("{before} and {range}");
            return Err(PolicyError::new(
                "quantize.layers",
                given,
                "layers that no other range names",
            ));
        }
        before = Some(*range);
    }
    Ok(())
}
