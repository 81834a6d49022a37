//! Weighted sums of integer values without unpacking them: lanes are columns, several rows at a time.
//!
//! A row's weight times its group's scale is rounded relative to the block's largest, and multiplied with codes as an
//! integer; zeros contribute Σ weight · zero a group. How it is rounded depends on the codec: `values8` and `values4`.

use std::arch::x86_64::*;

use super::Avx512;
use super::codes::{Buffer, Int2, Int3, Int4, ROWS, sixteen, two_groups};
use super::values4::Small;
use super::values8::Int8;
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, ValueCodes};
use crate::simd::Ahead;

/// Vectors of weights in a block.
pub(super) const CHUNKS: usize = BLOCK / ROWS;
const _: () = assert!(CHUNKS == 4);

/// A head's weights of a block, times the group's scales.
pub(super) type Scaled = [__m512; CHUNKS];

/// How codes are multiplied and added. The CPU must have the instructions, which is part of every promise below.
pub(super) trait Group {
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
    let mut buffer = Buffer::default();
    // The weights past the rows are 0.
    let Some(values) = sixteen(job.values, row, &mut buffer) else {
        return false;
    };
    // See `codes`: sixteen bytes of the only group would pass the row's end.
    if job.codec == Codec::Int2 && job.heads.v_dim == GROUP {
        return false;
    }
    match job.codec {
        Codec::Int8 => heads::<Int8>(job, values, row),
        Codec::Int4 => heads::<Small<Int4, 15>>(job, values, row),
        Codec::Int3 => heads::<Small<Int3, 7>>(job, values, row),
        Codec::Int2 => heads::<Small<Int2, 3>>(job, values, row),
        Codec::F32 | Codec::F16 | Codec::Bf16 => return false,
    }
    true
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn heads<G: Group>(job: &mut ValueCodes<'_>, values: &[u8], row: usize) {
    let mut h = 0;
    while h < job.heads.q_heads {
        h += match job.heads.q_heads - h {
            1 => run::<G, 1>(job, values, row, h),
            2 => run::<G, 2>(job, values, row, h),
            3 => run::<G, 3>(job, values, row, h),
            // More sums than that would not stay in registers.
            4 if G::SUMS > 4 => run::<G, 2>(job, values, row, h),
            _ if G::SUMS > 4 => run::<G, 3>(job, values, row, h),
            _ => run::<G, 4>(job, values, row, h),
        };
    }
}

/// H heads from `first` on. Returns H.
#[expect(
    clippy::needless_range_loop,
    reason = "a chunk of rows is found by its number too"
)]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn run<G: Group, const H: usize>(job: &mut ValueCodes<'_>, values: &[u8], row: usize, first: usize) -> usize {
    let dim = job.heads.v_dim;
    let groups = dim / GROUP;
    let (params, group_bytes) = (job.codec.code_bytes(dim), job.codec.group_bytes(GROUP));
    let rows = values.len() / row;
    let chunks = rows.div_ceil(ROWS);
    // The last chunk may overlap the one before: rows that were there already get no weight here.
    let start = |c: usize| (ROWS * c).min(rows - ROWS);
    let mask = |c: usize| u16::MAX << (ROWS * c - start(c));
    let sixteen = |c: usize| values[start(c) * row..][..ROWS * row].as_ptr();
    let ahead = match first {
        0 => Ahead::new(job.ahead, chunks * groups),
        _ => Ahead::NOTHING,
    };
    let mut g = 0;
    while g < groups {
        let mut scaled = [[[_mm512_setzero_ps(); CHUNKS]; H]; 2];
        let mut zeros = [[_mm512_setzero_ps(); H]; 2];
        for c in 0..chunks {
            // SAFETY: sixteen rows of `row` bytes, and `g` one of their groups.
            let both = unsafe { two_groups(sixteen(c), row, params, g, groups) };
            for h in 0..H {
                let weights = &job.weights[(first + h) * BLOCK + start(c)..][..ROWS];
                // SAFETY: the slice has sixteen values.
                let w = unsafe { _mm512_maskz_loadu_ps(mask(c), weights.as_ptr()) };
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
            // SAFETY: this function has the instructions, here and below.
            let nothing = unsafe { G::nothing() };
            let mut rounded = [([nothing; CHUNKS], 0.0); H];
            for h in 0..H {
                // SAFETY: see above.
                rounded[h] = unsafe { G::round(&scaled[i][h], &mut zeros[i][h]) };
            }
            let mut sums = [[_mm512_setzero_si512(); MOST]; H];
            for c in 0..chunks {
                ahead.ask(Avx512(()), g * chunks + c);
                let mut weights = [nothing; H];
                for h in 0..H {
                    weights[h] = rounded[h].0[c];
                }
                // SAFETY: sixteen rows, and group `g` of each lies in it; see `codes` for what else is read.
                unsafe { G::add(sixteen(c).add(g * group_bytes), row, weights, &mut sums) };
            }
            for h in 0..H {
                let zero = _mm512_reduce_add_ps(zeros[i][h]);
                let out = &mut job.out[(first + h) * dim + g * GROUP..][..GROUP];
                // SAFETY: this function has the instructions.
                finish(unsafe { G::columns(sums[h]) }, rounded[h].1, zero, out);
            }
            g += 1;
        }
    }
    H
}

/// Adds a group's sums, in steps, and its zeros to 32 outputs.
#[inline]
#[target_feature(enable = "avx512f")]
fn finish(columns: [__m512i; 2], step: f32, zero: f32, out: &mut [f32]) {
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
