//! A running request is retuned by one PATCH; bytes are what the allocator holds.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::{Server, text};
use serde_json::{Value, json};

/// About `tokens` tokens of the text: a little over four characters each.
fn prompt(tokens: usize) -> String {
    text().chars().skip(50_000).take(tokens * 43 / 10).collect()
}

fn body(prompt: &str, new: usize, level: Value) -> Value {
    json!({"model": "default", "prompt": prompt, "max_tokens": new, "temperature": 0.0, "stream": true, "cinch": level})
}

#[test]
fn level_0_becomes_h2o_half_int4_while_it_runs() {
    let server = Server::start(&["engine.prefix_cache=false"]);
    let prompt = prompt(4000);
    let tokens = Mutex::new(Vec::<Instant>::new());
    let last = Mutex::new(Value::Null);
    let (patched_at, report) = std::thread::scope(|scope| {
        let streaming = scope.spawn(|| {
            server.stream(&body(&prompt, 80, json!({"level": 0})), |at, event| {
                if event["choices"]
                    .as_array()
                    .is_some_and(|choices| !choices.is_empty())
                {
                    tokens.lock().unwrap().push(at);
                }
                if event.get("cinch").is_some() {
                    *last.lock().unwrap() = event["cinch"].clone();
                }
            });
        });
        let id = server.running_long();
        while tokens.lock().unwrap().len() < 20 {
            assert!(!streaming.is_finished(), "the stream ended early");
            std::thread::sleep(Duration::from_millis(1));
        }
        let before = server.get(&format!("/v1/requests/{id}"));
        assert_eq!(before["level"], 0, "{before}");
        assert!(before["seen"].as_u64().unwrap() > 3600, "{before}");
        let change = json!({"policy": {"select": {"method": "h2o", "budget": 0.5}, "quantize": {"k_bits": 4, "v_bits": 4}}});
        let at = Instant::now();
        let (status, report) = server.send(
            "PATCH",
            &format!("{}/v1/requests/{id}", server.api),
            &[],
            &change.to_string(),
        );
        assert_eq!(status, 200, "{report}");
        (at, report)
    });
    println!("PATCH: {report}");
    assert_eq!(report["applied"], true);
    let (before, after) = (
        report["bytes_before"].as_f64().unwrap(),
        report["bytes_after"].as_f64().unwrap(),
    );
    assert!(before / after >= 5.0, "bytes fell by {:.2} only", before / after);

    let tokens = tokens.into_inner().unwrap();
    assert!(
        tokens.len() >= 78,
        "the request did not go on to finish: {} tokens",
        tokens.len()
    );
    let mut gaps: Vec<(Instant, f64)> = tokens
        .windows(2)
        .map(|pair| (pair[1], (pair[1] - pair[0]).as_secs_f64()))
        .collect();
    // The step that compacts is the first or second to end after the PATCH was sent.
    let at = gaps.iter().position(|(end, _)| *end > patched_at).unwrap();
    let neighbours = &gaps[at.saturating_sub(8)..at];
    let mut sorted: Vec<f64> = neighbours.iter().map(|(_, gap)| *gap).collect();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    let slowest = gaps[at..(at + 3).min(gaps.len())]
        .iter()
        .map(|(_, gap)| *gap)
        .fold(0.0, f64::max);
    println!(
        "steps before: median {:.1} ms; slowest around the retune: {:.1} ms",
        median * 1e3,
        slowest * 1e3
    );
    gaps.clear();

    let served = last.into_inner().unwrap();
    println!("served with: {served}");
    let stretches = served["served"].as_array().unwrap();
    assert_eq!(stretches.len(), 2, "{served}");
    assert_eq!(stretches[1]["policy"]["select"]["method"], "h2o");
    assert!(stretches[1]["from_seen"].as_u64().unwrap() > 3600);
    assert!(served["attention_error"].as_f64().unwrap() > 0.0);
    assert!(served["kept"].as_f64().unwrap() <= served["seen"].as_f64().unwrap() * 0.5 + 80.0);
}

#[test]
fn bytes_at_4k_tokens() {
    let server = Server::start(&["engine.prefix_cache=false"]);
    let prompt = prompt(4096);
    for (asked, level, most) in [
        (json!({"policy": {"store": "full"}}), Value::Null, 1.03),
        (
            json!({"policy": {"quantize": {"k_bits": 8, "v_bits": 8}}}),
            Value::Null,
            0.58,
        ),
        (
            json!({"policy": {"quantize": {"k_bits": 4, "v_bits": 4}}}),
            Value::Null,
            0.33,
        ),
        (json!({"ratio": 2.0}), json!(2), 0.5),
    ] {
        let mut served = Value::Null;
        server.stream(&body(&prompt, 4, asked.clone()), |_, event| {
            if event.get("cinch").is_some() {
                served = event["cinch"].clone();
            }
        });
        let (bytes, f16) = (
            served["bytes"].as_f64().unwrap(),
            served["uncompressed_bytes"].as_f64().unwrap(),
        );
        println!(
            "{asked}: {} tokens, {bytes} bytes, {:.4} of f16",
            served["seen"],
            bytes / f16
        );
        assert!(served["seen"].as_u64().unwrap() > 3700, "{served}");
        assert!(bytes / f16 <= most && bytes > 0.0, "{served}");
        assert_eq!(served["level"], level, "{served}");
    }
}

#[test]
fn a_finished_request_can_not_be_retuned() {
    let server = Server::start(&[]);
    let (status, answer) = server.complete(
        &[],
        &json!({"model": "default", "prompt": "Call me", "max_tokens": 2}),
    );
    assert_eq!(status, 200, "{answer}");
    let id = answer["cinch"]["request"].as_u64().unwrap();
    let url = format!("{}/v1/requests/{id}", server.api);
    let (status, problem) = server.send("PATCH", &url, &[], r#"{"level": 1}"#);
    assert_eq!(status, 409, "{problem}");
    assert!(
        problem["detail"].as_str().unwrap().contains("finished"),
        "{problem}"
    );
    let (status, problem) = server.send(
        "PATCH",
        &format!("{}/v1/requests/999999", server.api),
        &[],
        r#"{"level": 1}"#,
    );
    assert_eq!(status, 404, "{problem}");
}
