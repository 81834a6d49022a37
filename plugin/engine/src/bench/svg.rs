//! The figures as a plot: prefill and decode rates by context, total rate by requests at once. A line a
//! system and KV cache; other systems are dashed.

use std::fmt::Write;

use cinch_protocol::bench::{Measured, Row};

const PANEL: (f64, f64) = (360.0, 260.0);
/// Left of a panel, above it, below it.
const MARGIN: (f64, f64, f64) = (64.0, 56.0, 48.0);
const LEGEND: f64 = 190.0;
/// Told apart by most people who see colors differently (Okabe and Ito, 2008).
const COLORS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f",
];

struct Line {
    label: String,
    dashed: bool,
    color: &'static str,
    points: Vec<(f64, f64)>,
}

/// Draws the plot.
pub(super) fn render(measured: &Measured) -> String {
    let rows = &measured.rows;
    let mut names: Vec<(&str, &str)> = Vec::new();
    for row in rows {
        let name = (row.system.as_str(), row.kv.as_str());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let lines = |of: &dyn Fn(&Row) -> Option<(f64, f64)>| -> Vec<Line> {
        let line = |(i, &(system, kv)): (usize, &(&str, &str))| Line {
            label: format!("{system} {kv}"),
            dashed: system != "cinch",
            color: COLORS[i % COLORS.len()],
            points: rows
                .iter()
                .filter(|row| row.system == system && row.kv == kv)
                .filter_map(of)
                .collect(),
        };
        names.iter().enumerate().map(line).collect()
    };
    let single = |row: &Row| (row.concurrency == 1).then_some(row.context as f64);
    let panels = [
        (
            "Prefill, tokens/s",
            "prompt tokens",
            lines(&|row| Some((single(row)?, row.median.prefill_tps))),
        ),
        (
            "Decode, tokens/s",
            "prompt tokens",
            lines(&|row| Some((single(row)?, row.median.decode_tps?))),
        ),
        (
            "Prefill and decode, tokens/s",
            "requests at once, mixed lengths",
            lines(&|row| (row.concurrency > 1).then_some((row.concurrency as f64, row.median.total_tps))),
        ),
    ];
    let shown: Vec<_> = panels
        .iter()
        .filter(|(_, _, lines)| lines.iter().any(|line| !line.points.is_empty()))
        .collect();
    let width = shown.len() as f64 * (PANEL.0 + MARGIN.0) + LEGEND + 24.0;
    let height = PANEL.1 + MARGIN.1 + MARGIN.2;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let about = format!(
        "{}, {} threads, {}, {} new tokens, medians of {} rounds, {}",
        measured.model, measured.threads, measured.cpu, measured.new_tokens, measured.rounds, measured.date
    );
    text(&mut out, (16.0, 18.0), "start", &about);
    for (i, (title, axis, lines)) in shown.iter().enumerate() {
        let left = i as f64 * (PANEL.0 + MARGIN.0) + MARGIN.0;
        panel(&mut out, left, title, axis, lines);
    }
    if let Some((_, _, lines)) = shown.first() {
        legend(&mut out, width - LEGEND, lines);
    }
    out += "</svg>\n";
    out
}

fn panel(out: &mut String, left: f64, title: &str, axis: &str, lines: &[Line]) {
    let points = || lines.iter().flat_map(|line| &line.points);
    let mut xs: Vec<f64> = points().map(|point| point.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let top = points().map(|point| point.1).fold(0.0, f64::max);
    let step = step(top);
    let most = (top / step).ceil().max(1.0) * step;
    let (low, high) = match (xs.first(), xs.last()) {
        (Some(low), Some(high)) if low < high => (low.ln(), high.ln()),
        (Some(only), _) => (only.ln() - 1.0, only.ln() + 1.0),
        _ => (0.0, 1.0),
    };
    let place = |(x, y): (f64, f64)| {
        let across = 12.0 + (x.ln() - low) / (high - low) * (PANEL.0 - 24.0);
        (left + across, MARGIN.1 + PANEL.1 * (1.0 - y / most))
    };
    text(out, (left, MARGIN.1 - 10.0), "start", title);
    let mut mark = 0.0;
    while mark <= most * 1.0001 {
        let y = MARGIN.1 + PANEL.1 * (1.0 - mark / most);
        let right = left + PANEL.0;
        let _ = writeln!(
            out,
            "<path d=\"M{left:.1} {y:.1}H{right:.1}\" stroke=\"#ddd\" fill=\"none\"/>"
        );
        text(out, (left - 6.0, y + 4.0), "end", &format!("{mark}"));
        mark += step;
    }
    let below = MARGIN.1 + PANEL.1;
    let mut free = f64::NEG_INFINITY;
    for &x in &xs {
        let at = place((x, 0.0)).0;
        // Close ones would write over each other.
        if at >= free {
            text(out, (at, below + 16.0), "middle", &format!("{x}"));
            free = at + 34.0;
        }
    }
    text(out, (left + PANEL.0 / 2.0, below + 34.0), "middle", axis);
    for line in lines {
        let color = line.color;
        let placed: Vec<(f64, f64)> = line.points.iter().map(|&point| place(point)).collect();
        let path: Vec<String> = placed.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        if path.len() > 1 {
            let path = path.join("L");
            let _ = writeln!(
                out,
                "<path d=\"M{path}\" stroke=\"{color}\" stroke-width=\"2\" fill=\"none\"{}/>",
                dash(line)
            );
        }
        for (x, y) in placed {
            let _ = writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{color}\"/>"
            );
        }
    }
}

fn legend(out: &mut String, left: f64, lines: &[Line]) {
    for (i, line) in lines.iter().enumerate() {
        let y = MARGIN.1 + 8.0 + i as f64 * 18.0;
        let _ = writeln!(
            out,
            "<path d=\"M{left:.1} {y:.1}h24\" stroke=\"{}\" stroke-width=\"2\"{}/>",
            line.color,
            dash(line)
        );
        text(out, (left + 30.0, y + 4.0), "start", &line.label);
    }
}

fn dash(line: &Line) -> &'static str {
    if line.dashed {
        " stroke-dasharray=\"6 4\""
    } else {
        ""
    }
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, what: &str) {
    let what = what
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>"
    );
}

/// 1, 2 or 5 times a power of ten, so that four to ten of them reach `top`.
fn step(top: f64) -> f64 {
    if top <= 0.0 {
        return 1.0;
    }
    let power = 10.0_f64.powf(top.log10().floor() - 1.0);
    let steps = [1.0, 2.0, 5.0, 10.0, 20.0].map(|times| times * power);
    let fits = steps.into_iter().find(|step| top / step <= 10.0);
    fits.unwrap_or(top)
}

#[cfg(test)]
mod tests {
    use super::super::tests::measured;
    use super::*;

    #[test]
    fn a_line_a_system_and_a_panel_a_figure() {
        let svg = render(&measured());
        assert_eq!(svg.matches("<svg").count() + svg.matches("</svg>").count(), 2);
        for title in [
            "Prefill, tokens/s",
            "Decode, tokens/s",
            "Prefill and decode, tokens/s",
        ] {
            assert!(svg.contains(title), "{svg}");
        }
        assert!(svg.contains(">cinch int4</text>") && svg.contains(">llama.cpp f16</text>"));
        // Three rows of one figure, two of the other that one row lacks, one for the load.
        assert_eq!(svg.matches("<circle").count(), 3 + 2 + 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn labels_are_escaped_and_nothing_is_drawn_of_nothing() {
        let mut measured = measured();
        measured.rows[0].kv = "<&>".into();
        assert!(render(&measured).contains(">cinch &lt;&amp;&gt;</text>"));
        measured.rows.clear();
        assert!(!render(&measured).contains("<circle"));
    }

    #[test]
    fn steps_are_round() {
        for (top, wanted) in [
            (70.0, 10.0),
            (622.0, 100.0),
            (9.0, 1.0),
            (11.0, 2.0),
            (0.0, 1.0),
            (41.0, 5.0),
        ] {
            assert!((step(top) - wanted).abs() < 1e-9, "{top}: {}", step(top));
        }
    }
}
