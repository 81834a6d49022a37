//! What admission reserves against what sequences come to hold: never less, and not much more.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use common::matrix::{by_channel, each, merges};
use common::*;

const MODEL: Model = Model {
    layers: 2,
    kv_heads: 2,
    group: 1,
    k_dim: 64,
    v_dim: 64,
};

#[test]
fn no_sequence_holds_more_than_the_bound_at_any_step() {
    each(|name, policy| {
        for prompt in [1, 17, 63, 64, 200, 700] {
            let plugin = plugin(policy.clone());
            let mut seq = [open(&plugin, &MODEL, 1, 5)];
            for fresh in std::iter::once(prompt).chain([1; 150]) {
                drop(step(&plugin, &MODEL, &mut seq, fresh));
                let (held, seen) = (seq[0].cache.bytes(), seq[0].seen);
                let most = plugin.most_bytes(policy, seen).unwrap();
                assert!(
                    held <= most,
                    "{name}: {held} held of {most} after {prompt} + {} tokens",
                    seen - prompt
                );
            }
        }
    });
}

#[test]
fn the_bound_of_a_long_sequence_is_near() {
    each(|name, policy| {
        let plugin = plugin(policy.clone());
        let mut seq = [open(&plugin, &MODEL, 1, 5)];
        drop(step(&plugin, &MODEL, &mut seq, 3000));
        let (held, most) = (seq[0].cache.bytes(), plugin.most_bytes(policy, 3000).unwrap());
        println!("{name}: {held} of {most}, {:.3}", most as f64 / held as f64);
        // Of keys by channel, every block that an eviction leaves may end with a tile that is not full.
        let by_channel = policy.quantize.as_ref().is_some_and(by_channel);
        let beside = policy.quantize.as_ref().is_some_and(|q| !q.method.codes_alone());
        let chooses = policy
            .select
            .as_ref()
            .is_some_and(|select| !select.method.evicts());
        let near = match &policy.project {
            // Nothing may be merged, where heads come to hold different tokens.
            Some(_) if merges(policy) => 2.8,
            // All dimensions may have to be held until a prompt is whole.
            Some(_) => 2.5,
            // Blocks with something beside their codes may all be of a batch of 64; bounds of pages: see below.
            None if beside && chooses => 1.9,
            None if beside => 1.8,
            // Bounds of pages come with the first decoded token: 32 bytes a row here, beside 256 of f16 and 80 of 4 bits.
            _ if chooses && policy.quantize.is_some() => 1.75,
            None if by_channel || chooses => 1.35,
            None => 1.25,
        };
        assert!(
            (most as f64) < near * held as f64,
            "{name}: {held} held, bound {most}"
        );
    });
}

#[test]
fn nothing_is_said_before_a_model_is_known() {
    let plugin = plugin(policy("{}"));
    assert_eq!(plugin.most_bytes(&policy("{}"), 100), None);
    assert_eq!(plugin.prefill_bytes(&policy("{}"), 100), None);
    let seq = open(&plugin, &MODEL, 1, 5);
    assert_eq!(plugin.prefill_bytes(&policy("{}"), 100), Some(100 * 2 * 128 * 2));
    drop(seq);
}
