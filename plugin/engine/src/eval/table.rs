//! The report for people in a terminal: Markdown, so that it can be pasted.

use std::fmt::Write;

use super::frontier::FEWEST;
use super::report::{Point, Report};

/// What was measured, and a table of all policies, fewest bytes last.
pub(super) fn render(report: &Report) -> String {
    let (sizes, text) = (&report.sizes, &report.about.text);
    let mut out = format!(
        "{}, activations {}, kernels {}; {} windows of {}: {} prompt and {} forced tokens each; against the full cache, with \
         95 % intervals\n\n\
         | level | policy | bytes of full | KL mean, nats | KL p99 | perplexity of full | top-1 | RMS Δp | prefill tok/s | \
         decode tok/s | TTFT ms | peak RSS MB |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        report.about.model.name,
        report.about.model.dtype,
        report.about.machine.kernels,
        sizes.windows,
        text.name,
        sizes.context,
        sizes.steps,
    );
    for point in by_bytes(report) {
        let quality = &point.quality;
        let speed = point.speed.as_ref();
        let or_dash =
            |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.0}"));
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| {} | {} | {:.4} | {} | {:.4} | {} | {:.3} | {:.4} | {} | {} | {} | {} |",
            level(point),
            point.name,
            point.bytes.ratio,
            quality.kl_mean.show(4),
            quality.kl_p99.value,
            quality.perplexity_ratio.show(3),
            quality.top1_agreement.value,
            quality.rms_delta_p.value,
            or_dash(speed.map(|speed| speed.prefill_tps)),
            or_dash(speed.and_then(|speed| speed.decode_tps)),
            or_dash(speed.map(|speed| speed.ttft_ms)),
            or_dash(speed.and_then(|speed| Some(speed.run_peak_rss_bytes? as f64 / 1e6))),
        );
    }
    tasks(&mut out, report);
    if let Some(correlation) = report.error_kl_correlation {
        let _ = writeln!(
            out,
            "\nRank correlation of the attention error that requests report with KL: {correlation:.2}"
        );
    }
    let levels = report.levels().count();
    let _ = writeln!(out, "\nThe ladder has {levels} levels.{}", fewer(levels));
    out
}

/// What to say of a ladder that is too coarse.
pub(super) fn fewer(levels: usize) -> &'static str {
    if levels < FEWEST {
        " Under five are too coarse to control with: relax the floors or extend the grid."
    } else {
        ""
    }
}

/// Most bytes first.
pub(super) fn by_bytes(report: &Report) -> Vec<&Point> {
    let mut points: Vec<&Point> = report.points.iter().collect();
    points.sort_by(|a, b| b.bytes.ratio.total_cmp(&a.bytes.ratio));
    points
}

/// Its level, or what it is instead.
pub(super) fn level(point: &Point) -> String {
    match point.level {
        Some(level) => level.to_string(),
        None if point.frontier => "frontier".to_owned(),
        None => String::new(),
    }
}

fn tasks(out: &mut String, report: &Report) {
    let Some(full) = report.points.first().filter(|full| !full.tasks.is_empty()) else {
        return;
    };
    out.push_str(
        "\nRetrieval: change of the right answers' log-likelihood in nats, and share of exact answers\n\n| policy |",
    );
    for score in &full.tasks {
        let _ = write!(out, " {} |", score.task.title());
    }
    out.push_str("\n| --- |");
    out.push_str(&" --- |".repeat(full.tasks.len()));
    out.push('\n');
    for point in by_bytes(report) {
        let _ = write!(out, "| {} |", point.name);
        for score in &point.tasks {
            let all = &score.all;
            let _ = write!(out, " {:+.2}, {:.0} % |", all.change.value, all.exact * 100.0);
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn a_line_a_policy_and_nothing_made_up() {
        let text = render(&report());
        assert!(
            text.starts_with(
                "m.Q8_0, activations f32, kernels scalar; 2 windows of t.txt: 1024 prompt and 64 forced"
            ),
            "{text}"
        );
        let line = |name: &str| {
            text.lines()
                .find(|line| line.contains(&format!("| {name} |")))
                .unwrap()
        };
        assert!(
            line("full").starts_with("| 0 | full | 1.0000 | 0.0000 [0.0000, 0.0000] |"),
            "{text}"
        );
        assert!(line("k4-v4").starts_with("| 2 | k4-v4 | 0.3300 | "), "{text}");
        assert!(line("k4-v4").ends_with("| 500 | 82 | 2000 | 350 |"), "{text}");
        assert!(line("h2o-0.25-<&>").ends_with("| – | – | – | – |"), "{text}");
        assert!(line("h2o-0.5").starts_with("|  | h2o-0.5 |"), "{text}");
        assert!(
            text.contains("| second question |") || text.contains(" second question |"),
            "{text}"
        );
        assert!(text.contains("\n| full | +0.00, 100 % |"), "{text}");
        assert!(text.contains("The ladder has 4 levels. Under five"), "{text}");
    }
}
