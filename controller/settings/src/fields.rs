//! Typed decoding whose errors name the field, what was given and what is allowed. The configuration and
//! both HTTP surfaces decode through here, so that the same mistake reads the same everywhere.

use std::fmt;

use cinch_protocol::PolicyError;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::{Path, Segment};

/// Most characters of a given value that a message repeats.
const GIVEN_CHARS: usize = 80;

/// One field that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field `{field}`: given {given}, allowed {allowed}")]
pub struct FieldFault {
    /// Dotted path.
    pub field: String,
    /// What was given.
    pub given: String,
    /// What is allowed.
    pub allowed: String,
}

impl FieldFault {
    /// A fault of `field`.
    pub fn new(field: impl Into<String>, given: impl fmt::Display, allowed: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            given: given.to_string(),
            allowed: allowed.into(),
        }
    }

    /// The same fault of a value that lies at `prefix` in a larger one.
    #[must_use]
    pub fn within(mut self, prefix: &str) -> Self {
        self.field = join(prefix, &self.field);
        self
    }
}

impl From<PolicyError> for FieldFault {
    fn from(err: PolicyError) -> Self {
        Self {
            field: err.field,
            given: err.given,
            allowed: err.allowed,
        }
    }
}

/// Decodes `value`, which lies at `prefix` (may be empty) in what the user wrote.
///
/// # Errors
/// The first field that does not fit.
pub fn decode<T: DeserializeOwned>(value: &Value, prefix: &str) -> Result<T, FieldFault> {
    serde_path_to_error::deserialize(value).map_err(|err| {
        let path = dotted(err.path());
        fault(value, &path, &err.inner().to_string()).within(prefix)
    })
}

fn join(prefix: &str, path: &str) -> String {
    match (prefix.is_empty(), path.is_empty()) {
        (true, _) => path.to_owned(),
        (_, true) => prefix.to_owned(),
        _ => format!("{prefix}.{path}"),
    }
}

fn dotted(path: &Path) -> String {
    let mut out = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => out.push_str(&format!("[{index}]")),
            Segment::Map { key } => out = join(&out, key),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    out
}

/// The value at a path that [`dotted`] made.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let pointer: String = path
        .replace('[', ".")
        .replace(']', "")
        .split('.')
        .filter(|part| !part.is_empty())
        .map(|part| format!("/{}", part.replace('~', "~0").replace('/', "~1")))
        .collect();
    value.pointer(&pointer)
}

/// serde says what is wrong in words; this takes them apart again. Wordings it does not know end up whole
/// in `allowed`, so nothing is lost.
fn fault(value: &Value, path: &str, message: &str) -> FieldFault {
    if let Some(name) = between(message, "unknown field `", "`") {
        let allowed = message
            .split_once(", ")
            .map_or("no field here", |(_, rest)| rest.trim_start_matches("expected "));
        // Some deserializers have put the key on the path already, some have not.
        let field = if last(path) == name {
            path.to_owned()
        } else {
            join(path, name)
        };
        return FieldFault::new(field, "an unknown field", allowed.trim_start_matches("one of "));
    }
    if let Some(name) = between(message, "missing field `", "`") {
        return FieldFault::new(join(path, name), "nothing", "a value: the field is required");
    }
    let given = at(value, path).map_or_else(|| "nothing".to_owned(), show);
    if let Some((_, allowed)) = message.rsplit_once(", allowed ") {
        return FieldFault::new(path, given, allowed);
    }
    match message.rsplit_once("expected ") {
        Some((_, expected)) => FieldFault::new(path, given, plain(expected)),
        None => FieldFault::new(path, given, message),
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    text.split_once(before)?
        .1
        .split_once(after)
        .map(|(found, _)| found)
}

/// serde's words for types, in the user's.
fn plain(expected: &str) -> String {
    match expected.trim_start_matches("one of ") {
        "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more".into(),
        "i32" | "i64" => "a whole number".into(),
        "f32" | "f64" => "a number".into(),
        other if other.starts_with("struct ") => "an object with its fields".into(),
        other => other.into(),
    }
}

/// A value as a message repeats it: compact JSON, cut.
#[must_use]
pub fn show(value: &Value) -> String {
    cut(&value.to_string())
}

/// The message itself: candle and anyhow put backtraces on the lines after it.
#[must_use]
pub fn first_line(text: &str) -> &str {
    text.trim_start().lines().next().unwrap_or_default().trim_end()
}

/// `text`, cut to what a message repeats.
#[must_use]
pub fn cut(text: &str) -> String {
    match text.char_indices().nth(GIVEN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use cinch_protocol::PolicyChange;
    use serde_json::json;

    use super::*;

    fn fails(value: Value) -> String {
        decode::<PolicyChange>(&value, "").unwrap_err().to_string()
    }

    #[test]
    fn bits_out_of_range() {
        assert_eq!(
            fails(json!({"policy": {"quantize": {"k_bits": 5, "v_bits": 4}}})),
            "field `policy.quantize.k_bits`: given 5, allowed 2, 3, 4, 8 or 16"
        );
    }

    #[test]
    fn layers_are_named_where_they_are_wrong() {
        let with = |layers: Value| {
            fails(json!({"policy": {"quantize": {"k_bits": 4, "v_bits": 4, "layers": layers}}}))
        };
        assert_eq!(
            with(json!({"0-2": {"k_bits": 5}})),
            "field `policy.quantize.layers.0-2.k_bits`: given 5, allowed 2, 3, 4, 8 or 16"
        );
        for key in ["", "x", "2-1", "-1", "1-", "10000", "1-2-3", "+1"] {
            let told = with(json!({key: {"k_bits": 8}}));
            assert!(
                told.contains("layers") && told.contains("a layer like \"3\" or layers like \"0-2\""),
                "{key:?}: {told}"
            );
        }
        assert_eq!(
            with(json!({"1": {"bits": 8}})),
            "field `policy.quantize.layers.1.bits`: given an unknown field, allowed `k_bits` or `v_bits`"
        );
    }

    #[test]
    fn unknown_field_lists_the_known_ones() {
        assert_eq!(
            fails(json!({"policy": {"select": {"methd": "h2o", "budget": 0.5}}})),
            "field `policy.select.methd`: given an unknown field, allowed `method`, `budget`, `sinks`, `recent`, `interval`, \
             `window`, `kernel`, `skip_layers`, `seed`, `temperature`, `recover`, `layers`, `beta`, `heads`, `floor`, `merge`"
        );
        assert_eq!(
            fails(json!({"lvl": 1})),
            "field `lvl`: given an unknown field, allowed `policy`, `level`, `ratio`, `fence`, `ttl_seconds`"
        );
    }

    #[test]
    fn missing_and_mistyped() {
        assert_eq!(
            fails(json!({"policy": {"select": {"method": "h2o"}}})),
            "field `policy.select.budget`: given nothing, allowed a value: the field is required"
        );
        assert_eq!(
            fails(json!({"level": "two"})),
            "field `level`: given \"two\", allowed a whole number, 0 or more"
        );
        assert_eq!(
            fails(json!({"ratio": "half"})),
            "field `ratio`: given \"half\", allowed a number"
        );
        assert_eq!(
            fails(json!({"policy": {"select": {"method": "h3o", "budget": 0.5}}})),
            "field `policy.select.method`: given \"h3o\", allowed `streaming`, `h2o`, `tova`, `snapkv`, `scissorhands`, \
             `keyformer`, `expected_attention`, `key_norm`, `keydiff`, `lagkv`, `fastgen`, `quest`, `kvzip`"
        );
    }

    #[test]
    fn prefix_and_cut() {
        let fault = decode::<PolicyChange>(&json!({"level": "x".repeat(500)}), "cinch").unwrap_err();
        assert_eq!(fault.field, "cinch.level");
        assert!(fault.given.chars().count() <= GIVEN_CHARS + 1);
    }
}
