//! A simulated engine on tokio's clock: admission by capacity, a queue, leases that end, and the text a real one
//! would be scraped for, so that the controller's own parser and loop run.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};

use cinch_controller::link::{EngineLink, LinkError};
use cinch_protocol::{ClassPolicies, ClassPolicy, Ladder, LadderLevel, Lease, Origin, Policy, PolicyChange};
use serde_json::json;
use tokio::time::Instant;

pub(crate) const RATIOS: [f64; 6] = [1.0, 0.577, 0.45, 0.329, 0.23, 0.184];
/// Of which one request takes this much at level 0.
const CAPACITY: f64 = 1000.0;
/// More than can be waited for while a lease lasts.
const STUCK: u64 = 200;

/// What a scrape answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Health {
    #[default]
    Well,
    Dead,
    Nan,
    Empty,
    Garbage,
    Negative,
    Hanging,
    /// Its policies can't be read.
    NoPolicies,
    /// Its ladder can't.
    NoLadder,
    /// A retune is never answered, and there are [`STUCK`] more requests to retune.
    Stuck,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    /// Bytes at level 0.
    size: f64,
    level: u32,
}

#[derive(Debug)]
struct Inner {
    born: Instant,
    demand: f64,
    health: Health,
    error: f64,
    errors: f64,
    error_sum: f64,
    started: f64,
    running: BTreeMap<u64, Running>,
    next: u64,
    level: u32,
    lease: Option<(Lease, Instant)>,
    epoch: u64,
    version: u64,
    writes: u64,
}

/// A handle; clones are the same engine.
#[derive(Clone)]
pub(crate) struct Plant(Arc<Mutex<Inner>>);

impl Plant {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Inner {
            born: Instant::now(),
            demand: 0.0,
            health: Health::Well,
            error: 0.01,
            errors: 0.0,
            error_sum: 0.0,
            started: 1.0,
            running: BTreeMap::new(),
            next: 0,
            level: 0,
            lease: None,
            epoch: 0,
            version: 0,
            writes: 0,
        })))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.0.lock().unwrap();
        if inner
            .lease
            .as_ref()
            .is_some_and(|(_, until)| *until <= Instant::now())
        {
            (inner.level, inner.lease) = (0, None);
        }
        f(&mut inner)
    }

    /// Demand as if at level 0, of capacity, from now on.
    pub(crate) fn demand(&self, demand: f64) {
        self.with(|inner| inner.demand = demand);
        self.second();
    }

    pub(crate) fn health(&self, health: Health) {
        self.with(|inner| inner.health = health);
    }

    pub(crate) fn error(&self, error: f64) {
        self.with(|inner| inner.error = error);
    }

    /// Another process: nothing runs, no lease, no epoch.
    pub(crate) fn restart(&self) {
        self.with(|inner| {
            inner.running.clear();
            (inner.level, inner.lease, inner.epoch) = (0, None, 0);
            inner.started += 1.0;
        });
    }

    /// A second passes: requests end, others come in as far as there is room.
    pub(crate) fn second(&self) {
        self.with(|inner| {
            let wanted = (inner.demand * 10.0).round() as usize;
            while inner.running.len() > wanted {
                inner.running.pop_first();
            }
            // Tenths of the capacity each.
            let size = CAPACITY / 10.0;
            while inner.running.len() < wanted
                && inner.used() + size * RATIOS[inner.level as usize] <= CAPACITY
            {
                let (id, level) = (inner.next, inner.level);
                inner.running.insert(id, Running { size, level });
                inner.next += 1;
            }
            inner.errors += 1.0;
            inner.error_sum += inner.error;
        });
    }

    pub(crate) fn level(&self) -> u32 {
        self.with(|inner| inner.level)
    }

    pub(crate) fn leased(&self) -> bool {
        self.with(|inner| inner.lease.is_some())
    }

    /// Bytes held, of capacity.
    pub(crate) fn usage(&self) -> f64 {
        self.with(|inner| inner.used() / CAPACITY)
    }

    pub(crate) fn waiting(&self) -> f64 {
        self.with(|inner| inner.waiting())
    }

    pub(crate) fn writes(&self) -> u64 {
        self.with(|inner| inner.writes)
    }
}

impl Inner {
    fn used(&self) -> f64 {
        self.running
            .values()
            .map(|one| one.size * RATIOS[one.level as usize])
            .sum()
    }

    fn waiting(&self) -> f64 {
        (self.demand * 10.0).round() - self.running.len() as f64
    }

    fn metrics(&self) -> String {
        let uncompressed: f64 = self.running.values().map(|one| one.size).sum();
        let waiting = self.waiting();
        let used = match self.health {
            Health::Nan => f64::NAN,
            Health::Negative => -1.0,
            _ => self.used(),
        };
        let mut text = String::new();
        let mut line = |name: &str, value: f64| {
            // Prometheus writes NaN so.
            let value = if value.is_nan() {
                "NaN".to_owned()
            } else {
                value.to_string()
            };
            writeln!(text, "{name} {value}").unwrap();
        };
        line("cinch_kv_capacity_bytes", CAPACITY);
        line("cinch_kv_bytes{class=\"default\"}", used);
        line("cinch_kv_uncompressed_bytes{class=\"default\"}", uncompressed);
        line(
            "cinch_kv_queued_bytes{class=\"default\"}",
            waiting * CAPACITY / 10.0,
        );
        line("cinch_requests_waiting{class=\"default\"}", waiting);
        line(
            "process_resident_memory_bytes",
            if used.is_nan() { f64::NAN } else { 5e8 },
        );
        line("cinch_memory_limit_bytes", 1e9);
        line("process_start_time_seconds", self.started);
        line(
            "cinch_attention_error_bucket{class=\"default\",le=\"+Inf\"}",
            self.errors,
        );
        line("cinch_attention_error_sum{class=\"default\"}", self.error_sum);
        line("cinch_attention_error_count{class=\"default\"}", self.errors);
        text
    }

    fn etag(&self) -> String {
        format!("\"{}\"", self.version)
    }

    fn put(&mut self, if_match: Option<&str>, body: &str) -> Result<String, LinkError> {
        let change: PolicyChange = serde_json::from_str(body).unwrap();
        let (fence, ttl) = (change.fence.unwrap(), change.ttl_seconds.unwrap());
        if if_match != Some(&self.etag()) {
            return Err(refused(412, "changed"));
        }
        self.fence(fence.epoch)?;
        let level = change.level.unwrap();
        if level != self.level {
            self.version += 1;
            self.level = level;
        }
        let lease = Lease {
            holder: fence.holder,
            epoch: fence.epoch,
            expires_in_seconds: ttl as f64,
        };
        self.lease = Some((lease, Instant::now() + std::time::Duration::from_secs(ttl)));
        Ok("{}".to_owned())
    }

    fn fence(&mut self, epoch: u64) -> Result<(), LinkError> {
        if epoch < self.epoch {
            return Err(refused(409, "stale-epoch"));
        }
        self.epoch = epoch;
        self.writes += 1;
        Ok(())
    }

    fn patch(&mut self, id: &str, body: &str) -> Result<String, LinkError> {
        let change: PolicyChange = serde_json::from_str(body).unwrap();
        self.fence(change.fence.unwrap().epoch)?;
        let Some(one) = self.running.get_mut(&id.parse::<u64>().unwrap()) else {
            return Err(refused(404, "unknown-request"));
        };
        let level = change.level.unwrap();
        assert!(level > one.level, "running requests are only tightened");
        one.level = level;
        Ok("{}".to_owned())
    }

    fn get(&self, path: &str) -> String {
        let policies = ClassPolicies {
            classes: vec![ClassPolicy {
                class: "default".into(),
                level: Some(self.level),
                policy: Policy::default(),
                origin: if self.lease.is_some() {
                    Origin::Lease
                } else {
                    Origin::Config
                },
                configured_level: Some(0),
                etag: self.etag(),
                lease: self.lease.as_ref().map(|(lease, _)| lease.clone()),
            }],
            epoch: self.epoch,
        };
        let ladder = Ladder {
            model: "simulated".into(),
            fingerprint: None,
            measured: "2026-01-01".into(),
            levels: (0..)
                .zip(RATIOS)
                .map(|(level, bytes_ratio)| LadderLevel {
                    level,
                    name: format!("level {level}"),
                    policy: Policy::default(),
                    bytes_ratio,
                    figures: None,
                })
                .collect(),
        };
        match path {
            "/metrics" => self.metrics(),
            "/v1/policies" => serde_json::to_string(&policies).unwrap(),
            "/v1/ladder" => serde_json::to_string(&ladder).unwrap(),
            "/v1/requests" => {
                let one = |(id, one): (&u64, &Running)| {
                    json!({"id": id, "state": "running", "class": "default", "own": false, "level": one.level,
                        "policy": Policy::default(), "sequences": 1, "prompt_tokens": 10, "seen": 10, "kept": 10.0,
                        "bytes": one.size as u64, "uncompressed_bytes": one.size as u64, "attention_error": null,
                        "applied": true, "served": []})
                };
                let mut all: Vec<_> = self.running.iter().map(one).collect();
                if self.health == Health::Stuck {
                    let (size, level) = (0.0, 0);
                    let more = self.next..self.next + STUCK;
                    all.extend(more.map(|id| one((&id, &Running { size, level }))));
                }
                json!({"requests": all}).to_string()
            }
            other => panic!("{other}"),
        }
    }
}

fn refused(status: u16, kind: &str) -> LinkError {
    LinkError::Refused {
        status,
        kind: kind.into(),
        detail: kind.into(),
    }
}

impl EngineLink for Plant {
    async fn get(&self, path: &str) -> Result<String, LinkError> {
        match self.with(|inner| inner.health) {
            Health::Dead => return Err(LinkError::Unreachable("connection refused".into())),
            Health::Hanging => std::future::pending().await,
            Health::Empty if path == "/metrics" => return Ok(String::new()),
            Health::Garbage if path == "/metrics" => return Ok("<html>not found</html>".into()),
            Health::NoPolicies if path == "/v1/policies" => return Err(refused(500, "internal")),
            Health::NoLadder if path == "/v1/ladder" => return Err(refused(500, "internal")),
            _ => {}
        }
        Ok(self.with(|inner| inner.get(path)))
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        if_match: Option<&str>,
        body: String,
    ) -> Result<String, LinkError> {
        match self.with(|inner| inner.health) {
            Health::Dead => return Err(LinkError::Unreachable("connection refused".into())),
            Health::Stuck if method == "PATCH" => std::future::pending().await,
            _ => {}
        }
        match (method, path.rsplit_once('/').unwrap()) {
            ("PUT", ("/v1/policies", "default")) => self.with(|inner| inner.put(if_match, &body)),
            ("PATCH", ("/v1/requests", id)) => self.with(|inner| inner.patch(id, &body)),
            other => panic!("{other:?}"),
        }
    }
}
