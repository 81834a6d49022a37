//! The control law: a pure function of what was measured and what it remembers. No clock, lock or I/O, so that
//! dry run, replay and tests are the same code as production.
//!
//! It controls on demand, not on usage: demand as if at level 0 does not depend on the level, so that a step down
//! the ladder cannot itself ask for a step back up. A missing input can only block a change.

mod config;
mod demand;
mod quality;
mod report;
mod state;
mod tick;
mod types;

use std::collections::BTreeMap;
use std::time::Duration;

pub use config::{ClassBounds, LawConfig};
pub use state::State;
pub use types::{
    ClassMemory, Condition, ConditionKind, Decision, FRESH, Inputs, KvMemory, LOST, LOST_FAILURES, Latency,
    Move, Phase, ProcessMemory, Quality, Reading, Rule,
};

/// The name under which bounds lie that hold for every class without its own.
pub const DEFAULT_CLASS: &str = "default";

/// One tick for one engine.
///
/// `classes` are the bounds by class, those of [`DEFAULT_CLASS`] hold for classes not named; `ratios` are the
/// measured byte ratios of the ladder's levels, level 0 first; `now` is the time since the controller started.
/// The levels in `inputs` are the truth: one that differs from what was wanted (a lease ended, somebody wrote)
/// is taken up, not fought.
#[must_use]
pub fn step(
    config: &LawConfig,
    classes: &BTreeMap<String, ClassBounds>,
    ratios: &[f64],
    state: State,
    inputs: &Inputs,
    now: Duration,
) -> (State, Decision) {
    let mut tick = tick::Tick::new(config, classes, ratios, state, inputs, now.as_secs_f64());
    tick.adopt();
    tick.quality();
    if inputs.unread.is_some() {
        tick.blind();
    } else {
        tick.tighten();
        tick.latency();
        tick.loosen();
    }
    tick.finish()
}
