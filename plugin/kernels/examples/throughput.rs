//! Throughput of the kernels on one core: GB/s of packed bytes for decode, GFLOP/s for prefill.
//!
//! `cargo run --release -p cinch-kernels --example throughput [filter]`

use std::hint::black_box;
use std::time::{Duration, Instant};

use cinch_kernels::{
    Codec, ColumnSums, Heads, Rows, RowsMut, Scratch, Segment, attend_decode, attend_prefill, pack, unpack,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// The fastest of many runs in half a second: what the code does when nothing else disturbs it.
fn fastest(mut run: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < Duration::from_millis(500) {
        let once = Instant::now();
        run();
        best = best.min(once.elapsed().as_secs_f64());
    }
    best
}

fn random(n: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(n as u64);
    (0..n).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn main() -> Result<(), cinch_kernels::KernelError> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    for (q_heads, dim) in [(1, 64), (3, 64), (4, 128), (8, 128)] {
        let heads = Heads {
            q_heads,
            k_dim: dim,
            v_dim: dim,
            scale: 1.0 / (dim as f32).sqrt(),
            softcap: None,
        };
        if "codec".contains(&filter) && q_heads != 8 && dim == 64 || dim == 128 && "codec".contains(&filter) {
            codecs(dim)?;
        }
        if "decode".contains(&filter) {
            decode(&heads, 4096)?;
        }
        if "prefill".contains(&filter) {
            prefill(&heads, 1024)?;
        }
    }
    Ok(())
}

fn codecs(dim: usize) -> Result<(), cinch_kernels::KernelError> {
    let rows = 64;
    let mut values = random(rows * dim);
    for codec in Codec::ALL {
        let mut bytes = vec![0; rows * codec.row_bytes(dim)];
        let p = fastest(|| pack(codec, dim, black_box(&values), &mut bytes).expect("shapes fit"));
        let u = fastest(|| unpack(codec, dim, black_box(&bytes), &mut values).expect("shapes fit"));
        let rate = |seconds: f64| (rows * dim) as f64 / seconds / 1e9;
        println!(
            "codec   dim {dim:3} {:>4}: pack {:5.2}, unpack {:5.2} G values/s",
            codec.name(),
            rate(p),
            rate(u)
        );
    }
    Ok(())
}

fn decode(heads: &Heads, rows: usize) -> Result<(), cinch_kernels::KernelError> {
    let q = random(heads.q_heads * heads.k_dim);
    let (mut weights, mut out) = (Vec::new(), vec![0.0; heads.q_heads * heads.v_dim]);
    for codec in Codec::ALL {
        let values = random(rows * heads.k_dim);
        let mut k = vec![0; rows * codec.row_bytes(heads.k_dim)];
        pack(codec, heads.k_dim, &values, &mut k)?;
        let v = k.clone();
        // Blocks of 64 rows, as stores hold them.
        let block = 64 * codec.row_bytes(heads.k_dim);
        let segments: Vec<_> = k
            .chunks(block)
            .zip(v.chunks(block))
            .map(|(k, v)| Segment {
                k_codec: codec,
                v_codec: codec,
                rows: 64,
                k,
                v,
            })
            .collect();
        let seconds = fastest(|| {
            attend_decode(heads, &segments, black_box(&q), &mut weights, &mut out).expect("shapes fit");
        });
        println!(
            "decode  dim {:3} q_heads {} rows {rows} {:>4}: {:6.2} GB/s, {:7.1} us",
            heads.k_dim,
            heads.q_heads,
            codec.name(),
            2.0 * k.len() as f64 / seconds / 1e9,
            seconds * 1e6
        );
    }
    Ok(())
}

fn prefill(heads: &Heads, t: usize) -> Result<(), cinch_kernels::KernelError> {
    let (g, dim) = (heads.q_heads, heads.k_dim);
    let (k, v, q) = (random(t * dim), random(t * dim), random(g * t * dim));
    let mut out = vec![0.0; g * t * dim];
    let q: Vec<_> = q.chunks(t * dim).map(|q| Rows::packed(q, dim)).collect();
    let mut scratch = Scratch::default();
    let mut column = vec![0.0; t];
    // Two multiply-adds per dimension of each visible pair: q·k and weight·v.
    let flops = (g * t * (t + 1) / 2 * 4 * dim) as f64;
    for (label, last_queries) in [("no sums", 0), ("sums of the last 64", 64), ("sums of all", t)] {
        let seconds = fastest(|| {
            let mut out: Vec<_> = out.chunks_mut(t * dim).map(|o| RowsMut::packed(o, dim)).collect();
            let sums = (last_queries > 0).then(|| ColumnSums {
                last_queries,
                out: &mut column,
            });
            let (k, v) = (Rows::packed(&k, dim), Rows::packed(&v, dim));
            attend_prefill(heads, &[], black_box(k), v, &q, &mut out, sums, &mut scratch)
                .expect("shapes fit");
        });
        println!(
            "prefill dim {dim:3} q_heads {g} tokens {t} {label}: {:6.2} GFLOP/s, {:7.2} ms",
            flops / seconds / 1e9,
            seconds * 1e3
        );
    }
    Ok(())
}
