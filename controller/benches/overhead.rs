//! What the controller costs: its own process, watching ten engines each second in mode `live`. The engines are stubs
//! in this process, whose time does not count; they answer with as much as an engine with four classes and sixteen
//! running requests does.
//!
//! `cargo bench -p cinch-controller --bench overhead` prints a table and a line of JSON, and fails where the
//! measurement is not what it claims to be: scrapes left out, or figures the controller could not read.
#![allow(
    clippy::unwrap_used,
    reason = "a benchmark that cannot go on should say where"
)]

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use cinch_controller::link::{EngineLink, Http};
use serde_json::{Value, json};

const ENGINES: usize = 10;
const WARM_UP: Duration = Duration::from_secs(10);
const MEASURED: Duration = Duration::from_secs(60);
const CLASSES: [&str; 4] = ["default", "interactive", "batch", "background"];
const REQUESTS: u64 = 16;
/// The level that the stubs are at, where demand keeps them; above their configured one, so that leases are renewed.
const LEVEL: u64 = 2;
const RATIOS: [f64; 6] = [1.0, 0.577, 0.45, 0.329, 0.23, 0.184];
/// Linux counts a process's time in hundredths of a second for whoever reads /proc.
const TICKS: f64 = 100.0;
/// What the project asks for.
const BAR: (f64, f64) = (1.0, 50.0);

/// The engine's histograms, and the bounds each has.
const HISTOGRAMS: [(&str, usize); 5] = [
    ("cinch_admission_waited_seconds", 22),
    ("cinch_time_to_first_token_seconds", 22),
    ("cinch_inter_token_latency_seconds", 19),
    ("cinch_time_per_output_token_seconds", 19),
    ("cinch_attention_error", 11),
];

#[derive(Default)]
struct Counts {
    scrapes: AtomicU64,
    writes: AtomicU64,
}

fn exposition(scrapes: u64) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &dyn std::fmt::Display| writeln!(text, "{name} {value}").unwrap();
    for (name, value) in [
        ("cinch_kv_capacity_bytes", 4e9),
        ("process_resident_memory_bytes", 6e9),
        ("cinch_memory_limit_bytes", 16e9),
        ("process_start_time_seconds", 1.76e9),
    ] {
        line(
            &format!("# HELP {name} What an engine says of it in a line of some length."),
            &"",
        );
        line(name, &value);
    }
    let gauges = [
        // 1.6 of the capacity uncompressed: fits at the third level, and not at the second.
        ("cinch_kv_bytes", 0.72e9),
        ("cinch_kv_uncompressed_bytes", 1.6e9),
        ("cinch_kv_queued_bytes", 0.0),
        ("cinch_requests_waiting", 0.0),
        ("cinch_requests_running", 4.0),
        ("cinch_kept_tokens", 12_000.5),
        ("cinch_seen_tokens", 48_000.0),
        ("cinch_generated_tokens_total", 1e6),
        ("cinch_evicted_tokens_total", 1e5),
        ("cinch_class_level", 2.0),
    ];
    for class in CLASSES {
        for (name, value) in gauges {
            line(&format!("{name}{{class=\"{class}\"}}"), &value);
        }
        for (name, bounds) in HISTOGRAMS {
            for bound in 1..=bounds {
                let count = scrapes * bound as u64;
                line(
                    &format!("{name}_bucket{{class=\"{class}\",le=\"0.{bound:02}\"}}"),
                    &count,
                );
            }
            let count = scrapes * bounds as u64;
            line(&format!("{name}_bucket{{class=\"{class}\",le=\"+Inf\"}}"), &count);
            line(
                &format!("{name}_sum{{class=\"{class}\"}}"),
                &(count as f64 * 0.05),
            );
            line(&format!("{name}_count{{class=\"{class}\"}}"), &count);
        }
    }
    text
}

fn requests() -> String {
    let one = |id: u64| {
        json!({"id": id, "state": "running", "class": "default", "own": false, "level": LEVEL, "policy": {},
            "sequences": 1, "prompt_tokens": 3000, "seen": 3100, "kept": 3100.0, "bytes": 40_000_000,
            "uncompressed_bytes": 90_000_000, "attention_error": 0.01, "applied": true, "served": []})
    };
    json!({"requests": (0..REQUESTS).map(one).collect::<Vec<_>>()}).to_string()
}

fn policies() -> String {
    let one = |class: &str| {
        json!({"class": class, "level": LEVEL, "policy": {}, "origin": "lease", "configured_level": 0, "etag": "\"1\"",
            "lease": {"holder": "cinch-controller/1", "epoch": 1, "expires_in_seconds": 50.0}})
    };
    json!({"classes": CLASSES.map(one), "epoch": 1}).to_string()
}

fn ladder() -> String {
    let one = |(level, ratio): (usize, &f64)| json!({"level": level, "name": format!("level {level}"), "policy": {}, "bytes_ratio": ratio});
    let levels: Vec<Value> = RATIOS.iter().enumerate().map(one).collect();
    json!({"model": "stub", "measured": "never", "levels": levels}).to_string()
}

/// An engine: a thread a connection, which the controller keeps open.
fn engine(counts: Arc<Counts>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let counts = counts.clone();
            std::thread::spawn(move || serve(stream.unwrap(), &counts));
        }
    });
    address
}

/// Answers until the other end is done.
fn serve(mut stream: TcpStream, counts: &Counts) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let (mut first, mut length) = (String::new(), 0);
        reader.read_line(&mut first).ok().filter(|read| *read > 0)?;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
            let line = line.trim().to_lowercase();
            if let Some(given) = line.strip_prefix("content-length: ") {
                length = given.parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
        }
        reader.read_exact(&mut vec![0; length]).ok()?;
        let body = match first.split(' ').nth(1).unwrap() {
            "/metrics" => exposition(counts.scrapes.fetch_add(1, Relaxed) + 1),
            "/v1/policies" => policies(),
            "/v1/ladder" => ladder(),
            "/v1/requests" => requests(),
            path if path.starts_with("/v1/policies/") => {
                counts.writes.fetch_add(1, Relaxed);
                "{}".to_owned()
            }
            other => panic!("{other}"),
        };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).ok()?;
    }
}

/// Ends with its owner.
struct Controller(Child);

impl Drop for Controller {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Controller {
    /// Seconds of all its threads on a core, in its own code and in the system's on its behalf.
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        // Fields 14 and 15; the second, in brackets, may hold blanks.
        let fields = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .skip(11)
            .take(2);
        fields.map(|field| field.parse::<f64>().unwrap()).sum::<f64>() / TICKS
    }

    /// Most megabytes it held at once.
    fn peak(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
    }
}

/// The conditions of every engine.
fn conditions(address: SocketAddr) -> Vec<Value> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let http = Http::new(&format!("http://{address}"), None, Duration::from_secs(2)).unwrap();
    let status: Value = serde_json::from_str(&runtime.block_on(http.get("/v1/status")).unwrap()).unwrap();
    let engines = status["engines"].as_array().unwrap();
    assert_eq!(engines.len(), ENGINES, "{status:#}");
    let conditions = engines
        .iter()
        .flat_map(|engine| engine["conditions"].as_array().unwrap());
    conditions.cloned().collect()
}

fn main() {
    let counts = Arc::new(Counts::default());
    let engines: Vec<Value> = (0..ENGINES)
        .map(|index| json!({"name": format!("engine-{index}"), "url": format!("http://{}", engine(counts.clone()))}))
        .collect();
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("controller.toml");
    let bounds = json!({"default": {"ttft_slo": 5.0, "itl_slo": 0.5, "error_floor": 0.2}});
    let settings = json!({"mode": "live", "listen": listen, "engine": engines, "class": bounds});
    std::fs::write(&path, toml::to_string(&settings).unwrap()).unwrap();
    let controller = Command::new(env!("CARGO_BIN_EXE_cinch-controller"))
        .args(["run", "--config"])
        .arg(&path)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let controller = Controller(controller);

    std::thread::sleep(WARM_UP);
    let (begun, cpu) = (Instant::now(), controller.cpu());
    let scrapes = counts.scrapes.load(Relaxed);
    std::thread::sleep(MEASURED);
    let seconds = begun.elapsed().as_secs_f64();
    let percent = (controller.cpu() - cpu) / seconds * 100.0;
    let scrapes = (counts.scrapes.load(Relaxed) - scrapes) as f64 / seconds;
    let (peak, writes) = (controller.peak(), counts.writes.load(Relaxed));

    let bytes = exposition(1_000_000).len();
    let wanted = ENGINES as f64;
    assert!(
        (wanted * 0.95..wanted * 1.05).contains(&scrapes),
        "{scrapes} scrapes a second, wanted {wanted}"
    );
    assert!(writes >= (ENGINES * CLASSES.len()) as u64, "{writes} renewals");
    let conditions = conditions(listen);
    assert!(conditions.is_empty(), "{conditions:#?}");

    println!("| engines | scrapes/s | bytes a scrape | renewals | % of a core | MB at the peak |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    println!("| {ENGINES} | {scrapes:.1} | {bytes} | {writes} | {percent:.2} | {peak:.1} |");
    let within = percent < BAR.0 && peak < BAR.1;
    println!(
        "under {} % and {} MB: {}",
        BAR.0,
        BAR.1,
        if within { "yes" } else { "no" }
    );
    let figures = json!({"engines": ENGINES, "seconds": seconds, "scrapes_per_second": scrapes, "bytes_per_scrape": bytes,
        "renewals": writes, "cpu_percent": percent, "peak_mb": peak});
    println!("{figures}");
}
