//! What is shown while the load runs, and of it in the end: pure formatting.

use std::time::Duration;

use super::board::Tally;
use super::figures::{Figures, Latency};
use super::screen::{Line, Style};
use super::watch::{Moved, Seen};

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
        let peak = seen.peak_bytes as f64 / self.capacity.max(1) as f64;
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
                    format!("  {} of {}, peak {}", mb(used), mb(self.capacity), percent(peak)),
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

    fn setting(&self) -> String {
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
        for (class, level) in &seen.levels {
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
    fn level(&self, level: u32) -> String {
        match self.ladder.get(level as usize) {
            Some(name) => format!("{level} {name}"),
            None => level.to_string(),
        }
    }

    /// The summary.
    pub(super) fn summary(&self, figures: &Figures) -> Vec<Line> {
        let row = |name: &str, text: String| label(name).and(Style::Plain, text);
        let share = figures.peak_bytes as f64 / figures.capacity_bytes.max(1) as f64;
        let mut lines = vec![
            Line::default(),
            Line::plain("  ").and(Style::Bold, "Summary"),
            Line::plain("  ").and(Style::Dim, self.setting()),
            row(
                "requests",
                format!(
                    "{}: {} finished, {} rejected, {} lost; {} refused with 503, {} retried",
                    figures.requests,
                    figures.finished,
                    figures.rejected,
                    figures.lost,
                    figures.refusals,
                    figures.retries
                ),
            ),
            row(
                "at once",
                format!(
                    "at most {} running, {} waiting",
                    figures.most_running, figures.most_waiting
                ),
            ),
            row("levels", self.levels(figures)),
            label("KV bytes").and(
                if figures.peak_bytes <= figures.capacity_bytes {
                    Style::Good
                } else {
                    Style::Hot
                },
                format!(
                    "peak {} of {} ({})",
                    mb(figures.peak_bytes),
                    mb(figures.capacity_bytes),
                    percent(share).trim_start()
                ),
            ),
            row(
                "demand",
                format!(
                    "at most {} of capacity, as if uncompressed",
                    percent(figures.most_demand).trim_start()
                ),
            ),
            row("first token", against(&figures.first_token)),
            row("between tokens", against(&figures.between_tokens)),
            row(
                "time",
                format!(
                    "{:.1} s for {} tokens out, {:.1} a second",
                    figures.wall_seconds,
                    figures.tokens,
                    figures.tokens as f64 / figures.wall_seconds.max(0.001)
                ),
            ),
            row(
                "controller",
                format!(
                    "{} moves, {} reversals, {} writes",
                    figures.moves.len(),
                    figures.reversals,
                    figures.writes.map_or("?".into(), |writes| writes.to_string())
                ),
            ),
            row(
                "engine",
                format!(
                    "{} restarts",
                    figures
                        .engine_restarts
                        .map_or("?".into(), |restarts| restarts.to_string())
                ),
            ),
        ];
        if let Some(within) = figures.release_within {
            let text = match figures.released_after {
                Some(after) => format!("new requests at level 0 again {after:.0} s after the load"),
                None => format!("new requests not back at level 0 within {within} s"),
            };
            lines.push(row("release", text));
        }
        for why in figures.lost_reasons.iter().take(3) {
            lines.push(label("lost").and(Style::Hot, why.clone()));
        }
        lines.push(Line::default());
        lines
    }

    fn levels(&self, figures: &Figures) -> String {
        let parts: Vec<String> = figures
            .levels
            .iter()
            .map(|(level, count)| match level.parse() {
                Ok(level) => format!("{count} × {}", self.level(level)),
                Err(_) => format!("{count} × {level}"),
            })
            .collect();
        let ended = if parts.is_empty() {
            "–".into()
        } else {
            parts.join(", ")
        };
        format!("ended at {ended}; {} retuned while they ran", figures.retuned)
    }
}

fn label(text: &str) -> Line {
    Line(vec![(Style::Dim, format!("  {text:<16}"))])
}

fn against(latency: &Latency) -> String {
    format!(
        "p50 {}, p95 {}; {} of {} within {}",
        time(latency.p50),
        time(latency.p95),
        latency.within,
        latency.samples,
        time(Some(latency.objective))
    )
}

/// Filled and empty part. Anything held shows, and only what is full looks full.
fn bar(share: f64, columns: usize) -> (String, String) {
    let exact = share.clamp(0.0, 1.0) * columns as f64;
    let full = if share >= 1.0 {
        columns
    } else {
        (exact as usize).max(usize::from(share > 0.0)).min(columns - 1)
    };
    ("█".repeat(full), "░".repeat(columns - full))
}

fn heat(share: f64) -> Style {
    match share {
        share if share > 0.92 => Style::Hot,
        share if share > 0.85 => Style::Warm,
        _ => Style::Good,
    }
}

/// Right-aligned up to three digits.
fn percent(share: f64) -> String {
    format!("{:3.0} %", share * 100.0)
}

fn mb(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn time(seconds: Option<f64>) -> String {
    match seconds {
        None => "–".into(),
        Some(seconds) if seconds < 0.9995 => format!("{:.0} ms", seconds * 1000.0),
        Some(seconds) if seconds < 100.0 => format!("{seconds:.1} s"),
        Some(seconds) => format!("{seconds:.0} s"),
    }
}

fn clock(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::figures::tests::figures;
    use super::super::watch::tests::moved;
    use super::*;

    fn scene() -> Scene {
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

    fn text(lines: &[Line]) -> String {
        lines.iter().map(|line| line.text() + "\n").collect()
    }

    #[test]
    fn figures_read_well() {
        assert_eq!([percent(0.071), percent(3.98)], ["  7 %", "398 %"]);
        assert_eq!(mb(303_512_000), "303.5 MB");
        assert_eq!(
            [
                time(None),
                time(Some(0.0312)),
                time(Some(0.9999)),
                time(Some(123.4))
            ],
            ["–", "31 ms", "1.0 s", "123 s"]
        );
        assert_eq!(clock(Duration::from_secs(605)), "10:05");
    }

    #[test]
    fn a_bar_is_full_only_at_capacity() {
        let full = |share| bar(share, 10).0.chars().count();
        assert_eq!([full(0.0), full(0.001), full(0.55)], [0, 1, 5]);
        assert_eq!([full(0.9999), full(1.0), full(1.7)], [9, 10, 10]);
        let (a, b) = bar(0.3, 10);
        assert_eq!(a.chars().count() + b.chars().count(), 10);
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
            "peak  90 %",
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

    #[test]
    fn the_summary_has_every_count() {
        let shown = text(&scene().summary(&figures()));
        for part in [
            "4: 2 finished, 1 rejected, 1 lost; 3 refused with 503, 3 retried",
            "ended at 2 × 3; 1 retuned while they ran",
            "(90 %)",
            "p50 2.0 s, p95 8.0 s; 1 of 2 within 5.0 s",
            "0 moves, 0 reversals, 0 writes",
            "0 restarts",
            "500: oh",
        ] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
    }
}
