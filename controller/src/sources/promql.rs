//! Latency and quality from a Prometheus over HTTP, for fleets whose requests one engine does not see.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::tracker::Tracker;
use crate::law::{Latency, Quality, Reading};
use crate::link::{Http, LinkError};

/// One engine's series in a Prometheus.
#[derive(Debug)]
pub struct Prometheus {
    http: Http,
    /// `{instance="…"}` or what else picks the engine's series.
    selector: String,
    window: u64,
    latency: Tracker<BTreeMap<String, Latency>>,
    quality: Tracker<BTreeMap<String, Quality>>,
}

#[derive(Deserialize)]
struct Answer {
    status: String,
    #[serde(default)]
    data: Option<Data>,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Deserialize)]
struct Data {
    result: Vec<Series>,
}

#[derive(Deserialize)]
struct Series {
    metric: BTreeMap<String, String>,
    value: (f64, String),
}

impl Prometheus {
    /// Asks `http` for the series that `selector` picks, over `window` seconds.
    #[must_use]
    pub fn new(http: Http, selector: &str, window: u64) -> Self {
        Self {
            http,
            selector: selector.to_owned(),
            window,
            latency: Tracker::default(),
            quality: Tracker::default(),
        }
    }

    /// Asks for everything; `now` in seconds since the controller started.
    pub async fn ask(&mut self, now: f64) {
        match self.ask_latency().await {
            Ok(latency) => self.latency.value(now, latency),
            Err(err) => self.latency.failed(now, err.to_string()),
        }
        match self.ask_quality().await {
            Ok(quality) => self.quality.value(now, quality),
            Err(err) => self.quality.failed(now, err.to_string()),
        }
    }

    async fn ask_latency(&self) -> Result<BTreeMap<String, Latency>, LinkError> {
        let quantile = |metric: &str| {
            let rate = self.rate(&format!("{metric}_bucket"));
            format!("histogram_quantile(0.95, sum by (le, class) ({rate}))")
        };
        let count = |metric: &str| format!("sum by (class) ({})", self.increase(&format!("{metric}_count")));
        let (first, next) = (
            "cinch_time_to_first_token_seconds",
            "cinch_inter_token_latency_seconds",
        );
        let ttft = self.query(&quantile(first)).await?;
        let ttft_samples = self.query(&count(first)).await?;
        let itl = self.query(&quantile(next)).await?;
        let itl_samples = self.query(&count(next)).await?;
        let all = ttft_samples.iter().map(|(class, samples)| {
            // Prometheus answers NaN for a quantile of nothing.
            let of =
                |values: &BTreeMap<String, f64>| values.get(class).copied().filter(|value| value.is_finite());
            let latency = Latency {
                ttft_p95: of(&ttft),
                ttft_samples: *samples,
                itl_p95: of(&itl),
                itl_samples: of(&itl_samples).unwrap_or(0.0),
            };
            (class.clone(), latency)
        });
        Ok(all.collect())
    }

    async fn ask_quality(&self) -> Result<BTreeMap<String, Quality>, LinkError> {
        let sum = |metric: &str| format!("sum by (class) ({})", self.increase(metric));
        let errors = self.query(&sum("cinch_attention_error_sum")).await?;
        let samples = self.query(&sum("cinch_attention_error_count")).await?;
        let all = samples.iter().map(|(class, samples)| {
            let sum = errors.get(class).copied().unwrap_or(f64::NAN);
            let error = if *samples > 0.0 { sum / samples } else { 0.0 };
            let samples = *samples;
            (class.clone(), Quality { error, samples })
        });
        Ok(all.collect())
    }

    fn rate(&self, metric: &str) -> String {
        format!("rate({metric}{}[{}s])", self.selector, self.window)
    }

    fn increase(&self, metric: &str) -> String {
        format!("increase({metric}{}[{}s])", self.selector, self.window)
    }

    /// An instant query's values by class. No series at all is a failure: `rate` keeps answering for a while
    /// after a target died, and answers nothing after that.
    async fn query(&self, query: &str) -> Result<BTreeMap<String, f64>, LinkError> {
        let text = self.http.get_query("/api/v1/query", query).await?;
        let answer: Answer = serde_json::from_str(&text).map_err(|err| LinkError::Body(err.to_string()))?;
        if answer.status != "success" {
            let why = answer.error.unwrap_or_else(|| answer.status.clone());
            return Err(LinkError::Body(format!("{query}: {why}")));
        }
        let all: BTreeMap<String, f64> = answer
            .data
            .into_iter()
            .flat_map(|data| data.result)
            .filter_map(|series| Some((series.metric.get("class")?.clone(), series.value.1.parse().ok()?)))
            .collect();
        if all.is_empty() {
            return Err(LinkError::Body(format!("{query}: no series")));
        }
        Ok(all)
    }

    /// Latency by class.
    #[must_use]
    pub fn latency(&self, now: f64) -> BTreeMap<String, Reading<Latency>> {
        split(self.latency.reading(now))
    }

    /// Quality by class.
    #[must_use]
    pub fn quality(&self, now: f64) -> BTreeMap<String, Reading<Quality>> {
        split(self.quality.reading(now))
    }
}

/// A reading of all classes as one of each; what is missing for all is absent for each.
fn split<T>(reading: Reading<BTreeMap<String, T>>) -> BTreeMap<String, Reading<T>> {
    match reading {
        Reading::Fresh { value, age } => value
            .into_iter()
            .map(|(class, value)| (class, Reading::Fresh { value, age }))
            .collect(),
        Reading::Stale { .. } | Reading::Missing { .. } => BTreeMap::new(),
    }
}
