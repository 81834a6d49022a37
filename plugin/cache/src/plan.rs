//! A validated policy, compiled to what a layer needs at each step. Budgets here are exact.

use std::fmt;
use std::sync::Arc;

use candle_core::DType;
use cinch_hooks::LayerShape;
use cinch_kernels::Codec;
use cinch_protocol::{Heads, Layers, Merge, Policy, PolicyError, SelectMethod, Store};

use crate::quantize;
use crate::select::quest::Attended;
use crate::select::{self, Budget, Method, Statistics, pyramid};
use crate::store::{Pair, Targets};

/// Sinks that stay in full precision where a policy quantizes but does not select (KVQuant, arXiv
/// 2401.18079, section 3.6, keeps the first token for the same reason).
const DEFAULT_SINKS: usize = 4;

/// Recent rows in full precision where a policy projects but does not quantize.
const DEFAULT_RESIDUAL: usize = 32;

/// `PyramidKV`'s own (arXiv 2406.02069).
const DEFAULT_BETA: u32 = 20;

/// Ada-KV's own safeguard (arXiv 2407.11550).
const DEFAULT_FLOOR: f64 = 0.2;

/// First layers in which Quest attends to everything (arXiv 2406.10774, section 3).
const QUEST_SKIPS: u32 = 2;

/// Which layer of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) layer: usize,
    /// How many the model has.
    pub(crate) layers: usize,
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
    /// all gets its whole budget from the first chunk on: what later chunks attend to goes only when there is no room.
    pub(crate) fn budget(&self, place: Place, seen: usize, prompt: usize) -> Option<Budget> {
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
        budget.recent = budget
            .recent
            .max(budget.total * select.method.recent_percent() / 100);
        Some(budget)
    }

    /// What each head keeps of the budget at least, where heads compete for it.
    pub(crate) fn floor(&self) -> Option<f64> {
        self.select.as_ref()?.floor
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

    /// Whether each query's weights are credited by the method, not summed.
    pub(crate) fn credits(&self) -> bool {
        self.method().is_some_and(|method| method.credits())
    }

    /// Whether a model of these layers can be served so.
    pub(crate) fn fits(&self, shapes: &[LayerShape]) -> Result<(), PolicyError> {
        let mut k_rank = None;
        if let Some(project) = &self.policy.project {
            k_rank = project.k_rank;
            for shape in shapes {
                for (field, rank, dim) in [
                    ("project.k_rank", k_rank, shape.k_dim),
                    ("project.v_rank", project.v_rank, shape.v_dim),
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
            if let (Some(codec), _) = quantize::codecs(quantize, layer)
                && quantize::by_channel(quantize)
            {
                quantize::kivi::check(codec, k_rank.map_or(shape.k_dim, |rank| rank as usize))?;
            }
        }
        Ok(())
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
        Targets {
            store,
            packed: Pair {
                k: k.unwrap_or(store),
                v: v.unwrap_or(store),
                rotated: keys.is_some_and(|quantize| quantize.rotate_k),
                channels: keys.is_some_and(quantize::by_channel),
                projected: self.policy.project.is_some(),
            },
            sinks: self.sinks,
            residual: self.residual,
        }
    }
}
