//! Histograms over a sliding window, from cumulative scrapes. A counter that falls begins anew: what it counted
//! before says nothing about the process that counts now.

use std::collections::{BTreeMap, VecDeque};

use super::exposition::Samples;

/// Scrapes that a window is kept in: how exactly its beginning is known.
const STEPS: f64 = 64.0;

/// A cumulative histogram of one class.
#[derive(Debug, Clone, PartialEq, Default)]
struct Histogram {
    /// Upper bound and count of samples at most that, in order.
    buckets: Vec<(f64, f64)>,
    sum: f64,
    count: f64,
}

/// What was observed within a window.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Observed {
    buckets: Vec<(f64, f64)>,
    /// Samples.
    pub(super) count: f64,
    /// Their sum.
    pub(super) sum: f64,
}

impl Observed {
    /// A quantile in 0 ..= 1, interpolated within its bucket as Prometheus does; none without samples.
    #[must_use]
    pub(super) fn quantile(&self, q: f64) -> Option<f64> {
        if self.count <= 0.0 {
            return None;
        }
        let rank = q * self.count;
        let mut below = (0.0, 0.0);
        for &(bound, count) in &self.buckets {
            if count >= rank {
                if bound.is_infinite() {
                    // Beyond the last bound nothing is known but that it is beyond.
                    return Some(below.0);
                }
                let within = if count > below.1 {
                    (rank - below.1) / (count - below.1)
                } else {
                    1.0
                };
                return Some(below.0 + (bound - below.0) * within);
            }
            below = (bound, count);
        }
        None
    }
}

/// One metric's histograms by class, over the last `length` seconds.
#[derive(Debug, Clone)]
pub(super) struct Window {
    metric: String,
    /// Seconds.
    pub(super) length: f64,
    scrapes: VecDeque<(f64, BTreeMap<String, Histogram>)>,
}

impl Window {
    /// An empty window of `length` seconds.
    #[must_use]
    pub(super) fn new(metric: &str, length: f64) -> Self {
        Self {
            metric: metric.to_owned(),
            length,
            scrapes: VecDeque::new(),
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.scrapes.clear();
    }

    /// Adds a scrape taken at `now` seconds.
    pub(super) fn add(&mut self, now: f64, samples: &Samples) {
        let mut all: BTreeMap<String, Histogram> = BTreeMap::new();
        for (class, sum) in samples.by_class(&format!("{}_sum", self.metric)) {
            all.entry(class).or_default().sum = sum;
        }
        for (class, count) in samples.by_class(&format!("{}_count", self.metric)) {
            all.entry(class).or_default().count = count;
        }
        for (labels, count) in samples.series(&format!("{}_bucket", self.metric)) {
            let bound = match labels.get("le").map(String::as_str) {
                Some("+Inf") => f64::INFINITY,
                Some(bound) => bound.parse().unwrap_or(f64::NAN),
                None => f64::NAN,
            };
            if let Some(class) = labels.get("class").filter(|_| !bound.is_nan()) {
                all.entry(class.clone())
                    .or_default()
                    .buckets
                    .push((bound, *count));
            }
        }
        for histogram in all.values_mut() {
            histogram.buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        let fell = self.scrapes.back().is_some_and(|(_, before)| {
            before
                .iter()
                .any(|(class, old)| all.get(class).is_none_or(|new| new.count < old.count))
        });
        if fell {
            self.clear();
        }
        // A long window keeps no more scrapes than a short one: the newest makes way until it is a step away.
        if let [.., before, newest] = self.scrapes.make_contiguous()
            && newest.0 - before.0 < self.length / STEPS
        {
            self.scrapes.pop_back();
        }
        self.scrapes.push_back((now, all));
        while self.scrapes.len() > 2 && self.scrapes[1].0 <= now - self.length {
            self.scrapes.pop_front();
        }
    }

    /// What was observed within the window, by class; nothing before the second scrape.
    #[must_use]
    pub(super) fn observed(&self) -> BTreeMap<String, Observed> {
        let (Some((_, first)), Some((_, last))) = (self.scrapes.front(), self.scrapes.back()) else {
            return BTreeMap::new();
        };
        let none = Histogram::default();
        last.iter()
            .map(|(class, new)| {
                let old = first.get(class).unwrap_or(&none);
                let before = |index: usize| old.buckets.get(index).map_or(0.0, |(_, count)| *count);
                let buckets = new.buckets.iter().enumerate();
                let observed = Observed {
                    buckets: buckets
                        .map(|(i, (bound, count))| (*bound, count - before(i)))
                        .collect(),
                    count: new.count - old.count,
                    sum: new.sum - old.sum,
                };
                (class.clone(), observed)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrape(counts: [f64; 3], sum: f64) -> Samples {
        let [a, b, all] = counts;
        let text = format!(
            "h_bucket{{class=\"x\",le=\"1\"}} {a}\nh_bucket{{class=\"x\",le=\"2\"}} {b}\n\
             h_bucket{{class=\"x\",le=\"+Inf\"}} {all}\nh_sum{{class=\"x\"}} {sum}\nh_count{{class=\"x\"}} {all}\n"
        );
        Samples::parse(&text, |_| true).unwrap()
    }

    #[test]
    fn counts_only_what_the_window_saw() {
        let mut window = Window::new("h", 60.0);
        window.add(0.0, &scrape([100.0, 100.0, 100.0], 50.0));
        assert_eq!(window.observed()["x"].quantile(0.5), None);
        window.add(30.0, &scrape([100.0, 110.0, 110.0], 65.0));
        let seen = window.observed()["x"].clone();
        assert_eq!((seen.count, seen.sum), (10.0, 15.0));
        assert_eq!(seen.quantile(0.5), Some(1.5));
        window.add(90.0, &scrape([100.0, 110.0, 110.0], 65.0));
        assert_eq!(
            window.observed()["x"].count,
            0.0,
            "half a minute ago is outside by now"
        );
    }

    #[test]
    fn a_long_window_keeps_few_scrapes_and_counts_the_same() {
        let mut window = Window::new("h", 3600.0);
        for second in 0..10_000 {
            let count = f64::from(second);
            window.add(count, &scrape([count, count, count], count));
        }
        assert!(window.scrapes.len() <= 67, "{} scrapes", window.scrapes.len());
        let counted = window.observed()["x"].count;
        assert!(
            (3600.0..3600.0 + 3600.0 / STEPS + 1.0).contains(&counted),
            "{counted}"
        );
    }

    #[test]
    fn a_counter_that_falls_begins_anew() {
        let mut window = Window::new("h", 60.0);
        window.add(0.0, &scrape([100.0, 100.0, 100.0], 50.0));
        window.add(1.0, &scrape([0.0, 1.0, 2.0], 5.0));
        assert_eq!(window.observed()["x"].count, 0.0);
        window.add(2.0, &scrape([0.0, 1.0, 3.0], 8.0));
        assert_eq!(window.observed()["x"].count, 1.0);
        assert_eq!(
            window.observed()["x"].quantile(0.95),
            Some(2.0),
            "beyond the last bound"
        );
    }
}
