//! A scatter plot as SVG: a mark a policy, whiskers for the interval, a line along the frontier.

use std::fmt::Write;

/// Width and height of the area that is drawn in.
const AREA: (f64, f64) = (620.0, 360.0);
/// Left of it, above it, below it, right of it.
const MARGIN: (f64, f64, f64, f64) = (70.0, 16.0, 48.0, 20.0);
/// Told apart by most people who see colors differently (Okabe and Ito, 2008).
pub(super) const COLORS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f",
];

/// A mark.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    pub(super) label: String,
    /// Which of the [`COLORS`].
    pub(super) color: usize,
    pub(super) x: f64,
    pub(super) y: f64,
    /// Ends of the interval of y.
    pub(super) interval: (f64, f64),
    /// Whether the frontier's line goes through it.
    pub(super) frontier: bool,
    /// Drawn beside the mark.
    pub(super) note: String,
}

/// An axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    pub(super) title: &'static str,
    pub(super) logarithmic: bool,
    /// The range goes down to it, whatever the marks.
    pub(super) least: Option<f64>,
}

/// From values to places on an axis.
struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Scale {
    fn new(values: impl Iterator<Item = f64>, axis: Axis) -> Self {
        let map = |x: f64| if axis.logarithmic { x.ln() } else { x };
        let values = values.chain(axis.least).map(map).filter(|x| x.is_finite());
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
            (low.min(x), high.max(x))
        });
        let (low, high) = if low < high {
            let pad = (high - low) * 0.05;
            let bottom = if axis.logarithmic || axis.least.is_none() {
                low - pad
            } else {
                low
            };
            (bottom, high + pad)
        } else if low.is_finite() {
            (low - 1.0, low + 1.0)
        } else {
            (0.0, 1.0)
        };
        Self {
            low,
            high,
            logarithmic: axis.logarithmic,
        }
    }

    /// 0 at the low end, 1 at the high one.
    fn at(&self, value: f64) -> f64 {
        let value = if self.logarithmic { value.ln() } else { value };
        ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    /// Round values within it.
    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            let (low, high) = (self.low.exp(), self.high.exp());
            let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
            // Of wide ranges the powers of ten alone.
            let steps: &[f64] = if high / low > 1e3 {
                &[1.0]
            } else {
                &[1.0, 2.0, 5.0]
            };
            let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10.0_f64.powi(power)));
            return all.filter(|tick| (low..=high).contains(tick)).collect();
        }
        let step = step(self.high - self.low);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// 1, 2 or 5 times a power of ten, so that three to eight of them make up `range`.
fn step(range: f64) -> f64 {
    let power = 10.0_f64.powf((range / 8.0).log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0];
    let fits = times.into_iter().find(|times| range / (times * power) <= 8.0);
    fits.unwrap_or(10.0) * power
}

/// Draws the marks. Those without a place on a logarithmic axis (at zero or below) are left out.
pub(super) fn scatter(marks: &[Mark], x: Axis, y: Axis) -> String {
    let placed = |value: f64, axis: Axis| value.is_finite() && (!axis.logarithmic || value > 0.0);
    let marks: Vec<&Mark> = marks
        .iter()
        .filter(|mark| placed(mark.x, x) && placed(mark.y, y))
        .collect();
    let (left, top, below, right) = MARGIN;
    let (width, height) = (left + AREA.0 + right, top + AREA.1 + below);
    let across = Scale::new(marks.iter().map(|mark| mark.x), x);
    let up = Scale::new(
        marks
            .iter()
            .flat_map(|mark| [mark.y, mark.interval.0, mark.interval.1]),
        y,
    );
    let place = |at: (f64, f64)| {
        (
            left + AREA.0 * across.at(at.0),
            top + AREA.1 * (1.0 - up.at(at.1)),
        )
    };
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" font-size=\"11\">\n"
    );
    // Writing to a string cannot fail.
    for tick in across.ticks() {
        let at = left + AREA.0 * across.at(tick);
        let _ = writeln!(out, "<path class=\"grid\" d=\"M{at:.1} {top}v{}\"/>", AREA.1);
        text(&mut out, (at, top + AREA.1 + 16.0), "middle", &number(tick));
    }
    for tick in up.ticks() {
        let at = top + AREA.1 * (1.0 - up.at(tick));
        let _ = writeln!(out, "<path class=\"grid\" d=\"M{left} {at:.1}h{}\"/>", AREA.0);
        text(&mut out, (left - 6.0, at + 4.0), "end", &number(tick));
    }
    text(&mut out, (left + AREA.0 / 2.0, height - 10.0), "middle", x.title);
    let middle = top + AREA.1 / 2.0;
    let _ = writeln!(
        out,
        "<text transform=\"rotate(-90 14 {middle})\" x=\"14\" y=\"{middle}\" text-anchor=\"middle\">{}</text>",
        escaped(y.title)
    );
    let mut line: Vec<(f64, f64)> = marks
        .iter()
        .filter(|mark| mark.frontier)
        .map(|mark| place((mark.x, mark.y)))
        .collect();
    line.sort_by(|a, b| a.0.total_cmp(&b.0));
    if line.len() > 1 {
        let path: Vec<String> = line.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
        let _ = writeln!(out, "<path class=\"frontier\" d=\"M{}\"/>", path.join("L"));
    }
    for mark in marks {
        let (x, y) = place((mark.x, mark.y));
        let (bottom, top) = (
            place((mark.x, mark.interval.0)).1,
            place((mark.x, mark.interval.1)).1,
        );
        let color = COLORS[mark.color % COLORS.len()];
        let _ = writeln!(
            out,
            "<path d=\"M{x:.1} {bottom:.1}V{top:.1}\" stroke=\"{color}\" opacity=\"0.5\"/>\n\
             <circle class=\"mark\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{}\" fill=\"{color}\"><title>{}</title></circle>",
            if mark.frontier { 5 } else { 3 },
            escaped(&mark.label)
        );
        if !mark.note.is_empty() {
            text(&mut out, (x + 7.0, y - 5.0), "start", &mark.note);
        }
    }
    out += "</svg>\n";
    out
}

fn number(value: f64) -> String {
    // What a sum of steps leaves over is not shown.
    let text = format!("{value:.6}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text.is_empty() || text == "-0" {
        "0".to_owned()
    } else {
        text.to_owned()
    }
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, what: &str) {
    let what = escaped(what);
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>"
    );
}

/// For HTML and SVG, in text and in attributes.
pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: Axis = Axis {
        title: "bytes <of> full",
        logarithmic: true,
        least: None,
    };
    const LINEAR: Axis = Axis {
        title: "tokens/s",
        logarithmic: false,
        least: Some(0.0),
    };

    fn mark(x: f64, y: f64, frontier: bool) -> Mark {
        Mark {
            label: "a & b".into(),
            color: 1,
            x,
            y,
            interval: (y * 0.9, y * 1.1),
            frontier,
            note: String::new(),
        }
    }

    #[test]
    fn marks_are_where_they_belong() {
        let svg = scatter(
            &[mark(0.1, 1.0, true), mark(1.0, 3.0, true), mark(0.0, 2.0, false)],
            LOG,
            LINEAR,
        );
        assert_eq!(
            svg.matches("class=\"mark\"").count(),
            2,
            "zero has no logarithm: {svg}"
        );
        assert_eq!(svg.matches("class=\"frontier\"").count(), 1);
        assert!(
            svg.contains("bytes &lt;of&gt; full") && svg.contains("<title>a &amp; b</title>"),
            "{svg}"
        );
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let places: Vec<f64> = svg
            .split("cx=\"")
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap().parse().unwrap())
            .collect();
        assert!(places[0] < places[1], "{places:?}");
        let none = scatter(&[], LOG, LINEAR);
        assert!(none.contains("</svg>") && !none.contains("NaN"), "{none}");
    }

    #[test]
    fn ticks_are_round_and_within() {
        let scale = Scale::new([0.07, 1.0].into_iter(), LOG);
        let ticks: Vec<String> = scale.ticks().into_iter().map(number).collect();
        assert_eq!(ticks, ["0.1", "0.2", "0.5", "1"]);
        let wide = Scale::new([0.0002, 3.0].into_iter(), LOG);
        let ticks: Vec<String> = wide.ticks().into_iter().map(number).collect();
        assert_eq!(ticks, ["0.001", "0.01", "0.1", "1"]);
        let linear = Scale::new([47.0, 93.0].into_iter(), LINEAR);
        let ticks: Vec<String> = linear.ticks().into_iter().map(number).collect();
        assert_eq!(ticks, ["0", "20", "40", "60", "80"]);
        assert_eq!(
            Scale::new(
                [5.0].into_iter(),
                Axis {
                    least: None,
                    ..LINEAR
                }
            )
            .ticks()
            .len(),
            5
        );
    }
}
