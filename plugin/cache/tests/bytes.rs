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

/// Allocated and reported bytes of a sequence after `TOKENS` prompt tokens and each of `decoded` more.
fn measure(plugin: &Arc<Plugin>, request: usize, decoded: &[usize]) -> Vec<(usize, usize)> {
    let before = LIVE.load(SeqCst);
    let mut seq = [open(plugin, &MODEL, request, 1)];
    for _ in 0..4 {
        drop(step(plugin, &MODEL, &mut seq, TOKENS / 4));
    }
    let mut figures = Vec::with_capacity(decoded.len());
    for decoded in decoded {
        while seq[0].seen < TOKENS + decoded {
            drop(step(plugin, &MODEL, &mut seq, 1));
        }
        figures.push((LIVE.load(SeqCst) - before, seq[0].cache.bytes()));
    }
    figures
}

/// The part of a ladder that is tested here.
#[derive(Deserialize)]
struct Ladder {
    level: Vec<Level>,
}

#[derive(Deserialize)]
struct Level {
    name: String,
    policy: Policy,
    bytes_ratio: f64,
}

/// What the README promises of a level's bytes, of f16.
fn promised(name: &str) -> f64 {
    match name {
        "full" => 1.02,
        "int8" => 0.58,
        "k8v4" => 0.46,
        "int4" => 0.33,
        "h2o-half-k8v4" => 0.26,
        "h2o-half-int4" => 0.2,
        other => panic!("a level without a promise: {other}"),
    }
}

#[test]
fn reported_bytes_are_allocated_bytes_and_the_ladder_tells_their_ratios() {
    let f16 = TOKENS * MODEL.layers * MODEL.kv_heads * (MODEL.k_dim + MODEL.v_dim) * 2;
    let ladder: Ladder = toml::from_str(include_str!(
        "../../../configs/ladders/smollm2-135m-instruct.toml"
    ))
    .unwrap();
    let mut full = None;
    for Level {
        name,
        policy,
        bytes_ratio,
    } in ladder.level
    {
        let limit = promised(&name);
        let plugin = plugin_with(
            policy,
            PluginSettings {
                serial: true,
                ..PluginSettings::default()
            },
        );
        let decoded = [0, 10, 15, 40];
        // Once to fill the threads' reusable buffers, which belong to no sequence.
        measure(&plugin, 0, &decoded);
        for (more, (allocated, reported)) in decoded.into_iter().zip(measure(&plugin, 1, &decoded)) {
            let ratio = reported as f64 / (f16 as f64 * (TOKENS + more) as f64 / TOKENS as f64);
            let off = (allocated as f64 - reported as f64).abs() / allocated as f64;
            println!(
                "{name} +{more}: reported {reported}, allocated {allocated}, {ratio:.4} of f16, off by {off:.4}"
            );
            assert!(off < 0.02, "{name}: reported {reported}, allocated {allocated}");
            assert!(ratio <= limit, "{name}: {ratio} of f16");
            if more == 0 {
                let full = *full.get_or_insert(allocated as f64);
                let measured = allocated as f64 / full;
                println!("{name}: {measured:.4} of level 0");
                assert!(
                    (measured / bytes_ratio - 1.0).abs() < 0.02,
                    "{name}: the ladder says {bytes_ratio} of level 0, measured {measured:.4}"
                );
            }
        }
        // Compressed head by head while the prompt comes in: the peak is one chunk of one head above the end.
        let totals = plugin.totals();
        println!("{name}: peak {:.4} of f16", totals.peak_bytes as f64 / f16 as f64);
        assert!(
            totals.peak_bytes as f64 <= (limit + 0.1) * f16 as f64,
            "{name}: peak {}",
            totals.peak_bytes
        );
    }
}
