//! How soon it is worth coming back: the queue's length over the rate at which requests have ended.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back ends count.
const WINDOW: Duration = Duration::from_secs(60);
/// Ends that are remembered: more a minute need no finer answer than a second.
const MOST: usize = 4096;
/// Seconds to come back in where nothing has ended yet.
const UNKNOWN: u64 = 10;

#[derive(Debug, Default)]
pub(super) struct Pace {
    ends: VecDeque<Instant>,
}

impl Pace {
    pub(super) fn ended(&mut self, now: Instant) {
        self.ends.push_back(now);
        if self.ends.len() > MOST {
            self.ends.pop_front();
        }
    }

    /// Whole seconds until `ahead` requests will have ended, at least 1 and at most `most`.
    pub(super) fn seconds(&mut self, ahead: usize, now: Instant, most: u64) -> u64 {
        while let Some(end) = self.ends.front() {
            if now.saturating_duration_since(*end) <= WINDOW {
                break;
            }
            self.ends.pop_front();
        }
        let seconds = match self.ends.front() {
            None => UNKNOWN,
            Some(first) => {
                let span = now.saturating_duration_since(*first).as_secs_f64().max(1.0);
                (ahead as f64 * span / self.ends.len() as f64).ceil() as u64
            }
        };
        seconds.clamp(1, most.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_over_the_rate() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut pace = Pace::default();
        assert_eq!(pace.seconds(5, start, 600), UNKNOWN, "nothing has ended yet");
        for second in 0..10 {
            pace.ended(at(second));
        }
        // Ten in ten seconds.
        assert_eq!(pace.seconds(25, at(10), 600), 25);
        assert_eq!(pace.seconds(0, at(10), 600), 1);
        assert_eq!(pace.seconds(2500, at(10), 600), 600);
        // Slower since: ten in fifty.
        assert_eq!(pace.seconds(2, at(50), 600), 10);
        assert_eq!(pace.seconds(2, at(1000), 600), UNKNOWN, "old ends say nothing");
    }
}
