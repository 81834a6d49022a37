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
