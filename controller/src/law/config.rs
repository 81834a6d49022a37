//! Every number of the law, with its range. Ratios are of capacity unless said otherwise; times are seconds.

use cinch_settings::FieldFault;
use serde::{Deserialize, Serialize};

/// The law's numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LawConfig {
    /// Tighten when demand at the present levels is over this. 0.1 ..= 1.0.
    pub up: f64,
    /// Loosen when demand one level lower would be at most this; `up / down` is the error of the measured byte
    /// ratios that cannot make it swing. 0.05 ..= 0.95 · `up`.
    pub down: f64,
    /// Bytes held over this are critical. `up` ..= 1.0.
    pub critical: f64,
    /// So is a cache that will be full within this many seconds at the present rate. 1 ..= 300.
    pub full_within: f64,
    /// Process memory over this share of its limit tightens. 0.1 ..= 1.0.
    pub process: f64,
    /// More waiting requests than this tighten, 0 ..= 10000, …
    pub queue: f64,
    /// … while bytes held are over this. 0.0 ..= 1.0.
    pub queue_usage: f64,
    /// Watch only, after a start, but for critical. 0 ..= 3600.
    pub warm_up: f64,
    /// Between two tightenings. 1 ..= 3600.
    pub up_cooldown: f64,
    /// Between two critical ones. 1 ..= `up_cooldown`.
    pub critical_cooldown: f64,
    /// Between two loosenings. 1 ..= 86400.
    pub down_cooldown: f64,
    /// Demand must have been low this long before anything is loosened. 1 ..= 86400.
    pub down_window: f64,
    /// Latency over this multiple of its objective counts. 1.0 ..= 10.0.
    pub latency_tolerance: f64,
    /// Samples a latency must rest on. 1 ..= 100000.
    pub latency_samples: f64,
    /// Samples an attention error must rest on. 1 ..= 100000.
    pub quality_samples: f64,
    /// Length of a quality window. 1 ..= 3600.
    pub quality_window: f64,
    /// An error over the floor times this is answered at once. 1.0 ..= 10.0.
    pub quality_hard: f64,
    /// A level that broke the floor is barred this long, doubling each time, 1 ..= 86400, …
    pub bar: f64,
    /// … up to this. `bar` ..= 604800.
    pub bar_most: f64,
    /// More changes of direction an hour than this freeze a class. 1 ..= 60.
    pub reversals: u32,
    /// A frozen class stays so this long. 1 ..= 86400.
    pub freeze: f64,
    /// A step that changes what caused it by less than this share had no effect; after two, the cause is ignored
    /// until it is gone. 0.0 ..= 0.9.
    pub effect: f64,
}

impl Default for LawConfig {
    fn default() -> Self {
        Self {
            up: 0.85,
            down: 0.70,
            critical: 0.92,
            full_within: 15.0,
            process: 0.85,
            queue: 5.0,
            queue_usage: 0.6,
            warm_up: 60.0,
            up_cooldown: 15.0,
            critical_cooldown: 5.0,
            down_cooldown: 120.0,
            down_window: 300.0,
            latency_tolerance: 1.10,
            latency_samples: 20.0,
            quality_samples: 12.0,
            quality_window: 60.0,
            quality_hard: 1.5,
            bar: 1800.0,
            bar_most: 14_400.0,
            reversals: 4,
            freeze: 3600.0,
            effect: 0.10,
        }
    }
}

impl LawConfig {
    /// Checks every number against its range.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<(), FieldFault> {
        let range = |field: &str, given: f64, low: f64, high: f64| {
            // Written so that NaN is out of range.
            if given >= low && given <= high {
                Ok(())
            } else {
                Err(FieldFault::new(field, given, format!("{low} to {high}")))
            }
        };
        range("up", self.up, 0.1, 1.0)?;
        range("down", self.down, 0.05, 0.95 * self.up)?;
        range("critical", self.critical, self.up, 1.0)?;
        range("full_within", self.full_within, 1.0, 300.0)?;
        range("process", self.process, 0.1, 1.0)?;
        range("queue", self.queue, 0.0, 10_000.0)?;
        range("queue_usage", self.queue_usage, 0.0, 1.0)?;
        range("warm_up", self.warm_up, 0.0, 3600.0)?;
        range("up_cooldown", self.up_cooldown, 1.0, 3600.0)?;
        range("critical_cooldown", self.critical_cooldown, 1.0, self.up_cooldown)?;
        range("down_cooldown", self.down_cooldown, 1.0, 86_400.0)?;
        range("down_window", self.down_window, 1.0, 86_400.0)?;
        range("latency_tolerance", self.latency_tolerance, 1.0, 10.0)?;
        range("latency_samples", self.latency_samples, 1.0, 100_000.0)?;
        range("quality_samples", self.quality_samples, 1.0, 100_000.0)?;
        range("quality_window", self.quality_window, 1.0, 3600.0)?;
        range("quality_hard", self.quality_hard, 1.0, 10.0)?;
        range("bar", self.bar, 1.0, 86_400.0)?;
        range("bar_most", self.bar_most, self.bar, 604_800.0)?;
        range("reversals", f64::from(self.reversals), 1.0, 60.0)?;
        range("freeze", self.freeze, 1.0, 86_400.0)?;
        range("effect", self.effect, 0.0, 0.9)
    }
}

/// What a class of requests bears.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClassBounds {
    /// Never looser than this level.
    pub min_level: u32,
    /// Never tighter than this one; absent: the ladder's last.
    pub max_level: Option<u32>,
    /// Classes of a lower rank give way first and recover last. 0 ..= 100.
    pub rank: u32,
    /// 95 % of first tokens are to come within this, 0.001 ..= 3600; absent: no objective.
    pub ttft_slo: Option<f64>,
    /// 95 % of further tokens are to come within this, 0.001 ..= 3600; absent: no objective.
    pub itl_slo: Option<f64>,
    /// The mean attention error is to stay under this, 0.0001 ..= 10; absent: no floor.
    pub error_floor: Option<f64>,
}

impl Default for ClassBounds {
    fn default() -> Self {
        Self {
            min_level: 0,
            max_level: None,
            rank: 50,
            ttft_slo: None,
            itl_slo: None,
            error_floor: None,
        }
    }
}

impl ClassBounds {
    /// Checks every number against its range.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<(), FieldFault> {
        if let Some(most) = self.max_level.filter(|most| *most < self.min_level) {
            let allowed = format!("{} (min_level) or more", self.min_level);
            return Err(FieldFault::new("max_level", most, allowed));
        }
        if self.rank > 100 {
            return Err(FieldFault::new("rank", self.rank, "0 to 100"));
        }
        for (field, given, low, high) in [
            ("ttft_slo", self.ttft_slo, 0.001, 3600.0),
            ("itl_slo", self.itl_slo, 0.001, 3600.0),
            ("error_floor", self.error_floor, 0.0001, 10.0),
        ] {
            if let Some(given) = given.filter(|given| !(*given >= low && *given <= high)) {
                return Err(FieldFault::new(field, given, format!("{low} to {high}")));
            }
        }
        Ok(())
    }

    /// The tightest level allowed on a ladder of `levels` levels.
    #[must_use]
    pub fn most(&self, levels: usize) -> u32 {
        let last = u32::try_from(levels.saturating_sub(1)).unwrap_or(u32::MAX);
        self.max_level.unwrap_or(last).min(last)
    }
}
