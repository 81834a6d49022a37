//! Where each policy is safe, in the report's page: a row a policy, a column a use, a verdict a cell. A verdict is of
//! the whole 95 % interval, so that too few measurements are neither safe nor broken.

use std::fmt::Write;

use super::plot::escaped;
use super::report::{Point, Report};
use super::table::by_bytes;

/// Nats of mean divergence from the full cache up to which text is as good as it was, and past which it is not text
/// of the same model any more.
const KL: (f64, f64) = (0.02, 0.1);
/// The same of perplexity, over the full cache's.
const PERPLEXITY: (f64, f64) = (1.01, 1.04);
/// The same of the nats that a right answer's log-likelihood loses.
const LOSS: (f64, f64) = (0.5, 2.0);

/// What an interval says of a use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Safe,
    Loss,
    Breaks,
}

impl Verdict {
    /// Of a cost between `low` and `high`: safe up to the first bound, broken past the second.
    fn of((low, high): (f64, f64), (safe, broken): (f64, f64)) -> Self {
        if high <= safe {
            Self::Safe
        } else if low > broken {
            Self::Breaks
        } else {
            Self::Loss
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Safe => "safe",
            Self::Loss => "some loss",
            Self::Breaks => "breaks",
        }
    }
}

/// Of plain text: the worse of divergence and perplexity.
fn text(point: &Point) -> Verdict {
    let (kl, perplexity) = (&point.quality.kl_mean, &point.quality.perplexity_ratio);
    Verdict::of((kl.low, kl.high), KL).max(Verdict::of((perplexity.low, perplexity.high), PERPLEXITY))
}

/// The matrix, of all policies.
pub(super) fn matrix(out: &mut String, report: &Report) {
    let tasks = report.points.first().map_or(&[][..], |full| &full.tasks);
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<h2>Where each is safe</h2>\n<p>Text is safe where the mean divergence is at most {} nats and perplexity at most {} of \
         the full cache's, and breaks past {} or {}; a task is safe where its right answers lose at most {} nats, and breaks past \
         {}. The whole 95&nbsp;% interval has to say so; what is neither is some loss. Of this model and this text.</p>",
        KL.0, PERPLEXITY.0, KL.1, PERPLEXITY.1, LOSS.0, LOSS.1
    );
    out.push_str(
        "<div class=\"wide\"><table class=\"matrix\">\n<tr><th>policy</th><th>bytes</th><th>text</th>",
    );
    for score in tasks {
        let _ = write!(out, "<th>{}</th>", score.task.title());
    }
    out.push_str("</tr>\n");
    for point in by_bytes(report) {
        let _ = write!(
            out,
            "<tr><th>{}</th><td>{:.4}</td>",
            escaped(&point.name),
            point.bytes.ratio
        );
        let mut verdicts = vec![text(point)];
        verdicts.extend(point.tasks.iter().map(|score| {
            let change = &score.all.change;
            Verdict::of((-change.high, -change.low), LOSS)
        }));
        for verdict in verdicts {
            let name = verdict.name();
            let class = name.rsplit(' ').next().unwrap_or(name);
            let _ = write!(out, "<td class=\"{class}\">{name}</td>");
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn an_interval_is_judged_whole() {
        let of = |low, high| Verdict::of((low, high), (0.5, 2.0));
        assert_eq!(of(0.0, 0.5), Verdict::Safe);
        assert_eq!(of(0.0, 0.6), Verdict::Loss);
        assert_eq!(of(0.4, 9.0), Verdict::Loss, "too few answers to tell");
        assert_eq!(of(2.0, 9.0), Verdict::Loss);
        assert_eq!(of(2.1, 9.0), Verdict::Breaks);
        assert_eq!(of(-3.0, -1.0), Verdict::Safe, "better than before");
    }

    #[test]
    fn a_verdict_a_policy_and_use() {
        let report = report();
        let mut page = String::new();
        matrix(&mut page, &report);
        let verdicts = page.matches("<td class=").count();
        assert_eq!(verdicts, report.points.len() * (1 + report.points[0].tasks.len()));
        let row = |name: &str| {
            page.split(&format!("<th>{name}</th>"))
                .nth(1)
                .unwrap()
                .lines()
                .next()
                .unwrap()
        };
        assert!(
            !row("full").contains("breaks") && !row("full").contains("loss"),
            "{page}"
        );
        assert!(row("h2o-0.5").contains("class=\"breaks\">breaks"), "{page}");
    }
}
