//! `/v1/policies` and `/v1/ladder`. A change counts for requests that come after it; running ones keep
//! theirs until a `PATCH` of their own.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::header::{ETAG, IF_MATCH};
use axum::http::{HeaderMap, HeaderName};
use cinch_protocol::{ClassPolicies, ClassPolicy, Ladder, PolicyChange};
use serde_json::{Map, Value};
use tracing::info;

use super::MAX_BODY;
use crate::classes::{Change, Choice, Classes};
use crate::fields::{FieldFault, decode};
use crate::http::{Received, Refusal, json, received};
use crate::state::App;

/// A class's policy under its ETag.
type Tagged = ([(HeaderName, String); 1], Json<ClassPolicy>);

fn tagged(policy: ClassPolicy) -> Tagged {
    ([(ETAG, policy.etag.clone())], Json(policy))
}

pub(super) async fn list(State(app): State<Arc<App>>) -> Json<ClassPolicies> {
    Json(app.classes.all())
}

pub(super) async fn ladder(State(app): State<Arc<App>>) -> Json<Ladder> {
    Json(app.classes.ladder().clone())
}

pub(super) async fn get(State(app): State<Arc<App>>, Path(class): Path<String>) -> Result<Tagged, Refusal> {
    app.classes.get(&class).map(tagged)
}

pub(super) async fn put(
    State(app): State<Arc<App>>,
    Path(class): Path<String>,
    Query(query): Query<Map<String, Value>>,
    headers: HeaderMap,
    body: Received,
) -> Result<Tagged, Refusal> {
    // An unknown class is the more useful thing to hear of than a bad body for it.
    app.classes.get(&class)?;
    let body = json(&headers, &received(body, MAX_BODY)?)?;
    let change: PolicyChange = decode(&body, "")?;
    let change = app.classes.change(&change)?;
    set(&app, &class, change, &headers, &query)
}

pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Path(class): Path<String>,
    Query(query): Query<Map<String, Value>>,
    headers: HeaderMap,
) -> Result<Tagged, Refusal> {
    set(&app, &class, Classes::reset(), &headers, &query)
}

fn set(
    app: &App,
    class: &str,
    change: Change,
    headers: &HeaderMap,
    query: &Map<String, Value>,
) -> Result<Tagged, Refusal> {
    app.kv.require_on()?;
    let dry_run = dry_run(query)?;
    let if_match = headers
        .get(IF_MATCH)
        .map(|value| {
            value
                .to_str()
                .map_err(|_| FieldFault::new("if-match", "not ASCII", "an ETag"))
        })
        .transpose()?;
    let before = app.classes.get(class)?.etag;
    let now = app.classes.put(class, change, if_match, dry_run)?;
    if !dry_run {
        if class == "default" {
            app.kv.set_default(Choice {
                level: now.level,
                policy: now.policy.clone(),
            })?;
        }
        // Renewals come by the minute.
        if now.etag != before {
            let holder = now.lease.as_ref().map(|lease| lease.holder.as_str());
            info!(class, level = now.level, policy = %now.policy, origin = ?now.origin, holder, "class policy changed");
        }
    }
    Ok(tagged(now))
}

fn dry_run(query: &Map<String, Value>) -> Result<bool, FieldFault> {
    let mut dry_run = false;
    for (key, value) in query {
        dry_run = match (key.as_str(), value.as_str()) {
            ("dry_run", Some("true")) => true,
            ("dry_run", Some("false")) => false,
            ("dry_run", _) => {
                return Err(FieldFault::new(
                    "dry_run",
                    crate::fields::show(value),
                    "true or false",
                ));
            }
            (other, _) => {
                return Err(FieldFault::new(
                    crate::fields::cut(other),
                    "an unknown parameter",
                    "dry_run",
                ));
            }
        };
    }
    Ok(dry_run)
}
