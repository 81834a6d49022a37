//! What the loops publish: the present status, the decisions that changed something, the metrics.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::config::Mode;
use crate::law::{Condition, Decision, Inputs, Phase};
use crate::metrics::Metrics;

/// Decisions remembered.
const REMEMBERED: usize = 1000;

/// A condition, and since when it holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Held {
    /// The condition.
    #[serde(flatten)]
    pub condition: Condition,
    /// Unix seconds.
    pub since: f64,
}

/// One engine, as last decided for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineStatus {
    /// Its name.
    pub name: String,
    /// Where the law is with it; none while nothing is decided.
    pub phase: Option<Phase>,
    /// Levels that new requests are served at, by class.
    pub levels: BTreeMap<String, u32>,
    /// Levels that are wanted.
    pub wanted: BTreeMap<String, u32>,
    /// Demand as if at level 0, of capacity.
    pub demand: Option<f64>,
    /// Demand at the present levels, of capacity.
    pub projected: Option<f64>,
    /// Bytes held, of capacity.
    pub usage: Option<f64>,
    /// What is the matter.
    pub conditions: Vec<Held>,
    /// What was decided on, with ages.
    pub inputs: Option<Inputs>,
    /// The epoch of this controller's writes; none before the first.
    pub epoch: Option<u64>,
    /// Why this controller writes no more.
    pub fenced: Option<String>,
    /// The last failure.
    pub error: Option<String>,
}

impl EngineStatus {
    pub(crate) fn new(
        name: &str,
        levels: BTreeMap<String, u32>,
        inputs: Option<&Inputs>,
        decision: Option<&Decision>,
    ) -> Self {
        let now = unix();
        let held = |condition: &Condition| Held {
            condition: condition.clone(),
            since: now,
        };
        Self {
            name: name.to_owned(),
            phase: decision.map(|decision| decision.phase),
            levels,
            wanted: decision
                .map(|decision| decision.levels.clone())
                .unwrap_or_default(),
            demand: decision.and_then(|decision| decision.demand),
            projected: decision.and_then(|decision| decision.projected),
            usage: decision.and_then(|decision| decision.usage),
            conditions: decision
                .map(|decision| decision.conditions.iter().map(held).collect())
                .unwrap_or_default(),
            inputs: inputs.cloned(),
            epoch: None,
            fenced: None,
            error: None,
        }
    }

    pub(crate) fn fenced(mut self, fenced: Option<String>) -> Self {
        self.fenced = fenced;
        self
    }

    pub(crate) fn error(mut self, error: Option<String>) -> Self {
        self.error = error;
        self
    }

    pub(crate) fn epoch(mut self, epoch: Option<u64>) -> Self {
        self.epoch = epoch;
        self
    }
}

/// A decision that moved something, or changed phase or conditions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Unix seconds.
    pub at: f64,
    /// The engine.
    pub engine: String,
    /// Whether it was to be carried out.
    pub mode: Mode,
    /// The decision.
    pub decision: Decision,
}

#[derive(Debug, Default)]
struct Inner {
    engines: BTreeMap<String, EngineStatus>,
    decisions: VecDeque<Entry>,
    mode: Mode,
    reload_error: Option<String>,
}

/// Shared by the loops and the listener.
pub struct Shared {
    /// The metrics.
    pub metrics: Metrics,
    started: f64,
    inner: Mutex<Inner>,
}

/// Answer of `GET /v1/status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The crate's version.
    pub version: &'static str,
    /// What decisions do.
    pub mode: Mode,
    /// Seconds since the start.
    pub uptime_seconds: f64,
    /// Why the settings file's present content is not in force.
    pub settings_error: Option<String>,
    /// One entry an engine, by name.
    pub engines: Vec<EngineStatus>,
}

/// Answer of `GET /v1/decisions`.
#[derive(Debug, Serialize)]
pub struct Decisions {
    /// Oldest first.
    pub decisions: Vec<Entry>,
}

impl Shared {
    /// Nothing published yet.
    ///
    /// # Errors
    /// A metric is defined twice: a mistake in this crate.
    pub fn new(mode: Mode) -> prometheus::Result<Self> {
        let metrics = Metrics::new()?;
        metrics.mode(mode);
        let inner = Inner {
            mode,
            ..Inner::default()
        };
        Ok(Self {
            metrics,
            started: unix(),
            inner: Mutex::new(inner),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every write leaves it whole, so a panic elsewhere does not make it wrong.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New settings are in force, or a file that was refused.
    pub fn settings(&self, result: Result<Mode, String>) {
        let mut inner = self.lock();
        match result {
            Ok(mode) => {
                inner.mode = mode;
                inner.reload_error = None;
                self.metrics.mode(mode);
                self.metrics.reloaded(true);
            }
            Err(error) => {
                inner.reload_error = Some(error);
                self.metrics.reloaded(false);
            }
        }
    }

    pub(crate) fn publish(
        &self,
        mode: Mode,
        mut status: EngineStatus,
        ages: [(&'static str, Option<f64>); 2],
        decision: Option<&Decision>,
    ) {
        let mut inner = self.lock();
        let before = inner.engines.get(&status.name);
        for held in &mut status.conditions {
            let same = before
                .into_iter()
                .flat_map(|before| &before.conditions)
                .find(|old| {
                    old.condition.kind == held.condition.kind && old.condition.class == held.condition.class
                });
            held.since = same.map_or(held.since, |old| old.since);
        }
        let kinds = |status: &EngineStatus| -> Vec<_> {
            let all = status.conditions.iter();
            all.map(|held| (held.condition.kind, held.condition.class.clone()))
                .collect()
        };
        let changed =
            before.is_none_or(|before| before.phase != status.phase || kinds(before) != kinds(&status));
        self.metrics.engine(&status, ages);
        if let Some(decision) = decision {
            self.metrics.moved(&status.name, decision);
            if changed || !decision.moves.is_empty() {
                inner.decisions.push_back(Entry {
                    at: unix(),
                    engine: status.name.clone(),
                    mode,
                    decision: decision.clone(),
                });
                while inner.decisions.len() > REMEMBERED {
                    inner.decisions.pop_front();
                }
            }
        }
        inner.engines.insert(status.name.clone(), status);
    }

    /// Everything as it is now.
    #[must_use]
    pub fn status(&self) -> Status {
        let inner = self.lock();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            mode: inner.mode,
            uptime_seconds: unix() - self.started,
            settings_error: inner.reload_error.clone(),
            engines: inner.engines.values().cloned().collect(),
        }
    }

    /// The last `limit` decisions that changed something.
    #[must_use]
    pub fn decisions(&self, limit: usize) -> Decisions {
        let inner = self.lock();
        let skip = inner.decisions.len().saturating_sub(limit);
        Decisions {
            decisions: inner.decisions.iter().skip(skip).cloned().collect(),
        }
    }
}

fn unix() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}
