//! Probes and `/metrics`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use prometheus::TEXT_FORMAT;
use serde_json::{Value, json};

use crate::http::Refusal;
use crate::state::App;

/// The process answers.
pub(super) async fn alive() -> Json<Value> {
    Json(json!({"status": "alive"}))
}

/// Requests are served.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, Refusal> {
    app.engine()?;
    Ok(Json(
        json!({"status": "ready", "model": crate::model::served_name(&app.settings.model)}),
    ))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.metrics.render(&app.kv, &app.classes, &app.admission) {
        Ok(text) => ([(CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Err(err) => Refusal::internal(err.to_string()).into_response(),
    }
}
