//! `/metrics`. Gauges and totals of the plugin are read when a scrape asks; what only this process's
//! handlers know (latencies, outcomes) is observed as it happens, and nothing that was not measured is.

use prometheus::core::Collector;
use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use cinch_protocol::Ladder;

use crate::admission::Admission;
use crate::classes::Classes;
use crate::http::Refusal;
use crate::kv::{ClassTotals, Kv};
use crate::memory;

/// vLLM's buckets of `vllm:time_to_first_token_seconds`, so that dashboards compare.
const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's buckets of `vllm:inter_token_latency_seconds`.
const INTER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// From int8 (about 0.002) to an eviction that hurts.
const ERROR_BUCKETS: &[f64] = &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Ok,
    /// The engine failed.
    Error,
    /// The client went away, or the server stopped.
    Canceled,
    /// Not taken: bad input, or not ready.
    Rejected,
    /// Not taken: no room for it.
    Overloaded,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Ok,
        Self::Error,
        Self::Canceled,
        Self::Rejected,
        Self::Overloaded,
    ];

    /// Of a request that was refused.
    #[must_use]
    pub fn of(refusal: &Refusal) -> Self {
        match refusal.status() {
            _ if refusal.0.overload.is_some() => Self::Overloaded,
            StatusCode::SERVICE_UNAVAILABLE => Self::Canceled,
            status if status.is_client_error() => Self::Rejected,
            _ => Self::Error,
        }
    }

    /// The label's value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Canceled => "canceled",
            Self::Rejected => "rejected",
            Self::Overloaded => "overloaded",
        }
    }
}

struct ByClass {
    bytes: IntGaugeVec,
    queued_bytes: IntGaugeVec,
    uncompressed_bytes: IntGaugeVec,
    kept: GaugeVec,
    seen: IntGaugeVec,
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    compressions: IntCounterVec,
    evicted: CounterVec,
    retunes: IntCounterVec,
}

struct Inner {
    registry: Registry,
    /// One scrape at a time: counters are moved up to the plugin's totals.
    scrape: Mutex<()>,
    by_class: ByClass,
    capacity: IntGauge,
    allocated: IntGauge,
    peak: IntGauge,
    prefix_bytes: IntGauge,
    prefix_entries: IntGauge,
    prefix_hits: IntCounter,
    prefix_misses: IntCounter,
    ready: Gauge,
    reserved: IntGauge,
    watermark: IntGauge,
    watermark_retunes: IntCounter,
    waited: HistogramVec,
    class_level: IntGaugeVec,
    lease_remaining: GaugeVec,
    lease_expired: IntCounterVec,
    stale_writes: IntCounter,
    requests: IntCounterVec,
    in_flight: IntGaugeVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    per_output_token: HistogramVec,
    error: HistogramVec,
}

/// The process's metrics.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

impl Metrics {
    /// All metrics, with a series for each of `classes` from the start: a rate needs a zero to begin from.
    ///
    /// # Errors
    /// A metric is defined twice: a mistake in this file.
    pub fn new(classes: &[String], ladder: &Ladder) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let build = IntGaugeVec::new(
            Opts::new("cinch_build_info", "1; the versions are in the labels."),
            &["version", "mistralrs", "candle"],
        )?;
        build
            .with_label_values(&[env!("CARGO_PKG_VERSION"), "0.8.1", "0.11.1"])
            .set(1);
        add(&registry, build)?;
        let ratios = GaugeVec::new(
            Opts::new(
                "cinch_ladder_bytes_ratio",
                "Bytes that a ladder level holds of those level 0 holds, as measured.",
            ),
            &["level", "name"],
        )?;
        for level in &ladder.levels {
            let number = level.level.to_string();
            let label = [number.as_str(), level.name.as_str()];
            ratios.with_label_values(&label).set(level.bytes_ratio);
        }
        add(&registry, ratios)?;
        if let Some(limit) = memory::limit_bytes() {
            let gauge = IntGauge::new(
                "cinch_memory_limit_bytes",
                "Memory that this process may use: the control group's limit, or the machine's memory.",
            )?;
            gauge.set(signed(limit));
            add(&registry, gauge)?;
        }
        #[cfg(target_os = "linux")]
        registry.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))?;

        let r = &registry;
        let inner = Inner {
            by_class: ByClass {
                bytes: gauges(
                    r,
                    "cinch_kv_bytes",
                    "Bytes that the KV caches of live requests hold, measured.",
                )?,
                queued_bytes: gauges(
                    r,
                    "cinch_kv_queued_bytes",
                    "Bytes that the prompts of waiting requests would take in f16.",
                )?,
                uncompressed_bytes: gauges(
                    r,
                    "cinch_kv_uncompressed_bytes",
                    "Bytes that live requests' caches would hold in f16, nothing evicted.",
                )?,
                kept: add(
                    r,
                    GaugeVec::new(
                        Opts::new(
                            "cinch_kept_tokens",
                            "Rows held for live requests, mean over layers and heads.",
                        ),
                        &["class"],
                    )?,
                )?,
                seen: gauges(r, "cinch_seen_tokens", "Tokens processed, of live requests.")?,
                running: gauges(
                    r,
                    "cinch_requests_running",
                    "Requests being processed. With kv.plugin off, all in flight.",
                )?,
                waiting: gauges(
                    r,
                    "cinch_requests_waiting",
                    "Requests accepted and not begun. With kv.plugin off, unknown and 0.",
                )?,
                compressions: counters(
                    r,
                    "cinch_compression_events_total",
                    "Compressions of a sequence's layers.",
                )?,
                evicted: add(
                    r,
                    CounterVec::new(
                        Opts::new(
                            "cinch_evicted_tokens_total",
                            "Tokens evicted, mean over layers and heads.",
                        ),
                        &["class"],
                    )?,
                )?,
                retunes: counters(r, "cinch_retunes_total", "Policy changes of live requests.")?,
            },
            capacity: add(
                r,
                IntGauge::new("cinch_kv_capacity_bytes", "The configured KV capacity.")?,
            )?,
            allocated: add(
                r,
                IntGauge::new(
                    "cinch_kv_allocated_bytes",
                    "Bytes of all KV blocks, prefix cache included; a block that several share counts once.",
                )?,
            )?,
            peak: add(
                r,
                IntGauge::new(
                    "cinch_kv_peak_bytes",
                    "The most that cinch_kv_allocated_bytes ever was.",
                )?,
            )?,
            prefix_bytes: add(
                r,
                IntGauge::new("cinch_prefix_cache_bytes", "Bytes that finished prefixes hold.")?,
            )?,
            prefix_entries: add(
                r,
                IntGauge::new("cinch_prefix_cache_entries", "Finished prefixes held.")?,
            )?,
            prefix_hits: add(
                r,
                IntCounter::new(
                    "cinch_prefix_cache_hits_total",
                    "Requests that began with a finished prefix.",
                )?,
            )?,
            prefix_misses: add(
                r,
                IntCounter::new(
                    "cinch_prefix_cache_misses_total",
                    "Requests that found no finished prefix.",
                )?,
            )?,
            ready: add(
                r,
                Gauge::new("cinch_ready", "1 once the model is loaded and self-tested.")?,
            )?,
            reserved: add(
                r,
                IntGauge::new(
                    "cinch_kv_reserved_bytes",
                    "Bytes that admitted requests hold or may grow to.",
                )?,
            )?,
            watermark: add(
                r,
                IntGauge::new(
                    "cinch_watermark_active",
                    "1 from the time live requests hold more than the high mark until they hold less than the low one.",
                )?,
            )?,
            watermark_retunes: add(
                r,
                IntCounter::new(
                    "cinch_watermark_retunes_total",
                    "Running requests that the watermark has tightened.",
                )?,
            )?,
            waited: histograms(
                r,
                "cinch_admission_waited_seconds",
                "From a request's arrival at the gate to its admission; those not admitted are not counted.",
                FIRST_TOKEN_BUCKETS,
            )?,
            class_level: gauges(
                r,
                "cinch_class_level",
                "Ladder level of a class's next requests; absent while its policy is no level.",
            )?,
            lease_remaining: add(
                r,
                GaugeVec::new(
                    Opts::new(
                        "cinch_lease_remaining_seconds",
                        "Seconds until a class returns to its configured policy; absent without a lease.",
                    ),
                    &["class"],
                )?,
            )?,
            lease_expired: counters(
                r,
                "cinch_lease_expired_total",
                "Leases of a class that have run out.",
            )?,
            stale_writes: add(
                r,
                IntCounter::new(
                    "cinch_stale_writes_total",
                    "Writes refused because a write of a newer epoch had been seen.",
                )?,
            )?,
            requests: add(
                r,
                IntCounterVec::new(
                    Opts::new(
                        "cinch_requests_total",
                        "Requests by how they ended: ok, error, canceled, rejected, overloaded.",
                    ),
                    &["class", "outcome"],
                )?,
            )?,
            // Feeds `running` when the plugin is off; not exported by itself.
            in_flight: IntGaugeVec::new(
                Opts::new("cinch_requests_in_flight", "Requests in flight."),
                &["class"],
            )?,
            first_token: histograms(
                r,
                "cinch_time_to_first_token_seconds",
                "From the request's arrival to its first token. Where a request has several choices and does not \
                 stream, it is not measured.",
                FIRST_TOKEN_BUCKETS,
            )?,
            inter_token: histograms(
                r,
                "cinch_inter_token_latency_seconds",
                "Between two tokens of a streaming request; not measured for others.",
                INTER_TOKEN_BUCKETS,
            )?,
            per_output_token: histograms(
                r,
                "cinch_time_per_output_token_seconds",
                "Mean time of a request's tokens after the first, one observation a request.",
                INTER_TOKEN_BUCKETS,
            )?,
            error: histograms(
                r,
                "cinch_attention_error",
                "Relative error of attention output, compressed against exact, where a compression measured it.",
                ERROR_BUCKETS,
            )?,
            scrape: Mutex::new(()),
            registry,
        };
        let metrics = Self(Arc::new(inner));
        for class in classes {
            metrics.touch(class);
        }
        Ok(metrics)
    }

    /// Makes the series of a class exist.
    fn touch(&self, class: &str) {
        let label = &[class];
        let inner = &self.0;
        inner.set(class, &ClassTotals::default());
        inner.in_flight.with_label_values(label);
        for outcome in Outcome::ALL {
            inner.requests.with_label_values(&[class, outcome.name()]);
        }
        for histogram in [
            &inner.first_token,
            &inner.inter_token,
            &inner.per_output_token,
            &inner.error,
            &inner.waited,
        ] {
            histogram.with_label_values(label);
        }
    }

    /// The configured capacity.
    pub fn set_capacity(&self, bytes: u64) {
        self.0.capacity.set(signed(bytes));
    }

    /// Whether requests are served.
    pub fn set_ready(&self, ready: bool) {
        self.0.ready.set(if ready { 1.0 } else { 0.0 });
    }

    /// A request was accepted.
    pub fn begin(&self, class: &str) {
        self.0.in_flight.with_label_values(&[class]).inc();
    }

    /// An accepted request ended.
    pub fn end(&self, class: &str, outcome: Outcome) {
        self.0.in_flight.with_label_values(&[class]).dec();
        self.count(class, outcome);
    }

    /// A request ended, accepted or not.
    pub fn count(&self, class: &str, outcome: Outcome) {
        self.0.requests.with_label_values(&[class, outcome.name()]).inc();
    }

    /// A measured time to first token.
    pub fn first_token(&self, class: &str, seconds: f64) {
        self.0.first_token.with_label_values(&[class]).observe(seconds);
    }

    /// A measured time between two tokens.
    pub fn inter_token(&self, class: &str, seconds: f64) {
        self.0.inter_token.with_label_values(&[class]).observe(seconds);
    }

    /// A request's mean time a token, first excluded.
    pub fn per_output_token(&self, class: &str, seconds: f64) {
        self.0
            .per_output_token
            .with_label_values(&[class])
            .observe(seconds);
    }

    /// How long a request waited to be admitted.
    pub fn waited(&self, class: &str, seconds: f64) {
        self.0.waited.with_label_values(&[class]).observe(seconds);
    }

    /// Whether the watermark is in force.
    pub fn set_watermark(&self, active: bool) {
        self.0.watermark.set(i64::from(active));
    }

    /// The watermark has tightened a request.
    pub fn watermark_retuned(&self) {
        self.0.watermark_retunes.inc();
    }

    /// A measured relative error of attention output.
    pub fn attention_error(&self, class: &str, value: f64) {
        self.0.error.with_label_values(&[class]).observe(value);
    }

    /// The exposition, `text/plain; version=0.0.4`.
    ///
    /// # Errors
    /// A metric can't be encoded.
    pub fn render(&self, kv: &Kv, classes: &Classes, admission: &Admission) -> prometheus::Result<Vec<u8>> {
        let inner = &self.0;
        inner.reserved.set(signed(admission.reserved_bytes()));
        let _one = inner.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let totals = kv.totals();
        inner.allocated.set(signed(totals.allocated_bytes));
        inner.peak.set(signed(totals.peak_bytes));
        inner.prefix_bytes.set(signed(totals.prefix_bytes));
        inner.prefix_entries.set(signed(totals.prefix_entries));
        raise(&inner.prefix_hits, totals.prefix_hits);
        raise(&inner.prefix_misses, totals.prefix_misses);
        for (class, totals) in &totals.classes {
            inner.set(class, totals);
        }
        raise(&inner.stale_writes, classes.stale_writes());
        // Rebuilt each time, since a series is absent while there is nothing to say.
        inner.class_level.reset();
        inner.lease_remaining.reset();
        for figures in classes.figures() {
            let label = &[figures.class.as_str()];
            raise(&inner.lease_expired.with_label_values(label), figures.expired);
            if let Some(level) = figures.level {
                inner.class_level.with_label_values(label).set(i64::from(level));
            }
            if let Some(seconds) = figures.lease_seconds {
                inner.lease_remaining.with_label_values(label).set(seconds);
            }
        }
        if !kv.on() {
            for family in inner.in_flight.collect() {
                for metric in family.get_metric() {
                    let class = metric
                        .get_label()
                        .first()
                        .map(|label| label.value())
                        .unwrap_or_default();
                    let running = metric.get_gauge().get_value();
                    inner
                        .by_class
                        .running
                        .with_label_values(&[class])
                        .set(running as i64);
                }
            }
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&inner.registry.gather(), &mut text)?;
        Ok(text)
    }
}

impl Inner {
    fn set(&self, class: &str, totals: &ClassTotals) {
        let label = &[class];
        let to = &self.by_class;
        to.bytes.with_label_values(label).set(signed(totals.bytes));
        to.queued_bytes
            .with_label_values(label)
            .set(signed(totals.queued_bytes));
        to.uncompressed_bytes
            .with_label_values(label)
            .set(signed(totals.uncompressed_bytes));
        to.kept.with_label_values(label).set(totals.kept);
        to.seen.with_label_values(label).set(signed(totals.seen));
        to.running.with_label_values(label).set(signed(totals.running));
        to.waiting.with_label_values(label).set(signed(totals.queued));
        raise(
            &to.compressions.with_label_values(label),
            totals.compression_events,
        );
        let evicted = to.evicted.with_label_values(label);
        evicted.inc_by((totals.evicted_tokens - evicted.get()).max(0.0));
        raise(&to.retunes.with_label_values(label), totals.retunes);
    }
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn gauges(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGaugeVec> {
    add(registry, IntGaugeVec::new(Opts::new(name, help), &["class"])?)
}

fn counters(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounterVec> {
    add(registry, IntCounterVec::new(Opts::new(name, help), &["class"])?)
}

fn histograms(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> prometheus::Result<HistogramVec> {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    add(registry, HistogramVec::new(options, &["class"])?)
}

/// Moves a counter up to a total kept elsewhere.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
