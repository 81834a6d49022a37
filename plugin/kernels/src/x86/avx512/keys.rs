//! Logits of integer keys without unpacking them: sixteen keys at a time, a lane each.
//!
//! A query is rounded to integers of one or two signed bytes (see `query`); codes are unsigned bytes, so `vpdpbusd`
//! multiplies and adds four of them at once. Scales and zeros apply to whole groups:
//! q·k = Σ_g scale_g · (Σ q·code) + zero_g · Σ q.

use std::arch::x86_64::*;

use super::super::query::{self, COLUMNS, Query};
use super::codes::{Bits, Buffer, Int2, Int3, Int4, ROWS, sixteen, transpose, two_groups};
use super::{Avx512, bytes, key_channels, key_tiles};
use crate::Layout;
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, KeyCodes};
use crate::simd::Ahead;

/// The columns of one group of sixteen keys: lane `r` of column `c` has codes `4c` to `4c + 3` of key `r`.
trait Group {
    const CODEC: Codec;

    /// # Safety
    /// `group` must be valid for reading 16 bytes (32 for int8) at each of the sixteen rows, and the CPU must have the
    /// instructions.
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS];
}

struct Int8;

impl Group for Int8 {
    const CODEC: Codec = Codec::Int8;

    #[inline(always)]
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise.
        unsafe {
            let [a, b, c, d] = transpose(group, stride);
            let [e, f, g, h] = transpose(group.add(16), stride);
            [a, b, c, d, e, f, g, h]
        }
    }
}

impl<B: Bits> Group for B {
    const CODEC: Codec = B::CODEC;

    #[inline(always)]
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise.
        unsafe { B::codes(transpose(group, stride)) }
    }
}

/// Makes `scores`; false if there is no way or no room for it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn score(job: &mut KeyCodes<'_>) -> bool {
    let done = match job.layout {
        Layout::Rows => 0,
        Layout::KeyTiles => key_tiles::score(job),
        Layout::KeyChannels => return key_channels::score(job),
        Layout::ValueTiles => return false,
    };
    let row = job.codec.row_bytes(job.heads.k_dim);
    let mut buffer = Buffer::default();
    let rows = &job.keys[done * row..];
    if rows.is_empty() {
        return true;
    }
    let Some(keys) = sixteen(rows, row, &mut buffer) else {
        return false;
    };
    // See `codes`: sixteen bytes of the only group would pass the row's end.
    if job.codec == Codec::Int2 && job.heads.k_dim == GROUP {
        return false;
    }
    match (job.codec, query::prepare(job, bytes)) {
        (Codec::Int8, _) => heads::<Int8, 2>(job, keys, done),
        (Codec::Int4, 1) => heads::<Int4, 1>(job, keys, done),
        (Codec::Int3, 1) => heads::<Int3, 1>(job, keys, done),
        (Codec::Int2, 1) => heads::<Int2, 1>(job, keys, done),
        (Codec::Int4, _) => heads::<Int4, 2>(job, keys, done),
        (Codec::Int3, _) => heads::<Int3, 2>(job, keys, done),
        (Codec::Int2, _) => heads::<Int2, 2>(job, keys, done),
        (Codec::F32 | Codec::F16 | Codec::Bf16 | Codec::Fp8, _) => return false,
    }
    true
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn heads<G: Group, const BYTES: usize>(job: &mut KeyCodes<'_>, keys: &[u8], done: usize) {
    let mut h = 0;
    while h < job.heads.q_heads {
        h += match job.heads.q_heads - h {
            1 => dims::<G, BYTES, 1>(job, keys, h, done),
            2 => dims::<G, BYTES, 2>(job, keys, h, done),
            3 => dims::<G, BYTES, 3>(job, keys, h, done),
            _ => dims::<G, BYTES, 4>(job, keys, h, done),
        };
    }
}

/// The usual dimensions are known to the compiler: every address is a constant away from the first row's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dims<G: Group, const BYTES: usize, const H: usize>(
    job: &mut KeyCodes<'_>,
    keys: &[u8],
    first: usize,
    done: usize,
) -> usize {
    // SAFETY: this function has the instructions.
    unsafe {
        match job.heads.k_dim {
            64 => run::<G, BYTES, H>(job, keys, first, done, 64),
            128 => run::<G, BYTES, H>(job, keys, first, done, 128),
            dim => run::<G, BYTES, H>(job, keys, first, done, dim),
        }
    }
    H
}

/// H heads from `first` on, with queries of so many bytes; the rows before these are done.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn run<G: Group, const BYTES: usize, const H: usize>(
    job: &mut KeyCodes<'_>,
    keys: &[u8],
    first: usize,
    done: usize,
    dim: usize,
) {
    let (groups, row) = (dim / GROUP, G::CODEC.row_bytes(dim));
    let (params, group_bytes) = (G::CODEC.code_bytes(dim), G::CODEC.group_bytes(GROUP));
    let mut queries = [Query::<BYTES>::of(job.prepared, groups, first); H];
    for h in 1..H {
        queries[h] = Query::of(job.prepared, groups, first + h);
    }
    let rows = keys.len() / row;
    let ahead = match first {
        0 if done == 0 => Ahead::new(job.ahead, rows.div_ceil(ROWS) * groups),
        _ => Ahead::NOTHING,
    };
    let mut r = 0;
    while r < rows {
        // The last sixteen may overlap the ones before; the same dot products are written again.
        let start = r.min(rows - ROWS);
        let keys = keys[start * row..][..ROWS * row].as_ptr();
        // SAFETY: the caller's promise; `keys` is sixteen rows of `row` bytes, and `g` is one of their groups
        // and of the queries'; see `codes` for what is read past a group; the slices stored to have sixteen values.
        unsafe {
            let mut acc = [_mm512_setzero_ps(); H];
            let mut g = 0;
            while g < groups {
                let both = two_groups(keys, row, params, g, groups);
                for i in 0..2 {
                    if g == groups {
                        break;
                    }
                    let (scale, zero) = both[i];
                    ahead.ask(Avx512(()), r / ROWS * groups + g);
                    let columns = G::columns(keys.add(g * group_bytes), row);
                    for h in 0..H {
                        let (sum, rest) = queries[h].sums(g);
                        let dot = dot(&columns, queries[h].group(g));
                        let dot = _mm512_add_ps(dot, _mm512_set1_ps(rest));
                        acc[h] = _mm512_fmadd_ps(dot, scale, acc[h]);
                        acc[h] = _mm512_fmadd_ps(zero, _mm512_set1_ps(sum), acc[h]);
                    }
                    g += 1;
                }
            }
            for h in 0..H {
                let dots = _mm512_mul_ps(acc[h], _mm512_set1_ps(queries[h].step()));
                let out = &mut job.scores[(first + h) * BLOCK + done + start..][..ROWS];
                _mm512_storeu_ps(out.as_mut_ptr(), dots);
            }
        }
        r += ROWS;
    }
}

/// Dot products of one group with a query, in steps.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
pub(super) unsafe fn dot<const BYTES: usize>(
    columns: &[__m512i; COLUMNS],
    q: &[[i32; BYTES]; COLUMNS],
) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        // Two chains a byte: a `vpdpbusd` takes four cycles until the next can add to it.
        let mut acc = [[_mm512_setzero_si512(); 2]; BYTES];
        for c in 0..COLUMNS {
            for b in 0..BYTES {
                acc[b][c % 2] = _mm512_dpbusd_epi32(acc[b][c % 2], columns[c], _mm512_set1_epi32(q[c][b]));
            }
        }
        // At most 32 · 255 · 32639: no overflow.
        let mut sum = _mm512_add_epi32(acc[0][0], acc[0][1]);
        for b in 1..BYTES {
            let low = _mm512_add_epi32(acc[b][0], acc[b][1]);
            sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sum), low);
        }
        _mm512_cvtepi32_ps(sum)
    }
}
