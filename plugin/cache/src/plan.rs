//! A validated policy, compiled to what a layer needs at each step. Budgets here are exact.

use std::fmt;
use std::sync::Arc;

use candle_core::DType;
use cinch_hooks::{ExtraPass, LayerShape};
use cinch_kernels::Codec;
use cinch_protocol::{
    Heads, Layers, Merge, Policy, PolicyError, Project, ProjectMethod, Quantize, Rope, SelectMethod, Store,
};

use crate::quantize::{self, Beside, Fraction};
use crate::rotary::Rotaries;
use crate::select::quest::Attended;
use crate::select::{self, Budget, Method, Statistics, pyramid};
use crate::store::{MOST_DIM, Pair, Targets};

/// Sinks that stay in full precision where a policy quantizes but does not select (KVQuant, arXiv
/// 2401.18079, section 3.6, keeps the first token for the same reason).
const DEFAULT_SINKS: usize = 4;

/// Recent rows in full precision where a policy projects but does not quantize.
const DEFAULT_RESIDUAL: usize = 32;

/// `PyramidKV`'s own (arXiv 2406.02069).
const DEFAULT_BETA: u32 = 20;

/// Rows that are not merged, by `MiniCache`'s own measure (arXiv 2405.14366, section 4.2).
const DEFAULT_RETAINED: f64 = 0.05;

/// Heads that differ more are not one head.
const DEFAULT_SIMILARITY: f64 = 0.8;

/// Ada-KV's own safeguard (arXiv 2407.11550).
const DEFAULT_FLOOR: f64 = 0.2;

/// First layers in which Quest attends to everything (arXiv 2406.10774, section 3).
const QUEST_SKIPS: u32 = 2;

/// Where `MiniCache` begins to find layers alike (arXiv 2405.14366, section 3.2): in the middle.
fn first_merged(project: &Project, layers: usize) -> usize {
    project.first_layer.map_or(layers / 2, |layer| layer as usize)
}

/// What heads are merged with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Merging {
    /// Those of the layer before.
    LayerBefore,
    /// Those of their own layer, from this mean cosine on.
    Heads { similarity: f64 },
}

/// Which layer of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) layer: usize,
    /// How many the model has.
    pub(crate) layers: usize,
}

/// What a layer has of an even layer's budget, since layers competed for it: a quotient of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Won {
    pub(crate) rows: usize,
    pub(crate) of: usize,
}

impl Won {
    /// As much as any.
    pub(crate) const EVEN: Self = Self { rows: 1, of: 1 };

    /// Rounded down, so that all layers together have no more than their budgets.
    fn of(self, even: usize) -> usize {
        even * self.rows / self.of.max(1)
    }
}

/// A policy ready to be applied. `id` is unique in a plugin and grows: the epoch of retunes.
pub(crate) struct Plan {
    pub(crate) id: u64,
    pub(crate) policy: Policy,
    pub(crate) level: Option<u32>,
    sinks: usize,
    select: Option<SelectPlan>,
    residual: usize,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan")
            .field("id", &self.id)
            .field("policy", &self.policy)
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

struct SelectPlan {
    method: Arc<dyn Method>,
    budget: f64,
    skip_layers: usize,
    /// Steepness of a pyramid of layers.
    beta: Option<u32>,
    /// What each head keeps at least, where heads compete.
    floor: Option<f64>,
    /// Whether those of all layers do.
    layers_compete: bool,
    merge: Merge,
    /// What draws of a merge come from.
    seed: u32,
    recent: usize,
    interval: usize,
}

impl Plan {
    pub(crate) fn compile(id: u64, level: Option<u32>, policy: Policy) -> Result<Self, PolicyError> {
        policy.validate()?;
        let select = policy.select.as_ref().map(|select| SelectPlan {
            method: select::method(select),
            budget: select.budget,
            skip_layers: select.skip_layers.unwrap_or(match select.method {
                SelectMethod::Quest => QUEST_SKIPS,
                _ => 0,
            }) as usize,
            beta: (select.layers == Layers::Pyramid).then(|| select.beta.unwrap_or(DEFAULT_BETA)),
            floor: (select.heads == Heads::Adaptive).then(|| select.floor.unwrap_or(DEFAULT_FLOOR)),
            layers_compete: select.layers == Layers::Adaptive,
            merge: select.merge,
            seed: select.seed.unwrap_or(0),
            recent: select.recent as usize,
            interval: select.interval as usize,
        });
        let packs = policy.project.is_some() || policy.quantize.as_ref().is_some_and(quantize::packs);
        Ok(Self {
            id,
            level,
            sinks: match &policy.select {
                Some(select) => select.sinks as usize,
                None if packs => DEFAULT_SINKS,
                None => 0,
            },
            select,
            residual: policy
                .quantize
                .as_ref()
                .map_or(if packs { DEFAULT_RESIDUAL } else { 0 }, |quantize| {
                    quantize.residual as usize
                }),
            policy,
        })
    }

    /// What a decoded token attends to in a layer; `None`: everything.
    pub(crate) fn attended(&self, place: Place) -> Option<Attended> {
        let select = self.select.as_ref().filter(|select| !select.method.evicts())?;
        (place.layer >= select.skip_layers).then_some(Attended {
            share: select.budget,
            sinks: self.sinks,
            recent: select.recent,
        })
    }

    /// How rows are ranked; `None`: all stay.
    pub(crate) fn method(&self) -> Option<&dyn Method> {
        self.select.as_ref().map(|select| &*select.method)
    }

    /// How many rows stay in a layer of `seen` tokens; `None`: all. A prompt that comes in chunks and is `prompt` tokens in
    /// all gets its whole budget from the first chunk on: what later chunks attend to goes only when there is no room. Of a
    /// layer that won or lost against others, `won` is what it has of an even one.
    pub(crate) fn budget(&self, place: Place, seen: usize, prompt: usize, won: Won) -> Option<Budget> {
        let select = self.evicting()?;
        if place.layer < select.skip_layers {
            return None;
        }
        // A budget like 0.07 of 100 must be 7, not 8: the product is only nearly an integer.
        let share = (select.budget * seen.max(prompt) as f64 - 1e-9).ceil() as usize;
        let mut budget = Budget {
            total: share.max(self.sinks + select.recent).min(seen),
            sinks: self.sinks,
            recent: select.recent,
        };
        if let Some(beta) = select.beta {
            budget.total = pyramid::rows(budget, place, seen, beta);
        }
        if select.layers_compete {
            let least = (self.sinks + select.recent).min(seen);
            budget.total = won.of(budget.total).clamp(least, seen);
        }
        budget.recent = budget
            .recent
            .max(budget.total * select.method.recent_percent() / 100);
        Some(budget)
    }

    /// What each head keeps of the budget at least, where heads compete for it.
    pub(crate) fn floor(&self) -> Option<f64> {
        self.select.as_ref()?.floor
    }

    /// Whether heads of all layers compete.
    pub(crate) fn layers_compete(&self) -> bool {
        self.select.as_ref().is_some_and(|select| select.layers_compete)
    }

    /// What becomes of evicted rows, and what its draws come from.
    pub(crate) fn merge(&self) -> (Merge, u32) {
        let select = self.select.as_ref();
        select.map_or((Merge::None, 0), |select| (select.merge, select.seed))
    }

    /// First positions that are never evicted.
    pub(crate) fn sinks(&self) -> usize {
        self.sinks
    }

    /// Decoded tokens between two evictions; `None`: never.
    pub(crate) fn interval(&self) -> Option<usize> {
        self.evicting().map(|select| select.interval)
    }

    fn evicting(&self) -> Option<&SelectPlan> {
        self.select.as_ref().filter(|select| select.method.evicts())
    }

    /// Whether each head has scores of its own: heads may come to hold different rows.
    pub(crate) fn head_scores(&self) -> bool {
        self.method().is_some_and(|method| method.per_head())
    }

    /// What the scores are made of.
    pub(crate) fn statistics(&self) -> Statistics {
        self.method()
            .map_or(Statistics::Sampled, |method| method.statistics())
    }

    /// Whether a score is the largest weight that a row received.
    pub(crate) fn largest(&self) -> bool {
        self.method().is_some_and(|method| method.largest())
    }

    /// How a prompt is read once more before its rows go.
    pub(crate) fn rereads(&self) -> Option<ExtraPass> {
        self.method().and_then(|method| method.rereads())
    }

    /// Whether each query's weights are credited by the method, not summed.
    pub(crate) fn credits(&self) -> bool {
        self.method().is_some_and(|method| method.credits())
    }

    /// Whether a model of these layers can be served so.
    pub(crate) fn fits(&self, shapes: &[LayerShape], rotary: &Rotaries) -> Result<(), PolicyError> {
        if let Some(dim) = shapes
            .iter()
            .map(|shape| shape.k_dim.max(shape.v_dim))
            .find(|dim| *dim > MOST_DIM)
        {
            let allowed = format!("heads of at most {MOST_DIM} values");
            return Err(PolicyError::new(
                "store",
                format!("heads of {dim} values"),
                &allowed,
            ));
        }
        let (mut k_rank, mut v_rank) = (None, None);
        if let Some(project) = &self.policy.project {
            let (first, most) = (
                first_merged(project, shapes.len()),
                shapes.len().saturating_sub(2),
            );
            if project.method == ProjectMethod::Minicache && first > most {
                let allowed = format!("0 to {most}: a layer that another one follows");
                return Err(PolicyError::new("project.first_layer", first, &allowed));
            }
            (k_rank, v_rank) = (project.k_rank, project.v_rank);
            for shape in shapes {
                for (field, rank, dim) in [
                    ("project.k_rank", k_rank, shape.k_dim),
                    ("project.v_rank", v_rank, shape.v_dim),
                ] {
                    if let Some(rank) = rank.filter(|rank| *rank as usize > dim) {
                        let allowed = format!("at most {dim}, what this model's heads have");
                        return Err(PolicyError::new(field, rank, &allowed));
                    }
                }
            }
        }
        let Some(quantize) = &self.policy.quantize else {
            return Ok(());
        };
        if let Some((range, _)) = quantize.layers.last_key_value()
            && range.last as usize >= shapes.len()
        {
            let allowed = format!("layers of the model, 0 to {}", shapes.len() - 1);
            return Err(PolicyError::new("quantize.layers", range, &allowed));
        }
        for (layer, shape) in shapes.iter().enumerate() {
            let dim = |rank: Option<u32>, dim| rank.map_or(dim, |rank| rank as usize);
            let (k_dim, v_dim) = (dim(k_rank, shape.k_dim), dim(v_rank, shape.v_dim));
            quantize::fits(quantize, layer, k_dim, v_dim)?;
            if quantize::before_rope(quantize, layer)
                && let Err(reason) = rotary.of(layer, shapes)
            {
                let allowed = format!("after, with this model: {reason}");
                return Err(PolicyError::new("quantize.rope", Rope::Before, &allowed));
            }
        }
        Ok(())
    }

    /// What bases are made by, where rows keep fewer dimensions.
    pub(crate) fn projects(&self) -> Option<&Project> {
        self.policy
            .project
            .as_ref()
            .filter(|project| match project.method {
                ProjectMethod::Lowrank | ProjectMethod::Think => true,
                ProjectMethod::Minicache | ProjectMethod::MergeHeads => false,
            })
    }

    /// What a layer's heads are merged with; with the layer before, at the later layer of two.
    pub(crate) fn merging(&self, place: Place) -> Option<Merging> {
        let project = self.policy.project.as_ref()?;
        match project.method {
            ProjectMethod::Lowrank | ProjectMethod::Think => None,
            ProjectMethod::Minicache => {
                let first = first_merged(project, place.layers);
                (place.layer > first && (place.layer - first) % 2 == 1).then_some(Merging::LayerBefore)
            }
            ProjectMethod::MergeHeads => Some(Merging::Heads {
                similarity: project.similarity.unwrap_or(DEFAULT_SIMILARITY),
            }),
        }
    }

    /// Whether a layer's rows wait to be merged: it is one of two, or has heads that may be.
    fn merges_rows(&self, place: Place) -> Option<Fraction> {
        let next = Place {
            layer: place.layer + 1,
            ..place
        };
        let with_next = next.layer < place.layers && self.merging(next) == Some(Merging::LayerBefore);
        let merged = self.merging(place).is_some() || with_next;
        let project = self.policy.project.as_ref().filter(|_| merged)?;
        Some(Fraction::new(project.retained.unwrap_or(DEFAULT_RETAINED)))
    }

    /// Codecs of this plan's rows in a layer of a model of this activation dtype.
    pub(crate) fn targets(&self, place: Place, dtype: DType) -> Targets {
        let store = match (self.policy.store, dtype) {
            (Store::Full, _) | (Store::Exact, DType::F16) => Codec::F16,
            (Store::Exact, DType::BF16) => Codec::Bf16,
            (Store::Exact, _) => Codec::F32,
        };
        let quantize = self.policy.quantize.as_ref();
        let (k, v) = quantize.map_or((None, None), |quantize| quantize::codecs(quantize, place.layer));
        // Of keys that are packed.
        let keys = quantize.filter(|_| k.is_some());
        let packed = quantize.filter(|_| k.is_some() || v.is_some());
        Targets {
            store,
            packed: Pair {
                k: k.unwrap_or(store),
                v: v.unwrap_or(store),
                rotated: keys.is_some_and(|quantize| quantize.rotate_k),
                before_rope: keys.is_some_and(Quantize::before_rope),
                channels: keys.is_some_and(quantize::by_channel),
                projected: self.projects().is_some(),
                beside: match self.merges_rows(place) {
                    Some(retained) => Beside::Shared { retained },
                    None => packed.map_or(Beside::Nothing, quantize::beside),
                },
            },
            sinks: self.sinks,
            residual: self.residual,
        }
    }
}
