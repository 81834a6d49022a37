//! Engines and a Prometheus that answer badly, on real sockets through the real client: nothing moves, memory stays
//! bounded, and a condition says what is the matter.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use cinch_controller::config::Settings;
use cinch_controller::engine::Engine;
use cinch_controller::link::Http;
use cinch_controller::shared::Shared;
use cinch_controller::sources::Prometheus;
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const SETTINGS: &str = include_str!("../../configs/controller.toml");
/// Everything as short as it may be: what would move a level does so within a few seconds.
const QUICK: [&str; 10] = [
    "mode=new_requests",
    "tick_seconds=0.2",
    "scrape_seconds=0.1",
    "law.warm_up=0.0",
    "law.down_window=1.0",
    "law.down_cooldown=1.0",
    "law.quality_window=1.0",
    "law.quality_samples=1.0",
    "class.default.error_floor=0.1",
    "class.default.ttft_slo=1.0",
];
const WATCHED: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(4);
/// The level everything starts at; demand at it is neither high nor low.
const LEVEL: u64 = 2;

/// What `/metrics` is answered with.
#[derive(Clone)]
enum Answer {
    /// 200 and this body.
    Body(Vec<u8>),
    /// These bytes instead of an HTTP answer, then the end.
    Raw(&'static [u8]),
    /// A beginning, then these bytes for ever.
    Endless(&'static str, Vec<u8>),
    /// A beginning, then nothing.
    Silence(&'static str),
    /// Histograms whose error counts go on, with a sum that is `.0` a sample.
    Errors(&'static str),
}

const OK: &str = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";

#[derive(Default)]
struct Seen {
    /// Writes that set another level.
    moved: AtomicU64,
    /// Bytes taken of endless answers.
    taken: AtomicU64,
    scrapes: AtomicU64,
}

/// `used` of a capacity of 1000, as text so that it can be anything.
fn exposition(used: &str, uncompressed: f64) -> String {
    format!(
        "cinch_kv_capacity_bytes 1000\ncinch_kv_bytes{{class=\"default\"}} {used}\n\
         cinch_kv_uncompressed_bytes{{class=\"default\"}} {uncompressed}\ncinch_kv_queued_bytes{{class=\"default\"}} 0\n\
         cinch_requests_waiting{{class=\"default\"}} 0\nprocess_resident_memory_bytes 500\n\
         cinch_memory_limit_bytes 1000\nprocess_start_time_seconds 1\n"
    )
}

fn body(text: impl Into<String>) -> Answer {
    Answer::Body(text.into().into_bytes())
}

/// An engine at [`LEVEL`] whose policy API is as it should be, and whose metrics are `answer`.
async fn engine(answer: Answer) -> (SocketAddr, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Seen::default());
    let shown = seen.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(stream, answer.clone(), seen.clone()));
        }
    });
    (address, shown)
}

/// One call; an error is the client's end of the connection.
async fn serve(mut stream: TcpStream, answer: Answer, seen: Arc<Seen>) -> std::io::Result<()> {
    let (head, sent) = request(&mut stream).await?;
    let policy = json!({"class": "default", "level": LEVEL, "policy": {}, "origin": "config", "configured_level": 0,
        "etag": "\"1\""});
    let levels: Vec<Value> = [1.0, 0.577, 0.45, 0.329, 0.23]
        .iter()
        .enumerate()
        .map(|(level, ratio)| json!({"level": level, "name": level.to_string(), "policy": {}, "bytes_ratio": ratio}))
        .collect();
    let json = match head.split(' ').nth(1).unwrap() {
        "/v1/policies" => json!({"classes": [policy], "epoch": 0}),
        "/v1/ladder" => json!({"model": "m", "measured": "now", "levels": levels}),
        "/v1/policies/default" => {
            let change: Value = serde_json::from_slice(&sent).unwrap();
            if change["level"] != LEVEL {
                seen.moved.fetch_add(1, Relaxed);
            }
            json!({})
        }
        _ => return metrics(stream, answer, seen).await,
    };
    stream.write_all(OK.as_bytes()).await?;
    stream.write_all(json.to_string().as_bytes()).await
}

async fn metrics(mut stream: TcpStream, answer: Answer, seen: Arc<Seen>) -> std::io::Result<()> {
    let scrapes = seen.scrapes.fetch_add(1, Relaxed) + 1;
    match answer {
        Answer::Body(body) => {
            stream.write_all(OK.as_bytes()).await?;
            stream.write_all(&body).await
        }
        Answer::Raw(bytes) => stream.write_all(bytes).await,
        Answer::Endless(begin, chunk) => {
            stream.write_all(begin.as_bytes()).await?;
            loop {
                let taken = stream.write(&chunk).await?;
                seen.taken.fetch_add(taken as u64, Relaxed);
            }
        }
        Answer::Silence(begin) => {
            stream.write_all(begin.as_bytes()).await?;
            std::future::pending().await
        }
        Answer::Errors(sum) => {
            let mut text = exposition("765", 1700.0);
            let each: f64 = sum.parse().unwrap();
            let sum = if each.is_finite() {
                (each * scrapes as f64).to_string()
            } else {
                sum.to_owned()
            };
            text += &format!(
                "cinch_attention_error_bucket{{class=\"default\",le=\"+Inf\"}} {scrapes}\n\
                 cinch_attention_error_sum{{class=\"default\"}} {sum}\n\
                 cinch_attention_error_count{{class=\"default\"}} {scrapes}\n"
            );
            stream.write_all(OK.as_bytes()).await?;
            stream.write_all(text.as_bytes()).await
        }
    }
}

/// A request's head and body.
async fn request(stream: &mut TcpStream) -> std::io::Result<(String, Vec<u8>)> {
    let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let read = stream.read(&mut chunk).await?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&chunk[..read]);
        let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
            continue;
        };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        if bytes.len() >= end + 4 + length {
            return Ok((head, bytes[end + 4..].to_vec()));
        }
    }
}

/// What a real loop made of it: the engine's status.
async fn watch(address: SocketAddr, prometheus: Option<SocketAddr>) -> Value {
    let overrides = QUICK.map(str::to_owned);
    let settings = Arc::new(Settings::parse(SETTINGS, "controller.toml", &overrides).unwrap());
    let (_changed, watched) = watch::channel(settings.clone());
    let shared = Arc::new(Shared::new(settings.mode).unwrap());
    let http = |address: SocketAddr| Http::new(&format!("http://{address}"), None, TIMEOUT).unwrap();
    let prometheus = prometheus.map(|address| {
        let selector = "{instance=\"x\"}";
        Prometheus::new(http(address), selector, watched.clone())
    });
    let engine = Engine::new("x", http(address), prometheus, watched, shared.clone());
    let task = tokio::spawn(engine.run());
    tokio::time::sleep(WATCHED).await;
    assert!(!task.is_finished(), "the loop ended");
    task.abort();
    serde_json::to_value(shared.status()).unwrap()["engines"][0].clone()
}

fn message<'a>(status: &'a Value, kind: &str) -> Option<&'a str> {
    let all = status["conditions"].as_array().unwrap();
    let found = all.iter().find(|condition| condition["kind"] == kind);
    found.map(|condition| condition["message"].as_str().unwrap())
}

/// Most bytes this process has held at once.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_engine_answering_well_is_moved() {
    for (answer, what) in [
        (body(exposition("10", 20.0)), "low demand is left"),
        (body(exposition("900", 5000.0)), "high demand is met"),
        (Answer::Errors("9"), "a bad error is answered"),
    ] {
        let (address, seen) = engine(answer).await;
        let status = watch(address, None).await;
        assert!(seen.moved.load(Relaxed) > 0, "{what}; {status:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_answers_move_nothing_and_are_named() {
    let classes: String = (0..70_000)
        .map(|index| format!("cinch_kv_bytes{{class=\"c{index}\"}} 1\n"))
        .collect();
    let cases = [
        ("empty", body(""), "none of the metrics"),
        ("garbage", body("<html>no</html>"), "not a sample"),
        ("negative", body(exposition("-5", 20.0)), "cinch_kv_bytes is -5"),
        ("NaN", body(exposition("NaN", 20.0)), "cinch_kv_bytes is NaN"),
        (
            "infinite",
            body(exposition("+Inf", 20.0)),
            "cinch_kv_bytes is inf",
        ),
        (
            "over capacity",
            body(exposition("9e9", 20.0)),
            "of a capacity of 1000",
        ),
        (
            "no figure",
            body("cinch_kv_capacity_bytes 1000\n"),
            "no cinch_kv_bytes",
        ),
        ("not text", Answer::Body(vec![0xff; 100]), "no text"),
        (
            "too many classes",
            body(exposition("10", 20.0) + &classes),
            "more than",
        ),
        ("no HTTP", Answer::Raw(b"\0\0\0\0\0\0\0\0"), ""),
        ("nothing", Answer::Raw(b""), ""),
        (
            "cut off",
            Answer::Raw(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\ncinch_kv"),
            "",
        ),
        (
            "error",
            Answer::Raw(b"HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\n"),
            "500",
        ),
        (
            "elsewhere",
            Answer::Raw(b"HTTP/1.1 302 x\r\nlocation: /v1/ladder\r\ncontent-length: 0\r\n\r\n"),
            "302",
        ),
        ("hanging", Answer::Silence(""), "no answer within"),
        ("hanging in the body", Answer::Silence(OK), "no answer within"),
        (
            "1 GB",
            Answer::Endless(OK, b"# a comment\n".repeat(5000)),
            "longer than",
        ),
        (
            "an endless head",
            Answer::Endless("HTTP/1.1 200 OK\r\na: ", vec![b'a'; 65536]),
            "",
        ),
    ];
    let before = peak();
    join_all(cases.map(|(name, answer, words)| async move {
        let (address, seen) = engine(answer).await;
        let status = watch(address, None).await;
        assert_eq!(seen.moved.load(Relaxed), 0, "{name}; {status:#}");
        assert!(seen.scrapes.load(Relaxed) > 1, "{name}: it goes on asking");
        let said = message(&status, "MemoryMissing").unwrap_or_else(|| panic!("{name}; {status:#}"));
        assert!(said.contains(words), "{name}: {said}");
        let each = seen.taken.load(Relaxed) / seen.scrapes.load(Relaxed).max(1);
        assert!(each < 32 << 20, "{name}: {each} bytes taken a scrape");
    }))
    .await;
    let grown = peak() - before;
    assert!(grown < 200 << 20, "{} MB more at the peak", grown >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_moves_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let status = watch(address, None).await;
    assert!(message(&status, "AllLost").is_some(), "{status:#}");
    assert!(
        message(&status, "MemoryMissing").unwrap().contains("refused"),
        "{status:#}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_that_is_none_moves_nothing_and_is_named() {
    join_all(["NaN", "+Inf", "-Inf", "-9"].map(|sum| async move {
        let (address, seen) = engine(Answer::Errors(sum)).await;
        let status = watch(address, None).await;
        assert_eq!(seen.moved.load(Relaxed), 0, "{sum}; {status:#}");
        let said = message(&status, "QualityMissing").unwrap_or_else(|| panic!("{sum}; {status:#}"));
        assert!(said.contains("cinch_attention_error"), "{sum}: {said}");
        assert!(message(&status, "MemoryMissing").is_none(), "one input, not all");
    }))
    .await;
}

/// A Prometheus that answers badly blinds latency and quality, never memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_prometheus_does_not_keep_memory_waiting() {
    let value = |up: &str, error: &str| {
        let series = |part: &str, class: &str, value: &str| {
            let mut labels = json!({"cinch_part": part});
            if !class.is_empty() {
                labels["class"] = json!(class);
            }
            json!({"metric": labels, "value": [0, value]})
        };
        let all = [
            series("up", "", up),
            series("age", "", "0.5"),
            series("error_count", "default", "100"),
            series("error_sum", "default", error),
        ];
        body(json!({"status": "success", "data": {"result": all}}).to_string())
    };
    let cases = [
        ("hanging", Answer::Silence(""), "no answer within"),
        ("garbage", body("<html>"), ""),
        (
            "refused",
            body(json!({"status": "error", "error": "too slow"}).to_string()),
            "too slow",
        ),
        (
            "empty",
            body(json!({"status": "success", "data": {"result": []}}).to_string()),
            "no series up",
        ),
        ("down", value("0", "900"), "is 0"),
        (
            "NaN",
            value("1", "NaN"),
            "cinch_attention_error_sum over the window is NaN",
        ),
        ("negative", value("1", "-7"), "is -7"),
        ("endless", Answer::Endless(OK, vec![b' '; 65536]), ""),
    ];
    join_all(cases.map(|(name, answer, words)| async move {
        let (steady, seen) = engine(body(exposition("765", 1700.0))).await;
        let (full, answered) = engine(body(exposition("900", 5000.0))).await;
        let (prometheus, _) = engine(answer).await;
        let (status, critical) = tokio::join!(watch(steady, Some(prometheus)), watch(full, Some(prometheus)));
        assert_eq!(seen.moved.load(Relaxed), 0, "{name}; {status:#}");
        let said = message(&status, "QualityMissing").unwrap_or_else(|| panic!("{name}; {status:#}"));
        assert!(said.contains(words), "{name}: {said}");
        assert!(
            answered.moved.load(Relaxed) > 0,
            "{name}: memory is still answered; {critical:#}"
        );
    }))
    .await;
}
