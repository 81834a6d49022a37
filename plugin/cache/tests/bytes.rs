//! Reported bytes against the allocator. One test: it counts every allocation of the process.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]
#![allow(unsafe_code, reason = "a counting allocator implements an unsafe trait")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use cinch_cache::{Plugin, PluginSettings};
use cinch_protocol::Policy;
use common::*;
use serde::Deserialize;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` unchanged; counting touches nothing but an atomic.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), SeqCst);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MODEL: Model = Model {
    layers: 2,
    kv_heads: 3,
    group: 1,
    k_dim: 64,
    v_dim: 64,
};
const TOKENS: usize = 4096;

/// Allocated and reported bytes of a sequence after so many prompt tokens and each of `decoded` more.
fn measure(plugin: &Arc<Plugin>, request: usize, tokens: usize, decoded: &[usize]) -> Vec<(usize, usize)> {
    let before = LIVE.load(SeqCst);
    let mut seq = [open(plugin, &MODEL, request, 1)];
    for _ in 0..4 {
        drop(step(plugin, &MODEL, &mut seq, tokens / 4));
    }
    let mut figures = Vec::with_capacity(decoded.len());
    for decoded in decoded {
        while seq[0].seen < tokens + decoded {
            drop(step(plugin, &MODEL, &mut seq, 1));
        }
        figures.push((LIVE.load(SeqCst) - before, seq[0].cache.bytes()));
    }
    figures
}

/// The part of a ladder that is tested here.
#[derive(Deserialize)]
struct Ladder {
    prompt_tokens: usize,
    level: Vec<Level>,
}

#[derive(Deserialize)]
struct Level {
    name: String,
    policy: Policy,
    bytes_ratio: f64,
}

/// Policies and what the README promises of their bytes, of f16.
const PROMISED: [(&str, f64); 6] = [
    ("{}", 1.02),
    (r#"{"quantize": {"k_bits": 8, "v_bits": 8}}"#, 0.58),
    (r#"{"quantize": {"k_bits": 8, "v_bits": 4}}"#, 0.46),
    (r#"{"quantize": {"k_bits": 4, "v_bits": 4}}"#, 0.33),
    (
        r#"{"select": {"method": "h2o", "budget": 0.5}, "quantize": {"k_bits": 8, "v_bits": 4}}"#,
        0.26,
    ),
    (
        r#"{"select": {"method": "h2o", "budget": 0.5}, "quantize": {"k_bits": 4, "v_bits": 4}}"#,
        0.2,
    ),
];

fn serial(policy: Policy) -> Arc<Plugin> {
    let settings = PluginSettings {
        serial: true,
        ..PluginSettings::default()
    };
    plugin_with(policy, settings)
}

fn f16(tokens: usize) -> f64 {
    (tokens * MODEL.layers * MODEL.kv_heads * (MODEL.k_dim + MODEL.v_dim) * 2) as f64
}

#[test]
fn reported_bytes_are_allocated_bytes_and_ladders_tell_their_ratios() {
    for (json, limit) in PROMISED {
        let plugin = serial(policy(json));
        let decoded = [0, 10, 15, 40];
        // Once to fill the threads' reusable buffers, which belong to no sequence.
        measure(&plugin, 0, TOKENS, &decoded);
        for (more, (allocated, reported)) in decoded.into_iter().zip(measure(&plugin, 1, TOKENS, &decoded)) {
            let ratio = reported as f64 / f16(TOKENS + more);
            let off = (allocated as f64 - reported as f64).abs() / allocated as f64;
            println!(
                "{json} +{more}: reported {reported}, allocated {allocated}, {ratio:.4} of f16, off by {off:.4}"
            );
            assert!(off < 0.02, "{json}: reported {reported}, allocated {allocated}");
            assert!(ratio <= limit, "{json}: {ratio} of f16");
        }
        // Compressed head by head while the prompt comes in: the peak is one chunk of one head above the end.
        let totals = plugin.totals();
        println!(
            "{json}: peak {:.4} of f16",
            totals.peak_bytes as f64 / f16(TOKENS)
        );
        assert!(
            totals.peak_bytes as f64 <= (limit + 0.1) * f16(TOKENS),
            "{json}: peak {}",
            totals.peak_bytes
        );
    }

    let ladder: Ladder = toml::from_str(include_str!(
        "../../../configs/ladders/smollm2-135m-instruct.toml"
    ))
    .unwrap();
    let mut full = None;
    for level in ladder.level {
        let plugin = serial(level.policy);
        measure(&plugin, 0, ladder.prompt_tokens, &[0]);
        let allocated = measure(&plugin, 1, ladder.prompt_tokens, &[0])[0].0 as f64;
        let measured = allocated / *full.get_or_insert(allocated);
        println!("{}: {measured:.4} of level 0", level.name);
        assert!(
            (measured / level.bytes_ratio - 1.0).abs() < 0.02,
            "{}: the ladder says {} of level 0, measured {measured:.4}",
            level.name,
            level.bytes_ratio
        );
    }
}
