//! As much of PromQL as is needed to tell metrics from functions, labels and keywords. Whether a query is one is
//! promtool's and Prometheus' to say.

const GROUPING: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
const OTHER: [&str; 7] = ["and", "or", "unless", "bool", "offset", "inf", "nan"];

/// A metric and the labels it is asked for by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Selector {
    pub(crate) metric: String,
    /// With braces; empty without any.
    pub(crate) labels: String,
}

impl Selector {
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.metric, self.labels)
    }
}

/// The end of what is quoted or bracketed at the beginning of `text`, strings inside skipped.
fn end(text: &str, close: char) -> usize {
    let mut quote = None;
    for (at, c) in text.char_indices().skip(1) {
        match quote {
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == close => return at + c.len_utf8(),
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None => {}
        }
    }
    panic!("{text}: no {close}");
}

/// Whether what comes after a word makes it a function or an aggregation.
fn called(after: &str) -> bool {
    let after = after.trim_start();
    after.starts_with('(')
        || ["by", "without"]
            .iter()
            .any(|word| after.starts_with(&format!("{word} (")))
}

/// Every metric that an expression reads.
pub(crate) fn selectors(expr: &str) -> Vec<Selector> {
    let name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut all = Vec::new();
    let mut rest = expr;
    while let Some(c) = rest.chars().next() {
        let skip = match c {
            '"' | '\'' => end(rest, c),
            '[' => end(rest, ']'),
            // A number or a duration.
            '0'..='9' => rest.find(|c: char| !name(c) && c != '.').unwrap_or(rest.len()),
            _ if name(c) => {
                let length = rest.find(|c| !name(c)).unwrap_or(rest.len());
                let (word, after) = rest.split_at(length);
                let spaces = after.len() - after.trim_start().len();
                if GROUPING.contains(&word) && after.trim_start().starts_with('(') {
                    length + spaces + end(after.trim_start(), ')')
                } else if GROUPING.contains(&word) || OTHER.contains(&word) || called(after) {
                    length
                } else {
                    let braces = if after.starts_with('{') {
                        end(after, '}')
                    } else {
                        0
                    };
                    all.push(Selector {
                        metric: word.to_owned(),
                        labels: after[..braces].to_owned(),
                    });
                    length + braces
                }
            }
            _ => c.len_utf8(),
        };
        rest = &rest[skip..];
    }
    all
}

/// The `$names` in a text.
pub(crate) fn variables(text: &str) -> Vec<String> {
    let pieces = text.split('$').skip(1);
    pieces
        .map(|piece| {
            let name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            piece.chars().take_while(|c| name(*c)).collect()
        })
        .collect()
}

/// Puts values in place of `$names`, longest names first.
pub(crate) fn fill(expr: &str, values: &[(String, String)]) -> String {
    let mut values: Vec<_> = values.iter().collect();
    values.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    let filled = values.iter().fold(expr.to_owned(), |expr, (name, value)| {
        expr.replace(&format!("${name}"), value)
    });
    assert!(!filled.contains('$'), "{filled}: an unknown variable");
    filled
}
