//! Registering metrics, and moving them to figures that are kept elsewhere.

use prometheus::core::Collector;
use prometheus::{
    CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
};

pub(super) fn add<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

pub(super) fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    add(registry, IntGauge::new(name, help)?)
}

pub(super) fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    add(registry, IntCounter::new(name, help)?)
}

/// By class.
pub(super) fn gauges(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGaugeVec> {
    add(registry, IntGaugeVec::new(Opts::new(name, help), &["class"])?)
}

/// By class, with fractions.
pub(super) fn float_gauges(registry: &Registry, name: &str, help: &str) -> prometheus::Result<GaugeVec> {
    add(registry, GaugeVec::new(Opts::new(name, help), &["class"])?)
}

/// By class.
pub(super) fn counters(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounterVec> {
    add(registry, IntCounterVec::new(Opts::new(name, help), &["class"])?)
}

/// By class, with fractions.
pub(super) fn float_counters(registry: &Registry, name: &str, help: &str) -> prometheus::Result<CounterVec> {
    add(registry, CounterVec::new(Opts::new(name, help), &["class"])?)
}

/// By class.
pub(super) fn histograms(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> prometheus::Result<HistogramVec> {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    add(registry, HistogramVec::new(options, &["class"])?)
}

/// Moves a counter up to a total kept elsewhere.
pub(super) fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
