//! The decode kernel by itself, against what the same threads read as a plain stream: one sequence of the demo model,
//! all its layers, so that no cache holds its rows from one token to the next.

use anyhow::{Context, Result};
use cinch_kernels::bench::{Decode, decode, roofline};
use cinch_kernels::{Codec, Heads, Kernels};
use cinch_protocol::bench::KernelRow;

/// SmolLM2-135M with 8192 tokens seen.
const SHAPE: Decode = Decode {
    heads: Heads {
        q_heads: 3,
        k_dim: 64,
        v_dim: 64,
        scale: 0.125,
        softcap: None,
    },
    rows: 8192,
    kv_heads: 3,
    layers: 30,
    threads: 1,
};

const CODECS: [Codec; 5] = [Codec::F16, Codec::Int8, Codec::Int4, Codec::Int3, Codec::Int2];

/// Measures every codec, for K and V alike, on `threads` threads. The stream is measured beside each: what memory
/// gives changes with what else the machine does.
pub(super) fn measure(threads: usize) -> Result<Vec<KernelRow>> {
    let shape = Decode { threads, ..SHAPE };
    let row = |codec: Codec| {
        let read = decode(Kernels::detect(), &shape, codec, codec);
        Ok(KernelRow {
            kv: codec.name().to_owned(),
            gb_s: read.with_context(|| format!("attending to {}", codec.name()))? / 1e9,
            roofline_gb_s: roofline(threads) / 1e9,
        })
    };
    CODECS.into_iter().map(row).collect()
}
