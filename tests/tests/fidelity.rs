//! The hooked engine against the unhooked one: off is the same bits, `exact` the same greedy text, level 0
//! within 1e-4 nats.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::path::Path;

use cinch_protocol::probe::{Plan, Report, Run};
use cinch_tests::{Recorded, Recording, cpu_key, fidelity_runs, mismatch, second_turn, six_requests};
use common::{Server, probe, root, text};

const OFF: &[&str] = &["kv.plugin=off"];
const EXACT: &[&str] = &[r#"class.default={ policy = { store = "exact" } }"#];
const FULL: &[&str] = &[r#"class.default={ policy = { store = "full" } }"#];

fn read(path: &Path) -> Recording {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// This CPU's recording, or another's: tokens can be held against any, bits only against one's own.
fn recording() -> Recording {
    let dir = root().join("tests/recordings");
    let own = dir.join(format!("{}.json", cpu_key()));
    if own.is_file() {
        return read(&own);
    }
    let mut others: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    others.sort();
    read(others.first().expect("tests/recordings holds a recording"))
}

fn recorded<'a>(recording: &'a Recording, name: &str) -> &'a Recorded {
    recording
        .runs
        .iter()
        .find(|run| run.name == name)
        .expect("recorded")
}

fn alone(runs: &[Run]) -> Plan {
    Plan {
        groups: runs.iter().map(|run| vec![run.clone()]).collect(),
        ..Plan::default()
    }
}

/// Fails on the first mismatch that is no tie; prints the ties.
fn same_text(recording: &Recording, report: &Report) {
    for run in &report.runs {
        let recorded = recorded(recording, &run.name);
        assert_eq!(recorded.prompt_tokens, run.prompt_tokens, "{}", run.name);
        if recorded.tokens.is_empty() {
            assert_eq!(Some(&recorded.text), run.texts.first(), "{}", run.name);
            continue;
        }
        if let Some((step, gap)) = mismatch(recorded, &run.tokens).unwrap() {
            println!("{}: tie at step {step}, top two logits {gap:e} apart", run.name);
        }
    }
}

#[test]
fn off_is_the_unhooked_engine_bit_for_bit() {
    let recording = recording();
    let runs = fidelity_runs(&text());
    // The exact store's test below runs all twenty through the same seam.
    let some: Vec<Run> = runs.into_iter().take(16).step_by(3).collect();
    let report = probe(OFF, &alone(&some));
    same_text(&recording, &report);
    same_bits(&recording, &report);
}

/// Every step's logits, where the recording is of this CPU.
fn same_bits(recording: &Recording, report: &Report) {
    if recording.cpu != cpu_key() {
        println!(
            "no recording of this CPU ({}): tokens compared, bits not; see `cargo xtask record-plain`",
            cpu_key()
        );
        return;
    }
    for run in &report.runs {
        assert_eq!(recorded(recording, &run.name).hashes, run.hashes, "{}", run.name);
    }
}

#[test]
fn exact_gives_the_same_greedy_text_alone_and_in_a_second_turn() {
    let recording = recording();
    let report = probe(EXACT, &alone(&fidelity_runs(&text())));
    assert_eq!(report.runs.len(), 20);
    assert!(report.runs.iter().all(|run| run.tokens.len() == 64));
    same_text(&recording, &report);
    same_bits(&recording, &report);

    // Each first turn leaves its prefix; the second turn starts from it.
    let runs = fidelity_runs(&text());
    for i in [6, 12] {
        let first = &report.runs[i];
        let plan = Plan {
            prefix_cache: true,
            ..alone(&[runs[i].clone(), second_turn(first, &report.runs[0].prompt)])
        };
        let turns = probe(EXACT, &plan);
        same_text(&recording, &turns);
        let (first, second) = (&turns.runs[0], &turns.runs[1]);
        // The longer of the two has the time to tell: a quarter of its prompt is new.
        assert!(
            i == 6 || second.first_token_seconds < first.first_token_seconds * 0.8,
            "the second turn was computed anew: {} s after {} s",
            second.first_token_seconds,
            first.first_token_seconds
        );
    }
}

#[test]
fn exact_gives_the_same_greedy_text_six_at_once_and_twice_per_request() {
    let recording = recording();
    let mut runs = fidelity_runs(&text());
    let six = [0, 3, 6, 9, 12, 15].map(|i: usize| runs[i].clone()).to_vec();
    let mut twice = runs.swap_remove(4);
    twice.n = 2;
    let report = probe(
        EXACT,
        &Plan {
            groups: vec![six, vec![twice]],
            ..Plan::default()
        },
    );
    same_text(&recording, &report);
    let texts = &report.runs[6].texts;
    assert_eq!(texts.len(), 2);
    assert_eq!(texts[0], texts[1], "two greedy choices of one request");
}

#[test]
fn exact_streams_the_same_text() {
    let server = Server::start(EXACT);
    let run = fidelity_runs(&text()).swap_remove(5);
    let mut body =
        serde_json::json!({"model": "default", "prompt": run.text, "max_tokens": 32, "temperature": 0.0});
    let (status, whole) = server.complete(&[], &body);
    assert_eq!(status, 200, "{whole}");
    body["stream"] = true.into();
    let mut streamed = String::new();
    server.stream(&body, |_, event| {
        streamed += event["choices"][0]["text"].as_str().unwrap_or("")
    });
    assert_eq!(whole["choices"][0]["text"], streamed.as_str());
    assert!(!streamed.is_empty());
}

/// Our kernels over rows in the engine's own dtype: a budget of everything evicts nothing, and only the
/// order in which attention adds differs from `exact`.
const REORDERED: &[&str] =
    &[r#"class.default={ policy = { store = "exact", select = { method = "streaming", budget = 1.0 } } }"#];

#[test]
fn level_0_adds_nothing_to_the_order_of_adding() {
    let dir = tempfile::tempdir().unwrap();
    let forced = |overrides: &[&str], plan: &Plan, name: &str| {
        let path = dir.path().join(name);
        let report = probe(
            overrides,
            &Plan {
                logits: Some(path.clone()),
                ..plan.clone()
            },
        );
        (report, common::logits(&path))
    };
    let runs = six_requests(&text());
    let (exact, p) = forced(EXACT, &alone(&runs), "exact");
    // All sides see the same tokens at every step, so that the steps can be compared.
    let again: Vec<Run> = runs
        .iter()
        .zip(&exact.runs)
        .map(|(run, seen)| Run {
            force: seen.tokens.clone(),
            ..run.clone()
        })
        .collect();
    let (_, reordered) = forced(REORDERED, &alone(&again), "reordered");
    let (full, q) = forced(FULL, &alone(&again), "full");
    let steps: usize = full.runs.iter().map(|run| run.tokens.len()).sum();
    assert_eq!((p.len(), reordered.len(), steps), (q.len(), q.len(), 6 * 64));
    let vocabulary = p.len() / steps;
    let mean = |p: &[f32], q: &[f32]| {
        let all = p
            .chunks_exact(vocabulary)
            .zip(q.chunks_exact(vocabulary))
            .map(|(p, q)| kl(p, q));
        all.sum::<f64>() / steps as f64
    };
    let (storing, order, both) = (mean(&reordered, &q), mean(&p, &reordered), mean(&p, &q));
    println!(
        "mean KL over {steps} steps: storing in f16 {storing:.3e}, order of adding {order:.3e}, both {both:.3e}"
    );
    assert!(storing <= 1e-4, "storing in f16 costs {storing}");
    // What any other order of adding costs once the model rounds its activations after it: a mistake in the
    // kernels would stand out of it.
    assert!(
        both > 0.0 && both <= 5e-3,
        "mean KL against the engine's own attention: {both}"
    );
}

/// KL(p‖q) in nats of two logit vectors.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = x.iter().map(|v| f64::from(v - max).exp()).sum();
        let shift = f64::from(max) + sum.ln();
        x.iter().map(|v| f64::from(*v) - shift).collect::<Vec<f64>>()
    };
    log_softmax(p)
        .iter()
        .zip(log_softmax(q))
        .map(|(lp, lq)| lp.exp() * (lp - lq))
        .sum()
}
