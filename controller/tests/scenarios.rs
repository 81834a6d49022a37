//! Scenarios of `tests/scenarios/*.yaml`, each on tokio's paused clock: the real loop against a simulated engine. A
//! scenario is a list of phases; each sets the load, lasts, and ends with bands the figures must lie in.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cinch_controller::config::Settings;
use cinch_controller::engine::Engine;
use cinch_controller::shared::Shared;
use common::{Health, Plant, RATIOS};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const SETTINGS: &str = include_str!("../../configs/controller.toml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    /// What it shows.
    shows: String,
    #[serde(default)]
    settings: Vec<String>,
    /// Over all of it.
    #[serde(default)]
    reversals_most: Option<usize>,
    phases: Vec<Phase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Phase {
    seconds: u64,
    /// Of capacity, as if at level 0.
    #[serde(default)]
    demand: Option<f64>,
    /// Reached linearly by the end.
    #[serde(default)]
    ramp_to: Option<f64>,
    /// Low and high, changing each so many seconds.
    #[serde(default)]
    swing: Option<(f64, f64, u64)>,
    #[serde(default)]
    health: Option<Health>,
    /// The attention error requests are served with.
    #[serde(default)]
    error: Option<f64>,
    #[serde(default)]
    restart: Option<Restart>,
    expect: Expect,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Restart {
    /// The controller's process is killed, and a new one starts at once.
    Controller,
    /// It is killed, and none starts.
    ControllerGone,
    /// The engine's process is another.
    Engine,
}

/// What must hold when a phase ends; for `moves`, over it.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Expect {
    level: Option<(u32, u32)>,
    moves: Option<(usize, usize)>,
    reversals_most: Option<usize>,
    usage_most: Option<f64>,
    waiting_most: Option<f64>,
    condition: Option<String>,
    no_condition: Option<String>,
    leased: Option<bool>,
    writes: Option<(u64, u64)>,
    phase: Option<String>,
    /// Seconds after which, at the latest, the memory target is met for good: demand at the present level, and what
    /// is measured, are at most `law.up`, and nothing waits.
    fits_within: Option<u64>,
}

struct Bench {
    plant: Plant,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    task: Option<JoinHandle<()>>,
    /// Keeps the channel open.
    _changed: watch::Sender<Arc<Settings>>,
    watched: watch::Receiver<Arc<Settings>>,
}

impl Bench {
    fn new(overrides: &[String]) -> Self {
        let settings = Arc::new(Settings::parse(SETTINGS, "controller.toml", overrides).unwrap());
        let (changed, watched) = watch::channel(settings.clone());
        let mut bench = Self {
            plant: Plant::new(),
            shared: Arc::new(Shared::new(settings.mode).unwrap()),
            settings,
            task: None,
            _changed: changed,
            watched,
        };
        bench.start();
        bench
    }

    fn start(&mut self) {
        let engine = Engine::new(
            "plant",
            self.plant.clone(),
            None,
            self.watched.clone(),
            self.shared.clone(),
        );
        self.task = Some(tokio::spawn(engine.run()));
    }

    fn kill(&mut self) {
        self.task.take().unwrap().abort();
    }

    fn status(&self) -> Value {
        serde_json::to_value(self.shared.status()).unwrap()["engines"][0].clone()
    }

    fn has(&self, kind: &str) -> bool {
        let status = self.status();
        let all = status["conditions"].as_array().cloned().unwrap_or_default();
        all.iter().any(|condition| condition["kind"] == kind)
    }

    /// Every move decided so far.
    fn moves(&self) -> Vec<(u32, u32)> {
        let all = self.shared.decisions(1000).decisions;
        let moves = all.iter().flat_map(|entry| &entry.decision.moves);
        moves.map(|made| (made.from, made.to)).collect()
    }

    async fn phase(&mut self, name: &str, phase: &Phase) {
        let before = (self.moves().len(), self.plant.writes());
        if let Some(health) = phase.health {
            self.plant.health(health);
        }
        if let Some(error) = phase.error {
            self.plant.error(error);
        }
        match phase.restart {
            Some(Restart::Controller) => {
                self.kill();
                self.start();
            }
            Some(Restart::ControllerGone) => self.kill(),
            Some(Restart::Engine) => self.plant.restart(),
            None => {}
        }
        let from = phase.demand.unwrap_or(0.0);
        let mut fits_after = None;
        for second in 0..phase.seconds {
            let demand = match (phase.swing, phase.ramp_to) {
                (Some((low, high, period)), _) => Some(if second / period % 2 == 0 { high } else { low }),
                (None, Some(to)) => Some(from + (to - from) * second as f64 / phase.seconds as f64),
                (None, None) => phase.demand.filter(|_| second == 0),
            };
            match demand {
                Some(demand) => self.plant.demand(demand),
                None => self.plant.second(),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(self.plant.usage() <= 1.0, "{name}: bytes passed the capacity");
            let projected = phase.demand.unwrap_or(0.0) * RATIOS[self.plant.level() as usize];
            let target = self.settings.law.up;
            let fits = projected <= target && self.plant.usage() <= target && self.plant.waiting() == 0.0;
            fits_after = if fits { fits_after.or(Some(second)) } else { None };
        }
        let moves = self.moves()[before.0..].to_vec();
        let expect = &phase.expect;
        let shown = format!("{name}: moves {moves:?}, status {:#}", self.status());
        if let Some((low, high)) = expect.level {
            assert!(
                (low..=high).contains(&self.plant.level()),
                "level {}; {shown}",
                self.plant.level()
            );
        }
        if let Some((low, high)) = expect.moves {
            assert!(
                (low..=high).contains(&moves.len()),
                "{} moves; {shown}",
                moves.len()
            );
        }
        if let Some(most) = expect.reversals_most {
            let reversals = reversals(&moves);
            assert!(reversals <= most, "{reversals} reversals; {shown}");
        }
        if let Some(most) = expect.usage_most {
            assert!(
                self.plant.usage() <= most,
                "usage {}; {shown}",
                self.plant.usage()
            );
        }
        if let Some(most) = expect.waiting_most {
            assert!(
                self.plant.waiting() <= most,
                "{} wait; {shown}",
                self.plant.waiting()
            );
        }
        if let Some(kind) = &expect.condition {
            assert!(self.has(kind), "no {kind}; {shown}");
        }
        if let Some(kind) = &expect.no_condition {
            assert!(!self.has(kind), "{kind}; {shown}");
        }
        if let Some(leased) = expect.leased {
            assert_eq!(self.plant.leased(), leased, "lease; {shown}");
        }
        if let Some((low, high)) = expect.writes {
            let writes = self.plant.writes() - before.1;
            assert!((low..=high).contains(&writes), "{writes} writes; {shown}");
        }
        if let Some(phase) = &expect.phase {
            assert_eq!(self.status()["phase"], phase.as_str(), "{shown}");
        }
        if let Some(most) = expect.fits_within {
            assert!(
                fits_after.is_some_and(|after| after <= most),
                "fits after {fits_after:?} s; {shown}"
            );
        }
    }
}

fn reversals(moves: &[(u32, u32)]) -> usize {
    let up: Vec<bool> = moves.iter().map(|(from, to)| to > from).collect();
    up.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

fn scenarios() -> Vec<(String, Scenario)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let read = |path: PathBuf| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let scenario = serde_norway::from_str(&text).unwrap_or_else(|err| panic!("{name}: {err}"));
        (name, scenario)
    };
    paths.into_iter().map(read).collect()
}

#[tokio::test(start_paused = true)]
async fn every_scenario_stays_in_its_bands() {
    let all = scenarios();
    assert!(all.len() >= 20, "{} scenarios", all.len());
    let mut failed = Vec::new();
    for (name, scenario) in all {
        println!("{name}: {}", scenario.shows);
        let run = async move {
            let mut bench = Bench::new(&scenario.settings);
            for (index, phase) in scenario.phases.iter().enumerate() {
                bench.phase(&format!("{name}, phase {index}"), phase).await;
            }
            if let Some(most) = scenario.reversals_most {
                let moves = bench.moves();
                assert!(
                    !moves.is_empty() && reversals(&moves) <= most,
                    "{name}: {moves:?}"
                );
            }
            if let Some(task) = bench.task.take() {
                task.abort();
            }
            name
        };
        // A task of its own: one that fails must not hide the others.
        if let Err(err) = tokio::spawn(run).await {
            failed.push(err);
        }
    }
    assert!(failed.is_empty(), "{} scenarios failed", failed.len());
}

#[tokio::test(start_paused = true)]
async fn recommending_decides_the_same_and_writes_nothing() {
    let mut decided = Vec::new();
    for mode in ["live", "recommend"] {
        let mut bench = Bench::new(&[format!("mode={mode}")]);
        let phase = Phase {
            seconds: 120,
            demand: Some(3.0),
            ramp_to: None,
            swing: None,
            health: None,
            error: None,
            restart: None,
            expect: Expect::default(),
        };
        bench.phase(mode, &phase).await;
        bench
            .phase(
                mode,
                &Phase {
                    demand: Some(0.1),
                    seconds: 1200,
                    ..phase
                },
            )
            .await;
        decided.push(bench.moves());
        assert_eq!(bench.plant.writes() > 0, mode == "live");
        bench.kill();
    }
    assert!(!decided[0].is_empty());
    assert_eq!(decided[0], decided[1]);
}
