//! Retrieval in the report's page: a map a task, a row a policy, a cell a length and depth, shaded by what the answers' log-likelihood
//! changed by.

use std::fmt::Write;

use super::jobs::Kind;
use super::plot::escaped;
use super::report::{Point, Report};
use super::scores::Score;
use super::table::by_bytes;

/// Nats of an answer's log-likelihood that color a cell most.
const DEEPEST: f64 = 5.0;
/// How opaque that is: text stays readable on light and dark pages.
const STRONGEST: f64 = 0.7;

/// All tasks' maps; nothing where there were no tasks.
pub(super) fn tasks(out: &mut String, report: &Report) {
    let Some(full) = report.points.first().filter(|full| !full.tasks.is_empty()) else {
        return;
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<h2>Retrieval</h2>\n<p>By how many nats the log-likelihood of the right answer changes against the full cache, and how \
         often greedy decoding gives it in full. The more orange, the less likely. Columns are prompt lengths and where in the \
         prompt the answer is: 0 is its beginning; answers a cell: {}.</p>\n<div class=\"maps\">",
        answers(report)
    );
    for score in &full.tasks {
        let _ = writeln!(out, "<section><h3>{}</h3>", score.task.title());
        map(out, report, score.task);
        out.push_str("</section>\n");
    }
    out.push_str("</div>\n");
}

/// As many as there are in a cell: `2`, or `1 to 2`.
fn answers(report: &Report) -> String {
    let tasks = report.points.first().map_or(&[][..], |full| &full.tasks);
    let cells = || tasks.iter().flat_map(|task| &task.cells);
    let counts = || cells().map(|cell| cell.score.answers);
    let (low, high) = (counts().min().unwrap_or(0), counts().max().unwrap_or(0));
    if low == high {
        low.to_string()
    } else {
        format!("{low} to {high}")
    }
}

fn map(out: &mut String, report: &Report, task: Kind) {
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
    let depth = (change.abs() / DEEPEST).min(1.0) * STRONGEST;
    let color = if change < 0.0 { "213, 94, 0" } else { "0, 158, 115" };
    let _ = write!(
        out,
        "<td style=\"background:rgba({color}, {depth:.2})\" title=\"{} answers: {:.2} nats, full cache {:.2}; change {}; \
         exact {:.0} %, full cache {:.0} %\">{}<br>{:.0} %</td>",
        score.answers,
        score.log_likelihood,
        score.reference_log_likelihood,
        score.change.show(2),
        score.exact * 100.0,
        score.reference_exact * 100.0,
        signed(change),
        score.exact * 100.0,
    );
}

/// `+0.12`, `−3.40`; what rounds to zero has no sign.
fn signed(change: f64) -> String {
    match format!("{change:+.2}").as_str() {
        "+0.00" | "-0.00" => "0.00".to_owned(),
        text => text.replace('-', "−"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    fn rendered(report: &Report) -> String {
        let mut out = String::new();
        tasks(&mut out, report);
        out
    }

    #[test]
    fn a_map_a_task_and_a_cell_a_place() {
        let report = report();
        let page = rendered(&report);
        assert_eq!(page.matches("class=\"heat\"").count(), Kind::TASKS.len());
        let cells = Kind::TASKS.len() * report.points.len() * 3;
        assert_eq!(page.matches("<td ").count(), cells, "two depths and all of them");
        assert!(
            page.contains("answers a cell: 1.") && page.contains("−0."),
            "{page}"
        );
        let mut silent = report;
        for point in &mut silent.points {
            point.tasks.clear();
        }
        assert_eq!(rendered(&silent), "");
    }

    #[test]
    fn less_likely_answers_are_redder() {
        let page = rendered(&report());
        let shade = |name: &str| {
            let row = page.split("class=\"heat\"").nth(1).unwrap();
            let row = row.split(&format!("<th>{name}</th>")).nth(1).unwrap();
            let depth = row.split("rgba(213, 94, 0, ").nth(1).unwrap();
            depth.split(')').next().unwrap().parse::<f64>().unwrap()
        };
        assert!(shade("k8-v8") < shade("h2o-0.5"));
    }

    #[test]
    fn signs() {
        let shown = [0.12, -3.4, -0.001, 0.0].map(signed);
        assert_eq!(shown, ["+0.12", "−3.40", "0.00", "0.00"]);
    }
}
