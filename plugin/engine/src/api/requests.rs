//! `/v1/requests`: what is live, and changing the policy of one while it runs.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use cinch_protocol::{Given, PolicyChange, RequestView, RequestViews, RetuneReport};
use tracing::info;

use super::MAX_BODY;
use crate::fields::{FieldFault, cut, decode};
use crate::http::{Received, Refusal, json, received};
use crate::state::App;

pub(super) async fn list(State(app): State<Arc<App>>) -> Json<RequestViews> {
    Json(RequestViews {
        requests: app.kv.requests(),
    })
}

pub(super) async fn get(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<RequestView>, Refusal> {
    app.kv.request(number(&id)?).map(Json)
}

pub(super) async fn patch(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Received,
) -> Result<Json<RetuneReport>, Refusal> {
    let id = number(&id)?;
    let body = json(&headers, &received(body, MAX_BODY)?)?;
    let change: PolicyChange = decode(&body, "")?;
    if let Some(ttl) = change.ttl_seconds {
        let allowed = "nothing: what a running request was told holds until it ends";
        return Err(FieldFault::new("ttl_seconds", ttl, allowed).into());
    }
    let choice = app.classes.resolve(&change, "")?;
    app.kv.require_on()?;
    if let Some(fence) = &change.fence {
        app.classes.pass(fence)?;
    }
    let field = change.given().map_or("body", Given::field);
    app.admission.retuned(id, &choice, field)?;
    let wait = Duration::from_millis(app.settings.api.apply_wait_ms);
    let report = app.kv.retune(id, choice, wait).await?;
    info!(
        request = id,
        level = report.level,
        policy = %report.policy,
        applied = report.applied,
        bytes_before = report.bytes_before,
        bytes_after = report.bytes_after,
        "request retuned"
    );
    Ok(Json(report))
}

fn number(id: &str) -> Result<usize, FieldFault> {
    id.parse()
        .map_err(|_| FieldFault::new("id", cut(id), "a whole number, as in the header x-cinch-request"))
}
