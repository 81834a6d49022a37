//! The oracle: plain loops, obviously right. Attention is computed in f64 on unpacked rows.
//!
//! Invariant: [`pack`] writes the same bytes as every other implementation, bit for bit.

mod layout;

use half::{bf16, f16};

use crate::codec::{F16_MAX, GROUP, PARAM_BYTES};
use crate::partial::Stat;
use crate::types::Prefill;
pub(crate) use layout::{of_rows, pack_levels, pack_run, to_rows, unpack_levels, unpack_run};

use crate::{Codec, ColumnSums, Heads, KernelError, Partial, RowsMut, Scratch, Segment, check};

/// See [`crate::Kernels::pack`].
pub(crate) fn pack(codec: Codec, dim: usize, src: &[f32], dst: &mut [u8]) -> Result<(), KernelError> {
    pack_by(codec, dim, src, dst, None)
}

/// The same, with codes of a table.
fn pack_by(
    codec: Codec,
    dim: usize,
    src: &[f32],
    dst: &mut [u8],
    table: Option<&[f32]>,
) -> Result<(), KernelError> {
    check::codec(codec, dim, src.len(), dst.len())?;
    let rows = src
        .chunks_exact(dim)
        .zip(dst.chunks_exact_mut(codec.row_bytes(dim)));
    for (row, (src, dst)) in rows.enumerate() {
        for (column, &given) in src.iter().enumerate() {
            if !given.is_finite() {
                return Err(KernelError::NonFinite { row, column, given });
            }
        }
        match codec {
            Codec::F32 => {
                for (i, x) in src.iter().enumerate() {
                    dst[4 * i..4 * i + 4].copy_from_slice(&x.to_le_bytes());
                }
            }
            Codec::F16 => {
                for (i, x) in src.iter().enumerate() {
                    dst[2 * i..2 * i + 2].copy_from_slice(&f16::from_f32(saturate(*x)).to_le_bytes());
                }
            }
            Codec::Bf16 => {
                let largest = bf16::MAX.to_f32();
                for (i, x) in src.iter().enumerate() {
                    let x = bf16::from_f32(x.clamp(-largest, largest));
                    dst[2 * i..2 * i + 2].copy_from_slice(&x.to_le_bytes());
                }
            }
            Codec::Fp8 => {
                for (x, byte) in src.iter().zip(dst) {
                    *byte = fp8(*x);
                }
            }
            Codec::Int8 | Codec::Int4 | Codec::Int3 | Codec::Int2 => pack_codes(codec, src, dst, table),
        }
    }
    Ok(())
}

/// The code whose value is nearest; of two as near, the even one.
fn fp8(x: f32) -> u8 {
    let x = x.clamp(-crate::fp8::MAX, crate::fp8::MAX);
    let distance = |code: u8| (f64::from(fp8_value(code)) - f64::from(x)).abs();
    let codes = (0..0x7f).map(|code| code | (u8::from(x.is_sign_negative()) << 7));
    codes
        .min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1))))
        .unwrap_or_default()
}

fn fp8_value(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The code of a value between 0 and `levels`: of a table, the level that is nearest, the lower of two.
fn nearest(x: f32, levels: f32, table: Option<&[f32]>) -> u8 {
    match table {
        None => x.round_ties_even().clamp(0.0, levels) as u8,
        Some(table) => {
            let x = x.clamp(0.0, levels);
            table
                .windows(2)
                .filter(|pair| x > (pair[0] + pair[1]) / 2.0)
                .count() as u8
        }
    }
}

fn pack_codes(codec: Codec, src: &[f32], dst: &mut [u8], table: Option<&[f32]>) {
    let levels = f32::from(codec.levels().unwrap_or(u8::MAX));
    let (codes, params) = dst.split_at_mut(codec.code_bytes(src.len()));
    codes.fill(0);
    let mut at = 0;
    for (g, group) in src.chunks(GROUP).enumerate() {
        let min = group.iter().copied().fold(f32::INFINITY, f32::min);
        let max = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (scale, zero) = parameters(min, max, levels);
        params[PARAM_BYTES * g..][..2].copy_from_slice(&scale.to_le_bytes());
        params[PARAM_BYTES * g + 2..][..2].copy_from_slice(&zero.to_le_bytes());
        let (scale, zero) = (scale.to_f32(), zero.to_f32());
        for (i, x) in group.iter().enumerate() {
            if scale != 0.0 {
                let code = nearest((saturate(*x) - zero) / scale, levels, table);
                put(codec, &mut codes[at..], group.len(), i, code);
            }
        }
        at += codec.group_bytes(group.len());
    }
}

/// Writes code `i` of a group of `n` to the group's bytes, which were 0.
pub(crate) fn put(codec: Codec, group: &mut [u8], n: usize, i: usize, code: u8) {
    let mut start = 0;
    for plane in codec.planes() {
        let bits = usize::from(plane.bits);
        let bytes = (n * bits).div_ceil(8);
        let part = (code >> plane.shift) & (u8::MAX >> (8 - plane.bits));
        group[start + i % bytes] |= part << (bits * (i / bytes));
        start += bytes;
    }
}

/// Code `i` of a group of `n`.
pub(crate) fn code(codec: Codec, group: &[u8], n: usize, i: usize) -> u8 {
    let (mut start, mut code) = (0, 0);
    for plane in codec.planes() {
        let bits = usize::from(plane.bits);
        let bytes = (n * bits).div_ceil(8);
        let part = group[start + i % bytes] >> (bits * (i / bytes));
        code |= (part & (u8::MAX >> (8 - plane.bits))) << plane.shift;
        start += bytes;
    }
    code
}

/// Scale and zero of a group with these extremes, rounded so that no value is outside of what the
/// codes reach. Shared by all implementations: it runs once a group.
pub(crate) fn parameters(min: f32, max: f32, levels: f32) -> (f16, f16) {
    // Which zero is the extreme of 0.0 and -0.0 depends on the order; adding 0.0 makes both 0.0.
    let (min, max) = (saturate(min) + 0.0, saturate(max) + 0.0);
    let mut zero = f16::from_f32(min);
    if zero.to_f32() > min {
        zero = step(zero, false);
    }
    let wanted = (max - zero.to_f32()) / levels;
    let mut scale = f16::from_f32(wanted);
    if scale.to_f32() < wanted {
        scale = step(scale, true);
    }
    (scale, zero)
}

/// The next f16 above or below a finite one.
fn step(x: f16, up: bool) -> f16 {
    let bits = x.to_bits();
    let smallest = if up { 0x0001 } else { 0x8001 };
    match (bits & 0x7fff == 0, (bits & 0x8000 == 0) == up) {
        (true, _) => f16::from_bits(smallest),
        (false, true) => f16::from_bits(bits + 1),
        (false, false) => f16::from_bits(bits - 1),
    }
}

fn saturate(x: f32) -> f32 {
    x.clamp(-F16_MAX, F16_MAX)
}

/// See [`crate::Kernels::unpack`].
pub(crate) fn unpack(codec: Codec, dim: usize, src: &[u8], dst: &mut [f32]) -> Result<(), KernelError> {
    check::codec(codec, dim, dst.len(), src.len())?;
    for (src, dst) in src
        .chunks_exact(codec.row_bytes(dim))
        .zip(dst.chunks_exact_mut(dim))
    {
        for (i, x) in dst.iter_mut().enumerate() {
            *x = value(codec, dim, src, i, None);
        }
    }
    Ok(())
}

/// Value `i` of a packed row.
fn value(codec: Codec, dim: usize, row: &[u8], i: usize, table: Option<&[f32]>) -> f32 {
    let pair = |at: usize| [row[at], row[at + 1]];
    let code = match codec {
        Codec::F32 => {
            return f32::from_le_bytes([row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]]);
        }
        Codec::F16 => return f16::from_le_bytes(pair(2 * i)).to_f32(),
        Codec::Bf16 => return bf16::from_le_bytes(pair(2 * i)).to_f32(),
        Codec::Fp8 => return fp8_value(row[i]),
        Codec::Int8 | Codec::Int4 | Codec::Int3 | Codec::Int2 => {
            let group = i / GROUP;
            let n = GROUP.min(dim - GROUP * group);
            code(codec, &row[codec.group_bytes(GROUP) * group..], n, i % GROUP)
        }
    };
    let params = codec.code_bytes(dim) + PARAM_BYTES * (i / GROUP);
    let (scale, zero) = (
        f16::from_le_bytes(pair(params)),
        f16::from_le_bytes(pair(params + 2)),
    );
    scale.to_f32() * level(code, table) + zero.to_f32()
}

/// What a code stands for.
fn level(code: u8, table: Option<&[f32]>) -> f32 {
    table.map_or(f32::from(code), |table| table[usize::from(code)])
}

/// See [`crate::Kernels::rotate`].
pub(crate) fn rotate(dim: usize, rows: &mut [f32]) -> Result<(), KernelError> {
    check::rotate(dim, rows.len())?;
    for row in rows.chunks_exact_mut(dim) {
        for (start, size) in parts(dim) {
            let part: Vec<f64> = row[start..start + size].iter().map(|x| f64::from(*x)).collect();
            for (i, out) in row[start..start + size].iter_mut().enumerate() {
                // Entry (i, j) of a Hadamard matrix is −1 to the number of bits that i and j share.
                let sign = |j: usize| {
                    if (i & j).count_ones().is_multiple_of(2) {
                        1.0
                    } else {
                        -1.0
                    }
                };
                let sum: f64 = part.iter().enumerate().map(|(j, x)| sign(j) * x).sum();
                *out = (sum / (size as f64).sqrt()) as f32;
            }
        }
    }
    Ok(())
}

/// Starts and sizes of the power-of-two parts of a row, largest first. Part of the stored format.
pub(crate) fn parts(dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..usize::BITS)
        .rev()
        .map(|bit| 1 << bit)
        .filter(move |size| dim & size != 0)
        .scan(0, |start, size| {
            *start += size;
            Some((*start - size, size))
        })
}

/// See [`crate::Kernels::attend_decode`].
pub(crate) fn attend_decode(
    heads: &Heads,
    segments: &[Segment<'_>],
    q: &[f32],
    partial: &mut Partial,
    mut weights: Option<&mut [f32]>,
    _scratch: &mut Scratch,
) -> Result<(), KernelError> {
    let rows = check::decode(heads, segments, q, weights.as_deref())?;
    partial.reset(heads);
    if rows == 0 {
        return Ok(());
    }
    let (k, v) = unpack_all(heads, segments)?;
    let outs = partial.out.chunks_exact_mut(heads.v_dim);
    for (h, (q, out)) in q.chunks_exact(heads.k_dim).zip(outs).enumerate() {
        let (stat, exps) = attend_one(heads, q, &k, &v, out);
        out.iter_mut().for_each(|out| *out *= stat.sum);
        partial.stats[h] = stat;
        if let Some(weights) = &mut weights {
            for (weight, e) in weights[h * rows..].iter_mut().zip(exps) {
                *weight = e as f32;
            }
        }
    }
    Ok(())
}

/// See [`crate::Kernels::attend_prefill`].
pub(crate) fn attend_prefill(
    call: &Prefill<'_>,
    out: &mut [RowsMut<'_>],
    mut sums: Option<ColumnSums<'_>>,
    _scratch: &mut Scratch,
) -> Result<(), KernelError> {
    check::prefill(call, out, sums.as_ref())?;
    let (heads, n) = (call.heads, call.queries());
    let (mut k, mut v) = unpack_all(heads, call.past)?;
    for i in 0..(call.first_query + n).min(call.fresh_k.rows) {
        k.push(call.fresh_k.row(i).to_vec());
        v.push(call.fresh_v.row(i).to_vec());
        let Some(i) = i.checked_sub(call.first_query) else {
            continue;
        };
        for (q, out) in call.q.iter().zip(out.iter_mut()) {
            let (stat, exps) = attend_one(heads, q.row(i), &k, &v, out.row(i));
            match &mut sums {
                Some(sums) if i.saturating_add(sums.last_queries) >= n => {
                    for (sum, e) in sums.out.iter_mut().zip(exps) {
                        let weight = (e / f64::from(stat.sum)) as f32;
                        *sum = if sums.largest {
                            sum.max(weight)
                        } else {
                            *sum + weight
                        };
                    }
                }
                _ => {}
            }
        }
    }
    Ok(())
}

type Unpacked = Vec<Vec<f32>>;

fn unpack_all(heads: &Heads, segments: &[Segment<'_>]) -> Result<(Unpacked, Unpacked), KernelError> {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for s in segments {
        let mut k = vec![0.0; s.rows * heads.k_dim];
        let mut v = vec![0.0; s.rows * heads.v_dim];
        layout::unpack_first(s.k_layout, s.k_codec, heads.k_dim, s.k, &mut k, None);
        layout::unpack_first(s.v_layout, s.v_codec, heads.v_dim, s.v, &mut v, None);
        if s.k_rotated {
            rotate(heads.k_dim, &mut k)?;
        }
        keys.extend(k.chunks_exact(heads.k_dim).map(<[f32]>::to_vec));
        values.extend(v.chunks_exact(heads.v_dim).map(<[f32]>::to_vec));
    }
    Ok((keys, values))
}

/// One query over all given rows: softmax(scale · q·k, capped) · v. Returns each row's e^(logit − maximum).
fn attend_one(heads: &Heads, q: &[f32], k: &[Vec<f32>], v: &[Vec<f32>], out: &mut [f32]) -> (Stat, Vec<f64>) {
    let score = |k: &Vec<f32>| {
        let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
        let score = dot * f64::from(heads.scale);
        heads
            .softcap
            .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
    };
    // Logits in f32, as the maximum is handed out: next to a rounded maximum of, say, 10^20 unrounded logits are
    // nothing, or everything.
    let scores: Vec<f32> = k.iter().map(|k| score(k) as f32).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = scores
        .iter()
        .map(|s| (f64::from(*s) - f64::from(max)).exp())
        .collect();
    let sum: f64 = exps.iter().sum();
    for (d, out) in out.iter_mut().enumerate() {
        let values = exps.iter().zip(v).map(|(e, v)| e * f64::from(v[d]));
        *out = (values.sum::<f64>() / sum) as f32;
    }
    (Stat { max, sum: sum as f32 }, exps)
}
