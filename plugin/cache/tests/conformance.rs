//! Every policy in every situation, part one: what a step computes and what it leaves.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use std::sync::Arc;

use candle_core::DType;
use cinch_cache::{Plugin, PluginSettings};
use cinch_hooks::{AttendParams, CachePolicy, Qkv};
use cinch_kernels::{Codec, Kernels};
use cinch_protocol::Merge;
use common::matrix::*;
use common::*;

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

/// What a whole prompt has room for stays from its first chunk on: nothing goes that a later chunk could still attend to.
#[test]
fn a_prompt_in_chunks_has_its_whole_budget_from_the_first_chunk_on() {
    each(|_, policy| {
        let plugin = plugin(policy.clone());
        let cache = plugin.open(&SMALL.info(1, 1, 200)).unwrap();
        let mut seq = [Seq {
            cache,
            text: 7,
            seen: 0,
        }];
        for chunk in [60, 70, 70] {
            step(&plugin, &SMALL, &mut seq, chunk);
            let layers = check_invariants(&plugin, &seq[0]);
            check_budget(policy, &layers, total(policy, 200).min(seq[0].seen), 0);
        }
        // Decoding goes by the tokens seen, as ever.
        let interval = policy
            .select
            .as_ref()
            .map_or(1, |select| select.interval as usize);
        for _ in 0..interval {
            step(&plugin, &SMALL, &mut seq, 1);
        }
        let layers = check_invariants(&plugin, &seq[0]);
        check_budget(policy, &layers, total(policy, 200 + interval), 0);
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
            if policy.project.is_some() {
                continue;
            }
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
            let merges = policy
                .select
                .as_ref()
                .is_some_and(|select| select.merge != Merge::None);
            if policy.quantize.is_some() || policy.project.is_some() || merges {
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
fn the_device_path_answers_as_the_cpu_path() {
    // Kernels that do not round queries and weights, as candle's products on a device do not.
    let settings = |force_device_path| PluginSettings {
        force_device_path,
        kernels: Kernels::forced("portable").unwrap(),
        ..settings()
    };
    each(|_, policy| {
        let cpu = plugin_with(policy.clone(), settings(false));
        let device = plugin_with(policy.clone(), settings(true));
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
                        [(What::Q, 6, 32), (What::K, 2, 32), (What::V, 2, 64)].map(|(what, heads, dim)| {
                            tensor(&seq, layer, what, heads, fresh, dim)
                                .to_dtype(dtype)
                                .unwrap()
                        });
                    let qkv = Qkv { q: &q, k: &k, v: &v };
                    let out = plugin
                        .attend(layer, &[seq[0].cache.clone()], qkv, &params, &dense(params))
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
                let q = row(What::Q, head, 20, SMALL.k_dim);
                let weight: Vec<f64> = (0..21)
                    .map(|token| {
                        let k = row(What::K, head / 3, token, SMALL.k_dim);
                        let score: f64 = q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>();
                        let score = score / (SMALL.k_dim as f64).sqrt();
                        (2.0 * (score / 2.0).tanh()).exp()
                    })
                    .collect();
                let sum: f64 = weight.iter().sum();
                for column in 0..SMALL.v_dim {
                    let exact: f64 = (0..21)
                        .map(|token| weight[token] / sum * row(What::V, head / 3, token, SMALL.v_dim)[column])
                        .sum();
                    let ours = f64::from(outs[3][head * SMALL.v_dim + column]);
                    assert!((exact - ours).abs() < 4e-3, "{dtype:?}: {exact} and {ours}");
                }
            }
        }
    }
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
