//! What is done, what is found, and when the rest will be done.

use std::time::{Duration, Instant};

use tracing::info;

/// Costs are in any unit, as long as it is one.
pub(super) struct Progress {
    start: Instant,
    done: f64,
    all: f64,
}

impl Progress {
    /// Of work that costs `all` together.
    pub(super) fn new(all: f64) -> Self {
        Self {
            start: Instant::now(),
            done: 0.0,
            all,
        }
    }

    /// Something that cost `cost` is done.
    pub(super) fn step(&mut self, cost: f64, what: &str) {
        self.done += cost;
        info!("{}: {what}", line(self.start.elapsed(), self.done, self.all));
    }
}

fn line(elapsed: Duration, done: f64, all: f64) -> String {
    let share = if all > 0.0 { (done / all).min(1.0) } else { 1.0 };
    let left = elapsed.as_secs_f64() * (1.0 - share) / share.max(f64::MIN_POSITIVE);
    format!("{:.0} %, {} left", share * 100.0, duration(left))
}

/// `3 min 20 s`.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_goes_by_what_the_rest_costs() {
        let after = |seconds, done| line(Duration::from_secs(seconds), done, 200.0);
        assert_eq!(after(60, 50.0), "25 %, 3 min 0 s left");
        assert_eq!(after(10, 200.0), "100 %, 0 s left");
        assert_eq!(after(7200, 50.0), "25 %, 6 h 0 min left");
        assert_eq!(line(Duration::from_secs(1), 0.0, 0.0), "100 %, 0 s left");
        assert_eq!(duration(59.4), "59 s");
    }
}
