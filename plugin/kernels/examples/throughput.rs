//! Throughput of every implementation next to what this machine could do.
//!
//! `cargo run --release -p cinch-kernels --example throughput -- [decode|cached|prefill|product|codec] [implementation] [codec]`

use cinch_kernels::bench::{self, Decode};
use cinch_kernels::{Codec, Heads, KernelError, Kernels, Segment};

fn main() -> Result<(), KernelError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let what = |name: &str| arguments.first().is_none_or(|a| a == name);
    let mut kernels = Kernels::available();
    kernels.retain(|k| k.name() != "scalar" && arguments.get(1).is_none_or(|a| a == k.name()));
    let codec = arguments.get(2).map_or("", String::as_str);
    if what("decode") {
        for threads in [1, 2] {
            decode(&kernels, 30, threads, codec)?;
        }
    }
    if arguments.first().is_some_and(|a| a == "cached") {
        decode(&kernels, 0, 1, codec)?;
    }
    if what("prefill") {
        prefill(&kernels)?;
    }
    if what("product") {
        // SmolLM2-135M's last product, and its widest one within a layer.
        for (k, columns) in [(576, 49_152), (576, 1536)] {
            for rows in [1, 2, 8, 64] {
                for one in &kernels {
                    let rate = bench::product(*one, k, columns, rows, 2)?;
                    println!(
                        "product  {:8} threads 2 {k} x {columns}, {rows:2} rows: {:6.2} GB/s of weights",
                        one.name(),
                        rate / 1e9
                    );
                }
            }
        }
    }
    if what("codec") {
        for k in &kernels {
            for codec in Codec::ALL {
                let (pack, unpack) = bench::codec(*k, codec, 64)?;
                println!(
                    "{:8} {:4}: pack {:5.2}, unpack {:5.2} G values/s",
                    k.name(),
                    codec.name(),
                    pack / 1e9,
                    unpack / 1e9
                );
            }
        }
    }
    Ok(())
}

/// SmolLM2-135M's shape, 30 layers of 3 KV heads with 3 query heads each: 70 to 280 MB of rows at 8k tokens.
///
/// No layers: one head's 512 rows again and again, which stay in the caches.
fn decode(kernels: &[Kernels], layers: usize, threads: usize, codec: &str) -> Result<(), KernelError> {
    let shape = Decode {
        heads: heads(3, 64),
        rows: if layers == 0 { 4096 } else { 8192 },
        kv_heads: if layers == 0 { 1 } else { 3 },
        layers: layers.max(1),
        threads,
    };
    for k in kernels {
        for (keys, values) in [
            (Codec::F32, Codec::F32),
            (Codec::F16, Codec::F16),
            (Codec::Bf16, Codec::Bf16),
            (Codec::Int8, Codec::Int8),
            (Codec::Int8, Codec::Int4),
            (Codec::Int4, Codec::Int4),
            (Codec::Int3, Codec::Int3),
            (Codec::Int4, Codec::Int2),
            (Codec::Int2, Codec::Int2),
        ] {
            if !keys.name().contains(codec) {
                continue;
            }
            // Before and after: what the machine gives changes with its neighbours.
            let before = bench::roofline(threads);
            let rate = bench::decode(*k, &shape, keys, values)?;
            let roofline = f64::max(before, bench::roofline(threads));
            println!(
                "decode {:8} threads {threads} {:>4}/{:<4}: {:6.2} GB/s of {:6.2}, {:3.0} %, {:6.3} ms a step",
                k.name(),
                keys.name(),
                values.name(),
                rate / 1e9,
                roofline / 1e9,
                rate / roofline * 100.0,
                90.0 * 8192.0 * (keys.row_bytes(64) + values.row_bytes(64)) as f64 / rate * 1e3
            );
        }
    }
    Ok(())
}

fn prefill(kernels: &[Kernels]) -> Result<(), KernelError> {
    for k in kernels {
        let peak = bench::peak(*k);
        println!("{} multiply-add peak: {:.1} GFLOP/s", k.name(), peak / 1e9);
        for (q_heads, dim) in [(3, 64), (4, 128)] {
            let heads = heads(q_heads, dim);
            let rows = 4096;
            let values = bench::values(8, rows * dim);
            for codec in [
                None,
                Some(Codec::F16),
                Some(Codec::Int8),
                Some(Codec::Int4),
                Some(Codec::Int2),
            ] {
                let bytes = codec.map_or(0, |c| rows * c.row_bytes(dim));
                let (mut keys, mut numbers) = (vec![0; bytes], vec![0; bytes]);
                if let Some(codec) = codec {
                    k.pack_run(k.key_layout(codec, dim), codec, dim, &values, &mut keys)?;
                    k.pack_run(k.value_layout(codec, dim), codec, dim, &values, &mut numbers)?;
                }
                let past: Vec<_> = codec
                    .map(|codec| Segment {
                        k_codec: codec,
                        v_codec: codec,
                        k_layout: k.key_layout(codec, dim),
                        v_layout: k.value_layout(codec, dim),
                        k_rotated: true,
                        rows,
                        k: &keys,
                        v: &numbers,
                    })
                    .into_iter()
                    .collect();
                // Without a past, a chunk of its own; with one, a chunk of the size engines use.
                let t = if codec.is_some() { 512 } else { 2048 };
                let sums: &[usize] = if codec.is_some() { &[0] } else { &[0, 64, t] };
                for last in sums {
                    let rate = bench::prefill(*k, &heads, &past, t, *last)?;
                    println!(
                        "prefill {:8} dim {dim:3} q_heads {q_heads} past {:>4} tokens {t:4} sums {last:4}: {:6.1} GFLOP/s, {:3.0} %",
                        k.name(),
                        codec.map_or("none", Codec::name),
                        rate / 1e9,
                        rate / peak * 100.0
                    );
                }
            }
        }
    }
    Ok(())
}

fn heads(q_heads: usize, dim: usize) -> Heads {
    Heads {
        q_heads,
        k_dim: dim,
        v_dim: dim,
        scale: 1.0 / (dim as f32).sqrt(),
        softcap: None,
    }
}
