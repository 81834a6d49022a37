//! Random sequences of everything an engine can do never panic and keep every invariant.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use cinch_cache::Plugin;
use cinch_hooks::{CachePolicy, ForkRole, SequenceCache};
use cinch_protocol::{Policy, SelectMethod};
use common::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const TINY: Model = Model {
    layers: 2,
    kv_heads: 2,
    group: 2,
    k_dim: 8,
    v_dim: 4,
};

fn any_policy(rng: &mut StdRng) -> Policy {
    let select = rng.random_bool(0.6).then(|| {
        let methods = SelectMethod::ALL;
        let method = methods[rng.random_range(0..methods.len())];
        let (budget, sinks) = (rng.random_range(0.02..1.0), rng.random_range(0..20));
        let (recent, interval) = (rng.random_range(16..40), rng.random_range(1..20));
        let fields = |name: &str| method.fields().contains(&name);
        let mut own = String::new();
        if method.evicts() && rng.random_bool(0.3) {
            own += r#", "layers": "pyramid""#;
        }
        if fields("heads") && rng.random_bool(0.4) {
            own += &format!(
                r#", "heads": "adaptive", "floor": {}"#,
                rng.random_range(0.0..1.0)
            );
        }
        if fields("skip_layers") && !own.contains("pyramid") {
            own += &format!(r#", "skip_layers": {}"#, rng.random_range(0..2));
        }
        if method.evicts() && rng.random_bool(0.3) {
            let merge = ["d2o", "cam"][rng.random_range(0..2)];
            own += &format!(r#", "merge": "{merge}""#);
        }
        if fields("window") && rng.random_bool(0.5) {
            own += &format!(r#", "window": {}"#, rng.random_range(1..65));
        }
        let name = method.name();
        format!(
            r#""select": {{"method": "{name}", "budget": {budget}, "sinks": {sinks}, "recent": {recent},
                "interval": {interval}{own}}}"#
        )
    });
    let quantize = rng.random_bool(0.6).then(|| {
        let (k, v) = (
            [4, 8, 16][rng.random_range(0..3)],
            [4, 8, 16][rng.random_range(0..3)],
        );
        let residual = rng.random_range(16..60);
        format!(r#""quantize": {{"k_bits": {k}, "v_bits": {v}, "residual": {residual}}}"#)
    });
    let store = (quantize.is_none() && rng.random_bool(0.3)).then(|| r#""store": "exact""#.to_string());
    let fields: Vec<String> = [select, quantize, store].into_iter().flatten().collect();
    policy(&format!("{{{}}}", fields.join(",")))
}

fn run(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let plugin: std::sync::Arc<Plugin> = plugin(any_policy(&mut rng));
    let mut live: Vec<Seq> = Vec::new();
    let mut entries: Vec<(std::sync::Arc<dyn SequenceCache>, u64, usize)> = Vec::new();
    let mut next = 0;
    for _ in 0..60 {
        match rng.random_range(0..12) {
            0 | 1 if live.len() < 5 => {
                if rng.random_bool(0.5) {
                    plugin.assign(next, assignment(any_policy(&mut rng))).unwrap();
                }
                live.push(open(&plugin, &TINY, next, rng.random()));
                next += 1;
            }
            2 | 3 if !live.is_empty() => {
                let at = rng.random_range(0..live.len());
                let fresh = rng.random_range(1..90);
                step(&plugin, &TINY, &mut live[at..=at], fresh);
            }
            4 if !live.is_empty() => {
                let id = rng.random_range(0..next);
                let _ = plugin.retune(id, None, any_policy(&mut rng));
            }
            5 if !live.is_empty() => {
                let seq = live[rng.random_range(0..live.len())].clone();
                entries.push((seq.cache.fork(ForkRole::Prefix).unwrap(), seq.text, seq.seen));
            }
            6 if !entries.is_empty() && live.len() < 6 => {
                let (entry, text, seen) = &entries[rng.random_range(0..entries.len())];
                let fork = entry.fork(ForkRole::Sequence).unwrap();
                let to = rng.random_range(0..=*seen);
                let reachable = to >= entry.reachable_from();
                assert_eq!(
                    fork.truncate(to).is_ok(),
                    reachable,
                    "truncate and reachable_from agree"
                );
                match plugin.adopt(fork, &TINY.info(next, next, to)) {
                    Ok(cache) => live.push(Seq {
                        cache,
                        text: *text,
                        seen: if reachable { to } else { *seen },
                    }),
                    Err(error) => assert!(error.to_string().contains("compressed harder"), "{error}"),
                }
                next += 1;
            }
            7 if !live.is_empty() && live.len() < 6 => {
                let mut seq = live[rng.random_range(0..live.len())].clone();
                seq.cache = seq.cache.fork(ForkRole::Sequence).unwrap();
                seq.text = rng.random();
                live.push(seq);
            }
            8 if !live.is_empty() => {
                live.swap_remove(rng.random_range(0..live.len()));
            }
            9 if next > 0 => plugin.finish(rng.random_range(0..next)),
            10 if !entries.is_empty() => {
                entries.swap_remove(rng.random_range(0..entries.len()));
            }
            _ => {
                for _ in 0..rng.random_range(1..25) {
                    let mut batch: Vec<Seq> = live.iter().filter(|_| rng.random_bool(0.7)).cloned().collect();
                    if batch.is_empty() {
                        break;
                    }
                    step(&plugin, &TINY, &mut batch, 1);
                    for row in batch {
                        let seq = live
                            .iter_mut()
                            .find(|seq| std::sync::Arc::ptr_eq(&seq.cache, &row.cache));
                        seq.unwrap().seen = row.seen;
                    }
                }
            }
        }
        live.iter().for_each(|seq| drop(check_invariants(&plugin, seq)));
        let held: usize = live.iter().map(|seq| seq.cache.bytes()).sum::<usize>()
            + entries.iter().map(|entry| entry.0.bytes()).sum::<usize>();
        let totals = plugin.totals();
        assert!(totals.live_bytes <= held, "shared blocks count once");
        assert_eq!(totals.prefix_entries, entries.len());
    }
    drop((live, entries));
    assert_eq!(
        plugin.totals().live_bytes,
        0,
        "the ledger is empty when everything is gone"
    );
}

#[test]
fn random_operations_keep_every_invariant() {
    for seed in 0..40 {
        println!("seed {seed}");
        run(seed);
    }
}
