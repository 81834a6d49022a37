//! The OpenAI listener without a model.

use crate::common::{app, call};
use cinch_engine::serve::{ROUTES, router};

#[tokio::test]
async fn nothing_is_served_before_the_model_is_there() {
    let router = router(app(&[]));
    for (method, path) in ROUTES {
        let answer = call(&router, method, path, "{}").await;
        assert_eq!(answer.status, 503, "{method} {path}: {}", answer.text);
        assert!(answer.retry_after.is_some());
        let document = answer.json();
        assert_eq!(document["error"]["code"], "not-ready");
        assert!(document["detail"].as_str().unwrap().contains("being loaded"));
    }
}

#[tokio::test]
async fn routes_round_the_policies_are_not_served() {
    let router = router(app(&[]));
    for (method, path) in [
        ("POST", "/v1/responses"),
        ("POST", "/re_isq"),
        ("POST", "/v1/models/unload"),
        ("POST", "/v1/models/reload"),
        ("POST", "/v1/models/tune"),
        ("POST", "/v1/embeddings"),
    ] {
        let (field, given, allowed) = call(&router, method, path, "{}").await.problem(404);
        assert_eq!(field, "path");
        assert_eq!(given, path);
        assert!(allowed.contains("POST /v1/chat/completions"));
    }
    let (field, given, _) = call(&router, "GET", "/v1/chat/completions", "")
        .await
        .problem(405);
    assert_eq!((field.as_str(), given.as_str()), ("method", "GET"));
}
