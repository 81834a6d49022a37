//! Every pair of methods of different families through one life: a prompt in chunks, decoding, a ragged batch, a second
//! choice, truncation, a second turn, and a retune down to it. What methods do by themselves, and in threes, is in the
//! matrix.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use cinch_cache::Plugin;
use cinch_hooks::{CachePolicy, ForkRole};
use cinch_protocol::{Policy, ProjectMethod, QuantizeMethod, Rope, SelectMethod};
use common::matrix::{check, check_budget, merges, total};
use common::*;

const MODEL: Model = Model {
    layers: 2,
    kv_heads: 2,
    group: 2,
    k_dim: 64,
    v_dim: 40,
};

/// Every eighth token evicts.
const INTERVAL: usize = 8;

fn selects() -> Vec<String> {
    let one = |method: &SelectMethod| {
        let name = method.name();
        format!(
            r#""select": {{"method": "{name}", "budget": 0.6, "sinks": 2, "recent": 16, "interval": {INTERVAL}}}"#
        )
    };
    SelectMethod::ALL.iter().map(one).collect()
}

fn projects() -> Vec<String> {
    let one = |method: &ProjectMethod| match method {
        ProjectMethod::Lowrank => r#""project": {"method": "lowrank", "k_rank": 32, "v_rank": 24}"#,
        ProjectMethod::Think => r#""project": {"method": "think", "k_rank": 32}"#,
        ProjectMethod::Minicache => r#""project": {"method": "minicache", "first_layer": 0}"#,
        ProjectMethod::MergeHeads => r#""project": {"method": "merge_heads", "similarity": 0.0}"#,
    };
    ProjectMethod::ALL
        .iter()
        .map(|method| one(method).into())
        .collect()
}

fn quantizes() -> Vec<String> {
    let one = |method: &QuantizeMethod| {
        let (name, bits) = (method.name(), if *method == QuantizeMethod::Fp8 { 8 } else { 4 });
        format!(r#""quantize": {{"method": "{name}", "k_bits": {bits}, "v_bits": {bits}, "residual": 16}}"#)
    };
    QuantizeMethod::ALL.iter().map(one).collect()
}

fn pairs(first: &[String], second: &[String]) {
    for a in first {
        for b in second {
            println!("{a} × {b}");
            let mut policy: Policy = serde_json::from_str(&format!("{{{a}, {b}}}")).unwrap();
            if let (Some(project), Some(quantize)) = (&policy.project, &mut policy.quantize)
                && project.k_rank.is_some()
                && quantize.before_rope()
            {
                // Bases are of keys as they are cached.
                quantize.rope = Some(Rope::After);
            }
            if policy.validate().is_err() {
                // The only pairs that there are not: rows are merged of codes alone.
                let method = policy.quantize.unwrap().method;
                assert!(
                    !method.codes_alone() && policy.project.unwrap().method.fields().contains(&"retained")
                );
                continue;
            }
            lives(&policy);
            is_retuned_to(&policy);
        }
    }
}

/// Decodes, and checks after each step what must hold at any time, and at each eviction the budget too. `at` is `seen` at
/// the last one.
fn decode(plugin: &Plugin, policy: &Policy, rows: &mut [Seq], at: &mut [usize], steps: usize) {
    for _ in 0..steps {
        step(plugin, &MODEL, rows, 1);
        for (row, at) in rows.iter().zip(&mut *at) {
            if policy.select.is_some() && row.seen - *at >= INTERVAL {
                *at = row.seen;
            }
            check(plugin, policy, row, *at);
        }
    }
}

fn lives(policy: &Policy) {
    let plugin = plugin(policy.clone());
    let mut first = [open(&plugin, &MODEL, 1, 7)];
    for chunk in [90, 2, 70] {
        step(&plugin, &MODEL, &mut first, chunk);
        let seen = first[0].seen;
        check(&plugin, policy, &first[0], seen);
    }
    let mut at = [first[0].seen, 0];
    decode(&plugin, policy, &mut first, &mut at[..1], 2 * INTERVAL + 3);

    // Beside a shorter one.
    let mut second = [open(&plugin, &MODEL, 2, 8)];
    step(&plugin, &MODEL, &mut second, 75);
    at[1] = 75;
    let [first] = first;
    let [second] = second;
    let mut batch = [first, second];
    decode(&plugin, policy, &mut batch, &mut at, INTERVAL + 1);

    // A second choice goes its own way.
    let [first, second] = batch;
    let before = plugin.inspect(&*first.cache).unwrap();
    let mut choice = [Seq {
        cache: first.cache.fork(ForkRole::Sequence).unwrap(),
        text: 9,
        seen: first.seen,
    }];
    decode(&plugin, policy, &mut choice, &mut at[..1].to_vec(), 3);
    assert_eq!(plugin.inspect(&*first.cache).unwrap(), before);
    drop(choice);

    // Back by one token, if that was not evicted upon, and on.
    let mut first = [first];
    let back = first[0].seen - 1;
    if first[0].cache.reachable_from() <= back {
        first[0].cache.truncate(back).unwrap();
        first[0].seen = back;
        check_invariants(&plugin, &first[0]);
    }
    step(&plugin, &MODEL, &mut first, 1);
    check_invariants(&plugin, &first[0]);

    // A second turn of the other one.
    let entry = second.cache.fork(ForkRole::Prefix).unwrap();
    let seen = second.seen;
    drop((first, second));
    plugin.assign(3, assignment(policy.clone())).unwrap();
    let unused = plugin.open(&MODEL.info(3, 3, seen + 40)).unwrap();
    let fork = entry.fork(ForkRole::Sequence).unwrap();
    let cache = plugin.adopt(fork, &MODEL.info(3, 3, seen + 40)).unwrap();
    drop(unused);
    let mut turn = [Seq { cache, text: 8, seen }];
    step(&plugin, &MODEL, &mut turn, 40);
    let at = turn[0].seen;
    check(&plugin, policy, &turn[0], at);
    decode(&plugin, policy, &mut turn, &mut [at], INTERVAL);
    drop((turn, entry));
    assert_eq!(plugin.totals().live_bytes, 0, "nothing is left");
}

/// A running request that was served in full until now.
fn is_retuned_to(policy: &Policy) {
    let plugin = plugin(common::policy("{}"));
    let mut seq = [open(&plugin, &MODEL, 1, 5)];
    step(&plugin, &MODEL, &mut seq, 180);
    step(&plugin, &MODEL, &mut seq, 1);
    let before = plugin.request(1).unwrap().bytes;
    plugin.retune(1, None, policy.clone()).unwrap();
    step(&plugin, &MODEL, &mut seq, 1);
    let after = plugin.request(1).unwrap();
    assert!(after.applied);
    // Heads that hold different tokens have nothing to merge, and statistics of their own.
    let most = if merges(policy) {
        before + before / 10
    } else {
        before
    };
    assert!(after.bytes < most, "{} bytes of {before}", after.bytes);
    let layers = check_invariants(&plugin, &seq[0]);
    check_budget(policy, &layers, total(policy, 182), 0);
    decode(&plugin, policy, &mut seq, &mut [182], INTERVAL);
}

#[test]
fn select_and_quantize() {
    pairs(&selects(), &quantizes());
}

#[test]
fn select_and_project() {
    pairs(&selects(), &projects());
}

#[test]
fn project_and_quantize() {
    pairs(&projects(), &quantizes());
}
