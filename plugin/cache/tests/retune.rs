//! A long running request at level 0 is retuned to H2O at half budget in int4: what it frees, and how long
//! the step takes that does it.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use std::time::Instant;

use cinch_cache::PluginSettings;
use common::*;

const MODEL: Model = Model {
    layers: 4,
    kv_heads: 3,
    group: 3,
    k_dim: 64,
    v_dim: 64,
};

#[test]
fn four_thousand_tokens_shrink_five_times_in_one_step() {
    let plugin = plugin_with(policy("{}"), PluginSettings::default());
    let mut seq = [open(&plugin, &MODEL, 1, 1)];
    for _ in 0..8 {
        step(&plugin, &MODEL, &mut seq, 512);
    }
    let timed = |seq: &mut [Seq; 1]| {
        let start = Instant::now();
        step(&plugin, &MODEL, seq, 1);
        start.elapsed().as_secs_f64() * 1e3
    };
    timed(&mut seq);
    let neighbours: Vec<f64> = (0..10).map(|_| timed(&mut seq)).collect();
    let before = plugin.request(1).unwrap();
    let tight =
        policy(r#"{"select": {"method": "h2o", "budget": 0.5}, "quantize": {"k_bits": 4, "v_bits": 4}}"#);
    plugin.retune(1, None, tight).unwrap();
    let compaction = timed(&mut seq);
    let after = plugin.request(1).unwrap();
    assert_eq!(plugin.totals().live_bytes, after.bytes);
    let later: Vec<f64> = (0..10).map(|_| timed(&mut seq)).collect();
    let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len() as f64;
    println!(
        "{} layers, {} tokens: {} -> {} bytes ({:.2}x); steps {:.2} ms before, {compaction:.2} ms compacting, {:.2} ms \
         after; error {:?}",
        MODEL.layers,
        before.seen,
        before.bytes,
        after.bytes,
        before.bytes as f64 / after.bytes as f64,
        mean(&neighbours),
        mean(&later),
        after.attention_error
    );
    assert!(after.applied);
    assert!(
        before.bytes >= 5 * after.bytes,
        "{} -> {}",
        before.bytes,
        after.bytes
    );
    assert_eq!(after.kept_max, after.seen.div_ceil(2));
}

/// What another method gathered counts as one window of queries: the weights of 64 over the query heads of a head, or
/// all votes for the row with the highest score.
#[test]
fn a_window_begins_with_what_was_gathered_before() {
    let select = |method: &str| {
        policy(&format!(
            r#"{{"select": {{"method": "{method}", "budget": 0.5, "recent": 16, "interval": 1024}}}}"#
        ))
    };
    for (from, to) in [
        ("h2o", "snapkv"),
        ("key_norm", "snapkv"),
        ("streaming", "snapkv"),
        ("h2o", "scissorhands"),
    ] {
        let plugin = plugin_with(select(from), PluginSettings::default());
        let mut seq = [open(&plugin, &SMALL, 1, 3)];
        step(&plugin, &SMALL, &mut seq, 200);
        let order = |scores: &[f32]| {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            order
        };
        let before = check_invariants(&plugin, &seq[0]);
        plugin.retune(1, None, select(to)).unwrap();
        step(&plugin, &SMALL, &mut seq, 1);
        for (before, after) in before.iter().zip(&check_invariants(&plugin, &seq[0])) {
            for (old, new) in before.heads.iter().zip(&after.heads) {
                let old = old.scores.as_ref().or(before.scores.as_ref()).unwrap();
                let new = new.scores.as_ref().unwrap();
                // The step faded it by a 64th, and added one query's weights of three heads, or its votes.
                let (sum, most) = (new.iter().sum::<f32>(), new.iter().copied().fold(0.0, f32::max));
                let full = 64.0 * 3.0;
                match to {
                    "snapkv" => assert!(sum > 0.5 * full && sum <= 1.001 * full, "{from}: {sum}"),
                    _ => assert!(most > 0.95 * full && most <= 1.001 * full, "{from}: {most}"),
                }
                assert!(
                    order(new)[..20].contains(&order(old)[0]),
                    "{from}: what led goes on leading"
                );
            }
        }
    }
}
