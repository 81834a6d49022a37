//! The Prometheus source against a real Prometheus that scrapes an exposition of known distributions.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use cinch_controller::config::Settings;
use cinch_controller::engine::Engine;
use cinch_controller::law::{Latency, Quality, Reading};
use cinch_controller::link::Http;
use cinch_controller::shared::Shared;
use cinch_controller::sources::Prometheus;
use common::Plant;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

const SETTINGS: &str = include_str!("../../configs/controller.toml");
const SELECTOR: &str = "{instance=\"plant\"}";
/// Samples a second of class `default`; `batch` has half as many.
const RATE: f64 = 100.0;
/// Prometheus extrapolates an increase to the ends of its window; scrapes are a second apart.
const COUNT_TOLERANCE: f64 = 0.25;
/// A 95th percentile is a ratio of counts taken at the same moments: only their rounding counts.
const TOLERANCE: f64 = 0.02;

/// What an engine would export after some seconds: of ten samples five are in the first bucket, four in the second
/// and one in the third, so that the 95th percentile is the middle of the third.
fn exposition(seconds: f64) -> String {
    let mut text = String::new();
    let mut histogram = |metric: &str, class: &str, tens: f64, bounds: [f64; 3], mean: f64| {
        let mut line = |suffix: &str, label: &str, value: f64| {
            writeln!(text, "{metric}_{suffix}{{class=\"{class}\"{label}}} {value}").unwrap();
        };
        for (bound, count) in bounds.into_iter().zip([5.0, 9.0, 10.0]) {
            line("bucket", &format!(",le=\"{bound}\""), count * tens);
        }
        line("bucket", ",le=\"+Inf\"", 10.0 * tens);
        line("sum", "", 10.0 * tens * mean);
        line("count", "", 10.0 * tens);
    };
    for (class, share, scale) in [("default", 1.0, 1.0), ("batch", 0.5, 4.0)] {
        let tens = (seconds * RATE * share / 10.0).floor();
        let bounds = [0.1, 0.5, 1.0].map(|bound| bound * scale);
        histogram("cinch_time_to_first_token_seconds", class, tens, bounds, 0.3);
        let bounds = bounds.map(|bound| bound / 10.0);
        histogram("cinch_inter_token_latency_seconds", class, tens, bounds, 0.03);
        histogram(
            "cinch_attention_error",
            class,
            tens,
            [0.01, 0.1, 1.0],
            0.05 * scale,
        );
    }
    text
}

/// Exports until aborted.
async fn exporter() -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let begun = Instant::now();
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let text = exposition(begun.elapsed().as_secs_f64());
            // One short request; its end is not waited for.
            let _length = stream.read(&mut [0; 4096]).await;
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\nconnection: close\r\n\r\n";
            let _gone = stream.write_all(format!("{head}{text}").as_bytes()).await;
        }
    });
    (address, task)
}

/// A Prometheus that scrapes `target` each second as `plant`; ends when dropped.
async fn prometheus(dir: &Path, target: SocketAddr) -> (Child, String) {
    let config = format!(
        "global: {{ scrape_interval: 1s, scrape_timeout: 1s }}\nscrape_configs:\n  - job_name: engine\n    \
         static_configs: [{{ targets: [\"{target}\"], labels: {{ instance: plant }} }}]\n"
    );
    std::fs::write(dir.join("prometheus.yml"), config).unwrap();
    // Freed again for it to take: the port could be lost in between, and the test would say so.
    let address = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let log = std::fs::File::create(dir.join("log")).unwrap();
    let child = Command::new("prometheus")
        .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
        .arg(format!("--web.listen-address={address}"))
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|err| panic!("prometheus: {err}; install Debian's package of that name"));
    (child, format!("http://{address}"))
}

fn settings(overrides: &[&str]) -> Arc<Settings> {
    let overrides: Vec<String> = overrides.iter().map(|&one| one.to_owned()).collect();
    Arc::new(Settings::parse(SETTINGS, "controller.toml", &overrides).unwrap())
}

fn http(url: &str) -> Http {
    Http::new(url, None, Duration::from_secs(2)).unwrap()
}

/// Asked again until it holds, for a minute at most.
async fn until<T>(what: &str, mut check: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        match check() {
            Ok(value) => return value,
            Err(last) => assert!(begun.elapsed().as_secs() < 60, "{what}: {last}"),
        }
        sleep(Duration::from_millis(200)).await;
    }
}

fn seen(source: &Prometheus, class: &str) -> Result<(Latency, Quality), String> {
    let classes = || ["default", "batch"].into_iter();
    match (
        source.latency(classes()).remove(class),
        source.quality(classes()).remove(class),
    ) {
        (Some(Reading::Fresh { value: latency, .. }), Some(Reading::Fresh { value: quality, .. })) => {
            Ok((latency, quality))
        }
        other => Err(format!("{other:?}")),
    }
}

/// Enough samples for the window to be whole.
fn whole(source: &Prometheus, class: &str, samples: f64) -> Result<(Latency, Quality), String> {
    let seen = seen(source, class)?;
    let least = samples * (1.0 - COUNT_TOLERANCE);
    if seen.0.ttft_samples >= least && seen.1.samples >= least {
        Ok(seen)
    } else {
        Err(format!("{seen:?}"))
    }
}

fn near(what: &str, value: f64, wanted: f64, tolerance: f64) {
    let off = (value / wanted - 1.0).abs();
    assert!(
        off <= tolerance,
        "{what}: {value}, wanted {wanted} ± {} %",
        tolerance * 100.0
    );
}

/// A real loop on a simulated engine that is fairly full, so that latency counts; its status after some seconds.
async fn watch_latency(url: &str) -> (Value, usize) {
    let settings = settings(&[
        "mode=live",
        "tick_seconds=0.5",
        "scrape_seconds=0.5",
        "law.warm_up=0.0",
        "law.quality_window=60.0",
        "class.default.ttft_slo=0.5",
        "class.default.error_floor=0.2",
    ]);
    let (_changed, watched) = watch::channel(settings.clone());
    let shared = Arc::new(Shared::new(settings.mode).unwrap());
    let plant = Plant::new();
    plant.demand(0.8);
    let source = Prometheus::new(http(url), SELECTOR, watched.clone());
    let engine = Engine::new("plant", plant, Some(source), watched, shared.clone());
    let task = tokio::spawn(engine.run());
    sleep(Duration::from_secs(6)).await;
    task.abort();
    let status = serde_json::to_value(shared.status()).unwrap()["engines"][0].clone();
    let decisions = shared.decisions(1000).decisions;
    let moves = decisions.iter().map(|entry| entry.decision.moves.len()).sum();
    (status, moves)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_prometheus_says_what_was_exported_and_what_died_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let (target, exporter) = exporter().await;
    let (_prometheus, url) = prometheus(dir.path(), target).await;

    let (changed, watched) = watch::channel(settings(&["law.quality_window=8.0"]));
    let source = Prometheus::new(http(&url), SELECTOR, watched);
    for (class, samples, scale) in [("default", RATE, 1.0), ("batch", RATE / 2.0, 4.0)] {
        let (latency, quality) = until(class, || whole(&source, class, 8.0 * samples)).await;
        let what = |figure: &str| format!("{class}, {figure}");
        near(
            &what("first token"),
            latency.ttft_p95.unwrap(),
            0.75 * scale,
            TOLERANCE,
        );
        near(
            &what("next token"),
            latency.itl_p95.unwrap(),
            0.075 * scale,
            TOLERANCE,
        );
        near(&what("error"), quality.error, 0.05 * scale, TOLERANCE);
        for count in [latency.ttft_samples, latency.itl_samples, quality.samples] {
            near(&what("samples"), count, 8.0 * samples, COUNT_TOLERANCE);
        }
    }

    // The window is that of the settings in force.
    changed.send_replace(settings(&["law.quality_window=16.0"]));
    let (latency, _) = until("a longer window", || whole(&source, "default", 16.0 * RATE)).await;
    near(
        "samples of a longer window",
        latency.ttft_samples,
        16.0 * RATE,
        COUNT_TOLERANCE,
    );

    // 0.75 s against an objective of 0.5 s: what must not happen below does happen here.
    let (status, moves) = watch_latency(&url).await;
    assert!(moves > 0, "{status:#}");

    // `rate` goes on answering for a window of 60 s after this.
    exporter.abort();
    let gone = until("the source after its target's death", || {
        match seen(&source, "default") {
            Err(gone) => Ok(gone),
            Ok(seen) => Err(format!("{seen:?}")),
        }
    })
    .await;
    assert!(
        gone.contains("Missing") && gone.contains("it can't scrape the engine"),
        "{gone}"
    );
    let (status, moves) = watch_latency(&url).await;
    assert_eq!(moves, 0, "{status:#}");
    for kind in ["LatencyMissing", "QualityMissing"] {
        let all = status["conditions"].as_array().unwrap().iter();
        let said = all.filter(|one| one["kind"] == kind && one["class"] == "default");
        let said: Vec<_> = said.map(|one| one["message"].as_str().unwrap()).collect();
        assert!(
            said.len() == 1 && said[0].contains("it can't scrape the engine"),
            "{status:#}"
        );
    }
}
