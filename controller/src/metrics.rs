//! `/metrics` of the controller.

use prometheus::core::Collector;
use prometheus::proto::Metric;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::config::Mode;
use crate::law::{ConditionKind, Decision, Phase, Rule};
use crate::shared::EngineStatus;

/// A tick is some round trips on a local network.
const STEP_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

/// Series of an engine that are there from its first tick on: a rate needs a zero to begin from, and a condition that
/// never held is 0, not unknown.
const RULES: [Rule; 6] = [
    Rule::Up,
    Rule::Latency,
    Rule::Critical,
    Rule::Down,
    Rule::QualitySoft,
    Rule::QualityHard,
];
const CALLS: [&str; 3] = ["put", "requests", "patch"];
const WRITTEN: [&str; 3] = ["ok", "refused", "failed"];
const SCRAPED: [&str; 3] = ["ok", "garbage", "failed"];
/// Conditions of an engine as a whole.
const OF_ENGINE: [ConditionKind; 7] = [
    ConditionKind::MemoryMissing,
    ConditionKind::ProcessMissing,
    ConditionKind::LevelsMissing,
    ConditionKind::AllLost,
    ConditionKind::QualityCapped,
    ConditionKind::ActuatorIneffective,
    ConditionKind::EngineRestarted,
];
/// Conditions of one class.
const OF_CLASS: [ConditionKind; 4] = [
    ConditionKind::LatencyMissing,
    ConditionKind::QualityMissing,
    ConditionKind::FlapDetected,
    ConditionKind::Unmanaged,
];
// The last one's number: each kind is in one of the two.
const _: () = assert!(OF_ENGINE.len() + OF_CLASS.len() == ConditionKind::EngineRestarted as usize + 1);

/// The process's metrics.
pub struct Metrics {
    registry: Registry,
    mode: IntGaugeVec,
    level: IntGaugeVec,
    demand: GaugeVec,
    projected: GaugeVec,
    usage: GaugeVec,
    phase: IntGaugeVec,
    condition: IntGaugeVec,
    moves: IntCounterVec,
    writes: IntCounterVec,
    age: GaugeVec,
    scrapes: IntCounterVec,
    epoch: IntGauge,
    step: Histogram,
    reloads: IntCounterVec,
    config_valid: IntGauge,
}

fn add<T: Collector + Clone + 'static>(registry: &Registry, metric: T) -> prometheus::Result<T> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

impl Metrics {
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let opts = |name: &str, help: &str| Opts::new(format!("cinch_controller_{name}"), help);
        let gauges =
            |name: &str, help: &str, labels: &[&str]| add(r, GaugeVec::new(opts(name, help), labels)?);
        let whole =
            |name: &str, help: &str, labels: &[&str]| add(r, IntGaugeVec::new(opts(name, help), labels)?);
        let counts =
            |name: &str, help: &str, labels: &[&str]| add(r, IntCounterVec::new(opts(name, help), labels)?);
        let build = whole("build_info", "1; the version is in the label.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        #[cfg(target_os = "linux")]
        registry.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))?;
        let metrics = Self {
            mode: whole("mode", "1 for the mode in force.", &["mode"])?,
            level: whole(
                "level",
                "Level wanted for new requests of a class.",
                &["engine", "class"],
            )?,
            demand: gauges(
                "demand_ratio",
                "KV demand as if at level 0, of capacity.",
                &["engine"],
            )?,
            projected: gauges(
                "projected_ratio",
                "KV demand at the present levels, of capacity.",
                &["engine"],
            )?,
            usage: gauges("usage_ratio", "KV bytes held, of capacity.", &["engine"])?,
            phase: whole("phase", "1 for the phase an engine is in.", &["engine", "phase"])?,
            condition: whole(
                "condition",
                "1 while a condition holds.",
                &["engine", "kind", "class"],
            )?,
            moves: counts(
                "moves_total",
                "Changes of level decided.",
                &["engine", "class", "rule"],
            )?,
            writes: counts(
                "writes_total",
                "Calls that change something at an engine.",
                &["engine", "call", "result"],
            )?,
            age: gauges(
                "input_age_seconds",
                "Seconds since an input was last read.",
                &["engine", "input"],
            )?,
            scrapes: counts("scrapes_total", "Scrapes of an engine.", &["engine", "result"])?,
            epoch: add(
                r,
                IntGauge::with_opts(opts(
                    "epoch",
                    "Epoch this controller writes with; 0 before its first write.",
                ))?,
            )?,
            step: add(
                r,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "cinch_controller_step_seconds",
                        "Duration of a tick of one engine.",
                    )
                    .buckets(STEP_BUCKETS.to_vec()),
                )?,
            )?,
            reloads: counts(
                "config_reloads_total",
                "Changed settings files read.",
                &["result"],
            )?,
            config_valid: add(
                r,
                IntGauge::with_opts(opts(
                    "config_valid",
                    "0 while the settings file's present content is refused and older settings are in force.",
                ))?,
            )?,
            registry: registry.clone(),
        };
        for result in ["ok", "refused"] {
            metrics.reloads.with_label_values(&[result]);
        }
        metrics.config_valid.set(1);
        Ok(metrics)
    }

    /// The text of a scrape.
    ///
    /// # Errors
    /// The encoder failed.
    pub fn render(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    pub(crate) fn mode(&self, mode: Mode) {
        for one in Mode::ALL {
            self.mode
                .with_label_values(&[one.name()])
                .set(i64::from(one == mode));
        }
    }

    pub(crate) fn epoch(&self, epoch: u64) {
        self.epoch.set(i64::try_from(epoch).unwrap_or(i64::MAX));
    }

    pub(crate) fn scraped(&self, engine: &str, result: &str) {
        self.scrapes.with_label_values(&[engine, result]).inc();
    }

    pub(crate) fn wrote(&self, engine: &str, call: &str, result: &str) {
        self.writes.with_label_values(&[engine, call, result]).inc();
    }

    pub(crate) fn stepped(&self, seconds: f64) {
        self.step.observe(seconds);
    }

    /// A changed settings file was read.
    pub(crate) fn reloaded(&self, taken: bool) {
        let result = if taken { "ok" } else { "refused" };
        self.reloads.with_label_values(&[result]).inc();
        self.config_valid.set(i64::from(taken));
    }

    pub(crate) fn moved(&self, engine: &str, decision: &Decision) {
        for made in &decision.moves {
            self.moves(engine, &made.class, made.rule).inc();
        }
    }

    fn moves(&self, engine: &str, class: &str, rule: Rule) -> IntCounter {
        let rule = serde_json::to_value(rule).unwrap_or_default();
        let rule = rule.as_str().unwrap_or_default();
        self.moves.with_label_values(&[engine, class, rule])
    }

    /// Makes the series of an engine exist.
    fn touch(&self, status: &EngineStatus) {
        let engine = status.name.as_str();
        for result in SCRAPED {
            self.scrapes.with_label_values(&[engine, result]);
        }
        for call in CALLS {
            for result in WRITTEN {
                self.writes.with_label_values(&[engine, call, result]);
            }
        }
        for kind in OF_ENGINE {
            self.condition.with_label_values(&[engine, kind.name(), ""]);
        }
        for class in status.levels.keys() {
            for rule in RULES {
                self.moves(engine, class, rule);
            }
            for kind in OF_CLASS {
                self.condition.with_label_values(&[engine, kind.name(), class]);
            }
        }
    }

    /// The gauges of one engine. What is not known now has no series: an old value would look alive.
    pub(crate) fn engine(&self, status: &EngineStatus, ages: [(&'static str, Option<f64>); 2]) {
        let engine = status.name.as_str();
        self.touch(status);
        for (gauge, value) in [
            (&self.demand, status.demand),
            (&self.projected, status.projected),
            (&self.usage, status.usage),
        ] {
            match value {
                Some(value) => gauge.with_label_values(&[engine]).set(value),
                None => {
                    let _never_set = gauge.remove_label_values(&[engine]);
                }
            }
        }
        for metric in series(&self.level, engine) {
            let class = label(&metric, "class");
            if !status.wanted.contains_key(class) {
                let _just_listed = self.level.remove_label_values(&[engine, class]);
            }
        }
        for (class, level) in &status.wanted {
            self.level
                .with_label_values(&[engine, class])
                .set(i64::from(*level));
        }
        for phase in Phase::ALL {
            let now = i64::from(status.phase == Some(phase));
            self.phase.with_label_values(&[engine, phase.name()]).set(now);
        }
        for (input, age) in ages {
            match age {
                Some(age) => self.age.with_label_values(&[engine, input]).set(age),
                None => {
                    let _never_set = self.age.remove_label_values(&[engine, input]);
                }
            }
        }
        for metric in series(&self.condition, engine) {
            let of = [engine, label(&metric, "kind"), label(&metric, "class")];
            self.condition.with_label_values(&of).set(0);
        }
        for held in &status.conditions {
            let class = held.condition.class.as_deref().unwrap_or("");
            self.condition
                .with_label_values(&[engine, held.condition.kind.name(), class])
                .set(1);
        }
    }
}

/// The series of one engine.
fn series(gauges: &IntGaugeVec, engine: &str) -> Vec<Metric> {
    let families = gauges.collect().into_iter();
    let all = families.flat_map(|mut family| family.take_metric());
    all.filter(|metric| label(metric, "engine") == engine).collect()
}

fn label<'a>(metric: &'a Metric, name: &str) -> &'a str {
    let found = metric.get_label().iter().find(|label| label.name() == name);
    found.map_or("", |label| label.value())
}
