//! The policy API's listener. Everything but the two probes wants the bearer token, if one is configured.

mod capacity;
mod health;
mod openapi;
mod policies;
mod requests;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use subtle::ConstantTimeEq;

use crate::fields::FieldFault;
use crate::http::Refusal;
use crate::state::App;

/// Longest body: a policy has a dozen fields.
const MAX_BODY: usize = 64 << 10;

/// Every route of this listener, with the methods it takes. `openapi.json` describes the same; a test
/// compares the two.
pub const ROUTES: [(&str, &[&str]); 10] = [
    ("/v1/policies", &["GET"]),
    ("/v1/policies/{class}", &["GET", "PUT", "DELETE"]),
    ("/v1/requests", &["GET"]),
    ("/v1/requests/{id}", &["GET", "PATCH"]),
    ("/v1/ladder", &["GET"]),
    ("/v1/capacity", &["GET"]),
    ("/healthz", &["GET"]),
    ("/readyz", &["GET"]),
    ("/metrics", &["GET"]),
    ("/openapi.json", &["GET"]),
];

/// Routes that answer without the token.
const OPEN: [&str; 2] = ["/healthz", "/readyz"];

/// The listener's routes.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for (path, _) in ROUTES {
        if let Some(route) = route(path) {
            router = router.route(path, route);
        }
    }
    router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(from_fn_with_state(app.clone(), authorize))
        .with_state(app)
}

fn route(path: &str) -> Option<MethodRouter<Arc<App>>> {
    Some(match path {
        "/v1/policies" => get(policies::list),
        "/v1/policies/{class}" => get(policies::get).put(policies::put).delete(policies::delete),
        "/v1/requests" => get(requests::list),
        "/v1/requests/{id}" => get(requests::get).patch(requests::patch),
        "/v1/ladder" => get(policies::ladder),
        "/v1/capacity" => get(capacity::get),
        "/healthz" => get(health::alive),
        "/readyz" => get(health::ready),
        "/metrics" => get(health::metrics),
        "/openapi.json" => get(openapi::get),
        _ => return None,
    })
}

fn listed() -> String {
    let routes: Vec<String> = ROUTES
        .iter()
        .map(|(path, methods)| format!("{} {path}", methods.join("/")))
        .collect();
    routes.join(", ")
}

async fn no_route(method: Method, uri: Uri) -> Refusal {
    Refusal::no_route(method.as_str(), uri.path(), &listed())
}

async fn no_method(method: Method, uri: Uri) -> Refusal {
    Refusal::no_method(method.as_str(), uri.path(), &listed())
}

async fn authorize(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(token) = app.settings.api.token.as_deref() else {
        return next.run(request).await;
    };
    if OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let given = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let right = given
        .and_then(|given| given.strip_prefix(b"Bearer "))
        .is_some_and(|given| bool::from(given.ct_eq(token.as_bytes())));
    if right {
        return next.run(request).await;
    }
    let what = if given.is_some() { "another one" } else { "nothing" };
    let fault = FieldFault::new(
        "authorization",
        what,
        "Bearer and the token configured as api.token",
    );
    let refusal = Refusal::new(
        StatusCode::UNAUTHORIZED,
        "unauthorized",
        "Not authorized",
        fault.to_string(),
    );
    let mut response = refusal.naming(fault).into_response();
    response
        .headers_mut()
        .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}
