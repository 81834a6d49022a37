//! Everything that an operator would look at, looked at: a real Prometheus scrapes a real engine and a controller
//! under load, and every query of every panel, variable and rule is run. None may fail, be empty, or be no number.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod boards;
mod common;

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use boards::promql::{Selector, fill, selectors};
use boards::server::{Prometheus, Samples};
use boards::{Board, boards, rules};
use common::{Controller, Server, free_port, text};
use serde_json::{Value, json};

/// f16 bytes of a token: 30 layers, 3 KV heads, K and V of 64.
const TOKEN_BYTES: u64 = 30 * 3 * (64 + 64) * 2;
/// About the tokens of a request of the load, prompt and answer.
const REQUEST_TOKENS: u64 = 700;
/// How long the load goes on: some dozens of scrapes, and some requests of each kind.
const LOAD: Duration = Duration::from_secs(50);
/// Four scrapes of a second: what Grafana puts in.
const RATE_INTERVAL: &str = "4s";

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

fn prompt(i: usize) -> String {
    let words: Vec<String> = text().split_whitespace().map(str::to_owned).collect();
    let start = i * 1_237 % (words.len() - 470);
    words[start..start + 470].join(" ")
}

/// Sends requests of all kinds until the time is over: of both classes, streaming and not, one with a level of its own
/// that evicts, more than the queue takes, and some that make no sense.
fn load(server: &Server) {
    let end = Instant::now() + LOAD;
    let client = |i: usize| {
        let class = ["default", "batch"][i % 2];
        for round in 0.. {
            if Instant::now() >= end {
                break;
            }
            let mut body = json!({
                "model": "default", "prompt": prompt(i * 20 + round % 20), "max_tokens": 48, "temperature": 0.0,
                "stream": !i.is_multiple_of(4),
            });
            if i == 5 {
                body["cinch"] = json!({"level": 5});
            }
            let url = format!("{}/v1/completions", server.openai);
            let (status, text) =
                server.send_text("POST", &url, &[("x-cinch-class", class)], &body.to_string());
            assert!(matches!(status, 200 | 503), "{status}: {text}");
            if status == 503 {
                thread::sleep(Duration::from_millis(500));
            }
            if i == 0 {
                let (status, _) = server.complete(&[], &json!({"model": "default", "prompt": "a", "n": 0}));
                assert_eq!(status, 400);
            }
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|i| scope.spawn(move || client(i))).collect();
        for client in clients {
            client.join().unwrap();
        }
    });
}

/// What is wrong with an answer that should have something to show.
fn wrong(answer: Result<Vec<Samples>, String>) -> Option<String> {
    match answer {
        Err(error) => Some(error),
        Ok(all) if all.iter().all(Vec::is_empty) => Some("empty".to_owned()),
        Ok(all) => {
            let bad = all.iter().flatten().find(|(_, value)| !value.is_finite());
            bad.map(|(at, value)| format!("{value} at {at}"))
        }
    }
}

/// The values of a dashboard's variables with all selected, each filled as Grafana does it.
fn variables(
    prometheus: &Prometheus,
    board: &Board,
    range: &str,
    faults: &mut Vec<String>,
) -> Vec<(String, String)> {
    let mut values = vec![
        ("__rate_interval".to_owned(), RATE_INTERVAL.to_owned()),
        ("__range".to_owned(), range.to_owned()),
    ];
    for variable in board.variables() {
        let selector = fill(&variable.selector, &values);
        let found = prometheus.get(
            &format!("label/{}/values", variable.label),
            &[("match[]", &selector)],
        );
        let found: Vec<String> = match found {
            Ok(found) => serde_json::from_value(found).unwrap(),
            Err(error) => {
                faults.push(format!("{}: ${}: {error}", board.file, variable.name));
                continue;
            }
        };
        if found.is_empty() {
            faults.push(format!("{}: ${}: empty", board.file, variable.name));
        }
        let all = variable.all.unwrap_or_else(|| format!("({})", found.join("|")));
        values.push((variable.name, all));
    }
    values
}

#[test]
fn every_panel_variable_and_rule_has_something_to_show_under_load() {
    let capacity = format!("kv.capacity_bytes={}", 2 * REQUEST_TOKENS * TOKEN_BYTES * 11 / 10);
    let server = Server::start(&[&capacity, "admission.max_queue=3"]);
    let controller = Controller::start(&server, "live", &["tick_seconds=1", "law.warm_up=0"]);
    let prometheus = Prometheus::start(
        free_port(),
        &[
            ("cinch-engine", &server.api),
            ("cinch-controller", controller.url()),
        ],
    );
    // A prefix to find: the same conversation twice.
    let from = now();
    let asked = json!({"model": "default", "prompt": prompt(0), "max_tokens": 4, "temperature": 0.0});
    for _ in 0..2 {
        assert_eq!(server.complete(&[], &asked).0, 200);
    }
    load(&server);
    let to = now();

    // The load was one: what panels show of these must not be zeros.
    for expr in [
        "sum(cinch_prefix_cache_hits_total)",
        "sum(cinch_requests_total{outcome=\"overloaded\"})",
        "sum(cinch_requests_total{outcome=\"rejected\"})",
        "min by (class) (cinch_requests_total{outcome=\"ok\"})",
        "sum(cinch_compression_events_total)",
        "sum(cinch_evicted_tokens_total)",
        "min by (class) (cinch_generated_tokens_total)",
        "max(max_over_time(cinch_class_level{class=\"default\"}[1h]))",
        "sum(cinch_controller_moves_total)",
        "sum(cinch_controller_writes_total{result=\"ok\"})",
        "max(max_over_time(cinch_requests_waiting[1h]))",
    ] {
        let answer = prometheus.instant(expr, to).unwrap();
        let values: Vec<f64> = answer.iter().flatten().map(|(_, value)| *value).collect();
        println!("{expr}: {values:?}");
        assert!(
            !values.is_empty() && values.iter().all(|value| *value > 0.0),
            "{expr}: {values:?}"
        );
    }

    let mut faults = Vec::new();
    let range = format!("{}s", (to - from).ceil());
    let mut ran = 0;
    for board in boards() {
        let values = variables(&prometheus, &board, &range, &mut faults);
        for target in board.targets() {
            let expr = fill(&target.expr, &values);
            let answer = match target.instant {
                true => prometheus.instant(&expr, to),
                false => prometheus.range(&expr, from, to),
            };
            ran += 1;
            faults.extend(wrong(answer).map(|fault| format!("{}: {fault}", target.place)));
        }
    }
    for rule in rules() {
        let answer = prometheus.range(&rule.expr, from, to);
        ran += 1;
        if rule.record.is_some() {
            for expr in [rule.expr.as_str(), rule.name()] {
                let answer = prometheus.range(expr, from, to);
                faults.extend(wrong(answer).map(|fault| format!("{expr}: {fault}")));
            }
        } else if let Err(error) = answer {
            faults.push(format!("{}: {error}", rule.name()));
        }
        // An alert that does not fire is empty. What it reads is there all the same: it could.
        for Selector { metric, labels } in selectors(&rule.expr) {
            let expr = format!("{metric}{labels}");
            let answer = prometheus.instant(&format!("last_over_time({expr}[1h])"), to);
            let empty = answer.is_ok_and(|answer| answer.is_empty());
            faults.extend(empty.then(|| format!("{}: {expr}: empty", rule.name())));
        }
    }
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
    println!("{ran} queries over {range}");

    // Prometheus' own evaluations were fine too, and the refusals have set off their alert.
    let groups = prometheus.get("rules", &[]).unwrap();
    let loaded: Vec<&Value> = groups["groups"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap())
        .collect();
    assert_eq!(loaded.len(), rules().len());
    for rule in loaded {
        assert_eq!(rule["health"], "ok", "{rule}");
        if rule["name"] == "CinchRequestsOverloaded" {
            assert_ne!(rule["state"], "inactive", "{rule}");
        }
        if rule["name"] == "CinchEngineDown" {
            assert_eq!(rule["state"], "inactive", "{rule}");
        }
    }
}
