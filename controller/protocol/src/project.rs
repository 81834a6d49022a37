//! How many dimensions K and V keep.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::methods::{self, methods};
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
    /// First layer that is merged with the next one, counted from 0; only with `minicache`. By default the middle one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_layer: Option<u32>,
    /// Mean cosine of two heads' rows from which on they are merged; only with `merge_heads`. 0.0 ..= 1.0, by default 0.8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub similarity: Option<f64>,
    /// Fraction of the rows that is not merged, those that differ most; with `minicache` and `merge_heads`. 0.0 ..= 0.5, by
    /// default 0.05.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained: Option<f64>,
}

methods! {
    /// Methods of attention compression.
    pub enum ProjectMethod {
        /// The subspace that holds most of the prompt's own keys, or values (Eigen Attention, arXiv 2408.05646; Palu, arXiv
        /// 2407.21118).
        Lowrank = "lowrank" ["k_rank", "v_rank"];
        /// The channels of K that the prompt's last queries attend with most (`ThinK`, arXiv 2407.21018).
        Think = "think" ["k_rank"];
        /// Rows of two adjacent layers share a direction (`MiniCache`, arXiv 2405.14366).
        Minicache = "minicache" ["first_layer", "retained"];
        /// Rows of two KV heads of a layer share a direction, where they are alike.
        MergeHeads = "merge_heads" ["similarity", "retained"];
    }
}

impl Project {
    /// Checks every field against its range, and that the method has a use for it.
    pub(crate) fn validate(&self) -> Result<(), PolicyError> {
        if let Some(rank) = self.own("k_rank", self.k_rank)? {
            range("project.k_rank", rank, 8, 1024)?;
        }
        if let Some(rank) = self.own("v_rank", self.v_rank)? {
            range("project.v_rank", rank, 8, 1024)?;
        }
        if let Some(layer) = self.own("first_layer", self.first_layer)? {
            range("project.first_layer", layer, 0, 9999)?;
        }
        if let Some(similarity) = self.own("similarity", self.similarity)? {
            range("project.similarity", similarity, 0.0, 1.0)?;
        }
        if let Some(retained) = self.own("retained", self.retained)? {
            range("project.retained", retained, 0.0, 0.5)?;
        }
        match (self.method, self.k_rank, self.v_rank) {
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

    /// Refuses a value of a field that the method does not have.
    fn own<T: fmt::Display>(&self, field: &str, given: Option<T>) -> Result<Option<T>, PolicyError> {
        methods::own(self.method, ("project", field), given, "")
    }
}

impl fmt::Display for Project {
    /// For logs: `lowrank k32 v48`, `minicache`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.method.name())?;
        for (side, rank) in [("k", self.k_rank), ("v", self.v_rank)] {
            if let Some(rank) = rank {
                write!(f, " {side}{rank}")?;
            }
        }
        Ok(())
    }
}
