//! The control law: `step(config, ladder, state, inputs, now)`, a pure function. No clock, lock or I/O, so that
//! dry run, replay and tests are the same code as production.

mod types;

pub use types::{
    ClassMemory, Condition, ConditionKind, Decision, FRESH, Inputs, KvMemory, LOST, LOST_FAILURES, Latency,
    Move, Phase, ProcessMemory, Quality, Reading, Rule,
};
