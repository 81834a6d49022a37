//! `/metrics`. Gauges and totals of the plugin are read when a scrape asks; what only this process's
//! handlers know (latencies, outcomes) is observed as it happens, and nothing that was not measured is.

mod cache;
mod outcome;
mod policy;
mod process;
mod register;
mod requests;

use std::sync::{Arc, Mutex, PoisonError};

use cinch_protocol::Ladder;
use prometheus::core::Collector;
use prometheus::{Encoder, Gauge, Registry, TextEncoder};

use crate::admission::Admission;
use crate::classes::Classes;
use crate::kv::{ClassTotals, Kv};
use cache::Cache;
pub use outcome::Outcome;
use policy::PolicyMetrics;
use register::{add, signed};
use requests::Requests;

struct Inner {
    registry: Registry,
    /// One scrape at a time: counters are moved up to the plugin's totals.
    scrape: Mutex<()>,
    cache: Cache,
    policy: PolicyMetrics,
    requests: Requests,
    ready: Gauge,
}

/// The process's metrics.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

impl Metrics {
    /// All metrics, with a series for each of `classes` from the start: a rate needs a zero to begin from.
    ///
    /// # Errors
    /// A metric is defined twice: a mistake in this module.
    pub fn new(classes: &[String], ladder: &Ladder, kernels: &str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        process::register(&registry, ladder, kernels)?;
        let inner = Inner {
            cache: Cache::new(&registry)?,
            policy: PolicyMetrics::new(&registry)?,
            requests: Requests::new(&registry)?,
            ready: add(
                &registry,
                Gauge::new("cinch_ready", "1 once the model is loaded and self-tested.")?,
            )?,
            scrape: Mutex::new(()),
            registry,
        };
        for class in classes {
            inner.cache.set_class(class, &ClassTotals::default());
            inner.requests.touch(class);
        }
        Ok(Self(Arc::new(inner)))
    }

    /// The configured capacity.
    pub fn set_capacity(&self, bytes: u64) {
        self.0.cache.capacity.set(signed(bytes));
    }

    /// Whether requests are served.
    pub fn set_ready(&self, ready: bool) {
        self.0.ready.set(if ready { 1.0 } else { 0.0 });
    }

    /// A request was accepted.
    pub fn begin(&self, class: &str) {
        self.0.requests.in_flight.with_label_values(&[class]).inc();
    }

    /// An accepted request ended.
    pub fn end(&self, class: &str, outcome: Outcome) {
        self.0.requests.in_flight.with_label_values(&[class]).dec();
        self.count(class, outcome);
    }

    /// A request ended, accepted or not.
    pub fn count(&self, class: &str, outcome: Outcome) {
        let ended = &self.0.requests.ended;
        ended.with_label_values(&[class, outcome.name()]).inc();
    }

    /// Tokens were generated and sent.
    pub fn generated(&self, class: &str, tokens: usize) {
        let generated = &self.0.requests.generated;
        generated.with_label_values(&[class]).inc_by(tokens as u64);
    }

    /// A measured time to first token.
    pub fn first_token(&self, class: &str, seconds: f64) {
        let histogram = &self.0.requests.first_token;
        histogram.with_label_values(&[class]).observe(seconds);
    }

    /// A measured time between two tokens.
    pub fn inter_token(&self, class: &str, seconds: f64) {
        let histogram = &self.0.requests.inter_token;
        histogram.with_label_values(&[class]).observe(seconds);
    }

    /// A request's mean time a token, first excluded.
    pub fn per_output_token(&self, class: &str, seconds: f64) {
        let histogram = &self.0.requests.per_output_token;
        histogram.with_label_values(&[class]).observe(seconds);
    }

    /// How long a request waited to be admitted.
    pub fn waited(&self, class: &str, seconds: f64) {
        let histogram = &self.0.requests.waited;
        histogram.with_label_values(&[class]).observe(seconds);
    }

    /// Whether the watermark is in force.
    pub fn set_watermark(&self, active: bool) {
        self.0.policy.watermark.set(i64::from(active));
    }

    /// The watermark has tightened a request.
    pub fn watermark_retuned(&self) {
        self.0.policy.watermark_retunes.inc();
    }

    /// A measured relative error of attention output.
    pub fn attention_error(&self, class: &str, value: f64) {
        let histogram = &self.0.requests.error;
        histogram.with_label_values(&[class]).observe(value);
    }

    /// The exposition, `text/plain; version=0.0.4`.
    ///
    /// # Errors
    /// A metric can't be encoded.
    pub fn render(&self, kv: &Kv, classes: &Classes, admission: &Admission) -> prometheus::Result<Vec<u8>> {
        let inner = &self.0;
        inner.cache.reserved.set(signed(admission.reserved_bytes()));
        let _one = inner.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        inner.cache.set(&kv.totals());
        inner.policy.set(classes);
        if !kv.on() {
            for family in inner.requests.in_flight.collect() {
                for metric in family.get_metric() {
                    let class = metric
                        .get_label()
                        .first()
                        .map(|label| label.value())
                        .unwrap_or_default();
                    let running = metric.get_gauge().get_value() as i64;
                    inner.cache.running.with_label_values(&[class]).set(running);
                }
            }
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&inner.registry.gather(), &mut text)?;
        Ok(text)
    }
}
