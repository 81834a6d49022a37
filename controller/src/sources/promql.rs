//! Latency and quality from a Prometheus, where one sees more than the controller's own scrapes: any number of
//! replicas, and the time before it started. Nobody waits for it: it is asked aside, and what it said last has an age.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::checked::{self, Checked, ERROR, FIRST_TOKEN, INTER_TOKEN};
use super::tracker::Tracker;
use crate::config::Settings;
use crate::law::{LOST, Latency, Quality, Reading};
use crate::link::{Http, LinkError};

/// Between two questions. A tick acts on what is at most 2 s old.
const PERIOD: Duration = Duration::from_secs(1);

/// The label that says which part of the question a series answers.
const PART: &str = "cinch_part";

/// One engine's series in a Prometheus, asked for until this is dropped.
#[derive(Debug)]
pub struct Prometheus {
    start: Instant,
    seen: watch::Receiver<Seen>,
    /// Ends with its owner.
    _asking: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Seen {
    latency: Tracker<Checked<Latency>>,
    quality: Tracker<Checked<Quality>>,
}

#[derive(Deserialize)]
struct Answer {
    status: String,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    data: Option<Data>,
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

/// Values by part of the question, then by class; a part that is of no class has the class "".
type Parts = BTreeMap<String, BTreeMap<String, f64>>;

impl Prometheus {
    /// Asks `http` for the series that `selector` picks, over the window that `settings` say at the time.
    #[must_use]
    pub fn new(http: Http, selector: &str, settings: watch::Receiver<Arc<Settings>>) -> Self {
        let start = Instant::now();
        let (tell, seen) = watch::channel(Seen::default());
        let selector = selector.to_owned();
        let mut asking = JoinSet::new();
        asking.spawn(async move {
            let mut due = interval(PERIOD);
            due.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                due.tick().await;
                let window = settings.borrow().law.quality_window;
                // What it says is true of some moment since it was asked: the earliest counts.
                let at = start.elapsed().as_secs_f64();
                let answer = ask(&http, &selector, window).await;
                let now = start.elapsed().as_secs_f64();
                tell.send_modify(|seen| seen.take(at, now, answer));
            }
        });
        Self {
            start,
            seen,
            _asking: asking,
        }
    }

    /// Latency by class; what is missing for all is missing for each of `classes`.
    #[must_use]
    pub fn latency<'a>(&self, classes: impl Iterator<Item = &'a str>) -> BTreeMap<String, Reading<Latency>> {
        let now = self.start.elapsed().as_secs_f64();
        checked::split(self.seen.borrow().latency.reading(now), classes)
    }

    /// Quality by class; what is missing for all is missing for each of `classes`.
    #[must_use]
    pub fn quality<'a>(&self, classes: impl Iterator<Item = &'a str>) -> BTreeMap<String, Reading<Quality>> {
        let now = self.start.elapsed().as_secs_f64();
        checked::split(self.seen.borrow().quality.reading(now), classes)
    }
}

impl Seen {
    fn take(&mut self, at: f64, now: f64, answer: Result<Parts, LinkError>) {
        match answer {
            Ok(parts) => {
                self.latency.value(at, latency(&parts));
                self.quality.value(at, quality(&parts));
            }
            Err(err) => {
                self.latency.failed(now, err.to_string());
                self.quality.failed(now, err.to_string());
            }
        }
    }
}

/// One instant query for everything, so that all of it is of one moment.
fn question(selector: &str, window: f64) -> String {
    let window = (window * 1000.0).round();
    let over = |function: &str, metric: &str, suffix: &str| {
        format!("{function}({metric}_{suffix}{selector}[{window}ms])")
    };
    let p95 = |metric: &str| {
        let rate = over("rate", metric, "bucket");
        format!("histogram_quantile(0.95, sum by (le, class) ({rate}))")
    };
    let sum = |metric: &str, suffix: &str| format!("sum by (class) ({})", over("increase", metric, suffix));
    let parts = [
        ("up", format!("min(up{selector})")),
        ("age", format!("max(time() - timestamp(up{selector}))")),
        ("first_p95", p95(FIRST_TOKEN)),
        ("first_count", sum(FIRST_TOKEN, "count")),
        ("next_p95", p95(INTER_TOKEN)),
        ("next_count", sum(INTER_TOKEN, "count")),
        ("error_sum", sum(ERROR, "sum")),
        ("error_count", sum(ERROR, "count")),
    ];
    let named = parts.map(|(name, part)| format!("label_replace({part}, {PART:?}, {name:?}, \"\", \"\")"));
    named.join(" or ")
}

async fn ask(http: &Http, selector: &str, window: f64) -> Result<Parts, LinkError> {
    let text = http
        .get_query("/api/v1/query", &question(selector, window))
        .await?;
    let answer: Answer = serde_json::from_str(&text).map_err(|err| LinkError::Body(err.to_string()))?;
    if answer.status != "success" {
        return Err(LinkError::Body(answer.error.unwrap_or(answer.status)));
    }
    let mut parts = Parts::new();
    for series in answer.data.into_iter().flat_map(|data| data.result) {
        let (_, text) = series.value;
        let value = text.parse();
        let value = value.map_err(|_| LinkError::Body(format!("{text:?} is no number")))?;
        let label = |name: &str| series.metric.get(name).cloned().unwrap_or_default();
        parts
            .entry(label(PART))
            .or_default()
            .insert(label("class"), value);
    }
    alive(&parts, selector)?;
    Ok(parts)
}

/// `rate` keeps answering for a window after its target died: `up`, and how long ago that was looked at, say more.
fn alive(parts: &Parts, selector: &str) -> Result<(), LinkError> {
    let of = |name: &str| parts.get(name).and_then(|part| part.get("")).copied();
    let (Some(up), Some(age)) = (of("up"), of("age")) else {
        return Err(LinkError::Body(format!("no series up{selector}")));
    };
    if up != 1.0 {
        return Err(LinkError::Body(format!(
            "up{selector} is {up}: it can't scrape the engine"
        )));
    }
    // Written so that NaN is too old.
    if age <= LOST.as_secs_f64() {
        Ok(())
    } else {
        Err(LinkError::Body(format!("it scraped the engine {age:.0} s ago")))
    }
}

fn latency(parts: &Parts) -> Checked<Latency> {
    let (first, next) = (parts.get("first_count"), parts.get("next_count"));
    let classes = first.into_iter().chain(next).flat_map(BTreeMap::keys);
    let all = classes.map(|class| {
        let of = |name: &str| parts.get(name).and_then(|part| part.get(class)).copied();
        let percentile = |p95, count| (of(p95), of(count).unwrap_or(0.0));
        let latency = checked::latency(
            percentile("first_p95", "first_count"),
            percentile("next_p95", "next_count"),
        );
        (class.clone(), latency)
    });
    all.collect()
}

fn quality(parts: &Parts) -> Checked<Quality> {
    let sums = parts.get("error_sum");
    let all = parts
        .get("error_count")
        .into_iter()
        .flatten()
        .map(|(class, count)| {
            let sum = sums.and_then(|sums| sums.get(class)).copied();
            (class.clone(), checked::quality(sum.unwrap_or(f64::NAN), *count))
        });
    all.collect()
}
