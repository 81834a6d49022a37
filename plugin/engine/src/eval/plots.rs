//! The report's plots: where each policy is, and which of them nothing beats.

use std::fmt::Write;

use cinch_protocol::Policy;

use super::plot::{Axis, Mark, escaped, scatter, symbol};
use super::report::{Point, Report};

const BYTES: &str = "bytes at the end of the prompt, of the full cache's";

/// Quality against bytes, and against speed where that was measured.
pub(super) fn plots(out: &mut String, report: &Report) {
    let families = families(report);
    let kl = Axis {
        title: "mean KL divergence, nats",
        logarithmic: true,
        full: None,
    };
    let bytes = Axis {
        title: BYTES,
        logarithmic: true,
        full: Some(1.0),
    };
    let marks = |x: &dyn Fn(&Point) -> Option<f64>, frontier: &dyn Fn(&Point) -> bool| -> Vec<Mark> {
        let marks = report
            .points
            .iter()
            .map(|point| mark(point, x(point)?, frontier(point), &families));
        marks.flatten().collect()
    };
    out.push_str(
        "<h2>Quality against bytes</h2>\n<p>Down and left is better. The line is the Pareto frontier, numbers are levels of \
         the ladder, whiskers 95&nbsp;% intervals. The full cache has no divergence, hence no place on this scale.</p>\n",
    );
    legend(out, &families);
    out.push_str(&scatter(
        &marks(&|point| Some(point.bytes.ratio), &|point| point.frontier),
        bytes,
        kl,
    ));
    out.push_str("<h2>Quality against speed</h2>\n");
    if report.points.iter().all(|point| point.speed.is_none()) {
        out.push_str("<p>Speed was not measured.</p>\n");
        return;
    }
    let full = report.points.first().and_then(decode_tps);
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<p>Down and right is better; left of the full cache is slower than that. The line is the frontier of speed and \
         divergence. Decode of one request alone, after {} prompt tokens; the full cache: {}.</p>",
        report.sizes.speed_context,
        full.map_or_else(|| "not measured".to_owned(), |tps| format!("{tps:.1} tokens/s"))
    );
    let rate = Axis {
        title: "decode, tokens/s",
        logarithmic: false,
        full,
    };
    out.push_str(&scatter(
        &marks(&decode_tps, &|point| unbeaten(report, point)),
        rate,
        kl,
    ));
}

fn decode_tps(point: &Point) -> Option<f64> {
    point.speed.as_ref()?.decode_tps
}

/// Whether no other policy is at least as fast and as close to the full cache, which is among them, and better in one.
fn unbeaten(report: &Report, point: &Point) -> bool {
    let figures = |point: &Point| Some((decode_tps(point)?, point.quality.kl_mean.value));
    let Some((tps, kl)) = figures(point) else {
        return false;
    };
    let mut others = report.points.iter().filter_map(figures);
    !others
        .any(|(other_tps, other_kl)| other_tps >= tps && other_kl <= kl && (other_tps > tps || other_kl < kl))
}

/// What a policy's mark is drawn by: its selection method, or what else it does.
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

fn mark(point: &Point, x: f64, frontier: bool, families: &[String]) -> Option<Mark> {
    let kl = point.quality.kl_mean;
    let series = families
        .iter()
        .position(|family| *family == self::family(&point.policy))?;
    Some(Mark {
        label: format!(
            "{}: {:.4} of the bytes, KL {}",
            point.name,
            point.bytes.ratio,
            kl.show(4)
        ),
        series,
        x,
        y: kl.value,
        interval: (kl.low.max(kl.value / 10.0), kl.high),
        frontier,
        note: point.level.map(|level| level.to_string()).unwrap_or_default(),
    })
}

fn legend(out: &mut String, families: &[String]) {
    out.push_str("<p class=\"legend\">");
    for (i, family) in families.iter().enumerate() {
        let _ = write!(
            out,
            "<span><svg viewBox=\"0 0 12 12\" aria-hidden=\"true\"><path {}/></svg>{}</span> ",
            symbol(i, (6.0, 6.0), 4.5),
            escaped(family)
        );
    }
    out.push_str("</p>\n");
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn the_frontier_of_speed_is_its_own() {
        let mut report = report();
        for (point, tps) in report.points.iter_mut().zip([80.0, 70.0, 90.0, 85.0]) {
            point.speed.as_mut().unwrap().decode_tps = Some(tps);
        }
        let unbeaten: Vec<&str> = report
            .points
            .iter()
            .filter(|point| unbeaten(&report, point))
            .map(|point| point.name.as_str())
            .collect();
        // h2o-0.5 is slower than k4-v4 and further off, k8-v8 slower than the full cache; the last ones have a speed of 85
        // at no divergence, and none at all.
        assert_eq!(unbeaten, ["k4-v4", "exact"]);
    }
}
