//! One engine's loop: scrape, decide, write. It owns the law's state for that engine; nothing else writes there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cinch_protocol::{ClassPolicies, ClassPolicy, Ladder, Origin};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use crate::config::{Mode, Settings};
use crate::law::{self, Condition, ConditionKind, Decision, Inputs, State};
use crate::link::{EngineLink, LinkError};
use crate::shared::{EngineStatus, Shared};
use crate::sources::{Observer, Prometheus};
use crate::write::{Writer, Written};

/// Seconds for which a restart of the engine stays a condition.
const RESTART_SHOWN: f64 = 60.0;

/// Longest wait for what an engine can say at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// The loop of one engine.
pub struct Engine<L> {
    name: String,
    link: Arc<L>,
    prometheus: Option<Prometheus>,
    settings: watch::Receiver<Arc<Settings>>,
    shared: Arc<Shared>,
    start: Instant,
    observer: Observer,
    state: State,
    ladder: Option<Ladder>,
    policies: Option<ClassPolicies>,
    /// Where classes would be had every decision been carried out; used where none is.
    imagined: BTreeMap<String, (u32, u32)>,
    epoch: Option<u64>,
    /// Another controller writes: this one only watches from then on.
    fenced: Option<String>,
    written: BTreeMap<String, f64>,
    putting: Option<JoinHandle<Vec<Written>>>,
    tightening: Option<JoinHandle<Vec<Written>>>,
    restarted: Option<f64>,
    last_error: Option<String>,
}

impl<L: EngineLink> Engine<L> {
    /// A loop that has not begun.
    pub fn new(
        name: &str,
        link: L,
        prometheus: Option<Prometheus>,
        settings: watch::Receiver<Arc<Settings>>,
        shared: Arc<Shared>,
    ) -> Self {
        let window = settings.borrow().law.quality_window;
        Self {
            name: name.to_owned(),
            link: Arc::new(link),
            prometheus,
            settings,
            shared,
            start: Instant::now(),
            observer: Observer::new(window),
            state: State::default(),
            ladder: None,
            policies: None,
            imagined: BTreeMap::new(),
            epoch: None,
            fenced: None,
            written: BTreeMap::new(),
            putting: None,
            tightening: None,
            restarted: None,
            last_error: None,
        }
    }

    /// Runs until dropped.
    pub async fn run(mut self) {
        let settings = self.settings.borrow().clone();
        let mut scrape = interval(Duration::from_secs_f64(settings.scrape_seconds));
        scrape.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut next = Instant::now();
        loop {
            scrape.tick().await;
            self.observe().await;
            self.collect().await;
            if Instant::now() >= next {
                let settings = self.settings.borrow_and_update().clone();
                self.observer.window(settings.law.quality_window);
                next = Instant::now() + Duration::from_secs_f64(settings.tick_seconds);
                self.tick(&settings).await;
            }
        }
    }

    fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn failed(&mut self, what: &str, err: &LinkError) {
        let error = format!("{what}: {err}");
        // The same failure every second is one line.
        if self.last_error.as_ref() != Some(&error) {
            warn!("{}: {error}", self.name);
        }
        self.last_error = Some(error);
    }

    /// What an engine can say at once. One that hangs must not keep the others' figures, or the law, waiting.
    async fn read(&self, path: &str) -> Result<String, LinkError> {
        let answer = tokio::time::timeout(PATIENCE, self.link.get(path)).await;
        answer.unwrap_or(Err(LinkError::Timeout(PATIENCE)))
    }

    async fn observe(&mut self) {
        let answer = self.read("/metrics").await;
        let now = self.now();
        let result = match &answer {
            Ok(text) => match self.observer.scraped(now, text) {
                Ok(restarted) => {
                    if restarted {
                        warn!("{}: the engine was restarted", self.name);
                        self.restarted = Some(now);
                        self.ladder = None;
                        self.policies = None;
                        self.imagined.clear();
                    }
                    "ok"
                }
                Err(err) => {
                    self.failed("metrics", &LinkError::Body(err.to_string()));
                    "garbage"
                }
            },
            Err(err) => {
                self.observer.failed(now, &err.to_string());
                self.failed("metrics", err);
                "failed"
            }
        };
        self.shared.metrics.scraped(&self.name, result);
    }

    /// What the engine says of itself beside metrics. Without all of it nothing can be decided: why not.
    async fn ask(&mut self) -> Result<(), String> {
        if self.ladder.is_none() {
            let ladder = self.read("/v1/ladder").await.and_then(parse::<Ladder>);
            match ladder.and_then(sound) {
                Ok(ladder) => self.ladder = Some(ladder),
                Err(err) => self.failed("ladder", &err),
            }
        }
        let policies = self.read("/v1/policies").await.and_then(parse::<ClassPolicies>);
        if let Err(err) = &policies {
            self.failed("policies", err);
        }
        self.policies = policies.ok();
        if self.ladder.is_some() && self.policies.is_some() {
            Ok(())
        } else {
            Err(self.last_error.clone().unwrap_or_default())
        }
    }

    async fn tick(&mut self, settings: &Settings) {
        if settings.mode == Mode::Off {
            self.publish(settings, None, None);
            return;
        }
        let begun = std::time::Instant::now();
        let unread = self.ask().await.err();
        let now = self.now();
        let writes = matches!(settings.mode, Mode::NewRequests | Mode::Live) && self.fenced.is_none();
        let classes = self.bounds(settings);
        let inputs = self.inputs(now, writes, unread);
        let state = self.state.clone();
        let ladder = self.ladder.iter().flat_map(|ladder| &ladder.levels);
        let ratios: Vec<f64> = ladder.map(|level| level.bytes_ratio).collect();
        let (state, mut decision) = law::step(
            &settings.law,
            &classes,
            &ratios,
            state,
            &inputs,
            Duration::from_secs_f64(now),
        );
        self.state = state;
        if let Some(at) = self.restarted.filter(|at| now - at < RESTART_SHOWN) {
            decision.conditions.push(Condition {
                kind: ConditionKind::EngineRestarted,
                class: None,
                message: format!("{:.0} s ago; what was read before is forgotten", now - at),
            });
        }
        for made in &decision.moves {
            let doing = if writes { "" } else { " (not written)" };
            info!(
                "{}: class {} {} → {}{doing}: {}",
                self.name, made.class, made.from, made.to, made.reason
            );
        }
        debug!("{}: {decision:?}", self.name);
        if writes {
            self.order(settings, &decision, now);
        } else {
            for (class, level) in &decision.levels {
                if let Some((_, wanted)) = self.imagined.get_mut(class) {
                    *wanted = *level;
                }
            }
        }
        self.publish(settings, Some(&inputs), Some(&decision));
        self.shared.metrics.stepped(begun.elapsed().as_secs_f64());
    }

    fn classes(&self) -> impl Iterator<Item = &ClassPolicy> {
        self.policies.iter().flat_map(|policies| &policies.classes)
    }

    /// Bounds by class; what an engine's own configuration gives a class is its floor.
    fn bounds(&self, settings: &Settings) -> BTreeMap<String, law::ClassBounds> {
        let mut all = settings.class.clone();
        for class in self.classes() {
            let named = settings
                .class
                .get(&class.class)
                .or_else(|| settings.class.get(law::DEFAULT_CLASS));
            let mut bounds = named.cloned().unwrap_or_default();
            bounds.min_level = bounds.min_level.max(class.configured_level.unwrap_or(0));
            all.insert(class.class.clone(), bounds);
        }
        all
    }

    fn inputs(&mut self, now: f64, writes: bool, unread: Option<String>) -> Inputs {
        let mut levels: BTreeMap<String, u32> = self
            .classes()
            .filter(|class| class.origin != Origin::Api)
            .filter_map(|class| Some((class.class.clone(), class.level?)))
            .collect();
        if !writes && self.policies.is_some() {
            self.imagined.retain(|class, _| levels.contains_key(class));
            for (class, level) in &mut levels {
                let (actual, wanted) = self.imagined.entry(class.clone()).or_insert((*level, *level));
                if *actual != *level {
                    (*actual, *wanted) = (*level, *level);
                }
                *level = *wanted;
            }
        }
        let names = || self.classes().map(|class| class.class.as_str());
        let (latency, quality) = match &self.prometheus {
            Some(prometheus) => (prometheus.latency(names()), prometheus.quality(names())),
            None => (
                self.observer.latency(now, names()),
                self.observer.quality(now, names()),
            ),
        };
        Inputs {
            kv: self.observer.kv.reading(now),
            process: self.observer.process.reading(now),
            latency,
            quality,
            levels,
            unread,
        }
    }

    /// Sends what is to be written on its way; scraping goes on meanwhile, and leases are renewed however long
    /// running requests take to follow.
    fn order(&mut self, settings: &Settings, decision: &Decision, now: f64) {
        if !decision.renew || self.putting.is_some() {
            return;
        }
        let Some(policies) = &self.policies else { return };
        let epoch = *self.epoch.get_or_insert_with(|| {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let clock = since.map_or(0, |since| since.as_millis() as u64);
            clock.max(policies.epoch + 1)
        });
        self.shared.metrics.epoch(epoch);
        let due = |class: &str| {
            let renew = settings.lease.renew_seconds as f64;
            self.written.get(class).is_none_or(|at| now - at >= renew)
        };
        let puts: Vec<(ClassPolicy, u32)> = self
            .classes()
            .filter_map(|class| {
                let wanted = *decision.levels.get(&class.class)?;
                let moved = class.level != Some(wanted);
                // At its configured level a class needs no lease: the one there is runs out.
                let held = class.configured_level != Some(wanted) && due(&class.class);
                (moved || held).then(|| (class.clone(), wanted))
            })
            .collect();
        let writer = Arc::new(Writer {
            link: self.link.clone(),
            holder: format!("cinch-controller/{}", std::process::id()),
            epoch,
            ttl_seconds: settings.lease.ttl_seconds,
        });
        let (done, put) = oneshot::channel();
        if puts.is_empty() {
            // Whoever waits has gone: nobody tightens.
            let _gone = done.send(true);
        } else {
            let writer = writer.clone();
            self.putting = Some(tokio::spawn(async move {
                let all = writer.put(puts).await;
                let _gone = done.send(all.iter().all(|written| written.result.is_ok()));
                all
            }));
        }
        let tighten = settings.mode == Mode::Live && decision.levels.values().any(|level| *level > 0);
        if tighten && self.tightening.is_none() {
            let levels = decision.levels.clone();
            self.tightening = Some(tokio::spawn(async move {
                // Running requests follow their class, not the other way round.
                if put.await == Ok(true) {
                    writer.tighten(levels).await
                } else {
                    Vec::new()
                }
            }));
        }
    }

    /// Takes in what finished writers did.
    async fn collect(&mut self) {
        for index in 0..2 {
            let writer = [&mut self.putting, &mut self.tightening];
            let Some(writer) = writer[index].take_if(|writer| writer.is_finished()) else {
                continue;
            };
            match writer.await {
                Ok(all) => all.into_iter().for_each(|written| self.wrote(written)),
                Err(err) => warn!("{}: a write broke off: {err}", self.name),
            }
        }
    }

    fn wrote(&mut self, written: Written) {
        let result = match &written.result {
            Ok(()) => "ok",
            Err(LinkError::Refused { .. }) => "refused",
            Err(_) => "failed",
        };
        self.shared.metrics.wrote(&self.name, written.call, result);
        match written.result {
            Ok(()) => {
                if let Some(class) = written.class {
                    self.written.insert(class, self.now());
                }
            }
            Err(LinkError::Refused { kind, detail, .. }) if kind == "stale-epoch" => {
                if self.fenced.is_none() {
                    warn!(
                        "{}: another controller writes here, this one stops: {detail}",
                        self.name
                    );
                }
                self.fenced = Some(detail);
            }
            // Gone, or changed since it was read: the next tick sees what there is.
            Err(LinkError::Refused {
                status: 404 | 409 | 412,
                ..
            }) => {}
            Err(err) => self.failed(written.call, &err),
        }
    }

    fn publish(&mut self, settings: &Settings, inputs: Option<&Inputs>, decision: Option<&Decision>) {
        let now = self.now();
        let ages = [
            ("kv", self.observer.kv.age(now)),
            ("process", self.observer.process.age(now)),
        ];
        let levels = self
            .classes()
            .filter_map(|class| Some((class.class.clone(), class.level?)))
            .collect();
        let status = EngineStatus::new(&self.name, levels, inputs, decision)
            .fenced(self.fenced.clone())
            .error(self.last_error.clone())
            .epoch(self.epoch);
        self.shared.publish(settings.mode, status, ages, decision);
        if decision.is_some_and(|decision| decision.conditions.is_empty()) {
            self.last_error = None;
        }
    }
}

fn sound(ladder: Ladder) -> Result<Ladder, LinkError> {
    let ratios: Vec<f64> = ladder.levels.iter().map(|level| level.bytes_ratio).collect();
    let falling = ratios.windows(2).all(|pair| pair[1] < pair[0] && pair[1] > 0.0);
    if ratios.first() == Some(&1.0) && falling {
        Ok(ladder)
    } else {
        Err(LinkError::Body(format!(
            "byte ratios {ratios:?} do not fall from 1"
        )))
    }
}

fn parse<T: serde::de::DeserializeOwned>(text: String) -> Result<T, LinkError> {
    serde_json::from_str(&text).map_err(|err| LinkError::Body(err.to_string()))
}
