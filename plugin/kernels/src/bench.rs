//! Measuring: what the kernels move and compute per second, next to what the machine could.
//!
//! Invariant: every figure comes from runs over a working set several times larger than the caches, cycled so that
//! no pass finds its rows in them; roofline and kernels use the same threads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::{Codec, ColumnSums, Heads, KernelError, Kernels, Partial, Rows, RowsMut, Scratch, Segment};

/// Rows of a segment, as stores hold them.
const BLOCK: usize = 64;

/// What decode is measured on.
#[derive(Clone, Copy, Debug)]
pub struct Decode {
    /// Heads of one KV head.
    pub heads: Heads,
    /// Rows of each KV head.
    pub rows: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Layers.
    pub layers: usize,
    /// Threads that share the work of each KV head.
    pub threads: usize,
}

/// Deterministic values between −2 and 2 (splitmix64).
#[must_use]
pub fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as u32 >> 8
    };
    (0..n).map(|_| next() as f32 / (1 << 22) as f32 - 2.0).collect()
}

/// Bytes per second of `threads` that read memory front to back, the best of some passes.
#[must_use]
pub fn roofline(threads: usize) -> f64 {
    let memory = vec![1u64; (256 << 20) / 8];
    let share = memory.len().div_ceil(threads.max(1));
    let pass = || {
        std::thread::scope(|scope| {
            for part in memory.chunks(share) {
                scope.spawn(move || {
                    let mut acc = [0u64; 32];
                    for chunk in part.as_chunks::<32>().0 {
                        for (acc, x) in acc.iter_mut().zip(chunk) {
                            *acc |= x;
                        }
                    }
                    black_box(acc);
                });
            }
        });
    };
    let seconds = (0..8).map(|_| seconds(pass)).fold(f64::INFINITY, f64::min);
    (memory.len() * 8) as f64 / seconds
}

/// Floating-point operations per second of one thread whose multiply-adds never wait, as compiled for this target.
#[must_use]
pub fn peak() -> f64 {
    const STEPS: usize = 2_000_000;
    let run = || {
        let (mut acc, x) = ([[black_box(0.5f32); 16]; 16], black_box(0.999f32));
        for _ in 0..STEPS {
            for lanes in &mut acc {
                for lane in lanes {
                    *lane = lane.mul_add(x, x);
                }
            }
        }
        black_box(acc);
    };
    let seconds = (0..5).map(|_| seconds(run)).fold(f64::INFINITY, f64::min);
    (2 * 256 * STEPS) as f64 / seconds
}

fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// Packed bytes of K and V that decode attends to per second: the median of passes over all layers for a second.
///
/// # Errors
/// A shape that kernels refuse.
pub fn decode(kernels: Kernels, shape: &Decode, k: Codec, v: Codec) -> Result<f64, KernelError> {
    let heads = &shape.heads;
    let (k_row, v_row) = (k.row_bytes(heads.k_dim), v.row_bytes(heads.v_dim));
    // One head's rows, copied for every layer and KV head.
    let mut one = (vec![0; shape.rows * k_row], vec![0; shape.rows * v_row]);
    kernels.pack(k, heads.k_dim, &values(1, shape.rows * heads.k_dim), &mut one.0)?;
    kernels.pack(v, heads.v_dim, &values(2, shape.rows * heads.v_dim), &mut one.1)?;
    let all: Vec<_> = (0..shape.layers * shape.kv_heads).map(|_| one.clone()).collect();
    let q = values(3, heads.q_heads * heads.k_dim);
    let share = (shape.rows / BLOCK).div_ceil(shape.threads.max(1));

    let pass = |thread: usize| -> Result<(), KernelError> {
        let (mut partial, mut scratch) = (Partial::default(), Scratch::default());
        let mut segments = Vec::new();
        for (keys, values) in &all {
            let blocks = keys.chunks(BLOCK * k_row).zip(values.chunks(BLOCK * v_row));
            segments.clear();
            segments.extend(
                blocks
                    .skip(thread * share)
                    .take(share)
                    .map(|(keys, values)| Segment {
                        k_codec: k,
                        v_codec: v,
                        k_rotated: false,
                        rows: keys.len() / k_row,
                        k: keys,
                        v: values,
                    }),
            );
            kernels.attend_decode(heads, &segments, black_box(&q), &mut partial, None, &mut scratch)?;
            black_box(&partial);
        }
        Ok(())
    };
    pass(0)?;
    let bytes = all.len() * shape.rows * (k_row + v_row);
    let (start, mut rates) = (Instant::now(), Vec::new());
    while rates.len() < 5 || start.elapsed() < Duration::from_secs(1) {
        let seconds = seconds(|| {
            std::thread::scope(|scope| {
                for thread in 0..shape.threads {
                    // It was refused above if at all.
                    scope.spawn(move || pass(thread).is_ok());
                }
            });
        });
        rates.push(bytes as f64 / seconds);
    }
    Ok(median(rates))
}

/// Floating-point operations per second of causal prefill of `t` tokens on one thread: two multiply-adds per dimension
/// of each visible pair, for q·k and weight·v.
///
/// # Errors
/// A shape that kernels refuse.
pub fn prefill(
    kernels: Kernels,
    heads: &Heads,
    past: &[Segment<'_>],
    t: usize,
    last_queries: usize,
) -> Result<f64, KernelError> {
    let k = values(4, t * heads.k_dim);
    let v = values(5, t * heads.v_dim);
    let q = values(6, heads.q_heads * t * heads.k_dim);
    let q: Vec<_> = q
        .chunks(t * heads.k_dim)
        .map(|q| Rows::packed(q, heads.k_dim))
        .collect();
    let mut data = vec![0.0; heads.q_heads * t * heads.v_dim];
    let past_rows: usize = past.iter().map(|s| s.rows).sum();
    let (mut column, mut scratch) = (vec![0.0; past_rows + t], Scratch::default());
    let pairs = t * past_rows + t * (t + 1) / 2;
    let operations = (heads.q_heads * pairs * 2 * (heads.k_dim + heads.v_dim)) as f64;
    let (start, mut rates) = (Instant::now(), Vec::new());
    while rates.len() < 3 || start.elapsed() < Duration::from_secs(1) {
        let mut out: Vec<_> = data
            .chunks_mut(t * heads.v_dim)
            .map(|o| RowsMut::packed(o, heads.v_dim))
            .collect();
        let sums = (last_queries > 0).then_some(ColumnSums {
            last_queries,
            out: &mut column,
        });
        let (k, v) = (Rows::packed(&k, heads.k_dim), Rows::packed(&v, heads.v_dim));
        let once = Instant::now();
        kernels.attend_prefill(heads, past, black_box(k), v, 0, &q, &mut out, sums, &mut scratch)?;
        rates.push(operations / once.elapsed().as_secs_f64());
    }
    Ok(median(rates))
}

/// Values packed and values unpacked per second, of rows of `dim` in memory.
///
/// # Errors
/// A dimension that kernels refuse.
pub fn codec(kernels: Kernels, codec: Codec, dim: usize) -> Result<(f64, f64), KernelError> {
    let rows = (64 << 20) / (4 * dim);
    let mut unpacked = values(7, rows * dim);
    let mut packed = vec![0; rows * codec.row_bytes(dim)];
    let (mut pack, mut unpack) = (Vec::new(), Vec::new());
    for _ in 0..7 {
        let once = Instant::now();
        kernels.pack(codec, dim, black_box(&unpacked), &mut packed)?;
        pack.push((rows * dim) as f64 / once.elapsed().as_secs_f64());
        let once = Instant::now();
        kernels.unpack(codec, dim, black_box(&packed), &mut unpacked)?;
        unpack.push((rows * dim) as f64 / once.elapsed().as_secs_f64());
    }
    Ok((median(pack), median(unpack)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
