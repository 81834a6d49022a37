//! What is shown while the load runs: pure formatting.

use std::time::Duration;

use super::board::Tally;
use super::figures::Latency;
use super::format::{bar, clock, heat, label, mb, percent, time};
use super::screen::{Line, Style};
use super::watch::{Moved, Seen};

/// The class of the load's requests: they name none.
pub(super) const CLASS: &str = "default";
/// Columns of the bar.
const BAR: usize = 40;
/// Moves that are listed.
const MOVES: usize = 8;

/// What does not change while the load runs.
pub(super) struct Scene {
    pub(super) mode: &'static str,
    pub(super) requests: usize,
    pub(super) prompt_tokens: usize,
    pub(super) max_tokens: usize,
    pub(super) fit: usize,
    pub(super) capacity: u64,
    /// Names of the ladder's levels.
    pub(super) ladder: Vec<String>,
    pub(super) ttft_slo: f64,
    pub(super) itl_slo: f64,
}

/// One moment.
pub(super) struct Moment<'a> {
    pub(super) elapsed: Duration,
    pub(super) tally: &'a Tally,
    pub(super) seen: &'a Seen,
    /// What is going on, beside the load.
    pub(super) note: &'a str,
}

impl Scene {
    /// A frame.
    pub(super) fn frame(&self, now: &Moment<'_>) -> Vec<Line> {
        let (seen, tally) = (now.seen, now.tally);
        let used = seen.capacity.as_ref().map_or(0, |capacity| capacity.used_bytes);
        let share = used as f64 / self.capacity.max(1) as f64;
        let of_capacity = |bytes: u64| bytes as f64 / self.capacity.max(1) as f64;
        let peak = of_capacity(seen.peak_bytes);
        let reserved = of_capacity(seen.capacity.as_ref().map_or(0, |it| it.reserved_bytes));
        let (full, empty) = bar(share, BAR);
        let mut lines = vec![
            Line::plain("  ")
                .and(Style::Bold, format!("cinch demo  {}", clock(now.elapsed)))
                .and(Style::Plain, format!("  {}", now.note)),
            Line::plain("  ").and(Style::Dim, self.setting()),
            Line::default(),
            label("KV bytes")
                .and(heat(share), full)
                .and(Style::Dim, empty)
                .and(Style::Plain, format!(" {}", percent(share)))
                .and(
                    Style::Plain,
                    format!(
                        "  {} of {}; reserved {}, peak {}",
                        mb(used),
                        mb(self.capacity),
                        percent(reserved).trim_start(),
                        percent(peak).trim_start()
                    ),
                ),
            label("demand").and(Style::Plain, self.demand(seen)),
            label("requests").and(Style::Plain, self.requests(tally, seen)),
            label("running at").and(Style::Plain, self.running(seen)),
            label("latency").and(Style::Plain, self.latency(tally)),
            label("controller").and(Style::Plain, self.controller(seen)),
        ];
        for condition in seen.status.conditions.iter().take(2) {
            let text = format!("{}: {}", condition.kind, condition.message);
            lines.push(label("").and(Style::Warm, text));
        }
        lines.push(Line::default());
        lines.push(label("decisions").and(Style::Dim, if seen.moves.is_empty() { "none yet" } else { "" }));
        let skip = seen.moves.len().saturating_sub(MOVES);
        for moved in &seen.moves[skip..] {
            lines.push(self.moved(moved));
        }
        lines
    }

    /// The same in one line, for a log.
    pub(super) fn line(&self, now: &Moment<'_>) -> String {
        let used = now
            .seen
            .capacity
            .as_ref()
            .map_or(0, |capacity| capacity.used_bytes);
        format!(
            "{}  kv {} of {}, {}; {}; {}",
            clock(now.elapsed),
            mb(used),
            mb(self.capacity),
            percent(used as f64 / self.capacity.max(1) as f64).trim_start(),
            self.requests(now.tally, now.seen),
            self.controller(now.seen),
        )
    }

    /// One decision.
    pub(super) fn moved(&self, moved: &Moved) -> Line {
        let at = clock(Duration::from_secs_f64(moved.at.max(0.0)));
        let style = if moved.to > moved.from {
            Style::Warm
        } else {
            Style::Good
        };
        let step = format!("{} {} → {}", moved.class, moved.from, self.level(moved.to));
        Line::plain(format!("    {at:>6}  "))
            .and(style, format!("{step:<32}"))
            .and(Style::Plain, format!(" {}: ", moved.rule))
            .and(Style::Dim, moved.reason.clone())
    }

    pub(super) fn setting(&self) -> String {
        format!(
            "{} requests of about {} + {} tokens at once; {} fit at level 0; controller: {}",
            self.requests, self.prompt_tokens, self.max_tokens, self.fit, self.mode
        )
    }

    fn demand(&self, seen: &Seen) -> String {
        let Some(capacity) = &seen.capacity else {
            return "not known yet".into();
        };
        let all = (capacity.uncompressed_bytes + capacity.queued_bytes) as f64;
        let mut text = format!(
            "{} of capacity as if uncompressed",
            percent(all / self.capacity.max(1) as f64).trim_start()
        );
        if let Some(projected) = seen.status.projected {
            text += &format!(", {} at the wanted levels", percent(projected).trim_start());
        }
        text
    }

    fn requests(&self, tally: &Tally, seen: &Seen) -> String {
        let running: usize = seen.running.values().sum();
        let mut text = format!(
            "{running} running, {} waiting, {} of {} finished, {} refused",
            seen.waiting, tally.finished, self.requests, tally.refused
        );
        if tally.retried > 0 {
            text += &format!(" ({} tried again)", tally.retried);
        }
        if tally.given_up > 0 {
            text += &format!(", {} given up", tally.given_up);
        }
        if tally.lost > 0 {
            text += &format!(", {} LOST", tally.lost);
        }
        text
    }

    fn running(&self, seen: &Seen) -> String {
        let parts: Vec<String> = seen
            .running
            .iter()
            .map(|(level, count)| match level {
                Some(level) => format!("{count} × {}", self.level(*level)),
                None => format!("{count} × no level"),
            })
            .collect();
        if parts.is_empty() {
            "–".into()
        } else {
            parts.join(", ")
        }
    }

    fn latency(&self, tally: &Tally) -> String {
        let first = Latency::of(tally.first_tokens.clone(), self.ttft_slo);
        let gaps = Latency::of(tally.gaps.clone(), self.itl_slo);
        format!(
            "first token p50 {}, p95 {}; between tokens p50 {}, p95 {}",
            time(first.p50),
            time(first.p95),
            time(gaps.p50),
            time(gaps.p95)
        )
    }

    fn controller(&self, seen: &Seen) -> String {
        let phase = seen.status.phase.as_deref().unwrap_or("watching only");
        let mut parts = vec![phase.to_owned()];
        // The load is of one class; what others would be served with is not its news.
        let own = seen.levels.iter().filter(|(class, _)| *class == CLASS);
        for (class, level) in own {
            let mut part = format!("{class} at {}", self.level(*level));
            match seen.status.wanted.get(class) {
                Some(wanted) if wanted != level => part += &format!(", wants {}", self.level(*wanted)),
                _ => {}
            }
            parts.push(part);
        }
        parts.join("; ")
    }

    /// A level's number and name.
    pub(super) fn level(&self, level: u32) -> String {
        match self.ladder.get(level as usize) {
            Some(name) => format!("{level} {name}"),
            None => level.to_string(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::super::watch::tests::moved;
    use super::*;

    pub(in super::super) fn scene() -> Scene {
        Scene {
            mode: "live",
            requests: 8,
            prompt_tokens: 700,
            max_tokens: 96,
            fit: 2,
            capacity: 50_000_000,
            ladder: vec!["full".into(), "int8".into(), "k8v4".into()],
            ttft_slo: 60.0,
            itl_slo: 1.0,
        }
    }

    pub(in super::super) fn text(lines: &[Line]) -> String {
        lines.iter().map(|line| line.text() + "\n").collect()
    }

    #[test]
    fn a_frame_shows_what_is_going_on() {
        let seen = Seen {
            running: BTreeMap::from([(Some(2), 3), (None, 1)]),
            waiting: 4,
            peak_bytes: 45_000_000,
            levels: BTreeMap::from([("default".to_owned(), 0)]),
            status: super::super::watch::Status {
                phase: Some("rising".into()),
                wanted: BTreeMap::from([("default".to_owned(), 2)]),
                ..Default::default()
            },
            moves: (0..12).map(|i| moved(f64::from(i), "default", 0, 2)).collect(),
            ..Seen::default()
        };
        let tally = Tally {
            finished: 1,
            refused: 2,
            retried: 2,
            ..Tally::default()
        };
        let now = Moment {
            elapsed: Duration::from_secs(83),
            tally: &tally,
            seen: &seen,
            note: "",
        };
        let shown = text(&scene().frame(&now));
        for part in [
            "cinch demo  1:23",
            "peak 90 %",
            "4 running, 4 waiting, 1 of 8 finished, 2 refused (2 tried again)",
            "1 × no level, 3 × 2 k8v4",
            "rising; default at 0 full, wants 2 k8v4",
            "0:11  default 0 → 2 k8v4",
        ] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
        assert_eq!(shown.matches('→').count(), MOVES, "the last ones");
        assert!(!shown.contains("LOST"));
        let line = scene().line(&now);
        assert!(line.contains("4 waiting") && !line.contains('\n'), "{line}");
    }
}
