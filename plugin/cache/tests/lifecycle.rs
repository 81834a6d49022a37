//! Every policy in every situation, part two: retunes, forks, truncations, choices and prefixes.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use cinch_cache::{Plugin, RequestState};
use cinch_hooks::{CachePolicy, ForkRole};
use cinch_kernels::Codec;
use cinch_protocol::{Policy, Quantize};
use common::matrix::*;
use common::*;

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
            check_budget(policy, &layers, total(policy, 122), 0);
            if evicts(policy) || policy.quantize.is_some() {
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
        assert_eq!(from, if evicts(policy) { 80 } else { 0 });
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
    each(|name, policy| {
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

        let mut tight = common::policy(r#"{"quantize": {"k_bits": 2, "v_bits": 2, "residual": 16}}"#);
        if let (Some(own), Some(theirs)) = (&mut tight.quantize, &policy.quantize) {
            // Of the same method, where it has so few bits.
            *own = Quantize {
                k_bits: own.k_bits,
                v_bits: own.v_bits,
                layers: own.layers.clone(),
                ..theirs.clone()
            };
            if tight.validate().is_err() {
                tight.quantize = policy.quantize.clone();
            }
        }
        let tightest = tight.quantize.as_ref().map_or((Codec::F16, Codec::F16), codecs);
        let other = Policy {
            select: policy.select.clone(),
            project: policy.project.clone(),
            ..tight
        };
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
        let mut packed = layers[0].heads[0].blocks.iter();
        assert!(
            packed.any(|b| (b.k, b.v) == tightest),
            "{name}: the new request's tighter policy applies to the prefix, not {tightest:?} of {:?}",
            layers[0].heads[0].blocks
        );
        assert_eq!(plugin.inspect(&*entry).unwrap(), first, "the entry never changes");
    });
}

/// A prefix that was compressed harder than the next request asks for must not serve it.
#[test]
fn a_harder_compressed_prefix_is_refused() {
    for (left, asked, allowed) in [
        (
            r#"{"quantize": {"k_bits": 4, "v_bits": 8, "residual": 16}}"#,
            "{}",
            false,
        ),
        (
            r#"{"quantize": {"k_bits": 8, "v_bits": 8, "residual": 16}}"#,
            r#"{"quantize": {"k_bits": 8, "v_bits": 4}}"#,
            true,
        ),
        (
            r#"{"quantize": {"k_bits": 8, "v_bits": 4, "residual": 16}}"#,
            r#"{"quantize": {"k_bits": 8, "v_bits": 8}}"#,
            false,
        ),
        (
            r#"{"select": {"method": "streaming", "budget": 0.5, "recent": 16}}"#,
            "{}",
            false,
        ),
        (
            r#"{"select": {"method": "streaming", "budget": 0.5, "recent": 16}}"#,
            r#"{"select": {"method": "streaming", "budget": 0.9, "recent": 16}}"#,
            false,
        ),
        (
            "{}",
            r#"{"select": {"method": "h2o", "budget": 0.5, "recent": 16}}"#,
            true,
        ),
        ("{}", r#"{"store": "exact"}"#, false),
        (r#"{"store": "exact"}"#, "{}", true),
    ] {
        let plugin = plugin(policy(left));
        let mut seq = [open(&plugin, &SMALL, 1, 8)];
        step(&plugin, &SMALL, &mut seq, 100);
        let entry = seq[0].cache.fork(ForkRole::Prefix).unwrap();
        plugin.assign(2, assignment(policy(asked))).unwrap();
        let adopted = plugin.adopt(entry.fork(ForkRole::Sequence).unwrap(), &SMALL.info(2, 2, 120));
        assert_eq!(adopted.is_ok(), allowed, "{left} then {asked}");
        if let Err(error) = adopted {
            assert!(error.to_string().contains("compressed harder"), "{error}");
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
