//! A validated policy, compiled to what a layer needs at each step. Budgets here are exact.

use std::fmt;

use candle_core::DType;
use cinch_kernels::Codec;
use cinch_protocol::{Policy, PolicyError, Store};

use crate::quantize;
use crate::select::{self, Budget, Method, Statistics};
use crate::store::{Pair, Targets};

/// Sinks that stay in full precision where a policy quantizes but does not select (KVQuant, arXiv
/// 2401.18079, section 3.6, keeps the first token for the same reason).
const DEFAULT_SINKS: usize = 4;

/// A policy ready to be applied. `id` is unique in a plugin and grows: the epoch of retunes.
pub(crate) struct Plan {
    pub(crate) id: u64,
    pub(crate) policy: Policy,
    pub(crate) level: Option<u32>,
    sinks: usize,
    select: Option<SelectPlan>,
    k: Option<Codec>,
    v: Option<Codec>,
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

#[derive(Clone, Copy)]
struct SelectPlan {
    method: &'static dyn Method,
    budget: f64,
    recent: usize,
    interval: usize,
}

impl Plan {
    pub(crate) fn compile(id: u64, level: Option<u32>, policy: Policy) -> Result<Self, PolicyError> {
        policy.validate()?;
        let select = policy.select.as_ref().map(|select| SelectPlan {
            method: select::method(select.method),
            budget: select.budget,
            recent: select.recent as usize,
            interval: select.interval as usize,
        });
        let (k, v) = policy.quantize.as_ref().map_or((None, None), quantize::codecs);
        let packs = k.is_some() || v.is_some();
        Ok(Self {
            id,
            level,
            sinks: match &policy.select {
                Some(select) => select.sinks as usize,
                None if packs => DEFAULT_SINKS,
                None => 0,
            },
            select,
            k,
            v,
            residual: policy
                .quantize
                .as_ref()
                .map_or(0, |quantize| quantize.residual as usize),
            policy,
        })
    }

    /// The method and how many rows it must leave of `seen` tokens; `None`: all stay.
    pub(crate) fn budget(&self, seen: usize) -> Option<(&'static dyn Method, Budget)> {
        self.select.map(|select| {
            // A budget like 0.07 of 100 must be 7, not 8: the product is only nearly an integer.
            let share = (select.budget * seen as f64 - 1e-9).ceil() as usize;
            let total = share.max(self.sinks + select.recent).min(seen);
            (
                select.method,
                Budget {
                    total,
                    sinks: self.sinks,
                    recent: select.recent,
                },
            )
        })
    }

    /// Decoded tokens between two evictions; `None`: never.
    pub(crate) fn interval(&self) -> Option<usize> {
        self.select.map(|select| select.interval)
    }

    /// Whether each head has scores of its own: heads may come to hold different rows.
    pub(crate) fn head_scores(&self) -> bool {
        self.select.is_some_and(|select| select.method.per_head())
    }

    /// What the scores are made of.
    pub(crate) fn statistics(&self) -> Statistics {
        self.select
            .map_or(Statistics::Sampled, |select| select.method.statistics())
    }

    /// Codecs of this plan's rows for a model of this activation dtype.
    pub(crate) fn targets(&self, dtype: DType) -> Targets {
        let store = match (self.policy.store, dtype) {
            (Store::Full, _) | (Store::Exact, DType::F16) => Codec::F16,
            (Store::Exact, DType::BF16) => Codec::Bf16,
            (Store::Exact, _) => Codec::F32,
        };
        Targets {
            store,
            packed: Pair {
                k: self.k.unwrap_or(store),
                v: self.v.unwrap_or(store),
                // Only with keys that are packed: the policy was validated.
                rotated: self.policy.quantize.as_ref().is_some_and(|q| q.rotate_k),
            },
            sinks: self.sinks,
            residual: self.residual,
        }
    }
}
