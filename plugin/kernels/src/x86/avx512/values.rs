//! Weighted sums of integer values without unpacking them: lanes are columns, several rows at a time.
//!
//! A row's weight times its group's scale is rounded relative to the block's largest, and multiplied with codes as an
//! integer; zeros contribute Σ weight · zero a group. How it is rounded depends on the codec: `values8` and `values4`.

use std::arch::x86_64::*;

use super::codes::{Buffer, Int2, Int3, Int4, ROWS, sixteen, two_groups};
use super::values4::Small;
use super::values8::Int8;
use super::{Avx512, value_tiles};
use crate::Layout;
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, ValueCodes};
use crate::layout::TILE;
use crate::simd::Ahead;

/// Vectors of weights in a block.
pub(super) const CHUNKS: usize = BLOCK / ROWS;
const _: () = assert!(CHUNKS == 4);

/// A head's weights of a block, times the group's scales.
pub(super) type Scaled = [__m512; CHUNKS];

/// How codes are multiplied and added. The CPU must have the instructions, which is part of every promise below.
pub(super) trait Group {
    const CODEC: Codec;
    /// Rounded weights of sixteen rows.
    type Weights: Copy;
    /// Vectors of sums, in an order of their own.
    const SUMS: usize;

    /// Weights of 0.
    ///
    /// # Safety
    /// See above.
    unsafe fn nothing() -> Self::Weights;

    /// Rounds weights, none of them negative. Returns them and their step; corrects `zeros`, whose lanes' sum is added to
    /// every column, for what rounding changed on average.
    ///
    /// # Safety
    /// See above.
    unsafe fn round(scaled: &Scaled, zeros: &mut __m512) -> ([Self::Weights; CHUNKS], f32);

    /// Adds sixteen rows.
    ///
    /// # Safety
    /// `group` must be valid for reading a group's codes at each of the sixteen rows, 16 bytes at least.
    unsafe fn add<const H: usize>(
        group: *const u8,
        stride: usize,
        weights: [Self::Weights; H],
        sums: &mut [[__m512i; MOST]; H],
    );

    /// Each column's sum, in order.
    ///
    /// # Safety
    /// See above.
    unsafe fn columns(sums: [__m512i; MOST]) -> [__m512i; 2];
}

/// Vectors of sums of a head, at most.
pub(super) const MOST: usize = 8;

/// Adds to `out`; false if there is no room for it, and nothing was done.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn add(job: &mut ValueCodes<'_>) -> bool {
    let row = job.codec.row_bytes(job.heads.v_dim);
    let tiled = match job.layout {
        Layout::Rows => 0,
        Layout::ValueTiles => job.values.len() / row / TILE * TILE,
        Layout::KeyTiles | Layout::KeyChannels => return false,
    };
    let rows = &job.values[tiled * row..];
    let mut buffer = Buffer::default();
    // The weights past the rows are 0.
    let Some(values) = sixteen(rows, row, &mut buffer) else {
        return false;
    };
    // See `codes`: sixteen bytes of the only group would pass the row's end.
    if job.codec == Codec::Int2 && job.heads.v_dim == GROUP {
        return false;
    }
    if tiled > 0 {
        value_tiles::add(job);
    }
    if rows.is_empty() {
        return true;
    }
    match job.codec {
        Codec::Int8 => heads::<Int8>(job, values, tiled),
        Codec::Int4 => heads::<Small<Int4, 15>>(job, values, tiled),
        Codec::Int3 => heads::<Small<Int3, 7>>(job, values, tiled),
        Codec::Int2 => heads::<Small<Int2, 3>>(job, values, tiled),
        Codec::F32 | Codec::F16 | Codec::Bf16 | Codec::Fp8 => return false,
    }
    true
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn heads<G: Group>(job: &mut ValueCodes<'_>, values: &[u8], done: usize) {
    let mut h = 0;
    while h < job.heads.q_heads {
        h += match job.heads.q_heads - h {
            1 => dims::<G, 1>(job, values, h, done),
            2 => dims::<G, 2>(job, values, h, done),
            3 => dims::<G, 3>(job, values, h, done),
            // More sums than that would not stay in registers.
            4 if G::SUMS > 4 => dims::<G, 2>(job, values, h, done),
            _ if G::SUMS > 4 => dims::<G, 3>(job, values, h, done),
            _ => dims::<G, 4>(job, values, h, done),
        };
    }
}

/// The usual dimensions are known to the compiler: see `keys`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dims<G: Group, const H: usize>(
    job: &mut ValueCodes<'_>,
    values: &[u8],
    first: usize,
    done: usize,
) -> usize {
    // SAFETY: this function has the instructions.
    unsafe {
        match job.heads.v_dim {
            64 => run::<G, H>(job, values, first, done, 64),
            128 => run::<G, H>(job, values, first, done, 128),
            dim => run::<G, H>(job, values, first, done, dim),
        }
    }
    H
}

/// H heads from `first` on; the rows before these are done.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn run<G: Group, const H: usize>(
    job: &mut ValueCodes<'_>,
    values: &[u8],
    first: usize,
    done: usize,
    dim: usize,
) {
    let (groups, row) = (dim / GROUP, G::CODEC.row_bytes(dim));
    let (params, group_bytes) = (G::CODEC.code_bytes(dim), G::CODEC.group_bytes(GROUP));
    let rows = values.len() / row;
    let chunks = rows.div_ceil(ROWS).min(CHUNKS);
    // The last chunk may overlap the one before: rows that were there already get no weight here.
    let start = |c: usize| (ROWS * c).min(rows - ROWS);
    let sixteen = |c: usize| values[start(c) * row..][..ROWS * row].as_ptr();
    let ahead = match first {
        0 if done == 0 => Ahead::new(job.ahead, chunks * groups),
        _ => Ahead::NOTHING,
    };
    let mut g = 0;
    // SAFETY: the caller's promise; `sixteen` are sixteen rows of `row` bytes, and `g` is one of their groups;
    // see `codes` for what is read past a group; the slices loaded from have sixteen values.
    unsafe {
        while g < groups {
            let mut scaled = [[[_mm512_setzero_ps(); CHUNKS]; H]; 2];
            let mut zeros = [[_mm512_setzero_ps(); H]; 2];
            for c in 0..chunks {
                let both = two_groups(sixteen(c), row, params, g, groups);
                let mask = u16::MAX << (ROWS * c - start(c));
                for h in 0..H {
                    let weights = &job.weights[(first + h) * BLOCK + done + start(c)..][..ROWS];
                    let w = _mm512_maskz_loadu_ps(mask, weights.as_ptr());
                    for i in 0..2 {
                        let (scale, zero) = both[i];
                        scaled[i][h][c] = _mm512_mul_ps(w, scale);
                        zeros[i][h] = _mm512_fmadd_ps(w, zero, zeros[i][h]);
                    }
                }
            }
            for i in 0..2 {
                if g == groups {
                    break;
                }
                let mut rounded = [([G::nothing(); CHUNKS], 0.0); H];
                for h in 0..H {
                    rounded[h] = G::round(&scaled[i][h], &mut zeros[i][h]);
                }
                let mut sums = [[_mm512_setzero_si512(); MOST]; H];
                for c in 0..chunks {
                    ahead.ask(Avx512(()), g * chunks + c);
                    let mut weights = [G::nothing(); H];
                    for h in 0..H {
                        weights[h] = rounded[h].0[c];
                    }
                    G::add(sixteen(c).add(g * group_bytes), row, weights, &mut sums);
                }
                for h in 0..H {
                    let zero = _mm512_reduce_add_ps(zeros[i][h]);
                    let out = &mut job.out[(first + h) * dim + g * GROUP..][..GROUP];
                    finish(G::columns(sums[h]), rounded[h].1, zero, out);
                }
                g += 1;
            }
        }
    }
}

/// Adds a group's sums, in steps, and its zeros to 32 outputs.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn finish(columns: [__m512i; 2], step: f32, zero: f32, out: &mut [f32]) {
    let (step, zero) = (_mm512_set1_ps(step), _mm512_set1_ps(zero));
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate().take(2) {
        let x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(columns[i]), step, zero);
        // SAFETY: the array has sixteen values.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_add_ps(_mm512_loadu_ps(out.as_ptr()), x)) };
    }
}

/// The largest of a head's scaled weights. Less than the least adds nothing, and its inverse would overflow.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn top(scaled: &Scaled) -> f32 {
    let [a, b, c, d] = *scaled;
    _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d))).max(1e-30)
}

/// The halves of both added: those of the first, then those of the second.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn halved(a: __m512i, b: __m512i) -> __m512i {
    let low = _mm512_shuffle_i64x2::<0b01_00_01_00>(a, b);
    _mm512_add_epi32(low, _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b))
}
