//! What a request's KV cache is compressed with: select × project × quantize over a store.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::project::{Project, ProjectMethod};
use crate::quantize::{Bits, Quantize, Rope};
use crate::select::Select;

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
            quantize.validate()?;
            let merged = self.project.as_ref().map(|project| project.method);
            if let (Some(method @ (ProjectMethod::Minicache | ProjectMethod::MergeHeads)), false) =
                (merged, quantize.method.codes_alone())
            {
                let allowed = format!("rtn, kivi or fp8, with project {}", method.name());
                return Err(PolicyError::new(
                    "quantize.method",
                    quantize.method.name(),
                    &allowed,
                ));
            }
            if let Some(project) = &self.project
                && project.k_rank.is_some()
                && quantize.before_rope()
            {
                let allowed = format!(
                    "after, with project {}: its bases are of keys as they are cached",
                    project.method.name()
                );
                return Err(PolicyError::new("quantize.rope", Rope::Before, &allowed));
            }
            if self.store == Store::Exact && quantize.all_bits().any(|bits| bits != Bits::B16) {
                let allowed = "full, when quantize packs K or V";
                return Err(PolicyError::new("store", "exact", allowed));
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
        parts.extend(self.project.as_ref().map(Project::to_string));
        parts.extend(self.quantize.as_ref().map(Quantize::to_string));
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
