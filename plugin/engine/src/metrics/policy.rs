//! What requests are served with: levels and leases of classes, and the watermark.

use prometheus::{GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

use super::register::{counter, counters, float_gauges, gauge, gauges, raise};
use crate::classes::Classes;

pub(super) struct PolicyMetrics {
    pub(super) watermark: IntGauge,
    pub(super) watermark_retunes: IntCounter,
    class_level: IntGaugeVec,
    lease_remaining: GaugeVec,
    lease_expired: IntCounterVec,
    stale_writes: IntCounter,
}

impl PolicyMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            watermark: gauge(
                r,
                "cinch_watermark_active",
                "1 from the time live requests hold more than the high mark until they hold less than the low one.",
            )?,
            watermark_retunes: counter(
                r,
                "cinch_watermark_retunes_total",
                "Running requests that the watermark has tightened.",
            )?,
            class_level: gauges(
                r,
                "cinch_class_level",
                "Ladder level of a class's next requests; absent while its policy is no level.",
            )?,
            lease_remaining: float_gauges(
                r,
                "cinch_lease_remaining_seconds",
                "Seconds until a class returns to its configured policy; absent without a lease.",
            )?,
            lease_expired: counters(
                r,
                "cinch_lease_expired_total",
                "Leases that ran out while their class was away from its configured policy: nobody renewed them.",
            )?,
            stale_writes: counter(
                r,
                "cinch_stale_writes_total",
                "Writes refused because a write of a newer epoch had been seen.",
            )?,
        })
    }

    /// One scrape at a time.
    pub(super) fn set(&self, classes: &Classes) {
        raise(&self.stale_writes, classes.stale_writes());
        // Rebuilt each time, since a series is absent while there is nothing to say.
        self.class_level.reset();
        self.lease_remaining.reset();
        for figures in classes.figures() {
            let label = &[figures.class.as_str()];
            raise(&self.lease_expired.with_label_values(label), figures.expired);
            if let Some(level) = figures.level {
                self.class_level.with_label_values(label).set(i64::from(level));
            }
            if let Some(seconds) = figures.lease_seconds {
                self.lease_remaining.with_label_values(label).set(seconds);
            }
        }
    }
}
