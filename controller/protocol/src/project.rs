//! How many dimensions K and V keep.

use serde::{Deserialize, Serialize};

use crate::policy::{PolicyError, range};

/// Attention compression: rows that are packed keep fewer dimensions of K, V or both.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Project {
    /// Which dimensions.
    pub method: ProjectMethod,
    /// Dimensions of K that stay; absent: all. 8 ..= 1024, at most the head dimension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k_rank: Option<u32>,
    /// Dimensions of V that stay, likewise; only with `lowrank`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v_rank: Option<u32>,
}

/// Methods of attention compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjectMethod {
    /// The subspace that holds most of the prompt's own keys, or values (Eigen Attention, arXiv 2408.05646; Palu, arXiv
    /// 2407.21118).
    Lowrank,
    /// The channels of K that the prompt's last queries attend with most (`ThinK`, arXiv 2407.21018).
    Think,
}

impl ProjectMethod {
    /// The name in configs, metrics and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lowrank => "lowrank",
            Self::Think => "think",
        }
    }
}

impl Project {
    /// Checks every field against its range.
    pub(crate) fn validate(&self) -> Result<(), PolicyError> {
        for (field, rank) in [("project.k_rank", self.k_rank), ("project.v_rank", self.v_rank)] {
            if let Some(rank) = rank {
                range(field, rank, 8, 1024)?;
            }
        }
        match (self.method, self.k_rank, self.v_rank) {
            (ProjectMethod::Think, _, Some(rank)) => Err(PolicyError::new(
                "project.v_rank",
                rank,
                "nothing, with method think: it is about keys",
            )),
            (ProjectMethod::Think, None, _) => Err(PolicyError::new(
                "project.k_rank",
                "nothing",
                "8 to 1024, with method think",
            )),
            (ProjectMethod::Lowrank, None, None) => Err(PolicyError::new(
                "project",
                "no rank",
                "k_rank, v_rank or both, with method lowrank",
            )),
            _ => Ok(()),
        }
    }
}
