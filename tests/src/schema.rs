//! The part of JSON Schema (2020-12) that the published schemas use. A keyword that is not known here is an error: what is
//! not checked must not look as if it were.

use serde_json::Value;

/// What of `value` does not fit `schema`, each with its place; empty: it fits.
///
/// # Panics
/// A keyword, or a reference, that this does not know.
#[must_use]
pub fn misfits(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, schema, value, "", &mut found);
    found
}

fn check(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let Some(keywords) = schema.as_object() else {
        panic!("{at}: no schema: {schema}");
    };
    for (keyword, wanted) in keywords {
        let mut fault = |what: String| found.push(format!("{at}: {what}: {value}"));
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" => {}
            "$ref" => {
                let target = wanted
                    .as_str()
                    .and_then(|text| root.pointer(text.strip_prefix('#')?));
                let target = target.unwrap_or_else(|| panic!("{at}: no such definition: {wanted}"));
                check(root, target, value, at, found);
            }
            "type" => {
                let one = std::slice::from_ref(wanted);
                let types = wanted.as_array().map_or(one, Vec::as_slice);
                if !types.iter().any(|name| is(value, name)) {
                    fault(format!("not of type {wanted}"));
                }
            }
            "const" if value != wanted => fault(format!("not {wanted}")),
            "enum" if !wanted.as_array().is_some_and(|all| all.contains(value)) => {
                fault(format!("none of {wanted}"));
            }
            "minimum" if number(value).is_some_and(|given| Some(given) < number(wanted)) => {
                fault(format!("under {wanted}"));
            }
            "maximum" if number(value).is_some_and(|given| Some(given) > number(wanted)) => {
                fault(format!("over {wanted}"));
            }
            "pattern" => {
                let (Some(pattern), Some(text)) = (wanted.as_str(), value.as_str()) else {
                    continue;
                };
                if !matches(pattern, text) {
                    fault(format!("not like {wanted}"));
                }
            }
            "required" => {
                let Some(object) = value.as_object() else {
                    continue;
                };
                for name in wanted.as_array().into_iter().flatten().filter_map(Value::as_str) {
                    if !object.contains_key(name) {
                        found.push(format!("{at}: lacks {name}"));
                    }
                }
            }
            "properties" => {
                for (name, inner) in wanted.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        check(root, inner, value, &format!("{at}/{name}"), found);
                    }
                }
            }
            "additionalProperties" => {
                assert_eq!(wanted, &Value::Bool(false), "{at}: {keyword}");
                let known = |name: &String| schema["properties"].get(name).is_some();
                for name in value.as_object().into_iter().flat_map(serde_json::Map::keys) {
                    if !known(name) {
                        found.push(format!("{at}: has {name}"));
                    }
                }
            }
            "items" => {
                for (i, value) in value.as_array().into_iter().flatten().enumerate() {
                    check(root, wanted, value, &format!("{at}/{i}"), found);
                }
            }
            "const" | "enum" | "minimum" | "maximum" => {}
            other => panic!("{at}: a keyword that is not known: {other}"),
        }
    }
}

fn is(value: &Value, name: &Value) -> bool {
    match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        Some("number") => value.is_number(),
        Some("integer") => value.is_u64() || value.is_i64(),
        _ => panic!("a type that is not known: {name}"),
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64()
}

/// Patterns are literal characters and classes such as `[0-9a-f]{64}`, from `^` to `$`.
fn matches(pattern: &str, text: &str) -> bool {
    let pattern = pattern
        .strip_prefix('^')
        .and_then(|pattern| pattern.strip_suffix('$'));
    let mut pattern = pattern
        .unwrap_or_else(|| panic!("a pattern without both ends"))
        .chars();
    let mut text = text.chars();
    while let Some(c) = pattern.next() {
        if c != '[' {
            if text.next() != Some(c) {
                return false;
            }
            continue;
        }
        let class: Vec<char> = pattern.by_ref().take_while(|&c| c != ']').collect();
        let count: String = pattern
            .by_ref()
            .skip_while(|&c| c == '{')
            .take_while(|&c| c != '}')
            .collect();
        let count: usize = count
            .parse()
            .unwrap_or_else(|_| panic!("a class without a count"));
        let ranges: Vec<&[char]> = class.split(|&c| c == '-').collect();
        assert!(ranges.len() > 1, "a class without ranges");
        let within = |c: char| {
            class
                .windows(3)
                .any(|part| part[1] == '-' && (part[0]..=part[2]).contains(&c))
        };
        for _ in 0..count {
            if !text.next().is_some_and(within) {
                return false;
            }
        }
    }
    text.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema() -> Value {
        json!({
            "type": "object",
            "additionalProperties": false,
            "required": ["a"],
            "properties": {
                "a": {"$ref": "#/$defs/number"},
                "b": {"type": "array", "items": {"enum": ["x", "y"]}},
                "c": {"type": ["string", "null"], "pattern": "^n:[0-9a-f]{2}$"}
            },
            "$defs": {"number": {"type": "number", "minimum": 0, "maximum": 1}}
        })
    }

    #[test]
    fn what_fits_and_what_does_not() {
        let fits = |value: Value| misfits(&schema(), &value);
        assert!(fits(json!({"a": 0.5, "b": ["x"], "c": "n:0f"})).is_empty());
        assert!(fits(json!({"a": 1, "c": null})).is_empty());
        for (value, wanted) in [
            (json!({}), ": lacks a"),
            (json!({"a": 0, "d": 1}), ": has d"),
            (json!({"a": "0"}), "/a: not of type"),
            (json!({"a": -0.1}), "/a: under 0"),
            (json!({"a": 1.1}), "/a: over 1"),
            (json!({"a": 0, "b": ["x", "z"]}), "/b/1: none of"),
            (json!({"a": 0, "c": "n:0g"}), "/c: not like"),
            (json!({"a": 0, "c": "n:0f0"}), "/c: not like"),
            (json!([]), ": not of type"),
        ] {
            let found = fits(value.clone());
            assert!(
                found.iter().any(|fault| fault.starts_with(wanted)),
                "{value}: {found:?}"
            );
        }
    }
}
