//! Who may ask, and when nothing can be changed.

use crate::common::{app, call, send};
use axum::body::Body;
use axum::http::Request;
use cinch_engine::api::router;

#[tokio::test]
async fn with_the_plugin_off_nothing_pretends_to_change() {
    let router = router(app(&["kv.plugin=off"]));
    for (method, path) in [("PUT", "/v1/policies/batch"), ("PATCH", "/v1/requests/7")] {
        let (field, given, _) = call(&router, method, path, r#"{"level": 1}"#).await.problem(409);
        assert_eq!((field.as_str(), given.as_str()), ("kv.plugin", "off"));
    }
}

#[tokio::test]
async fn probes_and_token() {
    let router = router(app(&["api.token=0123456789abcdef0123"]));
    assert_eq!(call(&router, "GET", "/healthz", "").await.status, 200);
    let loading = call(&router, "GET", "/readyz", "").await;
    assert_eq!(loading.status, 503);
    assert!(loading.retry_after.is_some());
    assert!(loading.text.contains("being loaded"), "{}", loading.text);
    for (given, status) in [
        (None, 401),
        (Some("Bearer 0123456789abcdef0124"), 401),
        (Some("Basic 0123456789abcdef0123"), 401),
        (Some("Bearer 0123456789abcdef0123"), 200),
    ] {
        for path in ["/v1/policies", "/metrics", "/openapi.json", "/v1/requests"] {
            let mut request = Request::builder().uri(path);
            if let Some(given) = given {
                request = request.header("authorization", given);
            }
            let answer = send(&router, request.body(Body::empty()).unwrap()).await;
            assert_eq!(answer.status.as_u16(), status, "{path} with {given:?}");
            assert!(
                !answer.text.contains("0123456789abcdef"),
                "a token must not be repeated"
            );
        }
    }
}
