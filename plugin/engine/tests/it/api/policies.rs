//! Policies of classes: read, set, leased, given back.

use crate::common::{app, call, send};
use axum::body::Body;
use axum::http::Request;
use cinch_engine::api::router;
use serde_json::{Value, json};

#[tokio::test]
async fn policies_are_read_set_and_given_back() {
    let router = router(app(&[]));
    let before = call(&router, "GET", "/v1/policies/batch", "").await;
    assert_eq!(before.json()["level"], 2);
    assert_eq!(before.json()["origin"], "config");
    let put = call(&router, "PUT", "/v1/policies/batch", r#"{"level": 4}"#).await;
    assert_eq!(put.status, 200, "{}", put.text);
    let ladder = call(&router, "GET", "/v1/ladder", "").await.json();
    assert_eq!(put.json()["policy"], ladder["levels"][4]["policy"]);
    assert_eq!(put.json()["origin"], "api");
    assert_ne!(put.etag, before.etag);
    let now = call(&router, "GET", "/v1/policies/batch", "").await;
    assert_eq!((now.json(), &now.etag), (put.json(), &put.etag));
    let own = r#"{"policy": {"quantize": {"k_bits": 8, "v_bits": 4}}}"#;
    let put = call(&router, "PUT", "/v1/policies/batch", own).await;
    assert_eq!(put.json()["level"], Value::Null);
    let deleted = call(&router, "DELETE", "/v1/policies/batch", "").await;
    let bare = |answer: &crate::common::Answer| {
        let mut json = answer.json();
        assert_eq!(json["etag"].as_str(), answer.etag.as_deref());
        json["etag"].take();
        json
    };
    assert_eq!(bare(&deleted), bare(&before));
    assert_ne!(deleted.etag, before.etag, "an ETag never comes back");
}

#[tokio::test]
async fn leases_are_held_renewed_fenced_and_end() {
    let app = app(&[]);
    let router = router(app.clone());
    let lease = |level: u32, holder: &str, epoch: u64, ttl: u64| {
        json!({"level": level, "fence": {"holder": holder, "epoch": epoch}, "ttl_seconds": ttl}).to_string()
    };
    let put = async |body: String| call(&router, "PUT", "/v1/policies/batch", &body).await;
    let held = put(lease(4, "a", 7, 60)).await;
    assert_eq!(held.status, 200, "{}", held.text);
    let view = held.json();
    assert_eq!(
        (&view["origin"], &view["level"], &view["configured_level"]),
        (&json!("lease"), &json!(4), &json!(2))
    );
    assert_eq!(
        (&view["lease"]["holder"], &view["lease"]["epoch"]),
        (&json!("a"), &json!(7))
    );
    assert_eq!(
        put(lease(4, "a", 7, 60)).await.etag,
        held.etag,
        "a renewal is no change"
    );
    for (holder, epoch, allowed) in [("a", 6, "7 or more"), ("b", 7, "8 or more: 7 is held by a")] {
        let stale = put(lease(1, holder, epoch, 60)).await;
        assert_eq!(stale.json()["type"], "urn:cinch:problem:stale-epoch");
        let named = ("fence.epoch".to_owned(), epoch.to_string(), allowed.to_owned());
        assert_eq!(stale.problem(409), named);
    }
    let fenced = r#"{"level": 1, "fence": {"holder": "a", "epoch": 6}}"#;
    let stale = call(&router, "PATCH", "/v1/requests/41", fenced).await;
    assert_eq!(stale.json()["type"], "urn:cinch:problem:stale-epoch");
    let all = call(&router, "GET", "/v1/policies", "").await.json();
    assert_eq!(all["epoch"], 7);
    let pinned = call(&router, "PUT", "/v1/policies/batch", r#"{"level": 1}"#)
        .await
        .json();
    assert_eq!((&pinned["origin"], pinned.get("lease")), (&json!("api"), None));
    let refused = put(lease(4, "a", 7, 60)).await;
    assert_eq!(refused.json()["type"], "urn:cinch:problem:pinned");
    assert_eq!(refused.problem(409).0, "fence");
    call(&router, "DELETE", "/v1/policies/batch", "").await;
    let held = put(lease(4, "a", 7, 1)).await;
    assert_eq!(held.json()["level"], 4);
    tokio::time::sleep(std::time::Duration::from_millis(1050)).await;
    let ended = call(&router, "GET", "/v1/policies/batch", "").await;
    assert_eq!(ended.json()["origin"], "config");
    assert_eq!(ended.json()["level"], 2);
    assert_ne!(ended.etag, held.etag);
    let metrics = call(&router, "GET", "/metrics", "").await.text;
    for line in [
        "cinch_lease_expired_total{class=\"batch\"} 1\n",
        "cinch_stale_writes_total 3\n",
        "cinch_class_level{class=\"batch\"} 2\n",
    ] {
        assert!(metrics.contains(line), "{line}{metrics}");
    }
    assert!(!metrics.contains("cinch_lease_remaining_seconds{"), "{metrics}");
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let router = router(app(&[]));
    let before = call(&router, "GET", "/v1/policies/default", "").await;
    let dry = call(
        &router,
        "PUT",
        "/v1/policies/default?dry_run=true",
        r#"{"level": 1}"#,
    )
    .await;
    assert_eq!(dry.json()["level"], 1);
    assert_eq!(dry.etag, before.etag);
    let after = call(&router, "GET", "/v1/policies/default", "").await;
    assert_eq!((after.json(), after.etag), (before.json(), before.etag));
    let (field, given, _) = call(
        &router,
        "PUT",
        "/v1/policies/default?dry_run=perhaps",
        r#"{"level": 1}"#,
    )
    .await
    .problem(400);
    assert_eq!((field.as_str(), given.as_str()), ("dry_run", "\"perhaps\""));
}

#[tokio::test]
async fn if_match_guards_against_a_change_in_between() {
    let router = router(app(&[]));
    let with = |etag: &str| {
        let request = Request::builder().method("PUT").uri("/v1/policies/batch");
        let request = request
            .header("content-type", "application/json")
            .header("if-match", etag);
        send(&router, request.body(Body::from(r#"{"level": 1}"#)).unwrap())
    };
    let first = call(&router, "GET", "/v1/policies/batch", "").await.etag.unwrap();
    assert_eq!(with(&first).await.status, 200);
    let (field, given, allowed) = with(&first).await.problem(412);
    assert_eq!(field, "if-match");
    assert_eq!(given, first);
    assert_eq!(with(&allowed).await.status, 200);
    assert_eq!(with("*").await.status, 200);
}

#[tokio::test]
async fn a_ratio_is_the_mildest_level_that_reaches_it() {
    let router = router(app(&["class.night={ ratio = 3.0 }"]));
    let configured = call(&router, "GET", "/v1/policies/night", "").await.json();
    let ladder = call(&router, "GET", "/v1/ladder", "").await.json();
    let reaches: Vec<f64> = ladder["levels"]
        .as_array()
        .unwrap()
        .iter()
        .map(|level| 1.0 / level["bytes_ratio"].as_f64().unwrap())
        .collect();
    let level_of = |ratio: f64| reaches.iter().position(|reaches| *reaches >= ratio).unwrap();
    let three = level_of(3.0);
    assert_eq!(
        (&configured["level"], &configured["configured_level"]),
        (&json!(three), &json!(three))
    );
    assert_eq!(configured["policy"], ladder["levels"][three]["policy"]);
    // Each level's own ratio, cut where rounding can't undo it, is that level's; just above, the next one's.
    for (level, reaches) in reaches.iter().enumerate() {
        for (ratio, wanted) in [(reaches * 0.999, level), (reaches * 1.001, level + 1)] {
            let (ratio, Some(policy)) = (ratio.max(1.0), ladder["levels"].get(wanted)) else {
                continue;
            };
            let body = format!("{{\"ratio\": {ratio}}}");
            let put = call(&router, "PUT", "/v1/policies/night", &body).await;
            assert_eq!(put.status, 200, "{}", put.text);
            assert_eq!(
                (&put.json()["level"], &put.json()["policy"]),
                (&json!(wanted), &policy["policy"])
            );
        }
    }
    let lease = r#"{"ratio": 2.0, "fence": {"holder": "a", "epoch": 1}, "ttl_seconds": 60}"#;
    call(&router, "DELETE", "/v1/policies/night", "").await;
    let leased = call(&router, "PUT", "/v1/policies/night", lease).await.json();
    assert_eq!(
        (&leased["origin"], &leased["level"]),
        (&json!("lease"), &json!(level_of(2.0)))
    );
}
