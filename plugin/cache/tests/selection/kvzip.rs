//! A prompt's second reading: what it ranks, when rows go, and that nothing else of it is left.

use std::sync::Arc;

use cinch_cache::{LayerView, Plugin};
use cinch_hooks::{CachePolicy, ForkRole, SequenceInfo};
use cinch_protocol::{Layers, Policy};

use crate::common::matrix::check;
use crate::common::*;
use crate::replay::{Given, Layer};

/// What a second reading consists of, beside the prompt it follows.
const OTHER: u64 = 77;

fn begin(plugin: &Plugin, text: u64, prompt: usize) -> [Seq; 1] {
    let cache = plugin.open(&SMALL.info(1, 1, prompt)).unwrap();
    [Seq { cache, text, seen: 0 }]
}

/// Goes through a part in chunks, right behind the prompt.
fn read(plugin: &Plugin, seq: &[Seq; 1], chunks: &[usize]) -> usize {
    assert!(seq[0].cache.begin_part().unwrap());
    let mut part = [Seq {
        text: OTHER,
        ..seq[0].clone()
    }];
    for chunk in chunks {
        step(plugin, &SMALL, &mut part, *chunk);
    }
    part[0].seen - seq[0].seen
}

fn compare(oracles: &[Layer], views: &[LayerView], what: &str) {
    for (oracle, view) in oracles.iter().zip(views) {
        for (head, view) in oracle.heads.iter().zip(&view.heads) {
            assert_eq!(
                view.positions,
                head.positions(),
                "{what}: layer {}, head {}",
                head.layer,
                head.kv
            );
            for (score, row) in view.scores.iter().flatten().zip(&head.rows) {
                let off = (f64::from(*score) - row.score).abs();
                assert!(
                    off < 1e-5,
                    "{what}: score of {} is {score}, not {}",
                    row.position,
                    row.score
                );
            }
        }
    }
}

fn policy_of(rest: &str) -> Policy {
    policy(&format!(
        r#"{{"store": "exact", "select": {{"method": "kvzip", "recent": 16, "interval": 8, {rest}}}}}"#
    ))
}

/// Scores are the largest weight of any query of any part, and the rows kept are those of the highest; then decoded tokens
/// raise them, and a second turn begins anew.
#[test]
fn rows_rank_by_a_second_reading() {
    for rest in [
        r#""budget": 0.4"#,
        r#""budget": 0.25, "sinks": 0"#,
        r#""budget": 1.0"#,
        r#""budget": 0.4, "heads": "adaptive""#,
        r#""budget": 0.4, "heads": "adaptive", "floor": 0.0, "layers": "pyramid""#,
        r#""budget": 0.4, "heads": "adaptive", "layers": "adaptive""#,
        r#""budget": 0.3, "heads": "adaptive", "layers": "adaptive", "floor": 0.0, "sinks": 0"#,
        r#""budget": 0.5, "layers": "pyramid", "merge": "d2o""#,
        r#""budget": 0.5, "merge": "cam""#,
    ] {
        let (policy, text) = (policy_of(rest), 31);
        let select = policy.select.clone().unwrap();
        let plugin = plugin(policy);
        let mut seq = begin(&plugin, text, 150);
        let mut oracles: Vec<Layer> = (0..SMALL.layers)
            .map(|layer| Layer::new(&SMALL, text, layer))
            .collect();
        for (turn, chunks) in [&[80, 2, 68][..], &[40, 30][..]].into_iter().enumerate() {
            for chunk in chunks {
                assert!(seq[0].cache.extra_pass().unwrap().is_some());
                step(&plugin, &SMALL, &mut seq, *chunk);
                let layers = check_invariants(&plugin, &seq[0]);
                for (oracle, layer) in oracles.iter_mut().zip(&layers) {
                    oracle.held = true;
                    oracle.step(&select, *chunk, &Given::of(layer, 0.0));
                }
                compare(&oracles, &layers, "held");
            }
            oracles.iter_mut().for_each(Layer::forget);
            for part in [&[50, 33][..], &[71][..]] {
                let tokens = read(&plugin, &seq, part);
                oracles
                    .iter_mut()
                    .for_each(|oracle| oracle.read_again(OTHER, tokens));
            }
            seq[0].cache.end_pass().unwrap();
            let layers = check_invariants(&plugin, &seq[0]);
            if select.layers == Layers::Adaptive {
                Layer::release_all(&mut oracles, &select);
            } else {
                for (oracle, layer) in oracles.iter_mut().zip(&layers) {
                    oracle.release(&select, &Given::of(layer, 0.0));
                }
            }
            compare(&oracles, &layers, &format!("{rest}, turn {turn}"));
            for _ in 0..30 {
                step(&plugin, &SMALL, &mut seq, 1);
                let layers = check_invariants(&plugin, &seq[0]);
                for (oracle, layer) in oracles.iter_mut().zip(&layers) {
                    oracle.step(&select, 1, &Given::of(layer, 0.0));
                }
                compare(&oracles, &layers, rest);
            }
        }
    }
}

/// The device path raises scores to the same weights.
#[test]
fn the_device_path_reads_alike() {
    let of = |force_device_path: bool| {
        let settings = cinch_cache::PluginSettings {
            force_device_path,
            kernels: cinch_kernels::Kernels::forced("portable").unwrap(),
            ..settings()
        };
        let plugin = plugin_with(policy_of(r#""budget": 0.4"#), settings);
        let mut seq = begin(&plugin, 5, 140);
        seq[0].cache.extra_pass().unwrap();
        step(&plugin, &SMALL, &mut seq, 140);
        read(&plugin, &seq, &[150, 20]);
        seq[0].cache.end_pass().unwrap();
        for _ in 0..20 {
            step(&plugin, &SMALL, &mut seq, 1);
        }
        check_invariants(&plugin, &seq[0])
    };
    for (a, b) in of(false).iter().zip(of(true)) {
        for (a, b) in a.heads.iter().zip(&b.heads) {
            assert_eq!(a.positions, b.positions);
            let (a, b) = (a.scores.as_ref().unwrap(), b.scores.as_ref().unwrap());
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }
}

/// With room for all of it, a sequence that was read again goes on to the last bit like one that was not.
#[test]
fn nothing_else_of_a_reading_is_left() {
    for quantize in ["", r#", "quantize": {"k_bits": 8, "v_bits": 4, "residual": 16}"#] {
        let json = format!(r#"{{"select": {{"method": "kvzip", "budget": 1.0}}{quantize}}}"#);
        let plugin = plugin(policy(&json));
        let mut twice = begin(&plugin, 3, 150);
        let mut once = [open(&plugin, &SMALL, 2, 3)];
        for chunk in [100, 50] {
            assert!(twice[0].cache.extra_pass().unwrap().is_some());
            let outs = step(&plugin, &SMALL, &mut twice, chunk);
            assert_eq!(outs, step(&plugin, &SMALL, &mut once, chunk));
        }
        assert!(!plugin.request(1).unwrap().applied, "rows wait to go");
        let before = plugin.request(1).unwrap();
        read(&plugin, &twice, &[150, 50]);
        let during = plugin.request(1).unwrap();
        assert_eq!(
            (during.seen, during.kept, during.kept_max),
            (before.seen, before.kept, before.kept_max)
        );
        assert_eq!(during.uncompressed_bytes, before.uncompressed_bytes);
        assert!(during.bytes > before.bytes, "what is allocated is said");

        // A fork has nothing of it.
        let fork = twice[0].cache.fork(ForkRole::Prefix).unwrap();
        let fork = Seq {
            cache: fork,
            ..twice[0].clone()
        };
        assert_eq!(fork.cache.seen(1), 150);
        check_invariants(&plugin, &fork);
        drop(fork);

        read(&plugin, &twice, &[10]);
        twice[0].cache.end_pass().unwrap();
        assert!(plugin.request(1).unwrap().applied);
        let views = [&twice, &once].map(|seq| check_invariants(&plugin, &seq[0]));
        for (a, b) in views[0].iter().zip(&views[1]) {
            for (a, b) in a.heads.iter().zip(&b.heads) {
                assert_eq!((&a.positions, &a.blocks), (&b.positions, &b.blocks));
            }
        }
        for _ in 0..100 {
            let outs = step(&plugin, &SMALL, &mut twice, 1);
            assert_eq!(outs, step(&plugin, &SMALL, &mut once, 1));
        }
        drop((twice, once));
        assert_eq!(plugin.totals().live_bytes, 0);
    }
}

/// The error that a compression makes is measured with the prompt's own last queries.
#[test]
fn what_goes_is_measured() {
    let plugin = plugin(policy_of(r#""budget": 0.3"#));
    let mut seq = begin(&plugin, 8, 200);
    seq[0].cache.extra_pass().unwrap();
    step(&plugin, &SMALL, &mut seq, 200);
    assert_eq!(plugin.request(1).unwrap().attention_error, None);
    read(&plugin, &seq, &[64]);
    seq[0].cache.end_pass().unwrap();
    let request = plugin.request(1).unwrap();
    assert!(
        request
            .attention_error
            .is_some_and(|error| error > 0.0 && error < 2.0),
        "{request:?}"
    );
    assert_eq!(request.kept_max, 60);
    let totals = plugin.totals();
    let class = &totals.classes["default"];
    assert!((class.evicted_tokens - 140.0).abs() < 1e-6, "{class:?}");
}

/// Whatever else a policy does: budgets, codecs, and the bytes that admission counts with.
#[test]
fn it_goes_with_everything_and_stays_in_its_bound() {
    for rest in [
        "",
        r#", "quantize": {"k_bits": 4, "v_bits": 4, "residual": 16}"#,
        r#", "quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true, "residual": 16}"#,
        r#", "quantize": {"method": "kivi", "k_bits": 2, "v_bits": 2, "residual": 16}"#,
        r#", "quantize": {"method": "kvquant", "k_bits": 2, "v_bits": 2, "residual": 16}"#,
        r#", "quantize": {"method": "gear", "k_bits": 4, "v_bits": 4, "residual": 16}"#,
        r#", "quantize": {"method": "zipcache", "k_bits": 4, "v_bits": 4, "residual": 16}"#,
        r#", "project": {"method": "lowrank", "k_rank": 24, "v_rank": 40}"#,
        r#", "project": {"method": "think", "k_rank": 24}"#,
        r#", "project": {"method": "minicache", "first_layer": 0}"#,
        r#", "project": {"method": "merge_heads", "similarity": 0.0}"#,
    ] {
        for (heads, layers) in [("even", "even"), ("adaptive", "even"), ("adaptive", "adaptive")] {
            println!("{heads} {layers}{rest}");
            let policy = policy(&format!(
                r#"{{"select": {{"method": "kvzip", "budget": 0.5, "recent": 16, "interval": 8, "heads": "{heads}",
                    "layers": "{layers}"}}{rest}}}"#
            ));
            let plugin = plugin(policy.clone());
            let mut seq = begin(&plugin, 4, 700);
            let bounded = |plugin: &Arc<Plugin>, seq: &Seq| {
                let most = plugin.most_bytes(&policy, 700).unwrap();
                let passing = plugin.prefill_bytes(&policy, 700).unwrap();
                let held = seq.cache.bytes();
                assert!(held <= most + passing, "{held} held of {most} and {passing}");
            };
            for chunk in [400, 300] {
                seq[0].cache.extra_pass().unwrap();
                step(&plugin, &SMALL, &mut seq, chunk);
                bounded(&plugin, &seq[0]);
            }
            for part in [&[1024, 1024][..], &[512]] {
                read(&plugin, &seq, part);
                bounded(&plugin, &seq[0]);
            }
            seq[0].cache.end_pass().unwrap();
            assert!(seq[0].cache.bytes() <= plugin.most_bytes(&policy, 700).unwrap());
            check(&plugin, &policy, &seq[0], 700);
            for i in 1..=20 {
                step(&plugin, &SMALL, &mut seq, 1);
                check(&plugin, &policy, &seq[0], 700 + i / 8 * 8);
            }
        }
    }
}

/// Each sequence of a batch has its own reading.
#[test]
fn others_of_a_batch_are_not_concerned() {
    let plugin = plugin(policy_of(r#""budget": 0.4"#));
    let mut pair = [open(&plugin, &SMALL, 1, 5), open(&plugin, &SMALL, 2, 6)];
    for seq in &pair {
        seq.cache.extra_pass().unwrap();
    }
    step(&plugin, &SMALL, &mut pair, 120);
    let [first, second] = pair;
    let before = check_invariants(&plugin, &second);
    read(&plugin, std::array::from_ref(&first), &[100]);
    first.cache.end_pass().unwrap();
    assert_eq!(check_invariants(&plugin, &second), before);
    read(&plugin, std::array::from_ref(&second), &[100]);
    second.cache.end_pass().unwrap();
    let mut pair = [first, second];
    step(&plugin, &SMALL, &mut pair, 1);
    for (request, seq) in [1, 2].into_iter().zip(&pair) {
        check_invariants(&plugin, seq);
        assert_eq!(plugin.request(request).unwrap().kept_max, 48 + 1);
    }
}

/// A policy that changes on the way: before the pass it is not wanted any more, within it the next token finds the new one;
/// and one that comes behind it says what it ranks by.
#[test]
fn retunes_around_a_reading() {
    let streaming =
        policy(r#"{"store": "exact", "select": {"method": "streaming", "budget": 0.3, "recent": 16}}"#);
    for within in [false, true] {
        let plugin = plugin(policy_of(r#""budget": 0.4"#));
        let mut seq = begin(&plugin, 5, 120);
        assert!(seq[0].cache.extra_pass().unwrap().is_some());
        step(&plugin, &SMALL, &mut seq, 120);
        if within {
            read(&plugin, &seq, &[20]);
        }
        plugin.retune(1, None, streaming.clone()).unwrap();
        assert_eq!(seq[0].cache.extra_pass().unwrap(), None);
        assert!(!seq[0].cache.begin_part().unwrap());
        seq[0].cache.end_pass().unwrap();
        assert_eq!(
            check_invariants(&plugin, &seq[0])[0].heads[0].positions.len(),
            120
        );
        step(&plugin, &SMALL, &mut seq, 1);
        let kept = check_invariants(&plugin, &seq[0])[0].heads[0].positions.clone();
        let expected: Vec<u32> = (0..4).chain(121 - 33..121).collect();
        assert_eq!(kept, expected, "37 of 121");
        assert!(plugin.request(1).unwrap().applied);
    }
    let full = || {
        let plugin = plugin(policy(
            r#"{"store": "exact", "select": {"method": "h2o", "budget": 1.0}}"#,
        ));
        let mut seq = begin(&plugin, 5, 120);
        step(&plugin, &SMALL, &mut seq, 60);
        (plugin, seq)
    };
    let said = |plugin: &Plugin| {
        plugin
            .retune(1, None, policy_of(r#""budget": 0.4"#))
            .unwrap()
            .notes
            .join(" ")
    };
    let (plugin, seq) = full();
    let notes = said(&plugin);
    assert!(
        notes.contains("read once more if its last part has not begun"),
        "{notes}"
    );
    assert!(seq[0].cache.extra_pass().unwrap().is_some());
    let (plugin, mut seq) = full();
    step(&plugin, &SMALL, &mut seq, 60);
    step(&plugin, &SMALL, &mut seq, 1);
    let notes = said(&plugin);
    assert!(notes.contains("not read once more"), "{notes}");
    step(&plugin, &SMALL, &mut seq, 1);
    let layers = check_invariants(&plugin, &seq[0]);
    for head in layers.iter().flat_map(|layer| &layer.heads) {
        assert_eq!(head.positions.len(), 49, "40 % of 122");
        let scores = head.scores.as_ref().unwrap();
        let largest = scores.iter().copied().fold(0.0, f32::max);
        assert!((largest - 1.0).abs() < 1e-6, "{largest}");
    }
    let notes = plugin
        .retune(
            1,
            None,
            policy(r#"{"select": {"method": "keyformer", "budget": 0.4}}"#),
        )
        .unwrap()
        .notes
        .join(" ");
    assert!(
        notes.contains("the largest weights that its rows received"),
        "{notes}"
    );
}

#[test]
fn there_must_be_room_behind_the_prompt() {
    let plugin = plugin(policy_of(r#""budget": 0.4"#));
    let info = |prompt_tokens| SequenceInfo {
        context: 1000,
        ..SMALL.info(1, 1, prompt_tokens)
    };
    drop(plugin.open(&info(872)).unwrap());
    let error = plugin.open(&info(873)).err().unwrap().to_string();
    assert_eq!(
        error,
        "policy of request 1: select.method: given kvzip for a prompt of 873 tokens, allowed for prompts of at most 872 \
         tokens: it reads them again behind themselves, and the model has 1000 positions"
    );
    // Nor by a retune while there would be a second reading.
    let full = plugin_of_full();
    let cache = full
        .open(&SequenceInfo {
            context: 1000,
            ..SMALL.info(1, 1, 900)
        })
        .unwrap();
    let mut seq = [Seq {
        cache,
        text: 1,
        seen: 0,
    }];
    step(&full, &SMALL, &mut seq, 500);
    let error = full
        .retune(1, None, policy_of(r#""budget": 0.4"#))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("given kvzip for a prompt of 900 tokens"),
        "{error}"
    );
    // A single token is decoded, not read again.
    let mut seq = begin(&plugin, 1, 40);
    seq[0].cache.extra_pass().unwrap();
    step(&plugin, &SMALL, &mut seq, 40);
    assert!(seq[0].cache.begin_part().unwrap());
    let [q, k, v] = [(What::Q, 6, 32), (What::K, 2, 32), (What::V, 2, 64)]
        .map(|(what, heads, dim)| tensor(&seq, 0, what, heads, 1, dim));
    let error = plugin
        .attend(
            0,
            &[seq[0].cache.clone()],
            cinch_hooks::Qkv { q: &q, k: &k, v: &v },
            &SMALL.params(),
            &dense(SMALL.params()),
        )
        .unwrap_err();
    assert!(error.to_string().contains("at least 2 tokens"), "{error}");
    seq[0].cache.end_pass().unwrap();
    check_invariants(&plugin, &seq[0]);
}

fn plugin_of_full() -> Arc<Plugin> {
    plugin(policy("{}"))
}
