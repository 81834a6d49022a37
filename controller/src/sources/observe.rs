//! One engine's `/metrics`, checked and made into the law's inputs. What makes no sense is missing, never zero.

use std::collections::BTreeMap;

use super::checked::{self, Checked, ERROR, FIRST_TOKEN, INTER_TOKEN, sound};
use super::exposition::Samples;
use super::tracker::Tracker;
use super::window::Window;
use crate::law::{ClassMemory, KvMemory, Latency, ProcessMemory, Quality, Reading};

const STARTED: &str = "process_start_time_seconds";

/// What has been read of one engine.
#[derive(Debug)]
pub struct Observer {
    /// KV memory and queue.
    pub kv: Tracker<KvMemory>,
    /// The process's memory.
    pub process: Tracker<ProcessMemory>,
    scraped: Tracker<()>,
    first_token: Window,
    inter_token: Window,
    error: Window,
    started: Option<f64>,
}

fn wanted(name: &str) -> bool {
    name.starts_with("cinch_kv_")
        || [FIRST_TOKEN, INTER_TOKEN, ERROR]
            .iter()
            .any(|metric| name.starts_with(metric))
        || matches!(
            name,
            "cinch_requests_waiting" | "cinch_memory_limit_bytes" | "process_resident_memory_bytes" | STARTED
        )
}

impl Observer {
    /// Nothing read yet; latency and quality over `window` seconds.
    #[must_use]
    pub fn new(window: f64) -> Self {
        Self {
            kv: Tracker::default(),
            process: Tracker::default(),
            scraped: Tracker::default(),
            first_token: Window::new(FIRST_TOKEN, window),
            inter_token: Window::new(INTER_TOKEN, window),
            error: Window::new(ERROR, window),
            started: None,
        }
    }

    /// Latency and quality over `seconds` from now on.
    pub fn window(&mut self, seconds: f64) {
        for window in [&mut self.first_token, &mut self.inter_token, &mut self.error] {
            window.length = seconds;
        }
    }

    /// A scrape that failed.
    pub fn failed(&mut self, now: f64, reason: &str) {
        self.kv.failed(now, reason);
        self.process.failed(now, reason);
        self.scraped.failed(now, reason);
    }

    /// A scrape's text. Whether the engine's process is another than at the last one.
    ///
    /// # Errors
    /// A text that is no exposition; it counts as a failure.
    pub fn scraped(&mut self, now: f64, text: &str) -> Result<bool, super::exposition::ExpositionError> {
        let samples = match Samples::parse(text, wanted) {
            Ok(samples) => samples,
            Err(err) => {
                self.failed(now, &err.to_string());
                return Err(err);
            }
        };
        let started = samples.value(STARTED).filter(|at| at.is_finite());
        let restarted = matches!((self.started, started), (Some(before), Some(now)) if before != now);
        self.started = started.or(self.started);
        if restarted {
            // What was read of the process before says nothing of this one.
            for window in [&mut self.first_token, &mut self.inter_token, &mut self.error] {
                window.clear();
            }
            self.kv.forget();
            self.process.forget();
        }
        match memory(&samples) {
            Ok(memory) => self.kv.value(now, memory),
            Err(reason) => self.kv.failed(now, reason),
        }
        match process(&samples) {
            Ok(process) => self.process.value(now, process),
            Err(reason) => self.process.failed(now, reason),
        }
        for window in [&mut self.first_token, &mut self.inter_token, &mut self.error] {
            window.add(now, &samples);
        }
        self.scraped.value(now, ());
        Ok(restarted)
    }

    /// What a scrape says of all classes is as old as the scrape.
    fn with_age<'a, T>(
        &self,
        now: f64,
        value: Checked<T>,
        classes: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<String, Reading<T>> {
        let reading = match self.scraped.reading(now) {
            Reading::Fresh { age, .. } => Reading::Fresh { value, age },
            Reading::Stale { age } => Reading::Stale { age },
            Reading::Missing { reason, lost } => Reading::Missing { reason, lost },
        };
        checked::split(reading, classes)
    }

    /// Latency by class; what is missing for all is missing for each of `classes`.
    #[must_use]
    pub fn latency<'a>(
        &self,
        now: f64,
        classes: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<String, Reading<Latency>> {
        let inter_token = self.inter_token.observed();
        let all = self.first_token.observed().into_iter();
        let all = all.map(|(class, first)| {
            let next = inter_token.get(&class);
            let next = next.map_or((None, 0.0), |next| (next.quantile(0.95), next.count));
            let latency = checked::latency((first.quantile(0.95), first.count), next);
            (class, latency)
        });
        self.with_age(now, all.collect(), classes)
    }

    /// Quality by class; what is missing for all is missing for each of `classes`.
    #[must_use]
    pub fn quality<'a>(
        &self,
        now: f64,
        classes: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<String, Reading<Quality>> {
        let all = self.error.observed().into_iter();
        let all = all.map(|(class, error)| (class, checked::quality(error.sum, error.count)));
        self.with_age(now, all.collect(), classes)
    }
}

fn memory(samples: &Samples) -> Result<KvMemory, String> {
    let name = "cinch_kv_capacity_bytes";
    let capacity = samples.value(name).ok_or_else(|| format!("no {name}"))?;
    let capacity = sound(name, capacity)?;
    if capacity == 0.0 {
        return Err(format!("{name} is 0"));
    }
    let all = |name: &'static str| {
        let values = samples.by_class(name);
        if values.is_empty() {
            Err(format!("no {name}"))
        } else {
            Ok((name, values))
        }
    };
    let used = all("cinch_kv_bytes")?;
    let uncompressed = all("cinch_kv_uncompressed_bytes")?;
    let queued = all("cinch_kv_queued_bytes")?;
    let waiting = all("cinch_requests_waiting")?;
    let of = |(name, values): &(&str, BTreeMap<String, f64>), class: &str| {
        let value = values
            .get(class)
            .ok_or_else(|| format!("no {name} of class {class}"))?;
        sound(name, *value)
    };
    let mut classes = BTreeMap::new();
    for class in used.1.keys() {
        let memory = ClassMemory {
            used: of(&used, class)?,
            uncompressed: of(&uncompressed, class)?,
            queued: of(&queued, class)?,
            waiting: of(&waiting, class)?,
        };
        classes.insert(class.clone(), memory);
    }
    let held: f64 = classes.values().map(|class| class.used).sum();
    // The engine admits by it; far over it is not a reading of this capacity.
    if held > capacity * 2.0 {
        return Err(format!("{held} bytes held of a capacity of {capacity}"));
    }
    Ok(KvMemory { capacity, classes })
}

fn process(samples: &Samples) -> Result<ProcessMemory, String> {
    let of = |name: &str| {
        let value = samples.value(name).ok_or_else(|| format!("no {name}"))?;
        sound(name, value)
    };
    let (resident, limit) = (
        of("process_resident_memory_bytes")?,
        of("cinch_memory_limit_bytes")?,
    );
    if resident == 0.0 || resident > limit {
        return Err(format!("{resident} bytes resident of {limit}"));
    }
    Ok(ProcessMemory { resident, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(kv: &str, started: u32) -> String {
        format!(
            "cinch_kv_capacity_bytes 100\ncinch_kv_bytes{{class=\"a\"}} {kv}\ncinch_kv_uncompressed_bytes{{class=\"a\"}} 20\n\
             cinch_kv_queued_bytes{{class=\"a\"}} 5\ncinch_requests_waiting{{class=\"a\"}} 1\n\
             process_resident_memory_bytes 50\ncinch_memory_limit_bytes 80\nprocess_start_time_seconds {started}\n"
        )
    }

    #[test]
    fn what_makes_no_sense_is_missing_and_says_why() {
        for (kv, words) in [
            ("NaN", "cinch_kv_bytes is NaN"),
            ("-1", "cinch_kv_bytes is -1"),
            ("+Inf", "cinch_kv_bytes is inf"),
            ("1000", "1000 bytes held of a capacity of 100"),
        ] {
            let mut observer = Observer::new(60.0);
            observer.scraped(0.0, &text(kv, 1)).unwrap();
            let Reading::Missing { reason, lost: false } = observer.kv.reading(0.0) else {
                panic!("{kv}");
            };
            assert_eq!(reason, words);
            assert!(
                matches!(observer.process.reading(0.0), Reading::Fresh { .. }),
                "one input, not all"
            );
        }
        let mut observer = Observer::new(60.0);
        observer.scraped(0.0, "cinch_kv_capacity_bytes 100\n").unwrap();
        assert!(
            matches!(observer.kv.reading(0.0), Reading::Missing { .. }),
            "empty is not zero"
        );
        assert!(observer.scraped(0.0, "").is_err());
    }

    #[test]
    fn another_process_is_noticed() {
        let mut observer = Observer::new(60.0);
        assert_eq!(observer.scraped(0.0, &text("10", 1)), Ok(false));
        assert_eq!(observer.scraped(1.0, &text("10", 1)), Ok(false));
        assert_eq!(observer.scraped(2.0, &text("NaN", 2)), Ok(true));
        assert!(
            matches!(observer.kv.reading(2.0), Reading::Missing { .. }),
            "the old process's value is gone"
        );
    }
}
