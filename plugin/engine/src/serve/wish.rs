//! What a request wants of its cache: a class by header or body, and within it a policy, level or ratio of its own.

use axum::http::HeaderMap;
use cinch_protocol::{Policy, PolicyChange};
use serde::Deserialize;
use serde_json::Value;

use super::CLASS_HEADER;
use crate::classes::Choice;
use crate::fields::{FieldFault, decode};
use crate::http::Refusal;
use crate::state::App;

/// Where the wish lies in a body.
const FIELD: &str = "cinch";

/// The `cinch` object of a request's body.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    #[serde(default)]
    class: Option<String>,
    #[serde(default)]
    policy: Option<Policy>,
    #[serde(default)]
    level: Option<u32>,
    #[serde(default)]
    ratio: Option<f64>,
}

/// What a request gets.
#[derive(Debug, PartialEq)]
pub(super) struct Wish {
    pub(super) class: String,
    /// The class's, or what the request asked for.
    pub(super) choice: Choice,
    /// Whether the request asked for it.
    pub(super) own: bool,
}

impl Wish {
    /// Takes the wish out of a request; the body that is left is OpenAI's.
    pub(super) fn take(app: &App, headers: &HeaderMap, body: &mut Value) -> Result<Self, Refusal> {
        let Value::Object(fields) = body else {
            return Err(FieldFault::new("body", crate::fields::show(body), "a JSON object").into());
        };
        let asked: Option<Asked> = fields
            .remove(FIELD)
            .map(|asked| decode(&asked, FIELD))
            .transpose()?;
        let header = headers
            .get(CLASS_HEADER)
            .map(|value| {
                value
                    .to_str()
                    .map_err(|_| FieldFault::new(CLASS_HEADER, "not ASCII", "a class's name"))
            })
            .transpose()?;
        let (class, field) = match (header, asked.as_ref().and_then(|asked| asked.class.as_deref())) {
            (Some(header), Some(body)) if header != body => {
                let allowed = format!("{header}, as in the header {CLASS_HEADER}");
                return Err(FieldFault::new("cinch.class", body, allowed).into());
            }
            (Some(header), _) => (header, CLASS_HEADER),
            (None, Some(body)) => (body, "cinch.class"),
            (None, None) => ("default", "class"),
        };
        let of_class = app.classes.current(class, field)?;
        let class = class.to_owned();
        let (choice, own) = match asked {
            Some(Asked {
                policy, level, ratio, ..
            }) if policy.is_some() || level.is_some() || ratio.is_some() => {
                app.kv.require_on()?;
                let change = PolicyChange {
                    policy,
                    level,
                    ratio,
                    ..PolicyChange::default()
                };
                (app.classes.resolve(&change, FIELD)?, true)
            }
            _ => (of_class, false),
        };
        Ok(Self { class, choice, own })
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use serde_json::json;

    use super::*;
    use crate::serve::tests::app;

    fn take(
        overrides: &[&str],
        header: Option<&'static str>,
        mut body: Value,
    ) -> Result<(Wish, Value), Refusal> {
        let mut headers = HeaderMap::new();
        if let Some(class) = header {
            headers.insert(CLASS_HEADER, HeaderValue::from_static(class));
        }
        let wish = Wish::take(&app(overrides), &headers, &mut body)?;
        Ok((wish, body))
    }

    #[test]
    fn class_by_header_body_or_default() {
        let (wish, body) = take(&[], None, json!({"prompt": "x"})).unwrap();
        assert_eq!((wish.class.as_str(), wish.choice.level), ("default", Some(0)));
        assert_eq!(body, json!({"prompt": "x"}));
        let (wish, _) = take(&[], Some("batch"), json!({})).unwrap();
        assert_eq!((wish.class.as_str(), wish.choice.level), ("batch", Some(2)));
        let (wish, body) = take(
            &[],
            None,
            json!({"prompt": "x", "cinch": {"class": "batch", "level": 1}}),
        )
        .unwrap();
        assert_eq!((wish.class.as_str(), wish.choice.level), ("batch", Some(1)));
        assert_eq!(body, json!({"prompt": "x"}), "the engine does not get to see it");
        let (wish, _) = take(&[], Some("batch"), json!({"cinch": {"ratio": 1.5}})).unwrap();
        assert_eq!((wish.class.as_str(), wish.choice.level), ("batch", Some(1)));
        assert!(wish.own, "a ratio is a wish of its own");
        let policy = json!({"select": {"method": "h2o", "budget": 0.5}});
        let (wish, _) = take(
            &[],
            Some("batch"),
            json!({"cinch": {"class": "batch", "policy": policy}}),
        )
        .unwrap();
        assert_eq!(
            (wish.choice.level, wish.choice.policy.to_string()),
            (None, "h2o 0.5".into())
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (
                Some("nightly"),
                json!({}),
                CLASS_HEADER,
                "nightly",
                "batch, default",
            ),
            (
                None,
                json!({"cinch": {"class": "nightly"}}),
                "cinch.class",
                "nightly",
                "batch, default",
            ),
            (
                Some("batch"),
                json!({"cinch": {"class": "default"}}),
                "cinch.class",
                "default",
                "batch, as in",
            ),
            (
                None,
                json!({"cinch": {"level": 99}}),
                "cinch.level",
                "99",
                "0 to ",
            ),
            (
                None,
                json!({"cinch": {"lvl": 1}}),
                "cinch.lvl",
                "an unknown field",
                "`class`, `policy`, `level`, `ratio`",
            ),
            (
                None,
                json!({"cinch": {"level": 1, "policy": {}}}),
                "cinch",
                "`policy` and `level`",
                "exactly one",
            ),
            (
                None,
                json!({"cinch": {"level": 1, "ratio": 2.0}}),
                "cinch",
                "`level` and `ratio`",
                "exactly one",
            ),
            (
                None,
                json!({"cinch": {"ratio": 99}}),
                "cinch.ratio",
                "99",
                "1.0 to ",
            ),
            (
                None,
                json!({"cinch": {"policy": {"quantize": {"k_bits": 4, "v_bits": 6}}}}),
                "cinch.policy.quantize.v_bits",
                "6",
                "2, 3, 4, 8 or 16",
            ),
            (
                None,
                json!({"cinch": {"policy": {"select": {"method": "h2o", "budget": 0.001}}}}),
                "cinch.policy.select.budget",
                "0.001",
                "0.02 to 1",
            ),
            (None, json!(["prompt"]), "body", "[\"prompt\"]", "a JSON object"),
        ];
        for (header, body, field, given, allowed) in cases {
            let refusal = take(&[], header, body.clone()).unwrap_err();
            assert_eq!(refusal.status(), 400, "{body}");
            assert_eq!(refusal.0.field.as_deref(), Some(field), "{body}");
            assert!(refusal.0.given.as_deref().unwrap().contains(given), "{refusal:?}");
            assert!(
                refusal.0.allowed.as_deref().unwrap().contains(allowed),
                "{refusal:?}"
            );
        }
    }

    #[test]
    fn a_policy_is_not_taken_where_the_plugin_is_off() {
        let refusal = take(&["kv.plugin=off"], None, json!({"cinch": {"level": 1}})).unwrap_err();
        assert_eq!(
            (refusal.status().as_u16(), refusal.0.field.as_deref()),
            (409, Some("kv.plugin"))
        );
        let refusal = take(&["kv.plugin=off"], None, json!({"cinch": {"ratio": 2.0}})).unwrap_err();
        assert_eq!(refusal.status(), 409);
        assert!(take(&["kv.plugin=off"], Some("batch"), json!({})).is_ok());
    }
}
