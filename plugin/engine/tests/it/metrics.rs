//! `/metrics` without a model: every series is there from the start, under its name, type and labels.

use crate::common::{app, call};
use cinch_engine::api::router;
use cinch_engine::metrics::Outcome;

/// Name, type, and whether it has a `class` label.
const METRICS: [(&str, &str, bool); 36] = [
    ("cinch_build_info", "gauge", false),
    ("cinch_ready", "gauge", false),
    ("cinch_kv_bytes", "gauge", true),
    ("cinch_kv_queued_bytes", "gauge", true),
    ("cinch_kv_uncompressed_bytes", "gauge", true),
    ("cinch_kv_capacity_bytes", "gauge", false),
    ("cinch_kv_allocated_bytes", "gauge", false),
    ("cinch_kv_peak_bytes", "gauge", false),
    ("cinch_kept_tokens", "gauge", true),
    ("cinch_seen_tokens", "gauge", true),
    ("cinch_time_to_first_token_seconds", "histogram", true),
    ("cinch_inter_token_latency_seconds", "histogram", true),
    ("cinch_time_per_output_token_seconds", "histogram", true),
    ("cinch_requests_running", "gauge", true),
    ("cinch_requests_waiting", "gauge", true),
    ("cinch_requests_total", "counter", true),
    ("cinch_prefix_cache_bytes", "gauge", false),
    ("cinch_prefix_cache_entries", "gauge", false),
    ("cinch_prefix_cache_hits_total", "counter", false),
    ("cinch_prefix_cache_misses_total", "counter", false),
    ("cinch_kv_reserved_bytes", "gauge", false),
    ("cinch_memory_limit_bytes", "gauge", false),
    ("cinch_watermark_active", "gauge", false),
    ("cinch_watermark_retunes_total", "counter", false),
    ("cinch_admission_waited_seconds", "histogram", true),
    ("cinch_ladder_bytes_ratio", "gauge", false),
    ("cinch_class_level", "gauge", true),
    ("cinch_lease_expired_total", "counter", true),
    ("cinch_stale_writes_total", "counter", false),
    ("cinch_attention_error", "histogram", true),
    ("cinch_compression_events_total", "counter", true),
    ("cinch_evicted_tokens_total", "counter", true),
    ("cinch_generated_tokens_total", "counter", true),
    ("cinch_retunes_total", "counter", true),
    ("process_resident_memory_bytes", "gauge", false),
    ("process_cpu_seconds_total", "counter", false),
];

#[tokio::test]
async fn every_metric_is_there_from_the_start() {
    let app = app(&[]);
    let router = router(app);
    let answer = call(&router, "GET", "/metrics", "").await;
    assert_eq!(answer.status, 200);
    assert!(
        answer.content_type.starts_with("text/plain"),
        "{}",
        answer.content_type
    );
    for (name, kind, by_class) in METRICS {
        assert!(
            answer.text.contains(&format!("# TYPE {name} {kind}\n")),
            "{name} {kind}\n{}",
            answer.text
        );
        if by_class {
            let suffix = if kind == "histogram" { "_count" } else { "" };
            for class in ["default", "batch"] {
                let series = format!("{name}{suffix}{{class=\"{class}\"");
                assert!(answer.text.contains(&series), "{series}\n{}", answer.text);
            }
        }
    }
    let mut cinch: Vec<&str> = answer
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE cinch_"))
        .filter_map(|line| line.split(' ').next())
        .collect();
    cinch.sort_unstable();
    let mut listed: Vec<&str> = METRICS
        .iter()
        .filter_map(|(name, _, _)| name.strip_prefix("cinch_"))
        .collect();
    listed.sort_unstable();
    assert_eq!(cinch, listed, "a metric that this test does not know");
    assert!(answer.text.contains("cinch_kv_capacity_bytes 2147483648\n"));
}

#[tokio::test]
async fn queues_and_outcomes_are_counted() {
    let app = app(&[]);
    let router = router(app.clone());
    let choice = app.classes.current("batch", "class").unwrap();
    app.kv.assign(5, "batch", choice.clone(), false).unwrap();
    app.metrics.begin("batch");
    let text = call(&router, "GET", "/metrics", "").await.text;
    assert!(
        text.contains("cinch_requests_waiting{class=\"batch\"} 1\n"),
        "{text}"
    );
    let wait = std::time::Duration::ZERO;
    app.kv.retune(5, choice, wait).await.unwrap();
    app.kv.finish(5);
    app.metrics.end("batch", Outcome::Ok);
    for _ in 0..2 {
        let text = call(&router, "GET", "/metrics", "").await.text;
        assert!(
            text.contains("cinch_requests_waiting{class=\"batch\"} 0\n"),
            "{text}"
        );
        assert!(
            text.contains("cinch_requests_total{class=\"batch\",outcome=\"ok\"} 1\n"),
            "{text}"
        );
        assert!(
            text.contains("cinch_retunes_total{class=\"batch\"} 1\n"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_class_that_goes_quiet_goes_back_to_zero() {
    let app = app(&["kv.plugin=off"]);
    let router = router(app.clone());
    app.metrics.begin("default");
    let text = call(&router, "GET", "/metrics", "").await.text;
    assert!(
        text.contains("cinch_requests_running{class=\"default\"} 1\n"),
        "{text}"
    );
    app.metrics.end("default", Outcome::Canceled);
    let text = call(&router, "GET", "/metrics", "").await.text;
    assert!(
        text.contains("cinch_requests_running{class=\"default\"} 0\n"),
        "{text}"
    );
}
