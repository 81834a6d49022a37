//! The KV caches, by class and in all: the plugin's own totals, taken over at each scrape.

use prometheus::{CounterVec, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

use super::register::{counter, counters, float_counters, float_gauges, gauge, gauges, raise, signed};
use crate::kv::{ClassTotals, KvTotals};

pub(super) struct Cache {
    pub(super) capacity: IntGauge,
    pub(super) reserved: IntGauge,
    /// With the plugin off, the process's own count of requests in flight is put there.
    pub(super) running: IntGaugeVec,
    waiting: IntGaugeVec,
    bytes: IntGaugeVec,
    queued_bytes: IntGaugeVec,
    uncompressed_bytes: IntGaugeVec,
    kept: GaugeVec,
    seen: IntGaugeVec,
    compressions: IntCounterVec,
    evicted: CounterVec,
    retunes: IntCounterVec,
    allocated: IntGauge,
    peak: IntGauge,
    prefix_bytes: IntGauge,
    prefix_entries: IntGauge,
    prefix_hits: IntCounter,
    prefix_misses: IntCounter,
}

impl Cache {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            capacity: gauge(r, "cinch_kv_capacity_bytes", "The configured KV capacity.")?,
            reserved: gauge(
                r,
                "cinch_kv_reserved_bytes",
                "Bytes that admitted requests hold or may grow to.",
            )?,
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
            kept: float_gauges(
                r,
                "cinch_kept_tokens",
                "Rows held for live requests, mean over layers and heads.",
            )?,
            seen: gauges(r, "cinch_seen_tokens", "Tokens processed, of live requests.")?,
            compressions: counters(
                r,
                "cinch_compression_events_total",
                "Compressions of a sequence's layers.",
            )?,
            evicted: float_counters(
                r,
                "cinch_evicted_tokens_total",
                "Tokens evicted, mean over layers and heads.",
            )?,
            retunes: counters(r, "cinch_retunes_total", "Policy changes of live requests.")?,
            allocated: gauge(
                r,
                "cinch_kv_allocated_bytes",
                "Bytes of all KV blocks, prefix cache included; a block that several share counts once.",
            )?,
            peak: gauge(
                r,
                "cinch_kv_peak_bytes",
                "The most that cinch_kv_allocated_bytes ever was.",
            )?,
            prefix_bytes: gauge(
                r,
                "cinch_prefix_cache_bytes",
                "Bytes that finished prefixes hold.",
            )?,
            prefix_entries: gauge(r, "cinch_prefix_cache_entries", "Finished prefixes held.")?,
            prefix_hits: counter(
                r,
                "cinch_prefix_cache_hits_total",
                "Requests that began with a finished prefix.",
            )?,
            prefix_misses: counter(
                r,
                "cinch_prefix_cache_misses_total",
                "Requests that found no finished prefix.",
            )?,
        })
    }

    /// One scrape at a time: counters are moved up to the plugin's totals.
    pub(super) fn set(&self, totals: &KvTotals) {
        self.allocated.set(signed(totals.allocated_bytes));
        self.peak.set(signed(totals.peak_bytes));
        self.prefix_bytes.set(signed(totals.prefix_bytes));
        self.prefix_entries.set(signed(totals.prefix_entries));
        raise(&self.prefix_hits, totals.prefix_hits);
        raise(&self.prefix_misses, totals.prefix_misses);
        for (class, totals) in &totals.classes {
            self.set_class(class, totals);
        }
    }

    pub(super) fn set_class(&self, class: &str, totals: &ClassTotals) {
        let label = &[class];
        let set = |gauge: &IntGaugeVec, value| gauge.with_label_values(label).set(signed(value));
        set(&self.bytes, totals.bytes);
        set(&self.queued_bytes, totals.queued_bytes);
        set(&self.uncompressed_bytes, totals.uncompressed_bytes);
        self.kept.with_label_values(label).set(totals.kept);
        set(&self.seen, totals.seen);
        set(&self.running, totals.running);
        set(&self.waiting, totals.queued);
        raise(
            &self.compressions.with_label_values(label),
            totals.compression_events,
        );
        let evicted = self.evicted.with_label_values(label);
        evicted.inc_by((totals.evicted_tokens - evicted.get()).max(0.0));
        raise(&self.retunes.with_label_values(label), totals.retunes);
    }
}
