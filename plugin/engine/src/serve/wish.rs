//! What a request wants of its cache: a class by header or body, and within it a policy or level of its own.

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
}

/// What a request gets.
#[derive(Debug, PartialEq)]
pub(super) struct Wish {
    pub(super) class: String,
    pub(super) choice: Choice,
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
        let choice = match asked {
            Some(Asked { policy, level, .. }) if policy.is_some() || level.is_some() => {
                app.kv.require_on()?;
                app.classes.resolve(&PolicyChange { policy, level }, FIELD)?
            }
            _ => of_class,
        };
        Ok(Self { class, choice })
    }
}
