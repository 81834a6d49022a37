//! A served engine as its users meet it: classes, wishes, the policy API, metrics, prefix reuse, stopping.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use common::{Server, text};
use serde_json::{Value, json};

fn completion(prompt: &str) -> Value {
    json!({"model": "default", "prompt": prompt, "max_tokens": 8, "temperature": 0.0})
}

#[test]
fn classes_wishes_policies_and_metrics() {
    let server = Server::start(&[]);
    let prompt: String = text().chars().take(1200).collect();

    // Which class and policy a request gets, and that the answer says so.
    let (status, answer) = server.complete(&[], &completion(&prompt));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(
        (&answer["cinch"]["class"], &answer["cinch"]["level"]),
        (&json!("default"), &json!(0))
    );
    let (_, answer) = server.complete(&[("x-cinch-class", "batch")], &completion(&prompt));
    assert_eq!(
        (&answer["cinch"]["class"], &answer["cinch"]["level"]),
        (&json!("batch"), &json!(2))
    );
    let mut wish = completion(&prompt);
    wish["cinch"] = json!({"policy": {"select": {"method": "streaming", "budget": 0.4}}});
    let (_, answer) = server.complete(&[], &wish);
    let cache = &answer["cinch"];
    assert_eq!(cache["policy"]["select"]["method"], "streaming", "{answer}");
    let (kept, seen) = (cache["kept"].as_f64().unwrap(), cache["seen"].as_f64().unwrap());
    assert!(kept < seen * 0.5 && kept >= 68.0, "{cache}");
    assert!(
        cache["bytes"].as_f64().unwrap() < cache["uncompressed_bytes"].as_f64().unwrap() * 0.7,
        "{cache}"
    );

    // Served only where the self-test has found that keys turn with their positions as the model's file says.
    wish["cinch"] = json!({"policy": {"quantize": {"method": "kvquant", "k_bits": 2, "v_bits": 2}}});
    let (status, answer) = server.complete(&[], &wish);
    assert_eq!(status, 200, "{answer}");

    // Chat, both ways.
    let chat =
        json!({"model": "default", "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8});
    let (status, answer) = server.send(
        "POST",
        &format!("{}/v1/chat/completions", server.openai),
        &[],
        &chat.to_string(),
    );
    assert_eq!(status, 200, "{answer}");
    assert!(
        answer["choices"][0]["message"]["content"].is_string() && answer["cinch"]["managed"] == true,
        "{answer}"
    );
    let (_, models) = server.send("GET", &format!("{}/v1/models", server.openai), &[], "");
    assert!(
        models["data"].as_array().is_some_and(|data| !data.is_empty()),
        "{models}"
    );

    // A class's policy changes for the next request, and goes back.
    let url = format!("{}/v1/policies/batch", server.api);
    let (status, put) = server.send(
        "PUT",
        &url,
        &[],
        r#"{"policy": {"quantize": {"k_bits": 4, "v_bits": 4}}}"#,
    );
    assert_eq!(status, 200, "{put}");
    let (_, answer) = server.complete(&[("x-cinch-class", "batch")], &completion(&prompt));
    assert_eq!(answer["cinch"]["policy"]["quantize"]["k_bits"], 4, "{answer}");
    let (status, _) = server.send("PUT", &url, &[("if-match", "\"stale\"")], r#"{"level": 1}"#);
    assert_eq!(status, 412);
    let (status, _) = server.send("DELETE", &url, &[], "");
    assert!(status < 300);
    assert_eq!(server.get("/v1/policies/batch")["level"], 2);

    assert_eq!(
        server.get("/v1/requests")["requests"].as_array().unwrap().len(),
        0,
        "all are finished"
    );
    let capacity = server.get("/v1/capacity");
    assert!(
        capacity["capacity_bytes"].as_u64().unwrap() > 0 && capacity["used_bytes"] == 0,
        "{capacity}"
    );
    let (status, api) = server.send("GET", &format!("{}/openapi.json", server.api), &[], "");
    assert!(
        status == 200 && api["paths"]["/v1/requests/{id}"]["patch"].is_object(),
        "{status}"
    );

    let done = r#"cinch_requests_total{class="default",outcome="ok"}"#;
    let (_, metrics) = server.send_text("GET", &format!("{}/metrics", server.api), &[], "");
    assert!(server.metric(done).is_some_and(|n| n >= 3.0), "{metrics}");
    for name in [
        r#"cinch_time_to_first_token_seconds_count{class="default"}"#,
        r#"cinch_attention_error_count{class="default"}"#,
        "cinch_kv_capacity_bytes",
        "process_resident_memory_bytes",
    ] {
        assert!(
            server.metric(name).is_some_and(|value| value > 0.0),
            "{name} in:\n{metrics}"
        );
    }
    assert_eq!(server.stop(), Some(0), "Ctrl-C ends it cleanly");
}

#[test]
fn prefix_reuse_is_bounded_and_never_crosses_policies() {
    let server = Server::start(&["kv.prefix_cache_bytes=40000000"]);
    let prompts: Vec<String> = (0..3_usize)
        .map(|i| text().chars().skip(i * 90_000 + 4_000).take(3_000).collect())
        .collect();
    for prompt in &prompts {
        server.complete(&[], &completion(prompt));
    }
    let held = server.metric("cinch_prefix_cache_bytes").unwrap();
    assert!(held > 0.0 && held <= 40_000_000.0, "{held}");
    let hits = || server.metric("cinch_prefix_cache_hits_total").unwrap();
    let before = hits();
    let (_, again) = server.complete(&[], &completion(&prompts[2]));
    assert_eq!(hits(), before + 1.0, "{again}");

    // What int4 left must not serve a request that asked for level 0.
    let mut squeezed = completion(&(prompts[0].clone() + " squeezed"));
    squeezed["cinch"] = json!({"policy": {"quantize": {"k_bits": 4, "v_bits": 4}}});
    server.complete(&[], &squeezed);
    let mut longer = completion(&(prompts[0].clone() + " squeezed and then some more"));
    longer["cinch"] = json!({"level": 0});
    let (_, answer) = server.complete(&[], &longer);
    let cache = &answer["cinch"];
    assert!(
        cache["bytes"].as_f64().unwrap() >= cache["uncompressed_bytes"].as_f64().unwrap() * 0.98,
        "served from a compressed prefix: {cache}"
    );
}

#[test]
fn six_of_different_lengths_decode_together() {
    let server = Server::start(&[]);
    std::thread::scope(|scope| {
        let server = &server;
        let answers: Vec<_> = (0..6_usize)
            .map(|i| {
                scope.spawn(move || {
                    let prompt: String = text().chars().skip(i * 40_000).take(400 + i * 173).collect();
                    let mut body = completion(&prompt);
                    body["max_tokens"] = 32.into();
                    server.complete(&[], &body)
                })
            })
            .collect();
        for answer in answers {
            let (status, answer) = answer.join().unwrap();
            assert_eq!(status, 200, "{answer}");
            assert!(
                answer["usage"]["completion_tokens"].as_u64().unwrap() > 0,
                "{answer}"
            );
        }
    });
}
