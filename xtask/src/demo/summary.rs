//! What is said in the end.

use super::figures::{Figures, Latency};
use super::format::{label, mb, percent, time};
use super::screen::{Line, Style};
use super::view::Scene;

impl Scene {
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

#[cfg(test)]
mod tests {
    use super::super::figures::tests::figures;
    use super::super::view::tests::{scene, text};

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
