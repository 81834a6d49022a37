//! `openapi.json` beside the routes and the wire types.

use crate::common::{app, call};
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
        "project": {
            "method": "lowrank", "k_rank": 32, "v_rank": 48, "first_layer": 1, "similarity": 0.9, "retained": 0.1
        },
        "quantize": {
            "k_bits": 4, "v_bits": 4, "rotate_k": true, "outliers": 0.01, "rank": 2, "salient": 0.4, "low_bits": 2,
            "rope": "before",
            "layers": {"0-2": {"k_bits": 8}}
        }
    });
    let change: cinch_protocol::PolicyChange = serde_json::from_value(json!({"policy": policy})).unwrap();
    let policy = serde_json::to_value(change.policy.unwrap()).unwrap();
    assert_eq!(schema("Policy"), keys(&policy));
    assert_eq!(schema("Select"), keys(&policy["select"]));
    assert_eq!(schema("Project"), keys(&policy["project"]));
    assert_eq!(schema("Quantize"), keys(&policy["quantize"]));
    let documented = include_str!("../../../../../docs/policy-fields.md");
    for (part, name) in [
        ("select", "Select"),
        ("project", "Project"),
        ("quantize", "Quantize"),
    ] {
        let (_, section) = documented.split_once(&format!("## `{part}`")).unwrap();
        let section = section.split("\n## ").next().unwrap();
        for field in schema(name) {
            assert!(section.contains(&format!("\n| `{field}` | ")), "{part}.{field}");
        }
    }
    let lease = r#"{"level": 1, "fence": {"holder": "a", "epoch": 1}, "ttl_seconds": 60}"#;
    let change = serde_json::from_str::<cinch_protocol::PolicyChange>(lease).unwrap();
    let change = serde_json::to_value(cinch_protocol::PolicyChange {
        policy: Some(cinch_protocol::Policy::default()),
        ratio: Some(2.0),
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
