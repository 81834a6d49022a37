//! The controller's listener: what it sees, what it decided and why.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use cinch_protocol::Problem;
use serde::Deserialize;
use serde_json::json;

use crate::shared::{Decisions, Shared, Status};

/// Every route, with the one method it takes.
pub const ROUTES: [&str; 5] = [
    "/v1/status",
    "/v1/decisions",
    "/metrics",
    "/healthz",
    "/openapi.json",
];
/// Most decisions of one answer.
const MOST: usize = 1000;
const OPENAPI: &str = include_str!("openapi.json");

/// The listener's routes.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/decisions", get(decisions))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { Json(json!({"status": "alive"})) }))
        .route(
            "/openapi.json",
            get(|| async { ([(CONTENT_TYPE, "application/json")], OPENAPI) }),
        )
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(shared)
}

async fn status(State(shared): State<Arc<Shared>>) -> Json<Status> {
    Json(shared.status())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    #[serde(default = "hundred")]
    limit: usize,
}

fn hundred() -> usize {
    100
}

async fn decisions(
    State(shared): State<Arc<Shared>>,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Json<Decisions>, Response> {
    match page {
        Ok(Query(Page { limit })) if (1..=MOST).contains(&limit) => Ok(Json(shared.decisions(limit))),
        Ok(Query(Page { limit })) => Err(bad_limit(&limit.to_string())),
        Err(rejection) => Err(bad_limit(&rejection.body_text())),
    }
}

fn bad_limit(given: &str) -> Response {
    let allowed = format!("1 to {MOST}");
    problem(
        StatusCode::BAD_REQUEST,
        "invalid-field",
        "A field is not as it must be",
        ("limit", given, &allowed),
    )
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    match shared.metrics.render() {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(err) => {
            let given = err.to_string();
            let title = "The metrics could not be written";
            problem(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                title,
                ("metrics", &given, "text"),
            )
        }
    }
}

async fn no_route(uri: Uri) -> Response {
    let allowed = ROUTES.join(", ");
    problem(
        StatusCode::NOT_FOUND,
        "no-route",
        "No such route",
        ("path", uri.path(), &allowed),
    )
}

async fn no_method(method: Method) -> Response {
    let title = "Method not allowed";
    problem(
        StatusCode::METHOD_NOT_ALLOWED,
        "no-method",
        title,
        ("method", method.as_str(), "GET"),
    )
}

/// A problem document that names the field, what was given and what is allowed.
fn problem(
    status: StatusCode,
    slug: &str,
    title: &str,
    (field, given, allowed): (&str, &str, &str),
) -> Response {
    let given: String = given.chars().take(80).collect();
    let document = Problem {
        kind: format!("urn:cinch:problem:{slug}"),
        title: title.into(),
        status: status.as_u16(),
        detail: format!("field `{field}`: given {given}, allowed {allowed}"),
        field: Some(field.into()),
        given: Some(given),
        allowed: Some(allowed.into()),
        overload: None,
    };
    let text = serde_json::to_string(&document).unwrap_or_default();
    (status, [(CONTENT_TYPE, "application/problem+json")], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_lists_the_routes() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let paths: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
        let mut routes = ROUTES.to_vec();
        routes.sort_unstable();
        assert_eq!(paths, routes);
    }
}
