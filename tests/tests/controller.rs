//! The loop closed on real parts: an engine with little KV memory, more load than fits, and a controller.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cinch_protocol::Served;
use cinch_tests::load::{self, End, Outcome, Patience};
use common::{Controller, Server, text};
use serde_json::Value;

/// f16 bytes of a token: 30 layers, 3 KV heads, K and V of 64.
const TOKEN_BYTES: u64 = 30 * 3 * (64 + 64) * 2;
/// About the tokens of a request's prompt, and the most of its answer.
const PROMPT_TOKENS: usize = 640;
const NEW_TOKENS: usize = 48;
/// Requests of the load; a quarter of them fits at level 0.
const REQUESTS: usize = 8;

fn engine(overrides: &[&str]) -> Server {
    // A tenth more than two whole requests: blocks are whole, and a prompt may be some tokens longer.
    let request = (PROMPT_TOKENS + NEW_TOKENS) as u64 * TOKEN_BYTES;
    let capacity = format!("kv.capacity_bytes={}", 2 * request * 11 / 10);
    let mut all = vec![&*capacity, "engine.prefix_cache=false", "watermark.enabled=false"];
    all.extend_from_slice(overrides);
    Server::start(&all)
}

/// Sends the load at once; answers with how each request ended, and the most KV bytes seen.
fn load(server: &Server) -> (Vec<Outcome>, u64) {
    let most = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let bodies: Vec<Value> = load::prompts(&text(), REQUESTS, PROMPT_TOKENS)
        .iter()
        .map(|prompt| load::completion(prompt, NEW_TOKENS))
        .collect();
    let url = format!("{}/v1/completions", server.openai);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let used = server.get("/v1/capacity")["used_bytes"].as_u64().unwrap();
                most.fetch_max(used, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(100));
            }
        });
        let outcomes = load::run(
            &url,
            &bodies,
            Patience::default(),
            &AtomicBool::new(false),
            &|_, _| {},
        );
        done.store(true, Ordering::Relaxed);
        (outcomes, most.load(Ordering::Relaxed))
    })
}

/// What a request was served with; one that was not finished fails.
fn served(outcome: &Outcome) -> &[Served] {
    let End::Finished(served) = &outcome.end else {
        panic!("not finished: {:?}", outcome.end);
    };
    assert!(outcome.first_token.is_some(), "no token");
    &served.cache.as_ref().unwrap().served
}

/// Waits for `check` to hold.
fn wait_for(what: &str, most: Duration, mut check: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !check() {
        assert!(start.elapsed() < most, "{what}: not within {most:?}");
        thread::sleep(Duration::from_millis(100));
    }
    start.elapsed()
}

fn level(server: &Server) -> u64 {
    server.get("/v1/policies/default")["level"].as_u64().unwrap()
}

fn moves(controller: &Controller) -> Vec<(u64, u64)> {
    let decisions = controller.get("/v1/decisions?limit=1000");
    let all = decisions["decisions"].as_array().unwrap();
    all.iter()
        .flat_map(|entry| entry["decision"]["moves"].as_array().unwrap().clone())
        .map(|entry| (entry["from"].as_u64().unwrap(), entry["to"].as_u64().unwrap()))
        .collect()
}

/// Quick ticks: the load of a test is over in a minute.
const QUICK: &[&str] = &["tick_seconds=1"];

#[test]
fn four_times_the_capacity_completes_and_never_passes_it() {
    let server = engine(&[]);
    let capacity = server.get("/v1/capacity")["capacity_bytes"].as_u64().unwrap();
    let controller = Controller::start(&server, "live", QUICK);
    let (answers, most) = load(&server);
    assert!(most > 0 && most <= capacity, "{most} of {capacity} bytes");
    let live = moves(&controller);
    assert_eq!(live.first().map(|first| first.0), Some(0), "{live:?}");
    assert!(
        live.last().unwrap().1 >= 2,
        "tightened as far as the demand asks: {live:?}"
    );
    assert!(level(&server) > 0);
    // What was served says so itself; and all of it was.
    let tightened = answers
        .iter()
        .filter(|answer| served(answer).iter().any(|s| s.level > Some(0)))
        .count();
    assert!(tightened > 0);
    drop(controller);

    // The same load, watched only: the same first decisions, and not one write.
    let server = engine(&[]);
    let controller = Controller::start(&server, "recommend", QUICK);
    let (answers, most) = load(&server);
    // Nothing was tightened.
    assert!(
        answers
            .iter()
            .all(|answer| served(answer).iter().all(|s| s.level == Some(0)))
    );
    assert!(most <= capacity, "{most} of {capacity} bytes");
    let recommended = moves(&controller);
    assert_eq!(
        recommended.first(),
        live.first(),
        "{recommended:?} against {live:?}"
    );
    // From its first move on the two loads differ: one engine was tightened, the other was not. (That the same inputs
    // give the same decisions in both modes is held to on the paused clock.)
    assert!(
        recommended.iter().all(|(from, to)| to > from),
        "never less than the demand asks: {recommended:?}"
    );
    assert_eq!(controller.sum("cinch_controller_writes_total"), 0.0);
    assert_eq!(server.get("/v1/policies/default")["origin"], "config");
    assert_eq!(server.get("/v1/policies")["epoch"], 0);
}

#[test]
fn a_killed_controller_leaves_a_lease_that_ends_and_a_new_one_goes_on_from_there() {
    let server = engine(&[]);
    let short = ["tick_seconds=1", "lease.ttl_seconds=8", "lease.renew_seconds=2"];
    let controller = Controller::start(&server, "live", &short);
    thread::scope(|scope| {
        let load = scope.spawn(|| load(&server));
        wait_for("a level above 0", Duration::from_secs(60), || level(&server) > 0);
        let before = level(&server);
        controller.kill();
        // Restarted within the lease: it takes up what it finds.
        let controller = Controller::start(&server, "live", &short);
        assert!(
            level(&server) >= before,
            "jumped from {before} to {}",
            level(&server)
        );
        let (answers, _) = load.join().unwrap();
        for answer in &answers {
            served(answer);
        }
        assert_eq!(
            moves(&controller).iter().filter(|(from, to)| to < from).count(),
            0
        );
        assert!(level(&server) > 0);
        assert_eq!(server.get("/v1/policies/default")["origin"], "lease");
        controller.kill();
    });
    let took = wait_for("the configured policy", Duration::from_secs(12), || {
        level(&server) == 0
    });
    println!("fell back {took:?} after the kill");
    assert_eq!(server.get("/v1/policies/default")["origin"], "config");
}

#[test]
fn an_engine_that_restarts_is_noticed_and_nothing_moves_on_missing_data() {
    let server = engine(&[]);
    let controller = Controller::start(&server, "live", QUICK);
    wait_for("a fresh reading", Duration::from_secs(20), || {
        controller.get("/v1/status")["engines"][0]["usage"].is_number()
    });
    let (port, api_port) = server.ports();
    drop(server);
    wait_for("lost inputs", Duration::from_secs(40), || {
        controller.condition("MemoryMissing") || controller.condition("AllLost")
    });
    assert_eq!(moves(&controller), []);
    let server = Server::start_at(port, api_port, &["engine.prefix_cache=false"]);
    wait_for("a fresh reading again", Duration::from_secs(60), || {
        !controller.condition("MemoryMissing") && !controller.condition("AllLost")
    });
    assert_eq!(moves(&controller), []);
    assert_eq!(level(&server), 0);
}
