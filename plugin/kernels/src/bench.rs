//! Measuring: what the kernels move and compute per second, next to what the machine could.
//!
//! Invariant: every figure of memory comes from passes over a working set several times larger than the caches,
//! so that none finds its rows in them. Work is timed in units far shorter than a time slice and the median unit
//! counts, so other load on the machine disturbs little; roofline and kernels are timed alike, on the same number
//! of threads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::q8_0::{BLOCK as Q8_0, CODES};
use crate::{
    Codec, ColumnSums, Heads, KernelError, Kernels, Partial, Q8Rows, Rows, RowsMut, Scratch, Segment,
};

/// Rows of a segment, as stores hold them.
const BLOCK: usize = 64;

/// Bytes that begin with a cache line, as stores hold them.
struct Lines {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Lines {
    fn of(bytes: &[u8]) -> Self {
        let mut all = vec![0; bytes.len() + 64];
        let start = all.as_ptr().align_offset(64).min(64);
        all[start..start + bytes.len()].copy_from_slice(bytes);
        Self {
            bytes: all,
            start,
            len: bytes.len(),
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

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

/// Bytes per second of `threads` that read memory front to back.
#[must_use]
pub fn roofline(threads: usize) -> f64 {
    const UNIT: usize = 1 << 17;
    let memory = vec![1u64; (256 << 20) / 8];
    let share = (memory.len() / UNIT).div_ceil(threads.max(1)) * UNIT;
    let parts: Vec<_> = memory.chunks(share).collect();
    timed(parts.len(), |thread, times| {
        for unit in parts[thread].chunks_exact(UNIT) {
            let once = Instant::now();
            black_box(unit.iter().fold(0, |acc, x| acc | x));
            times.push(UNIT as f64 * 8.0 / once.elapsed().as_secs_f64());
        }
    })
}

/// Floating-point operations per second of one thread that has nothing to do but multiply and add.
#[must_use]
pub fn peak(kernels: Kernels) -> f64 {
    timed(1, |_, times| {
        for _ in 0..100 {
            let once = Instant::now();
            let operations = kernels.multiply_adds(10_000);
            times.push(operations as f64 / once.elapsed().as_secs_f64());
        }
    })
}

/// Runs `work` on each thread for half a second; it notes the rate of every unit. Adds up the threads' medians.
fn timed(threads: usize, work: impl Fn(usize, &mut Vec<f64>) + Sync) -> f64 {
    let run = |thread| {
        let (start, mut times) = (Instant::now(), Vec::new());
        while times.is_empty() || start.elapsed() < Duration::from_millis(500) {
            work(thread, &mut times);
        }
        median(times)
    };
    let run = &run;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || run(thread)))
            .collect();
        threads.into_iter().filter_map(|t| t.join().ok()).sum()
    })
}

/// Packed bytes of K and V that decode attends to per second, over all layers again and again.
///
/// # Errors
/// A shape that kernels refuse.
pub fn decode(kernels: Kernels, shape: &Decode, k: Codec, v: Codec) -> Result<f64, KernelError> {
    let heads = &shape.heads;
    let (k_row, v_row) = (k.row_bytes(heads.k_dim), v.row_bytes(heads.v_dim));
    let (k_layout, v_layout) = (
        kernels.key_layout(k, heads.k_dim),
        kernels.value_layout(v, heads.v_dim),
    );
    // One head's rows, copied for every layer and KV head.
    let mut one = (vec![0; shape.rows * k_row], vec![0; shape.rows * v_row]);
    let keys = values(1, shape.rows * heads.k_dim);
    kernels.pack_run(k_layout, k, heads.k_dim, &keys, &mut one.0)?;
    let numbers = values(2, shape.rows * heads.v_dim);
    kernels.pack_run(v_layout, v, heads.v_dim, &numbers, &mut one.1)?;
    let all: Vec<_> = (0..shape.layers * shape.kv_heads)
        .map(|_| (Lines::of(&one.0), Lines::of(&one.1)))
        .collect();
    let q = values(3, heads.q_heads * heads.k_dim);
    let share = (shape.rows / BLOCK).div_ceil(shape.threads.max(1));

    let units: Vec<Vec<Segment<'_>>> = all
        .iter()
        .map(|(keys, values)| {
            let blocks = keys
                .bytes()
                .chunks(BLOCK * k_row)
                .zip(values.bytes().chunks(BLOCK * v_row));
            blocks
                .map(|(keys, values)| Segment {
                    k_codec: k,
                    v_codec: v,
                    k_layout,
                    v_layout,
                    k_rotated: false,
                    rows: keys.len() / k_row,
                    k: keys,
                    v: values,
                })
                .collect()
        })
        .collect();
    // Shapes are checked here, once, so that threads need not tell of them.
    let (mut partial, mut scratch) = (Partial::default(), Scratch::default());
    kernels.attend_decode(heads, &units[0], &q, &mut partial, None, &mut scratch)?;
    Ok(timed(shape.threads, |thread, times| {
        let (mut partial, mut scratch) = (Partial::default(), Scratch::default());
        for unit in &units {
            let part = unit.chunks(share).nth(thread).unwrap_or_default();
            let rows: usize = part.iter().map(|s| s.rows).sum();
            let once = Instant::now();
            let done = kernels.attend_decode(heads, part, black_box(&q), &mut partial, None, &mut scratch);
            if black_box(done).is_ok() {
                times.push((rows * (k_row + v_row)) as f64 / once.elapsed().as_secs_f64());
            }
        }
    }))
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
            largest: false,
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

/// Bytes of Q8_0 weights per second, of products with so many rows of activations on `threads` threads: `columns` columns
/// of `k` values, a multiple of 32.
///
/// # Errors
/// A shape that kernels refuse.
pub fn product(
    kernels: Kernels,
    k: usize,
    columns: usize,
    rows: usize,
    threads: usize,
) -> Result<f64, KernelError> {
    const UNIT: usize = 64;
    let mut weights = vec![0; columns * k / CODES * Q8_0];
    for (i, block) in weights.chunks_exact_mut(Q8_0).enumerate() {
        block[1] = 0x2c;
        for (j, code) in block[2..].iter_mut().enumerate() {
            *code = (i * 7 + j * 13) as u8;
        }
    }
    let mut activations = Q8Rows::default();
    activations.resize(rows, k)?;
    for mut part in activations.parts(rows.next_multiple_of(2)) {
        part.quantize(&values(8, rows * k));
    }
    let share = columns.div_ceil(threads.max(1)).next_multiple_of(UNIT);
    let run = |columns: std::ops::Range<usize>, out: &mut [f32]| {
        let mut out: Vec<&mut [f32]> = out.chunks_exact_mut(UNIT).take(rows).collect();
        kernels.q8_0_matmul(&weights, columns, &activations, 0..rows, &mut out)
    };
    // Shapes are checked here, once, so that threads need not tell of them.
    run(0..UNIT, &mut vec![0.0; rows * UNIT])?;
    Ok(timed(threads, |thread, times| {
        let mut out = vec![0.0; rows * UNIT];
        let own = (thread * share).min(columns)..((thread + 1) * share).min(columns);
        for first in own.step_by(UNIT).filter(|first| first + UNIT <= columns) {
            let once = Instant::now();
            if black_box(run(first..first + UNIT, black_box(&mut out))).is_ok() {
                times.push((UNIT * k / CODES * Q8_0) as f64 / once.elapsed().as_secs_f64());
            }
        }
    }))
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
