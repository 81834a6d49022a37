//! What the user sees of a long step: what it does, that it goes on, how long it took.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// A step that is going on. Reports on stderr; stdout is for results.
pub(crate) struct Step {
    started: Instant,
    shown: Instant,
    terminal: bool,
    dirty: bool,
}

/// Between two reports: often on a terminal, where they overwrite one line; rarely in a log.
const TERMINAL: Duration = Duration::from_millis(100);
const LOG: Duration = Duration::from_secs(10);

impl Step {
    /// Says what begins.
    pub(crate) fn start(what: impl AsRef<str>) -> Self {
        eprintln!("==> {}", what.as_ref());
        let now = Instant::now();
        Self {
            started: now,
            shown: now,
            terminal: std::io::stderr().is_terminal(),
            dirty: false,
        }
    }

    /// Says how far it is, as a share.
    pub(crate) fn progress(&mut self, done: u64, total: u64, what: &str) {
        let percent = (done * 100).checked_div(total).unwrap_or(100);
        self.report(&format!("{percent:3} % {what}"));
    }

    /// Says that it goes on, where nothing else is known.
    pub(crate) fn waiting(&mut self, what: &str) {
        let elapsed = seconds(self.started.elapsed());
        self.report(&format!("{what}, {elapsed}"));
    }

    /// Says that it is done, and how long it took.
    pub(crate) fn done(mut self, result: impl AsRef<str>) {
        self.say(result);
    }

    /// As [`done`](Self::done), of a part of it.
    pub(crate) fn say(&mut self, result: impl AsRef<str>) {
        self.clear();
        eprintln!("    {} ({})", result.as_ref(), seconds(self.started.elapsed()));
    }

    fn report(&mut self, line: &str) {
        let pause = if self.terminal { TERMINAL } else { LOG };
        if self.shown.elapsed() < pause {
            return;
        }
        self.shown = Instant::now();
        if self.terminal {
            self.clear();
            eprint!("    {line}");
            // Progress that cannot be shown is not worth failing for.
            let _ = std::io::stderr().flush();
            self.dirty = true;
        } else {
            eprintln!("    {line}");
        }
    }

    fn clear(&mut self) {
        if self.dirty {
            eprint!("\r\x1b[K");
            self.dirty = false;
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A duration as a person says it.
pub(crate) fn seconds(duration: Duration) -> String {
    let total = duration.as_secs();
    match total {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..120 => format!("{total} s"),
        _ => format!("{} min {:02} s", total / 60, total % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        let say = |millis| seconds(Duration::from_millis(millis));
        assert_eq!(
            [say(0), say(2_340), say(59_900), say(605_000)],
            ["0.0 s", "2.3 s", "59 s", "10 min 05 s"]
        );
    }
}
