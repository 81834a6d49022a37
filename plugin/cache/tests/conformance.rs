//! Every policy in every situation: one matrix.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use std::sync::Arc;

use candle_core::DType;
use cinch_cache::{LayerView, Plugin, PluginSettings, RequestState};
use cinch_hooks::{AttendParams, CachePolicy, ForkRole, Qkv};
use cinch_kernels::Codec;
use cinch_protocol::{Bits, Policy};
use common::*;

/// Every policy of the matrix. A new method is one more line here.
fn policies() -> Vec<(&'static str, Policy)> {
    [
        ("exact", r#"{"store": "exact"}"#),
        ("full", r#"{}"#),
        ("int8", r#"{"quantize": {"k_bits": 8, "v_bits": 8}}"#),
        ("int4", r#"{"quantize": {"k_bits": 4, "v_bits": 4}}"#),
        (
            "k4v8",
            r#"{"quantize": {"k_bits": 4, "v_bits": 8, "residual": 16}}"#,
        ),
        (
            "k8v4",
            r#"{"quantize": {"k_bits": 8, "v_bits": 4, "residual": 48}}"#,
        ),
        ("k16v4", r#"{"quantize": {"k_bits": 16, "v_bits": 4}}"#),
        (
            "streaming",
            r#"{"select": {"method": "streaming", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "h2o",
            r#"{"select": {"method": "h2o", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "h2o×int4",
            r#"{"select": {"method": "h2o", "budget": 0.5, "sinks": 2, "recent": 24, "interval": 16},
                "quantize": {"k_bits": 4, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "streaming×int8",
            r#"{"select": {"method": "streaming", "budget": 0.3, "sinks": 0, "recent": 16, "interval": 8},
                "quantize": {"k_bits": 8, "v_bits": 8}}"#,
        ),
    ]
    .map(|(name, json)| (name, policy(json)))
    .to_vec()
}

fn each(f: impl Fn(&str, &Policy)) {
    for (name, policy) in policies() {
        println!("{name}");
        f(name, &policy);
    }
}

fn total(policy: &Policy, seen: usize) -> usize {
    policy.select.as_ref().map_or(seen, |select| {
        let share = (select.budget * seen as f64 - 1e-9).ceil() as usize;
        share.max((select.sinks + select.recent) as usize).min(seen)
    })
}

/// What must hold of a sequence that lived under one policy; `at` is `seen` at its last eviction.
fn check(plugin: &Plugin, policy: &Policy, seq: &Seq, at: usize) -> Vec<LayerView> {
    let layers = check_invariants(plugin, seq);
    let kept = total(policy, at) + seq.seen - at;
    for head in layers.iter().flat_map(|layer| &layer.heads) {
        assert_eq!(head.positions.len(), kept, "the budget is met exactly");
        if let Some(select) = &policy.select {
            let sinks = (select.sinks as usize).min(seq.seen);
            assert!(
                (0..sinks).all(|p| head.positions.contains(&(p as u32))),
                "sinks stay"
            );
            let recent = (select.recent as usize).min(seq.seen);
            assert!(
                (seq.seen - recent..seq.seen).all(|p| head.positions.contains(&(p as u32))),
                "recent stay"
            );
        }
        check_codecs(policy, &head.blocks, kept);
    }
    layers
}

fn check_codecs(policy: &Policy, blocks: &[cinch_cache::BlockView], kept: usize) {
    let rows: Vec<(Codec, Codec)> = blocks
        .iter()
        .flat_map(|block| std::iter::repeat_n((block.k, block.v), block.rows))
        .collect();
    let store = if policy.store == cinch_protocol::Store::Exact {
        Codec::F32
    } else {
        Codec::F16
    };
    let Some(quantize) = &policy.quantize else {
        assert!(rows.iter().all(|row| *row == (store, store)));
        return;
    };
    let codec = |bits| match bits {
        Bits::B4 => Codec::Int4,
        Bits::B8 => Codec::Int8,
        Bits::B16 => store,
    };
    let packed = (codec(quantize.k_bits), codec(quantize.v_bits));
    let sinks = policy
        .select
        .as_ref()
        .map_or(4, |select| select.sinks as usize)
        .min(kept);
    let residual = quantize.residual as usize;
    let batch = (residual / 4).max(16);
    assert!(
        rows[..sinks].iter().all(|row| *row == (store, store)),
        "sinks are in full precision"
    );
    let window = rows
        .iter()
        .rev()
        .take_while(|row| **row == (store, store))
        .count()
        .min(kept - sinks);
    assert!(
        window >= residual.min(kept - sinks) && window < residual + batch,
        "recent window of {window}"
    );
    assert!(
        rows[sinks..kept - window].iter().all(|row| *row == packed),
        "the rest is packed"
    );
}

#[test]
fn prefill_is_exact_and_leaves_the_budget() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        for prompt in [2, 5, 40, 131] {
            let mut seq = [open(&plugin, &SMALL, prompt, 7)];
            let outs = step(&plugin, &SMALL, &mut seq, prompt);
            for (layer, out) in outs.iter().enumerate() {
                let worst = against_full(&SMALL, &seq, prompt, layer, out);
                assert!(worst < 1e-5, "prefill of {prompt} is off by {worst}");
            }
            check(&plugin, policy, &seq[0], prompt);
        }
    });
}

#[test]
fn decode_meets_the_budget_at_every_interval() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let mut seq = [open(&plugin, &SMALL, 1, 3)];
        step(&plugin, &SMALL, &mut seq, 60);
        let interval = policy
            .select
            .as_ref()
            .map_or(usize::MAX, |select| select.interval as usize);
        let mut at = 60;
        for _ in 0..70 {
            let outs = step(&plugin, &SMALL, &mut seq, 1);
            if seq[0].seen - at >= interval {
                at = seq[0].seen;
            }
            check(&plugin, policy, &seq[0], at);
            let tolerance = match (policy.store, &policy.select, &policy.quantize) {
                (cinch_protocol::Store::Exact, None, None) => 1e-5,
                (_, None, None) => 1e-3,
                _ => continue,
            };
            for (layer, out) in outs.iter().enumerate() {
                let worst = against_full(&SMALL, &seq, 1, layer, out);
                assert!(worst < tolerance, "decode is off by {worst}");
            }
        }
    });
}

#[test]
fn chunked_prefill_goes_on_from_a_compressed_past() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let mut seq = [open(&plugin, &SMALL, 1, 11)];
        for chunk in [50, 2, 33, 70, 64] {
            let past = check_invariants(&plugin, &seq[0]);
            let outs = step(&plugin, &SMALL, &mut seq, chunk);
            check(&plugin, policy, &seq[0], seq[0].seen);
            if policy.quantize.is_some() {
                continue;
            }
            // Each query attends to what was kept of the past and to the fresh tokens before it.
            let tolerance = if policy.store == cinch_protocol::Store::Exact {
                1e-5
            } else {
                2e-3
            };
            for (layer, out) in outs.iter().enumerate() {
                let mut rows = out.chunks_exact(SMALL.v_dim);
                for head in 0..SMALL.q_heads() {
                    for token in seq[0].seen - chunk..seq[0].seen {
                        let mut visible = past[layer].heads[head / SMALL.group].positions.clone();
                        visible.extend((seq[0].seen - chunk) as u32..=token as u32);
                        let exact = attention(&SMALL, 11, layer, head, token, &visible);
                        let off = exact
                            .iter()
                            .zip(rows.next().unwrap())
                            .map(|(a, b)| (a - f64::from(*b)).abs());
                        assert!(off.fold(0.0, f64::max) < tolerance);
                    }
                }
            }
        }
    });
}

#[test]
fn retune_down_applies_to_what_is_stored() {
    each(|name, policy| {
        for start in [
            r#"{"store": "exact"}"#,
            "{}",
            r#"{"quantize": {"k_bits": 8, "v_bits": 8}}"#,
        ] {
            let plugin = plugin(common::policy(start));
            let mut seq = [open(&plugin, &SMALL, 9, 5)];
            step(&plugin, &SMALL, &mut seq, 120);
            step(&plugin, &SMALL, &mut seq, 1);
            let before = plugin.request(9).unwrap();
            let receipt = plugin.retune(9, Some(3), policy.clone()).unwrap();
            assert_eq!(receipt.bytes_before, before.bytes);
            assert!(!plugin.request(9).unwrap().applied);
            step(&plugin, &SMALL, &mut seq, 1);
            let after = plugin.request(9).unwrap();
            assert!(after.applied, "one step applies it to every layer");
            assert_eq!(after.level, Some(3));
            assert_eq!(after.served.len(), 2);
            assert_eq!(after.served[1].from_seen, 121);
            let layers = check_invariants(&plugin, &seq[0]);
            assert_eq!(layers[0].heads[0].positions.len(), total(policy, 122));
            if policy.select.is_some() || policy.quantize.is_some() {
                assert!(
                    after.bytes < before.bytes || start.contains("quantize"),
                    "{name}: bytes fall"
                );
            }
            if name == "h2o" {
                assert!(receipt.notes.iter().any(|note| note.starts_with("statistics")));
                assert!(after.attention_error.is_some_and(|error| error > 0.0));
            }
            if start == "{}" && policy.quantize.is_some() {
                check(&plugin, policy, &seq[0], 122);
            }
            for _ in 0..40 {
                step(&plugin, &SMALL, &mut seq, 1);
                check_invariants(&plugin, &seq[0]);
            }
        }
    });
}

#[test]
fn forks_share_blocks_and_part_ways() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let mut seq = [open(&plugin, &SMALL, 1, 21)];
        step(&plugin, &SMALL, &mut seq, 90);
        let alone = plugin.totals().live_bytes;
        assert_eq!(
            alone,
            seq[0].cache.bytes(),
            "the ledger counts what one sequence holds"
        );
        let mut fork = [seq[0].clone()];
        fork[0].cache = seq[0].cache.fork(ForkRole::Sequence).unwrap();
        assert_eq!(plugin.request(1).unwrap().sequences, 2);
        assert!(plugin.totals().live_bytes < 2 * alone, "a fork shares its blocks");
        fork[0].text = 22;
        let view = plugin.inspect(&*seq[0].cache).unwrap();
        for _ in 0..30 {
            step(&plugin, &SMALL, &mut fork, 1);
            check_invariants(&plugin, &fork[0]);
        }
        assert_eq!(
            plugin.inspect(&*seq[0].cache).unwrap(),
            view,
            "the original never changes"
        );
        // The original decodes as if there had been no fork.
        let twin_plugin = common::plugin(policy.clone());
        let mut twin = [open(&twin_plugin, &SMALL, 1, 21)];
        step(&twin_plugin, &SMALL, &mut twin, 90);
        for _ in 0..20 {
            assert_eq!(
                step(&plugin, &SMALL, &mut seq, 1),
                step(&twin_plugin, &SMALL, &mut twin, 1)
            );
        }
        drop(fork);
        check_invariants(&plugin, &seq[0]);
        drop(seq);
        assert_eq!(plugin.totals().live_bytes, 0, "nothing is left in the ledger");
    });
}

#[test]
fn truncate_goes_back_as_far_as_nothing_was_evicted() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let mut seq = [open(&plugin, &SMALL, 1, 2)];
        step(&plugin, &SMALL, &mut seq, 80);
        for _ in 0..3 {
            step(&plugin, &SMALL, &mut seq, 1);
        }
        assert!(seq[0].cache.truncate(84).is_err(), "longer than what was seen");
        let from = seq[0].cache.reachable_from();
        assert_eq!(from, if policy.select.is_some() { 80 } else { 0 });
        if from > 0 {
            let refused = seq[0].cache.truncate(from - 1).unwrap_err().to_string();
            assert!(refused.contains("80..=83"), "{refused}");
        }
        for to in [82, 80, 41, 1] {
            if to < from {
                continue;
            }
            seq[0].cache.truncate(to).unwrap();
            seq[0].seen = to;
            check_invariants(&plugin, &seq[0]);
        }
        seq[0].text = 3;
        step(&plugin, &SMALL, &mut seq, 30);
        for _ in 0..20 {
            step(&plugin, &SMALL, &mut seq, 1);
            check_invariants(&plugin, &seq[0]);
        }
    });
}

#[test]
fn ragged_rows_answer_as_alone() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let mut batch: Vec<Seq> = Vec::new();
        let mut alone = Vec::new();
        for (request, prompt) in [3, 90, 33, 150].into_iter().enumerate() {
            for (list, request) in [(&mut batch, request), (&mut alone, request + 10)] {
                let mut seq = [open(&plugin, &SMALL, request, 50 + prompt as u64)];
                step(&plugin, &SMALL, &mut seq, prompt);
                list.extend(seq);
            }
        }
        for _ in 0..20 {
            let together = step(&plugin, &SMALL, &mut batch, 1);
            let size = SMALL.q_heads() * SMALL.v_dim;
            for (row, seq) in alone.iter_mut().enumerate() {
                let single = step(&plugin, &SMALL, std::slice::from_mut(seq), 1);
                for (layer, out) in single.iter().enumerate() {
                    assert_eq!(out[..], together[layer][row * size..(row + 1) * size]);
                }
            }
        }
        let held: usize = batch.iter().chain(&alone).map(|seq| seq.cache.bytes()).sum();
        assert_eq!(plugin.totals().live_bytes, held);
        // Prompts of one length prefill together, too.
        let mut pair = vec![open(&plugin, &SMALL, 30, 1), open(&plugin, &SMALL, 31, 2)];
        let outs = step(&plugin, &SMALL, &mut pair, 25);
        assert!(against_full(&SMALL, &pair, 25, 1, &outs[1]) < 1e-5);
    });
}

#[test]
fn several_choices_are_one_request() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let mut choices = vec![open(&plugin, &SMALL, 4, 1), open(&plugin, &SMALL, 4, 2)];
        step(&plugin, &SMALL, &mut choices, 50);
        let snapshot = plugin.request(4).unwrap();
        assert_eq!((snapshot.sequences, snapshot.seen), (2, 100));
        plugin
            .retune(
                4,
                None,
                common::policy(r#"{"quantize": {"k_bits": 4, "v_bits": 4, "residual": 16}}"#),
            )
            .unwrap();
        step(&plugin, &SMALL, &mut choices[..1], 1);
        assert!(
            !plugin.request(4).unwrap().applied,
            "the second choice has not stepped yet"
        );
        step(&plugin, &SMALL, &mut choices[1..], 1);
        assert!(plugin.request(4).unwrap().applied);
        choices.pop();
        assert_eq!(plugin.request(4).unwrap().state, RequestState::Running);
        choices.pop();
        let end = plugin.request(4).unwrap();
        assert_eq!(
            (end.state, end.seen, end.sequences),
            (RequestState::Finished, 102, 2)
        );
        assert_eq!(end.served.len(), 2);
    });
}

#[test]
fn a_second_turn_continues_a_prefix() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let mut seq = [open(&plugin, &SMALL, 1, 8)];
        step(&plugin, &SMALL, &mut seq, 70);
        for _ in 0..5 {
            step(&plugin, &SMALL, &mut seq, 1);
        }
        let entry = seq[0].cache.fork(ForkRole::Prefix).unwrap();
        let first = plugin.inspect(&*entry).unwrap();
        drop(seq);
        assert_eq!(plugin.request(1).unwrap().state, RequestState::Finished);
        let totals = plugin.totals();
        assert_eq!((totals.prefix_entries, totals.prefix_bytes), (1, entry.bytes()));
        assert_eq!(totals.live_bytes, entry.bytes());
        assert_eq!(totals.uncompressed_bytes, 0);

        let other = common::policy(r#"{"quantize": {"k_bits": 4, "v_bits": 4, "residual": 16}}"#);
        plugin.assign(2, assignment(other)).unwrap();
        let unused = plugin.open(&SMALL.info(2, 2, 95)).unwrap();
        let fork = entry.fork(ForkRole::Sequence).unwrap();
        fork.truncate(72).unwrap();
        let cache = plugin.adopt(fork, &SMALL.info(2, 2, 95)).unwrap();
        drop(unused);
        let mut turn = [Seq {
            cache,
            text: 8,
            seen: 72,
        }];
        let snapshot = plugin.request(2).unwrap();
        assert_eq!(
            (snapshot.sequences, snapshot.seen, snapshot.prompt_tokens),
            (1, 72, 95)
        );
        assert_eq!(snapshot.served[0].policy, *policy);
        step(&plugin, &SMALL, &mut turn, 23);
        for _ in 0..20 {
            step(&plugin, &SMALL, &mut turn, 1);
        }
        let layers = check_invariants(&plugin, &turn[0]);
        assert!(plugin.request(2).unwrap().applied);
        let packed = layers[0].heads[0]
            .blocks
            .iter()
            .any(|b| (b.k, b.v) == (Codec::Int4, Codec::Int4));
        assert!(packed, "the new request's tighter policy applies to the prefix");
        assert_eq!(plugin.inspect(&*entry).unwrap(), first, "the entry never changes");
    });
}

#[test]
fn the_device_path_answers_as_the_cpu_path() {
    each(|_, policy| {
        let cpu = plugin(policy.clone());
        let device = plugin_with(
            policy.clone(),
            PluginSettings {
                force_device_path: true,
                ..settings()
            },
        );
        let mut runs = [[open(&cpu, &SMALL, 1, 6)], [open(&device, &SMALL, 1, 6)]];
        for fresh in [140, 3, 1, 20].into_iter().chain([1; 20]) {
            let a = step(&cpu, &SMALL, &mut runs[0], fresh);
            let b = step(&device, &SMALL, &mut runs[1], fresh);
            let worst = a
                .iter()
                .flatten()
                .zip(b.iter().flatten())
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst < 1e-4, "paths differ by {worst}");
            let positions = |plugin: &Arc<Plugin>, seq: &Seq| -> Vec<Vec<u32>> {
                let layers = check_invariants(plugin, seq);
                layers
                    .iter()
                    .flat_map(|layer| layer.heads.iter().map(|head| head.positions.clone()))
                    .collect()
            };
            assert_eq!(positions(&cpu, &runs[0][0]), positions(&device, &runs[1][0]));
        }
    });
}

/// Activations in half precision: the exact store keeps their own dtype, and the output comes back in it.
#[test]
fn half_precision_activations() {
    for (dtype, codec) in [(DType::F16, Codec::F16), (DType::BF16, Codec::Bf16)] {
        for force_device_path in [false, true] {
            let plugin = plugin_with(
                policy(r#"{"store": "exact"}"#),
                PluginSettings {
                    force_device_path,
                    ..settings()
                },
            );
            let mut info = SMALL.info(1, 1, 20);
            info.dtype = dtype;
            let mut seq = [Seq {
                cache: plugin.open(&info).unwrap(),
                text: 1,
                seen: 0,
            }];
            let params = AttendParams {
                softcap: Some(2.0),
                ..SMALL.params()
            };
            let mut outs = Vec::new();
            for fresh in [20, 1] {
                for layer in 0..SMALL.layers {
                    let [q, k, v] =
                        [(What::Q, 6, 16), (What::K, 2, 16), (What::V, 2, 24)].map(|(what, heads, dim)| {
                            tensor(&seq, layer, what, heads, fresh, dim)
                                .to_dtype(dtype)
                                .unwrap()
                        });
                    let qkv = Qkv { q: &q, k: &k, v: &v };
                    let out = plugin
                        .attend(layer, &[seq[0].cache.clone()], qkv, &params)
                        .unwrap();
                    assert_eq!(out.dtype(), dtype);
                    outs.push(
                        out.to_dtype(DType::F32)
                            .unwrap()
                            .flatten_all()
                            .unwrap()
                            .to_vec1::<f32>()
                            .unwrap(),
                    );
                }
                seq[0].seen += fresh;
            }
            let layers = check_invariants(&plugin, &seq[0]);
            assert!(
                layers[0].heads[0]
                    .blocks
                    .iter()
                    .all(|block| (block.k, block.v) == (codec, codec))
            );
            // The decoded token of layer 1 against f64 attention with the cap, on rounded projections.
            let round = |x: &f32| match dtype {
                DType::F16 => half::f16::from_f32(*x).to_f64(),
                _ => half::bf16::from_f32(*x).to_f64(),
            };
            for head in 0..SMALL.q_heads() {
                let row = |what, head, token, dim| -> Vec<f64> {
                    vector(1, 1, what, head, token, dim).iter().map(round).collect()
                };
                let q = row(What::Q, head, 20, 16);
                let weight: Vec<f64> = (0..21)
                    .map(|token| {
                        let k = row(What::K, head / 3, token, 16);
                        let score: f64 = q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / 4.0;
                        (2.0 * (score / 2.0).tanh()).exp()
                    })
                    .collect();
                let sum: f64 = weight.iter().sum();
                for column in 0..24 {
                    let exact: f64 = (0..21)
                        .map(|token| weight[token] / sum * row(What::V, head / 3, token, 24)[column])
                        .sum();
                    let ours = f64::from(outs[3][head * 24 + column]);
                    assert!((exact - ours).abs() < 4e-3, "{dtype:?}: {exact} and {ours}");
                }
            }
        }
    }
}

/// Loosening applies to what comes next: rows already packed stay packed, evicted ones stay away.
#[test]
fn retune_up_restores_nothing() {
    let plugin = plugin(policy(
        r#"{"select": {"method": "streaming", "budget": 0.5, "recent": 16},
            "quantize": {"k_bits": 4, "v_bits": 8, "residual": 16}}"#,
    ));
    let mut seq = [open(&plugin, &SMALL, 1, 1)];
    step(&plugin, &SMALL, &mut seq, 100);
    let packed = |plugin: &Plugin, seq: &Seq| -> usize {
        let layers = check_invariants(plugin, seq);
        let blocks = layers[0].heads[0].blocks.iter();
        blocks
            .filter(|block| (block.k, block.v) == (Codec::Int4, Codec::Int8))
            .map(|block| block.rows)
            .sum()
    };
    assert_eq!(packed(&plugin, &seq[0]), 50 - 4 - 16);
    let receipt = plugin.retune(1, None, policy("{}")).unwrap();
    assert!(
        receipt
            .notes
            .iter()
            .any(|note| note.starts_with("bits: tokens already packed stay at k4 v8"))
    );
    assert!(
        receipt
            .notes
            .iter()
            .any(|note| note.starts_with("budget: 50 of 100")),
        "{:?}",
        receipt.notes
    );
    for _ in 0..60 {
        step(&plugin, &SMALL, &mut seq, 1);
    }
    assert_eq!(packed(&plugin, &seq[0]), 30);
    assert_eq!(plugin.request(1).unwrap().kept_max, 110);
}

/// A budget is rounded up to whole tokens, and a product that is only nearly an integer counts as one.
#[test]
fn budgets_are_exact() {
    for (budget, seen, kept) in [
        ("0.55", 100, 55),
        ("0.07", 1000, 70),
        ("0.29", 100, 29),
        ("0.5", 101, 51),
        ("0.02", 100, 16),
    ] {
        let json = format!(
            r#"{{"select": {{"method": "streaming", "budget": {budget}, "sinks": 0, "recent": 16}}}}"#
        );
        let plugin = plugin(policy(&json));
        let mut seq = [open(&plugin, &SMALL, 1, 1)];
        step(&plugin, &SMALL, &mut seq, seen);
        assert_eq!(plugin.request(1).unwrap().kept_max, kept, "{budget} of {seen}");
    }
}
