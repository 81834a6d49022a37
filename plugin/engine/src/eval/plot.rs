//! A scatter plot as SVG: a mark a policy, whiskers for the interval, a line along the frontier and one where the full cache
//! is.

use std::fmt::Write;

/// Width and height of the area that is drawn in.
const AREA: (f64, f64) = (620.0, 360.0);
/// Left of it, above it, below it, right of it.
const MARGIN: (f64, f64, f64, f64) = (84.0, 16.0, 48.0, 20.0);
/// Told apart by most people who see colors differently (Okabe and Ito, 2008); their black is the text's color, light on dark
/// pages.
const COLORS: [&str; 8] = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "currentColor",
    "#7f7f7f",
];
/// Shapes of marks. Three and eight have no common factor: 24 series differ in color or shape, neighbors and those of like
/// colors in both.
const SHAPES: usize = 3;

/// A mark.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    pub(super) label: String,
    /// What it is drawn like: [`symbol`].
    pub(super) series: usize,
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
    /// Where the full cache is: a line, within the range whatever the marks.
    pub(super) full: Option<f64>,
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
        let values = values.chain(axis.full).map(map).filter(|x| x.is_finite());
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| {
            (low.min(x), high.max(x))
        });
        let (low, high) = if low < high {
            let pad = (high - low) * 0.05;
            (low - pad, high + pad)
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
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"{} by {}\">\n",
        escaped(y.title),
        escaped(x.title)
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
    if let Some(full) = x.full {
        let at = left + AREA.0 * across.at(full);
        let _ = writeln!(out, "<path class=\"full\" d=\"M{at:.1} {top}v{}\"/>", AREA.1);
        // On the side that has room.
        let (side, anchor) = if across.at(full) > 0.5 {
            (-5.0, "end")
        } else {
            (5.0, "start")
        };
        text(&mut out, (at + side, top + 12.0), anchor, "full cache");
    }
    text(&mut out, (left + AREA.0 / 2.0, height - 10.0), "middle", x.title);
    let middle = top + AREA.1 / 2.0;
    let _ = writeln!(
        out,
        "<text transform=\"rotate(-90 18 {middle})\" x=\"18\" y=\"{middle}\" text-anchor=\"middle\">{}</text>",
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
        let _ = writeln!(
            out,
            "<path d=\"M{x:.1} {bottom:.1}V{top:.1}\" stroke=\"{}\" opacity=\"0.5\"/>\n\
             <path class=\"mark\" {}><title>{}</title></path>",
            COLORS[mark.series % COLORS.len()],
            symbol(mark.series, (x, y), if mark.frontier { 5.5 } else { 3.5 }),
            escaped(&mark.label)
        );
        if !mark.note.is_empty() {
            let note = escaped(&mark.note);
            let (x, y) = (x + 7.0, y - 5.0);
            let _ = writeln!(
                out,
                "<text class=\"note\" x=\"{x:.1}\" y=\"{y:.1}\">{note}</text>"
            );
        }
    }
    out += "</svg>\n";
    out
}

/// Outline and color of a series' mark, as attributes of a path, `size` from its middle to its edge.
pub(super) fn symbol(series: usize, (x, y): (f64, f64), size: f64) -> String {
    let outline = match series % SHAPES {
        0 => {
            let (left, across) = (x - size, 2.0 * size);
            let half = |across: f64| format!("a{size} {size} 0 1 0 {across} 0");
            format!("M{left:.1} {y:.1}{}{}z", half(across), half(-across))
        }
        1 => {
            let side = 1.8 * size;
            let (left, top) = (x - side / 2.0, y - side / 2.0);
            format!("M{left:.1} {top:.1}h{side:.1}v{side:.1}h-{side:.1}z")
        }
        _ => {
            let half = 1.2 * size;
            let top = y - half;
            format!("M{x:.1} {top:.1}l{half:.1} {half:.1}l-{half:.1} {half:.1}l-{half:.1} -{half:.1}z")
        }
    };
    format!("d=\"{outline}\" fill=\"{}\"", COLORS[series % COLORS.len()])
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
        full: None,
    };
    const LINEAR: Axis = Axis {
        title: "tokens/s",
        logarithmic: false,
        full: Some(0.0),
    };

    fn mark(x: f64, y: f64, frontier: bool) -> Mark {
        Mark {
            label: "a & b".into(),
            series: 1,
            x,
            y,
            interval: (y * 0.9, y * 1.1),
            frontier,
            note: String::new(),
        }
    }

    #[test]
    fn marks_are_where_they_belong() {
        let marks = [mark(0.1, 1.0, true), mark(1.0, 3.0, true), mark(0.0, 2.0, false)];
        let svg = scatter(&marks, LOG, LINEAR);
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
            .split("class=\"mark\" d=\"M")
            .skip(1)
            .map(|rest| rest.split(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(places[0] < places[1], "{places:?}");
        assert!(
            !svg.contains("full cache"),
            "its place is not on this axis: {svg}"
        );
        assert!(scatter(&marks, LINEAR, LINEAR).contains("full cache"));
        let none = scatter(&[], LOG, LINEAR);
        assert!(none.contains("</svg>") && !none.contains("NaN"), "{none}");
    }

    #[test]
    fn series_look_different() {
        let mut all: Vec<String> = (0..24).map(|series| symbol(series, (1.0, 2.0), 3.0)).collect();
        let [first, second] = [0, 1].map(|series| symbol(series, (1.0, 2.0), 3.0));
        let fill = |mark: &str| mark.split("fill=").nth(1).map(str::to_owned);
        let shape = |mark: &str| mark.split("fill=").next().map(str::to_owned);
        assert!(fill(&first) != fill(&second) && shape(&first) != shape(&second));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 24);
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
        let alone = Axis { full: None, ..LINEAR };
        assert_eq!(Scale::new([5.0].into_iter(), alone).ticks().len(), 5);
    }
}
