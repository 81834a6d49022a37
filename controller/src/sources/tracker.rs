//! A value with its age and its failures: fresh, stale, missing or lost.

use crate::law::{FRESH, LOST, LOST_FAILURES, Reading};

/// The last value of one input. Times are seconds since the controller started.
#[derive(Debug, Clone)]
pub struct Tracker<T> {
    last: Option<(f64, T)>,
    first_asked: Option<f64>,
    failures: u32,
    reason: String,
}

impl<T> Default for Tracker<T> {
    fn default() -> Self {
        Self {
            last: None,
            first_asked: None,
            failures: 0,
            reason: "not read yet".to_owned(),
        }
    }
}

impl<T: Clone> Tracker<T> {
    /// A value, taken at `now`.
    pub fn value(&mut self, now: f64, value: T) {
        self.first_asked.get_or_insert(now);
        self.last = Some((now, value));
        self.failures = 0;
    }

    /// A reading that failed, or made no sense.
    pub fn failed(&mut self, now: f64, reason: impl Into<String>) {
        self.first_asked.get_or_insert(now);
        self.failures = self.failures.saturating_add(1);
        self.reason = reason.into();
    }

    /// Forgets the value: it is another process's.
    pub fn forget(&mut self) {
        self.last = None;
    }

    /// Seconds since the last value.
    pub fn age(&self, now: f64) -> Option<f64> {
        self.last.as_ref().map(|(at, _)| now - at)
    }

    /// What may be made of it at `now`.
    pub fn reading(&self, now: f64) -> Reading<T> {
        let since = self.last.as_ref().map(|(at, _)| *at).or(self.first_asked);
        let silent = since.map_or(0.0, |since| now - since);
        let lost = self.failures >= LOST_FAILURES || silent > LOST.as_secs_f64();
        match &self.last {
            Some((at, value)) if now - at <= FRESH.as_secs_f64() => Reading::Fresh {
                value: value.clone(),
                age: now - at,
            },
            Some((at, _)) if self.failures == 0 && !lost => Reading::Stale { age: now - at },
            _ => Reading::Missing {
                reason: self.reason.clone(),
                lost,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_ages_and_is_lost() {
        let mut tracker = Tracker::default();
        assert!(matches!(
            tracker.reading(0.0),
            Reading::Missing { lost: false, .. }
        ));
        tracker.value(1.0, 7);
        assert!(matches!(tracker.reading(2.5), Reading::Fresh { value: 7, .. }));
        assert!(matches!(tracker.reading(4.0), Reading::Stale { .. }));
        assert!(matches!(
            tracker.reading(32.0),
            Reading::Missing { lost: true, .. }
        ));
        tracker.failed(4.0, "refused");
        assert!(matches!(
            tracker.reading(4.5),
            Reading::Missing { lost: false, .. }
        ));
        tracker.failed(5.0, "refused");
        tracker.failed(6.0, "refused");
        assert!(matches!(
            tracker.reading(6.0),
            Reading::Missing { lost: true, .. }
        ));
        tracker.value(7.0, 8);
        assert!(matches!(tracker.reading(7.0), Reading::Fresh { value: 8, .. }));
    }
}
