//! What engine and controller say of themselves, read again and again. What can't be read stays as it was; the
//! figures that count (peaks) are the engine's own high-water marks, not what a look happened to see.

use std::collections::BTreeMap;
use std::time::Duration;

use cinch_protocol::{Capacity, Ladder, RequestState, RequestViews};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::up::settings::{Controller, Engine};

/// A change of level that the controller decided.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Moved {
    /// Seconds since the load was sent.
    pub(super) at: f64,
    pub(super) class: String,
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) rule: String,
    pub(super) reason: String,
}

/// How many of the moves go the other way than the one of the same class before.
pub(super) fn reversals(moves: &[Moved]) -> usize {
    let mut last: BTreeMap<&str, bool> = BTreeMap::new();
    let turned = moves.iter().filter(|moved| {
        let up = moved.to > moved.from;
        last.insert(&moved.class, up).is_some_and(|before| before != up)
    });
    turned.count()
}

/// The controller's view of the engine.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub(super) struct Status {
    #[serde(default)]
    pub(super) phase: Option<String>,
    /// Levels that are wanted, by class.
    #[serde(default)]
    pub(super) wanted: BTreeMap<String, u32>,
    pub(super) demand: Option<f64>,
    pub(super) projected: Option<f64>,
    pub(super) usage: Option<f64>,
    #[serde(default)]
    pub(super) conditions: Vec<Condition>,
}

/// Something the controller says is the matter.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Condition {
    pub(super) kind: String,
    pub(super) message: String,
}

#[derive(Deserialize)]
struct Statuses {
    engines: Vec<Status>,
}

#[derive(Deserialize)]
struct Decisions {
    decisions: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    at: f64,
    decision: Decision,
}

#[derive(Deserialize)]
struct Decision {
    moves: Vec<Move>,
}

#[derive(Deserialize)]
struct Move {
    class: String,
    from: u32,
    to: u32,
    rule: String,
    reason: String,
}

/// All that was seen so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) capacity: Option<Capacity>,
    /// Requests being processed, by level; `None` is a policy off the ladder.
    pub(super) running: BTreeMap<Option<u32>, usize>,
    pub(super) waiting: usize,
    pub(super) most_running: usize,
    pub(super) most_waiting: usize,
    /// The most bytes of live requests that a look saw, and the engine's own high-water mark.
    pub(super) peak_bytes: u64,
    /// The most that was demanded as if uncompressed, of capacity.
    pub(super) most_demand: f64,
    /// Levels of new requests at the engine, by class.
    pub(super) levels: BTreeMap<String, u32>,
    pub(super) status: Status,
    pub(super) moves: Vec<Moved>,
}

/// Reads both services.
pub(super) struct Watch {
    agent: ureq::Agent,
    api: String,
    authorization: Option<String>,
    controller: String,
    /// Unix seconds of the load's start.
    start: f64,
}

impl Watch {
    pub(super) fn new(engine: &Engine, controller: &Controller) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(2)))
            .proxy(None)
            .build()
            .into();
        Self {
            agent,
            api: engine.api_url(),
            authorization: engine.authorization(),
            controller: controller.url(),
            start: 0.0,
        }
    }

    /// Times are counted from here.
    pub(super) fn starts_now(&mut self) {
        self.start = unix();
    }

    fn text(&self, base: &str, path: &str) -> Option<String> {
        let mut request = self.agent.get(format!("{base}{path}"));
        if let (true, Some(authorization)) = (base == self.api, &self.authorization) {
            request = request.header("authorization", authorization);
        }
        let mut answer = request.call().ok()?;
        answer.body_mut().read_to_string().ok()
    }

    fn json<T: DeserializeOwned>(&self, base: &str, path: &str) -> Option<T> {
        serde_json::from_str(&self.text(base, path)?).ok()
    }

    /// Names of the ladder's levels.
    pub(super) fn ladder(&self) -> Vec<String> {
        let ladder: Option<Ladder> = self.json(&self.api, "/v1/ladder");
        let levels = ladder.into_iter().flat_map(|ladder| ladder.levels);
        levels.map(|level| level.name).collect()
    }

    /// When the engine's process started, as it says itself.
    pub(super) fn engine_started(&self) -> Option<f64> {
        sum(&self.text(&self.api, "/metrics")?, "process_start_time_seconds")
    }

    /// Calls of the controller that change something at the engine.
    pub(super) fn writes(&self) -> Option<u64> {
        let text = self.text(&self.controller, "/metrics")?;
        Some(sum(&text, "cinch_controller_writes_total").unwrap_or(0.0) as u64)
    }

    /// The engine's side, which changes quickly.
    pub(super) fn engine(&self, seen: &mut Seen) {
        if let Some(capacity) = self.json::<Capacity>(&self.api, "/v1/capacity") {
            let count = |of: fn(&cinch_protocol::ClassCapacity) -> u64| {
                capacity.classes.iter().map(of).sum::<u64>() as usize
            };
            seen.waiting = count(|class| class.waiting);
            seen.most_waiting = seen.most_waiting.max(seen.waiting);
            seen.most_running = seen.most_running.max(count(|class| class.running));
            seen.peak_bytes = seen.peak_bytes.max(capacity.used_bytes).max(capacity.peak_bytes);
            let demand = (capacity.uncompressed_bytes + capacity.queued_bytes) as f64;
            seen.most_demand = seen
                .most_demand
                .max(demand / capacity.capacity_bytes.max(1) as f64);
            seen.capacity = Some(capacity);
        }
        if let Some(views) = self.json::<RequestViews>(&self.api, "/v1/requests") {
            seen.running.clear();
            let running = views
                .requests
                .iter()
                .filter(|view| view.state == RequestState::Running);
            for view in running {
                *seen.running.entry(view.level).or_default() += 1;
            }
        }
    }

    /// The controller's side, which changes once a tick.
    pub(super) fn controller(&self, seen: &mut Seen) {
        if let Some(status) = self.json::<Statuses>(&self.controller, "/v1/status")
            && let Some(first) = status.engines.into_iter().next()
        {
            seen.status = first;
        }
        if let Some(policies) = self.json::<cinch_protocol::ClassPolicies>(&self.api, "/v1/policies") {
            let levels = policies.classes.into_iter();
            seen.levels = levels
                .filter_map(|class| Some((class.class, class.level?)))
                .collect();
        }
        if let Some(all) = self.json::<Decisions>(&self.controller, "/v1/decisions?limit=1000") {
            seen.moves = moves(all, self.start);
        }
    }
}

fn moves(all: Decisions, start: f64) -> Vec<Moved> {
    let of = |entry: Entry| {
        let at = entry.at - start;
        let moves = entry.decision.moves.into_iter();
        moves.map(move |one| Moved {
            at,
            class: one.class,
            from: one.from,
            to: one.to,
            rule: one.rule,
            reason: one.reason,
        })
    };
    all.decisions.into_iter().flat_map(of).collect()
}

/// The sum of a metric's series; none without one.
fn sum(text: &str, name: &str) -> Option<f64> {
    let series = text.lines().filter_map(|line| line.strip_prefix(name));
    let values = series.filter(|rest| rest.starts_with(['{', ' ']));
    values
        .filter_map(|rest| rest.rsplit_once(' ')?.1.parse::<f64>().ok())
        .fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

fn unix() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn moved(at: f64, class: &str, from: u32, to: u32) -> Moved {
        Moved {
            at,
            class: class.into(),
            from,
            to,
            rule: "up".into(),
            reason: "demand".into(),
        }
    }

    #[test]
    fn a_reversal_is_a_turn_of_one_class() {
        let up = [
            moved(1.0, "a", 0, 1),
            moved(2.0, "b", 2, 3),
            moved(3.0, "a", 1, 3),
        ];
        assert_eq!(reversals(&up), 0);
        let turns = [
            moved(1.0, "a", 0, 1),
            moved(2.0, "b", 3, 2),
            moved(3.0, "a", 1, 0),
            moved(4.0, "a", 0, 1),
        ];
        assert_eq!(reversals(&turns), 2);
    }

    #[test]
    fn series_are_summed_and_none_is_not_zero() {
        let text = "# HELP x_total X\nx_total{a=\"1\"} 2\nx_total{a=\"2\"} 3\nx_total_more 9\ny 4\n";
        assert_eq!(sum(text, "x_total"), Some(5.0));
        assert_eq!(sum(text, "y"), Some(4.0));
        assert_eq!(sum(text, "z"), None);
    }

    #[test]
    fn decisions_become_moves_from_the_start_of_the_load() {
        let text = r#"{"decisions": [
            {"at": 90.0, "engine": "local", "mode": "live", "decision": {"moves": [], "phase": "init"}},
            {"at": 102.5, "engine": "local", "mode": "live", "decision": {"moves": [
                {"class": "default", "from": 0, "to": 2, "rule": "critical", "reason": "full in 4 s"}]}}]}"#;
        let all = moves(serde_json::from_str(text).unwrap(), 100.0);
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].at, all[0].to, &*all[0].rule), (2.5, 2, "critical"));
    }
}
