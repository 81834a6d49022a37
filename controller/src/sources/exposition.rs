//! Prometheus' text format, as far as the controller reads it. Only wanted metrics are kept, so that what a
//! scrape costs does not depend on what else an engine exports.

use std::collections::BTreeMap;

/// Most series that are kept: some hundred classes' histograms. Each scrape of a window holds as many.
const MAX_SERIES: usize = 20_000;

/// Labels of a series.
pub type Labels = BTreeMap<String, String>;

/// The wanted series of a scrape, by metric name.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Samples(BTreeMap<String, Vec<(Labels, f64)>>);

/// Why a text is no exposition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpositionError {
    /// A line that is neither comment nor sample.
    #[error("line {line}: not a sample: {text:?}")]
    Line {
        /// 1-based.
        line: usize,
        /// Its beginning.
        text: String,
    },
    /// More wanted series than are kept.
    #[error("more than {MAX_SERIES} series")]
    TooMany,
    /// Nothing wanted is in it.
    #[error("none of the metrics that are read")]
    Empty,
}

impl Samples {
    /// Reads a text, keeping metrics that are `wanted`.
    ///
    /// # Errors
    /// A malformed line, or a text that holds nothing wanted, or too much of it.
    pub fn parse(text: &str, wanted: impl Fn(&str) -> bool) -> Result<Self, ExpositionError> {
        let mut all: BTreeMap<String, Vec<(Labels, f64)>> = BTreeMap::new();
        let mut kept = 0;
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, labels, value) = sample(line).ok_or_else(|| ExpositionError::Line {
                line: index + 1,
                text: line.chars().take(60).collect(),
            })?;
            if wanted(name) {
                kept += 1;
                if kept > MAX_SERIES {
                    return Err(ExpositionError::TooMany);
                }
                all.entry(name.to_owned()).or_default().push((labels, value));
            }
        }
        if all.is_empty() {
            return Err(ExpositionError::Empty);
        }
        Ok(Self(all))
    }

    /// All series of a metric.
    #[must_use]
    pub fn series(&self, name: &str) -> &[(Labels, f64)] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// The value of a metric without labels.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<f64> {
        self.series(name).first().map(|(_, value)| *value)
    }

    /// A metric's values by class.
    #[must_use]
    pub fn by_class(&self, name: &str) -> BTreeMap<String, f64> {
        let all = self.series(name).iter();
        all.filter_map(|(labels, value)| Some((labels.get("class")?.clone(), *value)))
            .collect()
    }
}

fn sample(line: &str) -> Option<(&str, Labels, f64)> {
    let end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at(end);
    let named = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
    if name.is_empty() || !named {
        return None;
    }
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inner) => labels(inner)?,
        None => (Labels::new(), rest),
    };
    // A time stamp may follow.
    let mut words = rest.split_whitespace();
    let value = number(words.next()?)?;
    if words.next().is_some_and(|stamp| stamp.parse::<i64>().is_err()) || words.next().is_some() {
        return None;
    }
    Some((name, labels, value))
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" | "Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        // Rust also reads "inf" and "nan" in any case, which the format does not know.
        _ if text
            .bytes()
            .any(|b| b.is_ascii_alphabetic() && !matches!(b, b'e' | b'E')) =>
        {
            None
        }
        _ => text.parse().ok(),
    }
}

/// Labels after `{`, and what follows the `}`.
fn labels(mut rest: &str) -> Option<(Labels, &str)> {
    let mut labels = Labels::new();
    loop {
        rest = rest.trim_start_matches([' ', ',']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.trim().to_owned(), value);
        rest = &after[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_wanted() {
        let text = "# HELP a b\n# TYPE a gauge\na 1\nb{class=\"x, \\\"y\\\"\",le=\"+Inf\"} 2.5e3 1700000000\nc{} NaN\nskipped 7\n";
        let samples = Samples::parse(text, |name| name != "skipped").unwrap();
        assert_eq!(samples.value("a"), Some(1.0));
        assert_eq!(
            samples.by_class("b"),
            BTreeMap::from([("x, \"y\"".to_owned(), 2500.0)])
        );
        assert!(samples.value("c").unwrap().is_nan());
        assert_eq!(samples.value("skipped"), None);
    }

    #[test]
    fn anything_else_is_an_error() {
        for text in [
            "<html>",
            "a",
            "a{b=\"c} 1",
            "a one",
            "a 1 2 3",
            "a nan",
            "{} 1",
            "a 1 x",
        ] {
            let err = Samples::parse(text, |_| true).unwrap_err();
            assert!(
                matches!(err, ExpositionError::Line { line: 1, .. }),
                "{text}: {err}"
            );
        }
        assert_eq!(Samples::parse("", |_| true), Err(ExpositionError::Empty));
        assert_eq!(
            Samples::parse("a 1", |name| name == "b"),
            Err(ExpositionError::Empty)
        );
    }
}
