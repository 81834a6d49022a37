//! The report as a page: one file, nothing fetched, no script.

use std::fmt::Write;

use super::figures::Estimate;
use super::heat;
use super::ladder::inline;
use super::matrix;
use super::plot::escaped;
use super::plots;
use super::report::{Point, Report};
use super::table::{by_bytes, fewer, level};

const STYLE: &str = include_str!("report.css");

/// Renders the page.
pub(super) fn render(report: &Report) -> String {
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <link rel=\"icon\" href=\"data:,\">\n\
         <title>Cinch: {model}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>KV cache compression of {model}</h1>\n",
        model = escaped(&report.about.model.name)
    );
    about(&mut out, report);
    plots::plots(&mut out, report);
    policies(&mut out, report);
    speeds(&mut out, report);
    heat::tasks(&mut out, report);
    matrix::matrix(&mut out, report);
    ladder(&mut out, report);
    out += "</body>\n</html>\n";
    out
}

fn about(out: &mut String, report: &Report) {
    let (sizes, text, machine) = (&report.sizes, &report.about.text, &report.about.machine);
    let rows = [
        (
            "Model",
            format!(
                "{}, activations {}",
                report.about.model.name, report.about.model.dtype
            ),
        ),
        ("Fingerprint", report.about.model.fingerprint.clone()),
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
                report.about.date,
                report.about.cinch,
                report.about.mode.name(),
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
    out.push_str(
        "<h2>Policies</h2>\n<p>Most bytes first; those on the frontier are shaded. Bytes are the full cache's share at the end \
         of the prompt and of the request, tokens kept the share of those seen, perplexity beside it what it is of the full \
         cache's, top-1 how often both find the same token likeliest, Δp the change of the forced token's probability. Below a \
         figure is its 95&nbsp;% interval.</p>\n",
    );
    let titles = [
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
    ];
    table(out, report, "policies", &titles, |point| {
        let (bytes, quality) = (&point.bytes, &point.quality);
        Some(vec![
            level(point),
            format!("{:.4}", bytes.ratio),
            format!("{:.4}", bytes.end_ratio),
            format!("{:.3}", bytes.kept),
            estimate(&quality.kl_mean, 4),
            estimate(&quality.kl_p95, 4),
            estimate(&quality.kl_p99, 4),
            estimate(&quality.perplexity, 2),
            estimate(&quality.perplexity_ratio, 4),
            estimate(&quality.top1_agreement, 3),
            estimate(&quality.rms_delta_p, 4),
            or_dash(point.attention_error, 4),
        ])
    });
    if let Some(correlation) = report.error_kl_correlation {
        let _ = writeln!(
            out,
            "<p>Rank correlation (Spearman) of the attention error that requests report with their KL divergence: \
             {correlation:.2}.</p>"
        );
    }
}

fn speeds(out: &mut String, report: &Report) {
    if report.points.iter().all(|point| point.speed.is_none()) {
        return;
    }
    let sizes = &report.sizes;
    let _ = writeln!(
        out,
        "<h2>Speed and memory</h2>\n<p>One request alone in a process of its own: {} prompt tokens, then {} more; medians of {} \
         measurements. TTFT is the time to the first token, peak RSS the most memory of the process while it ran.</p>",
        sizes.speed_context, sizes.speed_steps, sizes.speed_rounds
    );
    let titles = ["prefill tok/s", "decode tok/s", "TTFT ms", "peak RSS MB"];
    table(out, report, "speeds", &titles, |point| {
        let speed = point.speed.as_ref()?;
        Some(vec![
            format!("{:.1}", speed.prefill_tps),
            or_dash(speed.decode_tps, 1),
            format!("{:.0}", speed.ttft_ms),
            or_dash(speed.run_peak_rss_bytes.map(|bytes| bytes as f64 / 1e6), 1),
        ])
    });
}

/// A row a policy that has `cells`.
fn table(
    out: &mut String,
    report: &Report,
    class: &str,
    titles: &[&str],
    cells: impl Fn(&Point) -> Option<Vec<String>>,
) {
    let _ = write!(
        out,
        "<div class=\"wide\"><table class=\"{class}\">\n<tr><th>policy</th>"
    );
    for title in titles {
        let _ = write!(out, "<th>{title}</th>");
    }
    out.push_str("</tr>\n");
    for point in by_bytes(report) {
        let Some(cells) = cells(point) else {
            continue;
        };
        let class = if point.frontier { " class=\"frontier\"" } else { "" };
        let _ = write!(out, "<tr{class}><th>{}</th>", escaped(&point.name));
        for cell in cells {
            let _ = write!(out, "<td>{cell}</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

/// The value, and its interval in a line below where it has any width.
fn estimate(estimate: &Estimate, decimals: usize) -> String {
    let Estimate { value, low, high } = estimate;
    let mut text = format!("{value:.decimals$}");
    if low < high {
        // Writing to a string cannot fail.
        let _ = write!(text, "<br><small>{low:.decimals$} – {high:.decimals$}</small>");
    }
    text
}

fn or_dash(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.decimals$}"))
}

fn ladder(out: &mut String, report: &Report) {
    let levels: Vec<&Point> = report.levels().collect();
    let _ = writeln!(
        out,
        "<h2>Ladder</h2>\n<p>{} levels of the frontier.{}</p>\n<div class=\"wide\"><table class=\"ladder\">\n\
         <tr><th>level</th><th>bytes</th><th>KL mean</th><th>perplexity of full's</th><th>policy</th></tr>",
        levels.len(),
        fewer(levels.len())
    );
    for (number, point) in levels.iter().enumerate() {
        let _ = writeln!(
            out,
            "<tr><th>{number}</th><td>{:.4}</td><td>{}</td><td>{}</td><td><code>{}</code></td></tr>",
            point.bytes.ratio,
            estimate(&point.quality.kl_mean, 4),
            estimate(&point.quality.perplexity_ratio, 4),
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
        let speeds = page.split("<table class=\"speeds\">").nth(1).unwrap();
        let speeds = speeds.split("</table>").next().unwrap();
        assert_eq!(speeds.matches("<tr").count(), 6, "a title and five policies");
        assert!(page.contains("h2o-0.25-&lt;&amp;&gt;") && !page.contains("h2o-0.25-<"));
        assert!(page.contains("<h2>Ladder</h2>\n<p>4 levels"));
        let mut silent = report.clone();
        for point in &mut silent.points {
            point.speed = None;
            point.tasks.clear();
        }
        let page = render(&silent);
        assert!(page.contains("Speed was not measured.") && !page.contains("Retrieval"));
        assert!(!page.contains("Speed and memory"));
    }
}
