//! Routers without a model: everything that must answer, or refuse, before or without one.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use cinch_engine::config::Settings;
use cinch_engine::state::App;
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

pub(crate) const CONFIG: &str = include_str!("../../../../configs/engine.toml");
/// Where it is from here; the ladder is beside it.
pub(crate) const PATH: &str = "../../configs/engine.toml";

pub(crate) fn settings(overrides: &[&str]) -> Settings {
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    Settings::parse(CONFIG, PATH.as_ref(), &overrides).unwrap()
}

pub(crate) fn app(overrides: &[&str]) -> Arc<App> {
    App::new(settings(overrides)).unwrap()
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) content_type: String,
    pub(crate) etag: Option<String>,
    pub(crate) retry_after: Option<String>,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|err| panic!("{err}: {}", self.text))
    }

    /// A problem document that names field, given and allowed.
    pub(crate) fn problem(&self, status: u16) -> (String, String, String) {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        assert_eq!(self.content_type, "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["status"], status);
        let part = |name: &str| {
            problem[name]
                .as_str()
                .unwrap_or_else(|| panic!("no {name}: {problem}"))
                .to_owned()
        };
        assert!(!part("title").is_empty() && !part("detail").is_empty() && !part("type").is_empty());
        (part("field"), part("given"), part("allowed"))
    }
}

pub(crate) async fn send(router: &Router, request: Request<Body>) -> Answer {
    let response: Response<Body> = router.clone().oneshot(request).await.unwrap();
    let header = |name: &str| {
        response
            .headers()
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
    };
    let (content_type, etag, retry_after) = (header("content-type"), header("etag"), header("retry-after"));
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    Answer {
        status,
        content_type: content_type.unwrap_or_default(),
        etag,
        retry_after,
        text: String::from_utf8(bytes.to_vec()).unwrap(),
    }
}

pub(crate) async fn call(router: &Router, method: &str, path: &str, body: &str) -> Answer {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", "application/json");
    send(router, request.body(Body::from(body.to_owned())).unwrap()).await
}
