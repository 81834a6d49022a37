//! A prompt that is read twice answers as one that is read once, where nothing goes; and nothing of the second reading is left.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use cinch_protocol::probe::{Plan, Report, Run};
use cinch_tests::{fidelity_runs, second_turn, six_requests};
use common::{Server, probe, text};
use serde_json::json;

/// Rows lie in blocks as those of all policies that evict: in others, sums would be added in another order.
const ONCE: &[&str] = &[r#"class.default={ policy = { select = { method = "streaming", budget = 1.0 } } }"#];
const TWICE: &[&str] = &[r#"class.default={ policy = { select = { method = "kvzip", budget = 1.0 } } }"#];
const HALF: &[&str] = &[
    r#"class.default={ policy = { select = { method = "kvzip", budget = 0.5, heads = "adaptive" }, quantize = { k_bits = 8, v_bits = 8 } } }"#,
];

const HALF_UNCODED: &[&str] =
    &[r#"class.default={ policy = { select = { method = "kvzip", budget = 0.5, heads = "adaptive" } } }"#];

fn same_bits(once: &Report, twice: &Report) {
    assert_eq!(once.runs.len(), twice.runs.len());
    for (once, twice) in once.runs.iter().zip(&twice.runs) {
        assert_eq!(once.tokens, twice.tokens, "{}", once.name);
        assert_eq!(once.hashes, twice.hashes, "{}: bits of logits", once.name);
        println!(
            "{}: {} tokens, the first new one after {:.2} s, read twice {:.2} s",
            once.name, once.prompt_tokens, once.first_token_seconds, twice.first_token_seconds
        );
    }
}

/// Prompts of one part and of several, of one chunk and of several, and a second turn on a prefix that was read twice.
#[test]
fn with_room_for_everything_the_bits_are_those_of_one_reading() {
    let runs = fidelity_runs(&text());
    let mut some: Vec<Run> = [0, 9].map(|i: usize| runs[i].clone()).to_vec();
    let mut long = runs[0].clone();
    long.name = "long".into();
    long.text = text().chars().skip(60_000).take(11_000).collect();
    long.max_tokens = 16;
    some.push(long);
    let plan = |runs: &[Run]| Plan {
        groups: runs.iter().map(|run| vec![run.clone()]).collect(),
        prefix_cache: true,
        ..Plan::default()
    };
    let first = probe(ONCE, &plan(&some[..2]));
    some.push(second_turn(&first.runs[1], &first.runs[0].prompt));
    let (once, twice) = (probe(ONCE, &plan(&some)), probe(TWICE, &plan(&some)));
    same_bits(&once, &twice);
    assert!(
        twice.runs[2].prompt_tokens > 2300,
        "more than one part: {}",
        twice.runs[2].prompt_tokens
    );
}

/// Several at once, each with its own second reading, and two choices of one request. Beside one that decodes, a prompt is read in
/// chunks as large as the clock allows: only what is kept as it was computed answers the same in any chunks. Of codes, later
/// chunks attend to what the codes say.
#[test]
fn many_at_once() {
    let six = six_requests(&text());
    let mut choices = six[0].clone();
    choices.n = 2;
    let plan = Plan {
        groups: vec![vec![six[0].clone()], six.clone(), vec![choices]],
        ..Plan::default()
    };
    for (policy, coded) in [(HALF, true), (HALF_UNCODED, false)] {
        let report = probe(policy, &plan);
        let (alone, rest) = report.runs.split_first().unwrap();
        for (run, asked) in rest.iter().zip(&six) {
            assert_eq!(run.tokens.len(), asked.max_tokens, "{}", run.name);
        }
        // The first token is of logits that nothing was evicted for, and of one chunk.
        assert_eq!(alone.tokens[0], rest[0].tokens[0]);
        let [first, second] = &report.runs[7].texts[..] else {
            panic!("two choices: {:?}", report.runs[7].texts)
        };
        assert!(!first.is_empty());
        assert_eq!(
            Some(first),
            alone.texts.first(),
            "the first choice has nobody beside it while it is read"
        );
        if coded {
            assert_eq!(first.chars().next(), second.chars().next());
        } else {
            assert_eq!(first, second, "two greedy choices of one request");
        }
    }
}

#[test]
fn what_is_served_is_said_and_nothing_is_left() {
    let server = Server::start(&[HALF[0], "engine.prefix_cache=false"]);
    let prompt: String = text().chars().skip(90_000).take(5_000).collect();
    let body =
        |prompt: &str| json!({"model": "default", "prompt": prompt, "max_tokens": 8, "temperature": 0.0});
    let (status, answer) = server.complete(&[], &body(&prompt));
    assert_eq!(status, 200, "{answer}");
    let (served, tokens) = (
        &answer["cinch"],
        answer["usage"]["prompt_tokens"].as_f64().unwrap(),
    );
    println!("{served}");
    assert_eq!(served["served"][0]["policy"]["select"]["method"], "kvzip");
    let seen = served["seen"].as_f64().unwrap();
    assert!(seen >= tokens && seen <= tokens + 8.0, "{served}");
    assert!(served["kept"].as_f64().unwrap() <= 0.5 * seen + 9.0, "{served}");
    assert!(served["attention_error"].as_f64().unwrap() > 0.0);
    // Behind a prompt that takes nearly the whole context, of 8,192 positions, there is no room to read it again.
    let (status, answer) = server.complete(&[], &body(&" the".repeat(8_100)));
    println!("{status}: {answer}");
    assert!((400..500).contains(&status), "{answer}");
    let said = answer.to_string();
    assert!(
        said.contains("select.method") && said.contains("8064"),
        "{answer}"
    );
    assert_eq!(server.metric("cinch_kv_reserved_bytes"), Some(0.0));
    assert_eq!(server.metric(r#"cinch_kv_bytes{class="default"}"#), Some(0.0));
}
