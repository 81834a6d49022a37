//! What a tick says of itself: phase and conditions.

use super::demand;
use super::state::State;
use super::tick::Tick;
use super::types::{Condition, ConditionKind, Decision, Phase, Reading};

/// Seconds after a tightening in which the phase is still [`Phase::Rising`].
const LATELY: f64 = 60.0;

fn missing<T>(reading: &Reading<T>) -> Option<String> {
    match reading {
        // Fresh but refused by the law's own checks.
        Reading::Fresh { age, .. } => Some(format!("{age:.0} s old, and its figures make no sense")),
        Reading::Stale { age } => Some(format!("{age:.0} s old")),
        Reading::Missing { reason, .. } => Some(reason.clone()),
    }
}

fn lost<T>(reading: &Reading<T>) -> bool {
    matches!(reading, Reading::Missing { lost: true, .. })
}

impl Tick<'_> {
    /// The decision, and what to remember.
    pub(super) fn finish(mut self) -> (State, Decision) {
        let process = demand::process(&self.inputs.process);
        if self.demand.is_none()
            && let Some(reason) = missing(&self.inputs.kv)
        {
            self.say(ConditionKind::MemoryMissing, None, reason);
        }
        if process.is_none()
            && let Some(reason) = missing(&self.inputs.process)
        {
            self.say(ConditionKind::ProcessMissing, None, reason);
        }
        if let Some(reason) = &self.inputs.unread {
            self.say(ConditionKind::LevelsMissing, None, reason.clone());
        }
        let all_lost = lost(&self.inputs.kv) && lost(&self.inputs.process);
        if all_lost {
            let message = "levels are held until their leases end".to_owned();
            self.say(ConditionKind::AllLost, None, message);
        }
        let mut frozen = false;
        for class in self.names() {
            self.samples(&class);
            let until = self.class(&class).frozen_until.filter(|until| self.now < *until);
            if let Some(until) = until {
                frozen = true;
                let message = format!(
                    "frozen for {:.0} s more: it changed direction too often",
                    until - self.now
                );
                self.say(ConditionKind::FlapDetected, Some(&class), message);
            }
        }
        let managed = &self.inputs.levels;
        let others: Vec<String> = match &self.inputs.kv {
            Reading::Fresh { value, .. } if self.inputs.unread.is_none() => value
                .classes
                .keys()
                .filter(|name| !managed.contains_key(*name))
                .cloned()
                .collect(),
            _ => Vec::new(),
        };
        for class in others {
            let message = "pinned by a person, or served with a policy off the ladder".to_owned();
            self.say(ConditionKind::Unmanaged, Some(&class), message);
        }
        self.conditions.sort();
        let decision = Decision {
            phase: self.phase(all_lost, frozen),
            demand: self.demand.as_ref().map(demand::Demand::total),
            projected: self
                .demand
                .as_ref()
                .filter(|_| self.inputs.unread.is_none())
                .map(|demand| demand.at(&self.before)),
            usage: self.demand.as_ref().map(demand::Demand::usage),
            renew: !all_lost,
            moves: self.moves,
            levels: self.levels,
            conditions: self.conditions,
        };
        (self.state, decision)
    }

    /// Says which objectives of a class can't be watched. Too few samples are no fault of anybody's: a class
    /// without traffic has none.
    fn samples(&mut self, class: &str) {
        let bounds = self.bounds(class);
        if bounds.ttft_slo.is_some() || bounds.itl_slo.is_some() {
            let reason = match self.inputs.latency.get(class) {
                Some(Reading::Fresh { .. }) => None,
                Some(reading) => missing(reading),
                None => Some("not reported".to_owned()),
            };
            if let Some(reason) = reason {
                self.say(ConditionKind::LatencyMissing, Some(class), reason);
            }
        }
        if bounds.error_floor.is_some() {
            let reason = match self.inputs.quality.get(class) {
                Some(Reading::Fresh { .. }) => None,
                Some(reading) => missing(reading),
                None => Some("not reported".to_owned()),
            };
            if let Some(reason) = reason {
                self.say(ConditionKind::QualityMissing, Some(class), reason);
            }
        }
    }

    fn phase(&self, all_lost: bool, frozen: bool) -> Phase {
        let has = |kind| {
            self.conditions
                .iter()
                .any(|condition: &Condition| condition.kind == kind)
        };
        let lately = |at: Option<f64>, within: f64| at.is_some_and(|at| self.now - at < within);
        let up = lately(self.state.last_up, LATELY);
        if all_lost {
            Phase::Fallback
        } else if frozen {
            Phase::Frozen
        } else if has(ConditionKind::QualityCapped) {
            Phase::Guarded
        } else if up {
            Phase::Rising
        } else if self.warming_up() {
            Phase::Init
        } else if lately(self.state.last_down, self.config.down_cooldown) {
            Phase::Releasing
        } else {
            Phase::Steady
        }
    }
}
