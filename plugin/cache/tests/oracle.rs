//! Statistics and measured errors against oracles in f64 that share nothing with the crate. Kept sets are in `selection`.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use common::*;

/// A layer's scores are the mean over query heads, of the last 64 prompt queries and every eighth decoded token,
/// which stands for eight.
#[test]
fn layer_statistics_match_the_oracle() {
    let plugin = plugin(policy(r#"{"store": "exact"}"#));
    let mut seq = [open(&plugin, &SMALL, 1, 4)];
    step(&plugin, &SMALL, &mut seq, 104);
    for _ in 104..113 {
        step(&plugin, &SMALL, &mut seq, 1);
    }
    let counted = (40..104)
        .map(|token| (token, 1.0))
        .chain([(104, 8.0), (112, 8.0)]);
    for (layer, view) in check_invariants(&plugin, &seq[0]).iter().enumerate() {
        let mut expected = vec![0.0; 113];
        for (token, times) in counted.clone() {
            let visible: Vec<u32> = (0..=token as u32).collect();
            for head in 0..SMALL.q_heads() {
                for (sum, weight) in expected
                    .iter_mut()
                    .zip(weights(&SMALL, 4, layer, head, token, &visible))
                {
                    *sum += times * weight / SMALL.q_heads() as f64;
                }
            }
        }
        for (score, expected) in view.scores.as_ref().unwrap().iter().zip(expected) {
            assert!((f64::from(*score) - expected).abs() < 1e-4);
        }
    }
}

/// After a retune to H2O every head ranks by its layer's mean.
#[test]
fn retune_to_h2o_starts_from_layer_statistics() {
    let plugin = plugin(policy("{}"));
    let mut seq = [open(&plugin, &SMALL, 1, 12)];
    step(&plugin, &SMALL, &mut seq, 120);
    step(&plugin, &SMALL, &mut seq, 1);
    let scores: Vec<Vec<f32>> = plugin
        .inspect(&*seq[0].cache)
        .unwrap()
        .into_iter()
        .map(|layer| layer.scores.unwrap())
        .collect();
    let h2o = policy(r#"{"select": {"method": "h2o", "budget": 0.5, "recent": 16}}"#);
    plugin.retune(1, None, h2o).unwrap();
    step(&plugin, &SMALL, &mut seq, 1);
    for (layer, scores) in check_invariants(&plugin, &seq[0]).iter().zip(scores) {
        // The step's own weights count too, so only clear cases must agree: the top and bottom of what is neither a
        // sink nor one of the 30 recent ones.
        let mut middle: Vec<usize> = (4..92).collect();
        middle.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        for head in &layer.heads {
            assert_eq!(head.positions.len(), 61);
            assert!(middle[..6].iter().all(|p| head.positions.contains(&(*p as u32))));
            assert!(
                middle[70..]
                    .iter()
                    .all(|p| !head.positions.contains(&(*p as u32)))
            );
        }
    }
}

/// The measured error is the one an independent computation finds.
#[test]
fn attention_error_is_what_eviction_did() {
    let policy = policy(
        r#"{"store": "exact", "select": {"method": "streaming", "budget": 0.3, "recent": 16, "interval": 64}}"#,
    );
    let plugin = plugin(policy);
    let mut seq = [open(&plugin, &SMALL, 1, 9)];
    assert_eq!(
        plugin.request(1).unwrap().attention_error,
        None,
        "nothing is reported before it is measured"
    );
    step(&plugin, &SMALL, &mut seq, 100);
    let mut errors = Vec::new();
    for (layer, view) in check_invariants(&plugin, &seq[0]).iter().enumerate() {
        for (kv, head) in view.heads.iter().enumerate() {
            let (mut wrong, mut norm) = (0.0, 0.0);
            for token in 92..100 {
                let all: Vec<u32> = (0..=token as u32).collect();
                let kept: Vec<u32> = head
                    .positions
                    .iter()
                    .copied()
                    .filter(|p| *p as usize <= token)
                    .collect();
                for q_head in kv * SMALL.group..(kv + 1) * SMALL.group {
                    let exact = attention(&SMALL, 9, layer, q_head, token, &all);
                    let compressed = attention(&SMALL, 9, layer, q_head, token, &kept);
                    for (a, b) in exact.iter().zip(compressed) {
                        wrong += (a - b).powi(2);
                        norm += a.powi(2);
                    }
                }
            }
            errors.push((wrong / norm).sqrt());
        }
    }
    let expected = errors.iter().sum::<f64>() / errors.len() as f64;
    let measured = plugin.request(1).unwrap().attention_error.unwrap();
    assert!(
        (measured - expected).abs() < 1e-4,
        "measured {measured}, expected {expected}"
    );
    let class = plugin.totals().classes["default"];
    assert_eq!(class.attention_error_count, errors.len() as u64);
    assert!((class.attention_error_sum - errors.iter().sum::<f64>()).abs() < 1e-3);
}
