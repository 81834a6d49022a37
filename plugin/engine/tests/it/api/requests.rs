//! Policies of single requests.

use crate::common::{app, call};
use cinch_engine::api::router;

#[tokio::test]
async fn a_finished_request_is_a_conflict() {
    let app = app(&[]);
    let router = router(app.clone());
    let choice = app.classes.current("default", "class").unwrap();
    app.kv.assign(41, "default", choice, false).unwrap();
    let live = call(&router, "GET", "/v1/requests", "").await.json();
    assert_eq!(live["requests"][0]["id"], 41);
    assert_eq!(live["requests"][0]["state"], "queued");
    let queued = call(&router, "PATCH", "/v1/requests/41", r#"{"level": 3}"#).await;
    assert_eq!(queued.status, 200, "{}", queued.text);
    assert_eq!(queued.json()["level"], 3);
    app.kv.finish(41);
    let (field, given, _) = call(&router, "PATCH", "/v1/requests/41", r#"{"level": 1}"#)
        .await
        .problem(409);
    assert_eq!((field.as_str(), given.as_str()), ("id", "41"));
    let finished = call(&router, "GET", "/v1/requests/41", "").await.json();
    assert_eq!(finished["state"], "finished");
}

#[tokio::test]
async fn a_ratio_shows_as_the_level_that_was_picked() {
    let app = app(&[]);
    let router = router(app.clone());
    let choice = app.classes.current("default", "class").unwrap();
    app.kv.assign(41, "default", choice, false).unwrap();
    let report = call(&router, "PATCH", "/v1/requests/41", r#"{"ratio": 4.0}"#).await;
    assert_eq!(report.status, 200, "{}", report.text);
    let live = call(&router, "GET", "/v1/requests", "").await.json();
    let ladder = call(&router, "GET", "/v1/ladder", "").await.json();
    let levels = ladder["levels"].as_array().unwrap();
    let wanted = levels
        .iter()
        .position(|level| level["bytes_ratio"].as_f64().unwrap() <= 0.25)
        .unwrap();
    for view in [&report.json(), &live["requests"][0]] {
        assert_eq!(view["level"], wanted, "{view}");
        assert_eq!(view["policy"], levels[wanted]["policy"], "{view}");
    }
}
