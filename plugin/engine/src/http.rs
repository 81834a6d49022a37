//! What both listeners share: problem documents, and bodies that are JSON or refused.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use cinch_protocol::Problem;
use serde_json::Value;

use crate::fields::{FieldFault, cut, first_line};

/// Seconds after which a client may try again what is not ready yet.
const RETRY_SECONDS: u64 = 2;

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(pub Box<Problem>);

impl Refusal {
    /// A problem without a field.
    pub fn new(status: StatusCode, slug: &str, title: &str, detail: impl Into<String>) -> Self {
        Self(Box::new(Problem {
            kind: format!("urn:cinch:problem:{slug}"),
            title: title.into(),
            status: status.as_u16(),
            detail: detail.into(),
            field: None,
            given: None,
            allowed: None,
            overload: None,
        }))
    }

    /// A value that is not allowed: 400.
    #[must_use]
    pub fn field(fault: FieldFault) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid-field",
            "A field is not as it must be",
            fault.to_string(),
        )
        .naming(fault)
    }

    /// Names the field, what was given and what is allowed.
    #[must_use]
    pub fn naming(mut self, fault: FieldFault) -> Self {
        self.0.field = Some(fault.field);
        self.0.given = Some(fault.given);
        self.0.allowed = Some(fault.allowed);
        self
    }

    /// A request that mistral.rs can't make sense of: 400.
    #[must_use]
    pub fn invalid(detail: &str) -> Self {
        let title = "The engine can't take this request";
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid-request",
            title,
            first_line(detail),
        )
    }

    /// The model is not there yet, or not any more: 503.
    #[must_use]
    pub fn not_ready(detail: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not-ready", "Not ready", detail)
    }

    /// Ours or the host engine's fault: 500.
    #[must_use]
    pub fn internal(detail: impl AsRef<str>) -> Self {
        let detail = first_line(detail.as_ref());
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "The engine failed",
            detail,
        )
    }

    /// No such route: 404.
    #[must_use]
    pub fn no_route(method: &str, path: &str, allowed: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "no-route",
            "No such route",
            format!("{method} {path} is not served here"),
        )
        .naming(FieldFault::new("path", cut(path), allowed))
    }

    /// The route exists, this method on it does not: 405.
    #[must_use]
    pub fn no_method(method: &str, path: &str, allowed: &str) -> Self {
        let detail = format!("{path} does not take {method}");
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "no-method",
            "Method not allowed",
            detail,
        )
        .naming(FieldFault::new("method", method, allowed))
    }

    /// The status it answers with.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The document, with OpenAI's `error` member beside it for OpenAI's clients.
    #[must_use]
    pub fn openai(&self) -> Value {
        let mut document = serde_json::to_value(&self.0).unwrap_or_default();
        let kind = if self.status().is_client_error() {
            "invalid_request_error"
        } else {
            "server_error"
        };
        document["error"] = serde_json::json!({
            "message": self.0.detail,
            "type": kind,
            "param": self.0.field,
            "code": self.0.kind.rsplit(':').next(),
        });
        document
    }

    fn respond(&self, document: String) -> Response {
        let mut response = (self.status(), document).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.status() == StatusCode::SERVICE_UNAVAILABLE {
            let seconds = match &self.0.overload {
                Some(overload) => overload.retry_after_seconds,
                None => RETRY_SECONDS,
            };
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<FieldFault> for Refusal {
    fn from(fault: FieldFault) -> Self {
        Self::field(fault)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.respond(serde_json::to_string(&self.0).unwrap_or_default())
    }
}

/// A [`Refusal`] on the OpenAI listener.
#[derive(Debug)]
pub struct OpenAiRefusal(pub Refusal);

impl IntoResponse for OpenAiRefusal {
    fn into_response(self) -> Response {
        self.0.respond(self.0.openai().to_string())
    }
}

/// A body that may have been too long or have broken off.
pub type Received = Result<Bytes, BytesRejection>;

/// A body, as it arrived.
///
/// # Errors
/// 413 for one longer than `most` bytes, 400 for one that broke off.
pub fn received(body: Received, most: usize) -> Result<Bytes, Refusal> {
    body.map_err(|rejection| {
        if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
            let fault = FieldFault::new("body", "a longer one", format!("at most {most} bytes"));
            let title = "The body is too long";
            return Refusal::new(rejection.status(), "body-too-long", title, fault.to_string()).naming(fault);
        }
        Refusal::new(
            rejection.status(),
            "broken-body",
            "The body broke off",
            rejection.body_text(),
        )
    })
}

/// A body as JSON.
///
/// # Errors
/// 415 for another content type (so that no web page can post here without asking first), 400 for
/// malformed JSON, with the place.
pub fn json(headers: &HeaderMap, body: &Bytes) -> Result<Value, Refusal> {
    let given = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("none");
    let essence = given
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if essence != "application/json" && !(essence.starts_with("application/") && essence.ends_with("+json")) {
        let fault = FieldFault::new("content-type", cut(given), "application/json");
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "content-type",
            "The body must be JSON",
            fault.to_string(),
        )
        .naming(fault));
    }
    serde_json::from_slice(body).map_err(|err| {
        let given = String::from_utf8_lossy(body);
        Refusal::new(
            StatusCode::BAD_REQUEST,
            "malformed-json",
            "The body is not JSON",
            format!("malformed JSON: {err}"),
        )
        .naming(FieldFault::new("body", cut(given.trim()), "a JSON object"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(content_type: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(content_type))])
    }

    #[test]
    fn malformed_json_says_where() {
        let refusal = json(&headers("application/json"), &Bytes::from_static(b"{\"a\": ")).unwrap_err();
        assert_eq!(refusal.status(), StatusCode::BAD_REQUEST);
        assert!(refusal.0.detail.contains("line 1 column"), "{}", refusal.0.detail);
        assert_eq!(refusal.0.field.as_deref(), Some("body"));
    }

    #[test]
    fn other_content_types_are_refused() {
        let refusal = json(&headers("text/plain"), &Bytes::from_static(b"{}")).unwrap_err();
        assert_eq!(refusal.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert!(
            json(
                &headers("application/json; charset=utf-8"),
                &Bytes::from_static(b"{}")
            )
            .is_ok()
        );
    }

    #[test]
    fn openai_clients_find_their_error() {
        let refusal = Refusal::field(FieldFault::new("cinch.level", 9, "0 to 5"));
        let document = refusal.openai();
        assert_eq!(document["error"]["param"], "cinch.level");
        assert_eq!(document["error"]["type"], "invalid_request_error");
        assert_eq!(document["allowed"], "0 to 5");
    }
}
