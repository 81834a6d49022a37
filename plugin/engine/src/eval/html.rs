//! The report as a page: one file, nothing fetched, no script.

use std::fmt::Write;

use cinch_protocol::Policy;

use super::jobs::Kind;
use super::ladder::inline;
use super::plot::{Axis, COLORS, Mark, escaped, scatter};
use super::report::{Point, Report};
use super::scores::Score;
use super::table::{by_bytes, fewer, level};

const STYLE: &str = include_str!("report.css");
/// Nats of an answer's log-likelihood that color a cell fully.
const DEEPEST: f64 = 5.0;
const BYTES: &str = "bytes at the end of the prompt, of the full cache's";

/// Renders the page.
pub(super) fn render(report: &Report) -> String {
    let families = families(report);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <link rel=\"icon\" href=\"data:,\">\n\
         <title>Cinch: {model}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>KV cache compression of {model}</h1>\n",
        model = escaped(&report.model.name)
    );
    about(&mut out, report);
    let kl = Axis {
        title: "mean KL divergence, nats",
        logarithmic: true,
        least: None,
    };
    let bytes = Axis {
        title: BYTES,
        logarithmic: true,
        least: None,
    };
    let against = |x: &dyn Fn(&Point) -> Option<f64>| -> Vec<Mark> {
        let marks = report
            .points
            .iter()
            .map(|point| mark(point, x(point)?, &families));
        marks.flatten().collect()
    };
    out += "<h2>Quality against bytes</h2>\n<p>Down and left is better. The line is the Pareto frontier, numbers are levels of \
            the ladder, whiskers 95 % intervals. The full cache has no divergence, hence no place on this scale.</p>\n";
    legend(&mut out, &families);
    out += &scatter(&against(&|point| Some(point.bytes.ratio)), bytes, kl);
    let speed = against(&|point| point.speed.as_ref()?.decode_tps);
    if speed.is_empty() {
        out += "<h2>Quality against speed</h2>\n<p>Speed was not measured.</p>\n";
    } else {
        let _ = writeln!(
            out,
            "<h2>Quality against speed</h2>\n<p>Down and right is better. Decode of one request alone, after {} prompt \
             tokens; the full cache: {}.</p>",
            report.sizes.speed_context,
            report.points[0]
                .speed
                .as_ref()
                .and_then(|speed| speed.decode_tps)
                .map_or_else(|| "not measured".to_owned(), |tps| format!("{tps:.1} tokens/s"))
        );
        let rate = Axis {
            title: "decode, tokens/s",
            logarithmic: false,
            least: None,
        };
        out += &scatter(&speed, rate, kl);
    }
    policies(&mut out, report);
    tasks(&mut out, report);
    ladder(&mut out, report);
    out += "</body>\n</html>\n";
    out
}

/// What a policy is colored by: its selection method, or what else it does.
fn family(policy: &Policy) -> String {
    match &policy.select {
        Some(select) => select.method.name().to_owned(),
        None if *policy == Policy::default() => "full".to_owned(),
        None => "all tokens".to_owned(),
    }
}

fn families(report: &Report) -> Vec<String> {
    let mut families: Vec<String> = Vec::new();
    for point in report.points.iter().skip(1) {
        let family = family(&point.policy);
        if !families.contains(&family) {
            families.push(family);
        }
    }
    families
}

fn mark(point: &Point, x: f64, families: &[String]) -> Option<Mark> {
    let kl = point.quality.kl_mean;
    let color = families
        .iter()
        .position(|family| *family == self::family(&point.policy))?;
    Some(Mark {
        label: format!(
            "{}: {:.4} of the bytes, KL {}",
            point.name,
            point.bytes.ratio,
            kl.show(4)
        ),
        color,
        x,
        y: kl.value,
        interval: (kl.low.max(kl.value / 10.0), kl.high),
        frontier: point.frontier,
        note: point.level.map(|level| level.to_string()).unwrap_or_default(),
    })
}

fn legend(out: &mut String, families: &[String]) {
    out.push_str("<p class=\"legend\">");
    for (i, family) in families.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "<span><i style=\"background:{}\"></i>{}</span> ",
            COLORS[i % COLORS.len()],
            escaped(family)
        );
    }
    out.push_str("</p>\n");
}

fn about(out: &mut String, report: &Report) {
    let (sizes, text, machine) = (&report.sizes, &report.text, &report.machine);
    let rows = [
        (
            "Model",
            format!("{}, activations {}", report.model.name, report.model.dtype),
        ),
        ("Fingerprint", report.model.fingerprint.clone()),
        (
            "Text",
            format!(
                "{}, {} tokens; {} windows of {} prompt tokens, then {} forced ones each",
                text.name, text.tokens, sizes.windows, sizes.context, sizes.steps
            ),
        ),
        (
            "Machine",
            format!(
                "{}, {} threads, kernels {}",
                machine.cpu, machine.threads, machine.kernels
            ),
        ),
        (
            "Measured",
            format!(
                "{}, cinch {}, {}; intervals by {} resamples of blocks of {} tokens",
                report.date,
                report.cinch,
                report.mode.name(),
                report.bootstrap.resamples,
                report.bootstrap.block
            ),
        ),
    ];
    out.push_str("<table class=\"about\">\n");
    for (name, value) in rows {
        let _ = writeln!(out, "<tr><th>{name}</th><td>{}</td></tr>", escaped(&value));
    }
    out.push_str("</table>\n");
}

fn policies(out: &mut String, report: &Report) {
    out.push_str("<h2>Policies</h2>\n<div class=\"wide\"><table>\n<tr>");
    for title in [
        "policy",
        "level",
        "bytes",
        "at the end",
        "tokens kept",
        "KL mean",
        "KL p95",
        "KL p99",
        "perplexity",
        "of full's",
        "top-1",
        "RMS Δp",
        "attention error",
        "prefill tok/s",
        "decode tok/s",
        "TTFT ms",
        "peak RSS MB",
    ] {
        let _ = write!(out, "<th>{title}</th>");
    }
    out.push_str("</tr>\n");
    for point in by_bytes(report) {
        let (bytes, quality, speed) = (&point.bytes, &point.quality, point.speed.as_ref());
        let cells = [
            level(point),
            format!("{:.4}", bytes.ratio),
            format!("{:.4}", bytes.end_ratio),
            format!("{:.3}", bytes.kept),
            quality.kl_mean.show(4),
            quality.kl_p95.show(4),
            quality.kl_p99.show(4),
            quality.perplexity.show(2),
            quality.perplexity_ratio.show(4),
            quality.top1_agreement.show(3),
            quality.rms_delta_p.show(4),
            or_dash(point.attention_error, 4),
            or_dash(speed.map(|speed| speed.prefill_tps), 1),
            or_dash(speed.and_then(|speed| speed.decode_tps), 1),
            or_dash(speed.map(|speed| speed.ttft_ms), 0),
            or_dash(
                speed.and_then(|speed| Some(speed.run_peak_rss_bytes? as f64 / 1e6)),
                1,
            ),
        ];
        let class = if point.frontier { " class=\"frontier\"" } else { "" };
        let _ = write!(out, "<tr{class}><th>{}</th>", escaped(&point.name));
        for cell in cells {
            let _ = write!(out, "<td>{cell}</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
    if let Some(correlation) = report.error_kl_correlation {
        let _ = writeln!(
            out,
            "<p>Rank correlation (Spearman) of the attention error that requests report with their KL divergence: \
             {correlation:.2}.</p>"
        );
    }
}

fn or_dash(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.decimals$}"))
}

fn tasks(out: &mut String, report: &Report) {
    let tasks: Vec<Kind> = report.points[0].tasks.iter().map(|score| score.task).collect();
    if tasks.is_empty() {
        return;
    }
    out.push_str(
        "<h2>Retrieval</h2>\n<p>By how many nats the log-likelihood of the right answer changes against the full cache, and how \
         often greedy decoding gives it in full. Redder is less likely. Columns are prompt lengths and where in the prompt the \
         answer is: 0 is its beginning.</p>\n",
    );
    for task in tasks {
        let _ = writeln!(out, "<h3>{}</h3>", task.title());
        heat_map(out, report, task);
    }
}

fn heat_map(out: &mut String, report: &Report, task: Kind) {
    let scores = |point: &Point| point.tasks.iter().find(|score| score.task == task).cloned();
    let Some(full) = report.points.first().and_then(scores) else {
        return;
    };
    out.push_str("<div class=\"wide\"><table class=\"heat\">\n<tr><th>policy</th><th>all</th>");
    for cell in &full.cells {
        let _ = write!(out, "<th>{}<br>{}</th>", cell.length, cell.depth);
    }
    out.push_str("</tr>\n");
    for point in by_bytes(report) {
        let Some(score) = scores(point) else {
            continue;
        };
        let _ = write!(out, "<tr><th>{}</th>", escaped(&point.name));
        for score in std::iter::once(&score.all).chain(score.cells.iter().map(|cell| &cell.score)) {
            cell(out, score);
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

fn cell(out: &mut String, score: &Score) {
    let change = score.change.value;
    let depth = (change.abs() / DEEPEST).min(1.0);
    let color = if change < 0.0 { "213, 94, 0" } else { "0, 158, 115" };
    let _ = write!(
        out,
        "<td style=\"background:rgba({color}, {depth:.2})\" title=\"{} answers: {:.2} nats, full cache {:.2}; change {}; \
         exact {:.0} %, full cache {:.0} %\">{change:+.2}<br>{:.0} %</td>",
        score.answers,
        score.log_likelihood,
        score.reference_log_likelihood,
        score.change.show(2),
        score.exact * 100.0,
        score.reference_exact * 100.0,
        score.exact * 100.0,
    );
}

fn ladder(out: &mut String, report: &Report) {
    let levels: Vec<&Point> = report.levels().collect();
    let _ = writeln!(
        out,
        "<h2>Ladder</h2>\n<p>{} levels of the frontier.{}</p>\n<div class=\"wide\"><table>\n\
         <tr><th>level</th><th>bytes</th><th>KL mean</th><th>perplexity of full's</th><th>policy</th></tr>",
        levels.len(),
        fewer(levels.len())
    );
    for (number, point) in levels.iter().enumerate() {
        let _ = writeln!(
            out,
            "<tr><th>{number}</th><td>{:.4}</td><td>{}</td><td>{}</td><td><code>{}</code></td></tr>",
            point.bytes.ratio,
            point.quality.kl_mean.show(4),
            point.quality.perplexity_ratio.show(4),
            escaped(&inline(&point.policy).unwrap_or_default())
        );
    }
    out.push_str("</table></div>\n");
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn everything_is_in_one_file() {
        let page = render(&report());
        assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
        for outside in ["src=", "http:", "https:", "<script", "@import", "url("] {
            // The name of SVG's namespace is no address.
            let page = page.replace("http://www.w3.org/2000/svg", "");
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(!page.contains("NaN") && !page.contains("inf]"));
    }

    #[test]
    fn plots_and_tables_have_what_was_measured() {
        let report = report();
        let page = render(&report);
        let (bytes, speed) = page.split_once("Quality against speed").unwrap();
        // Level 0 and the exact store have no divergence to place.
        assert_eq!(bytes.matches("class=\"mark\"").count(), 4);
        // And one has no speed.
        assert_eq!(speed.matches("class=\"mark\"").count(), 3);
        assert_eq!(page.matches("class=\"heat\"").count(), Kind::TASKS.len());
        assert!(page.contains("h2o-0.25-&lt;&amp;&gt;") && !page.contains("h2o-0.25-<"));
        assert!(page.contains("<h2>Ladder</h2>\n<p>4 levels"));
        let mut silent = report.clone();
        for point in &mut silent.points {
            point.speed = None;
            point.tasks.clear();
        }
        let page = render(&silent);
        assert!(page.contains("Speed was not measured.") && !page.contains("Retrieval"));
    }

    #[test]
    fn less_likely_answers_are_redder() {
        let page = render(&report());
        let shade = |name: &str| {
            let row = page.split("class=\"heat\"").nth(1).unwrap();
            let row = row.split(&format!("<th>{name}</th>")).nth(1).unwrap();
            let depth = row.split("rgba(213, 94, 0, ").nth(1).unwrap();
            depth.split(')').next().unwrap().parse::<f64>().unwrap()
        };
        assert!(shade("k8-v8") < shade("h2o-0.5"));
    }
}
