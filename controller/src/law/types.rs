//! What the law reads and what it answers. Time is a [`Duration`] since the controller started: the law has
//! no clock of its own. Byte counts are measured by the engine.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A value with its age, or why there is none. Missing is never zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Reading<T> {
    /// Young enough to act on.
    Fresh {
        /// The value.
        value: T,
        /// Seconds since it was taken.
        age: f64,
    },
    /// Too old to act on, not given up yet.
    Stale {
        /// Seconds since it was taken.
        age: f64,
    },
    /// None: the source failed, or what it said makes no sense.
    Missing {
        /// Why, for people.
        reason: String,
        /// Whether it is given up: three failures in a row, or more than 30 s without a value.
        lost: bool,
    },
}

/// One class's memory, as its engine measures it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClassMemory {
    /// Bytes that live requests hold.
    pub used: f64,
    /// Bytes that live requests would hold at level 0.
    pub uncompressed: f64,
    /// Bytes that waiting requests would take at level 0.
    pub queued: f64,
    /// Requests that wait.
    pub waiting: f64,
}

/// One engine's KV memory. Everything finite, nothing negative, `capacity` above zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KvMemory {
    /// Bytes that live requests may hold.
    pub capacity: f64,
    /// By class.
    pub classes: BTreeMap<String, ClassMemory>,
}

/// The process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ProcessMemory {
    /// Resident bytes.
    pub resident: f64,
    /// Bytes it may have.
    pub limit: f64,
}

/// Latency of one class over the window.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// 95th percentile of the time to the first token, seconds; none without samples.
    pub ttft_p95: Option<f64>,
    /// Samples of it.
    pub ttft_samples: f64,
    /// 95th percentile of the time between tokens, seconds; none without samples.
    pub itl_p95: Option<f64>,
    /// Samples of it.
    pub itl_samples: f64,
}

/// Quality of one class over the window.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Mean relative error of attention output.
    pub error: f64,
    /// Samples of it.
    pub samples: f64,
}

/// Everything known of one engine at one tick.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inputs {
    /// KV memory and queue.
    pub kv: Reading<KvMemory>,
    /// Process memory.
    pub process: Reading<ProcessMemory>,
    /// By class.
    pub latency: BTreeMap<String, Reading<Latency>>,
    /// By class.
    pub quality: BTreeMap<String, Reading<Quality>>,
    /// The level that the engine serves new requests of a class at; absent for a class that is not the
    /// controller's to move (a person pinned it, or it has a policy off the ladder).
    pub levels: BTreeMap<String, u32>,
    /// Why the engine's levels or its ladder can't be read: `levels` is then no news of what there is.
    pub unread: Option<String>,
}

/// Why a class moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Demand, process memory or the queue is over its bound.
    Up,
    /// Latency is over its objective, and memory is a cause.
    Latency,
    /// The cache is about to be full.
    Critical,
    /// Demand has been low for the whole window.
    Down,
    /// The error was over the class's floor in two windows of three.
    QualitySoft,
    /// The error is over floor and margin.
    QualityHard,
}

/// One class's change of level.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Move {
    /// The class.
    pub class: String,
    /// From this level.
    pub from: u32,
    /// To this one.
    pub to: u32,
    /// Why.
    pub rule: Rule,
    /// The same with its figures, for people.
    pub reason: String,
}

impl Move {
    /// Whether running requests follow: they are only ever tightened.
    #[must_use]
    pub fn tightens(&self) -> bool {
        self.to > self.from
    }
}

/// Where the controller is with an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Watching, not moving yet.
    #[default]
    Init,
    /// At rest.
    Steady,
    /// Tightened lately.
    Rising,
    /// Loosening.
    Releasing,
    /// Quality keeps it from going on.
    Guarded,
    /// Inputs are lost: it holds what there is, and lets the lease end if they stay so.
    Fallback,
    /// Too many reversals: frozen at the safer level.
    Frozen,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Init,
        Self::Steady,
        Self::Rising,
        Self::Releasing,
        Self::Guarded,
        Self::Fallback,
        Self::Frozen,
    ];

    /// The name that metrics and answers carry.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Steady => "steady",
            Self::Rising => "rising",
            Self::Releasing => "releasing",
            Self::Guarded => "guarded",
            Self::Fallback => "fallback",
            Self::Frozen => "frozen",
        }
    }
}

/// Something an operator should know, true as long as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Condition {
    /// What.
    pub kind: ConditionKind,
    /// The class, for one that is of a class.
    pub class: Option<String>,
    /// Figures, for people.
    pub message: String,
}

/// Kinds of conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ConditionKind {
    /// KV memory can't be read.
    MemoryMissing,
    /// Process memory can't be read.
    ProcessMissing,
    /// Latency can't be read, or has too few samples.
    LatencyMissing,
    /// Quality can't be read, or has too few samples.
    QualityMissing,
    /// The levels of classes, or the ladder, can't be read.
    LevelsMissing,
    /// All inputs are lost.
    AllLost,
    /// Memory wants a level that quality, or the class's ceiling, forbids.
    QualityCapped,
    /// Reversed too often.
    FlapDetected,
    /// Two steps up changed nothing.
    ActuatorIneffective,
    /// The class is not the controller's to move.
    Unmanaged,
    /// The engine's process is another than before.
    EngineRestarted,
}

impl ConditionKind {
    /// The name that metrics carry: that of the variant.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryMissing => "MemoryMissing",
            Self::ProcessMissing => "ProcessMissing",
            Self::LatencyMissing => "LatencyMissing",
            Self::QualityMissing => "QualityMissing",
            Self::LevelsMissing => "LevelsMissing",
            Self::AllLost => "AllLost",
            Self::QualityCapped => "QualityCapped",
            Self::FlapDetected => "FlapDetected",
            Self::ActuatorIneffective => "ActuatorIneffective",
            Self::Unmanaged => "Unmanaged",
            Self::EngineRestarted => "EngineRestarted",
        }
    }
}

/// One tick's answer for one engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Changes, at most one a class.
    pub moves: Vec<Move>,
    /// The level wanted for each managed class after the moves: what a lease is renewed with.
    pub levels: BTreeMap<String, u32>,
    /// Whether leases are to be renewed: not while all inputs are lost.
    pub renew: bool,
    /// Where the controller is.
    pub phase: Phase,
    /// What is the matter.
    pub conditions: Vec<Condition>,
    /// Demand as if at level 0, of capacity; none without fresh KV memory.
    pub demand: Option<f64>,
    /// The same at the levels before the moves.
    pub projected: Option<f64>,
    /// Bytes held, of capacity.
    pub usage: Option<f64>,
}

/// How long a [`Reading`] may be acted on, in seconds.
pub const FRESH: Duration = Duration::from_secs(2);
/// How long without a value until a [`Reading`] is given up.
pub const LOST: Duration = Duration::from_secs(30);
/// Failures in a row after which a [`Reading`] is given up.
pub const LOST_FAILURES: u32 = 3;
