//! The policy API without a model.

use crate::common::{app, call, send};
use axum::body::Body;
use axum::http::Request;
use cinch_engine::api::{ROUTES, router};
use serde_json::{Value, json};

#[tokio::test]
async fn openapi_lists_exactly_the_routes() {
    let router = router(app(&[]));
    let document = call(&router, "GET", "/openapi.json", "").await.json();
    let paths = document["paths"].as_object().unwrap();
    let mut listed: Vec<&String> = paths.keys().collect();
    listed.sort();
    let mut routes: Vec<&str> = ROUTES.iter().map(|(path, _)| *path).collect();
    routes.sort_unstable();
    assert_eq!(listed, routes);
    for (path, methods) in ROUTES {
        let concrete = path.replace("{class}", "default").replace("{id}", "7");
        for method in ["GET", "PUT", "DELETE", "PATCH", "POST"] {
            let described = paths[path].get(method.to_lowercase()).is_some();
            assert_eq!(
                described,
                methods.contains(&method),
                "{method} {path} in openapi.json"
            );
            let answer = call(&router, method, &concrete, "{}").await;
            let refused = answer.status == 405;
            assert_eq!(
                refused,
                !methods.contains(&method),
                "{method} {path}: {}",
                answer.status
            );
        }
    }
}

/// Every `$ref` leads somewhere, and the schemas have the wire types' fields.
#[tokio::test]
async fn openapi_schemas_are_the_wire_types() {
    let router = router(app(&[]));
    let document = call(&router, "GET", "/openapi.json", "").await.json();
    fn refs<'a>(value: &'a Value, into: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => fields
                .iter()
                .for_each(|(key, value)| match (key.as_str(), value) {
                    ("$ref", Value::String(to)) => into.push(to),
                    _ => refs(value, into),
                }),
            Value::Array(items) => items.iter().for_each(|item| refs(item, into)),
            _ => {}
        }
    }
    let mut all = Vec::new();
    refs(&document, &mut all);
    for to in all {
        assert!(document.pointer(to.trim_start_matches('#')).is_some(), "{to}");
    }
    let schema = |name: &str| -> Vec<String> {
        let fields = document["components"]["schemas"][name]["properties"]
            .as_object()
            .unwrap();
        let mut names: Vec<String> = fields.keys().cloned().collect();
        names.sort();
        names
    };
    let keys = |value: &Value| -> Vec<String> {
        let mut names: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        names.sort();
        names
    };
    // Every field there is, whether it goes with the method or not.
    let policy = json!({
        "store": "full",
        "select": {
            "method": "h2o", "budget": 0.5, "window": 8, "kernel": 3, "skip_layers": 1, "seed": 1, "temperature": 2.0,
            "recover": 0.9,
            "layers": "pyramid", "beta": 9, "heads": "adaptive", "floor": 0.1, "merge": "d2o"
        },
        "project": {"method": "lowrank", "k_rank": 32, "v_rank": 48},
        "quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true, "layers": {"0-2": {"k_bits": 8}}}
    });
    let change: cinch_protocol::PolicyChange = serde_json::from_value(json!({"policy": policy})).unwrap();
    let policy = serde_json::to_value(change.policy.unwrap()).unwrap();
    assert_eq!(schema("Policy"), keys(&policy));
    assert_eq!(schema("Select"), keys(&policy["select"]));
    assert_eq!(schema("Project"), keys(&policy["project"]));
    assert_eq!(schema("Quantize"), keys(&policy["quantize"]));
    let lease = r#"{"level": 1, "fence": {"holder": "a", "epoch": 1}, "ttl_seconds": 60}"#;
    let change = serde_json::from_str::<cinch_protocol::PolicyChange>(lease).unwrap();
    let change = serde_json::to_value(cinch_protocol::PolicyChange {
        policy: Some(cinch_protocol::Policy::default()),
        ..change
    });
    let change = change.unwrap();
    assert_eq!(schema("PolicyChange"), keys(&change));
    assert_eq!(schema("Fence"), keys(&change["fence"]));
    call(&router, "PUT", "/v1/policies/batch", lease).await;
    let classes = call(&router, "GET", "/v1/policies", "").await.json();
    assert_eq!(schema("ClassPolicies"), keys(&classes));
    assert_eq!(schema("ClassPolicy"), keys(&classes["classes"][0]));
    assert_eq!(schema("Lease"), keys(&classes["classes"][0]["lease"]));
    let ladder = call(&router, "GET", "/v1/ladder", "").await.json();
    let mut ladder: cinch_protocol::Ladder = serde_json::from_value(ladder).unwrap();
    ladder.fingerprint = Some(String::new());
    ladder.levels[0].figures = Some(cinch_protocol::LevelFigures {
        attention_error: Some(0.0),
        prefill_tps: Some(1.0),
        decode_tps: Some(1.0),
        ttft_ms: Some(1.0),
        peak_rss_bytes: Some(1),
        ..cinch_protocol::LevelFigures::default()
    });
    let ladder = serde_json::to_value(ladder).unwrap();
    assert_eq!(schema("Ladder"), keys(&ladder));
    assert_eq!(schema("LadderLevel"), keys(&ladder["levels"][0]));
    assert_eq!(schema("LevelFigures"), keys(&ladder["levels"][0]["figures"]));
    let capacity = call(&router, "GET", "/v1/capacity", "").await.json();
    assert_eq!(schema("Capacity"), keys(&capacity));
    assert_eq!(schema("ClassCapacity"), keys(&capacity["classes"][0]));
    let mut problem = call(&router, "GET", "/v1/policies/none", "").await.json();
    let overload = cinch_protocol::Overload {
        queue_length: 1,
        max_queue: 1,
        need_bytes: 1,
        reserved_bytes: 1,
        demanded_bytes: 1,
        capacity_bytes: 1,
        retry_after_seconds: 1,
    };
    problem["overload"] = serde_json::to_value(overload).unwrap();
    assert_eq!(schema("Overload"), keys(&problem["overload"]));
    assert_eq!(schema("Problem"), keys(&problem));
}

#[tokio::test]
async fn policies_are_read_set_and_given_back() {
    let router = router(app(&[]));
    let before = call(&router, "GET", "/v1/policies/batch", "").await;
    assert_eq!(before.json()["level"], 2);
    assert_eq!(before.json()["origin"], "config");
    let put = call(&router, "PUT", "/v1/policies/batch", r#"{"level": 4}"#).await;
    assert_eq!(put.status, 200, "{}", put.text);
    assert_eq!(put.json()["policy"]["select"]["method"], "h2o");
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
async fn bad_input_names_field_given_and_allowed() {
    let router = router(app(&[]));
    let cases = [
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 17}"#,
            400,
            "level",
            "17",
            "0 to 5",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            "{}",
            400,
            "body",
            "neither",
            "exactly one",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 1, "policy": {}}"#,
            400,
            "body",
            "both",
            "exactly one",
        ),
        (
            "PUT",
            "/v1/policies/nightly",
            r#"{"level": 1}"#,
            404,
            "class",
            "nightly",
            "batch, default",
        ),
        (
            "DELETE",
            "/v1/policies/nightly",
            "",
            404,
            "class",
            "nightly",
            "batch, default",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": "#,
            400,
            "body",
            "{\"level\":",
            "a JSON object",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"epoch": 1}"#,
            400,
            "epoch",
            "an unknown field",
            "`policy`, `level`, `fence`, `ttl_seconds`",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 1, "ttl_seconds": 60}"#,
            400,
            "fence",
            "nothing",
            "a holder and an epoch",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 1, "fence": {"holder": "a", "epoch": 1}}"#,
            400,
            "ttl_seconds",
            "nothing",
            "1 to 3600",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 1, "fence": {"holder": "a", "epoch": 1}, "ttl_seconds": 3601}"#,
            400,
            "ttl_seconds",
            "3601",
            "1 to 3600",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 1, "fence": {"holder": "", "epoch": 1}, "ttl_seconds": 60}"#,
            400,
            "fence.holder",
            "0 characters",
            "1 to 128",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 1, "fence": {"holder": "a", "epoch": 0}, "ttl_seconds": 60}"#,
            400,
            "fence.epoch",
            "0",
            "1 to 9007199254740991",
        ),
        (
            "PUT",
            "/v1/policies/batch",
            r#"{"level": 1, "fence": {"holder": "a"}, "ttl_seconds": 60}"#,
            400,
            "fence.epoch",
            "nothing",
            "a value",
        ),
        (
            "PATCH",
            "/v1/requests/7",
            r#"{"level": 1, "fence": {"holder": "a", "epoch": 1}, "ttl_seconds": 60}"#,
            400,
            "ttl_seconds",
            "60",
            "nothing",
        ),
        (
            "PATCH",
            "/v1/requests/7",
            r#"{"level": 1, "fence": {"holder": "", "epoch": 1}}"#,
            400,
            "fence.holder",
            "0 characters",
            "1 to 128",
        ),
        (
            "PATCH",
            "/v1/requests/7",
            r#"{"policy": {"quantize": {"k_bits": 5, "v_bits": 4}}}"#,
            400,
            "policy.quantize.k_bits",
            "5",
            "2, 3, 4, 8 or 16",
        ),
        (
            "PATCH",
            "/v1/requests/7",
            r#"{"policy": {"select": {"method": "h2o", "budget": 1.5}}}"#,
            400,
            "policy.select.budget",
            "1.5",
            "0.02 to 1",
        ),
        (
            "PATCH",
            "/v1/requests/7",
            r#"{"level": 1}"#,
            404,
            "id",
            "7",
            "the id of a live",
        ),
        (
            "PATCH",
            "/v1/requests/seven",
            r#"{"level": 1}"#,
            400,
            "id",
            "seven",
            "a whole number",
        ),
        ("GET", "/v1/requests/7", "", 404, "id", "7", "the id of a live"),
        (
            "GET",
            "/v1/nothing",
            "",
            404,
            "path",
            "/v1/nothing",
            "/v1/policies",
        ),
        (
            "POST",
            "/v1/policies",
            "{}",
            405,
            "method",
            "POST",
            "GET /v1/policies",
        ),
    ];
    for (method, path, body, status, field, given, allowed) in cases {
        let answer = call(&router, method, path, body).await;
        let problem = answer.problem(status);
        let said = format!("{method} {path} {body}: {}", answer.text);
        assert_eq!(problem.0, field, "{said}");
        assert!(problem.1.contains(given), "{said}");
        assert!(problem.2.contains(allowed), "{said}");
    }
}

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
