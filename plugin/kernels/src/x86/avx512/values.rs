//! Weighted sums of integer values without unpacking them: lanes are columns, a pair of rows at a time.
//!
//! A row's weight times its group's scale is rounded to 15 bits relative to the block's largest; codes are
//! widened to 16 bits and those of two rows put side by side, so that `vpdpwssd` multiplies and adds both.
//! Zeros contribute Σ weight · zero a group. The rounding is 2^-16 of the block's largest contribution, far
//! below what the codes' own rounding does.

use std::arch::x86_64::*;

use super::Avx512;
use super::keys::{parameters, parameters2};
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, ValueCodes};
use crate::simd::Ahead;

/// Rows whose scales and weights share a vector.
const ROWS: usize = 16;
const CHUNKS: usize = BLOCK / ROWS;
/// Bytes of the buffer for fewer than sixteen rows.
const BUFFER: usize = 8192;

// A lane adds up half of a block's rows.
const _: () = assert!((BLOCK as u64 / 2) * 32767 * 255 < i32::MAX as u64);

const _: () = assert!(CHUNKS == 4);
const ACCUMULATORS: usize = 8;

/// How the codes of a group are multiplied and added.
trait Group {
    /// Adds sixteen rows to the accumulators, whose layout is the codec's own. Weights are 16 bits a row.
    ///
    /// # Safety
    /// `group` must be valid for reading a group's codes at each of the sixteen rows.
    unsafe fn add<const H: usize>(
        group: *const u8,
        stride: usize,
        weights: [__m256i; H],
        acc: &mut [[__m512i; ACCUMULATORS]; H],
    );

    /// Each column's sum. Within eight columns the even ones come first: 0, 2, 4, 6, 1, 3, 5, 7, 8, 10 and so on.
    fn columns(acc: [__m512i; ACCUMULATORS]) -> [__m512i; 2];
}

/// The codes of one group in two rows, as bytes.
trait Pair {
    /// 32 codes of the first row, then of the second, in order.
    ///
    /// # Safety
    /// Both must be valid for reading a group's codes.
    unsafe fn codes(a: *const u8, b: *const u8) -> __m512i;
}

struct Int8;
struct Int4;
struct Int3;
struct Int2;

/// Adds to `out`; false if there is no room for it, and nothing was done.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn add(job: &mut ValueCodes<'_>) -> bool {
    let row = job.codec.row_bytes(job.heads.v_dim);
    if job.rows < ROWS && ROWS * row > BUFFER {
        return false;
    }
    let mut buffer;
    let values = if job.rows < ROWS {
        // The weights past the rows are 0.
        buffer = [0; BUFFER];
        buffer[..job.values.len()].copy_from_slice(job.values);
        &buffer[..ROWS * row]
    } else {
        job.values
    };
    match job.codec {
        Codec::Int8 => heads::<Int8>(job, values, row),
        Codec::Int4 => heads::<Int4>(job, values, row),
        Codec::Int3 => heads::<Int3>(job, values, row),
        Codec::Int2 => heads::<Int2>(job, values, row),
        Codec::F32 | Codec::F16 | Codec::Bf16 => return false,
    }
    true
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn heads<P: Group>(job: &mut ValueCodes<'_>, values: &[u8], row: usize) {
    let mut h = 0;
    while h < job.heads.q_heads {
        h += match job.heads.q_heads - h {
            1 => run::<P, 1>(job, values, row, h),
            2 => run::<P, 2>(job, values, row, h),
            3 => run::<P, 3>(job, values, row, h),
            _ => run::<P, 4>(job, values, row, h),
        };
    }
}

/// H heads from `first` on. Returns H.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn run<P: Group, const H: usize>(job: &mut ValueCodes<'_>, values: &[u8], row: usize, first: usize) -> usize {
    let dim = job.heads.v_dim;
    let (params, group_bytes) = (job.codec.code_bytes(dim), job.codec.group_bytes(GROUP));
    let rows = values.len() / row;
    let chunks = rows.div_ceil(ROWS);
    // The last chunk may overlap the one before: rows that were there already get no weight here.
    let start = |c: usize| (ROWS * c).min(rows - ROWS);
    let mask = |c: usize| u16::MAX << (ROWS * c - start(c));
    let groups = dim / GROUP;
    let ahead = match first {
        0 => Ahead::new(job.ahead, chunks * groups),
        _ => Ahead::NOTHING,
    };
    let mut g = 0;
    while g < groups {
        let pair = g + 1 < groups;
        let mut scaled = [[[_mm512_setzero_ps(); CHUNKS]; H]; 2];
        let mut zeros = [[_mm512_setzero_ps(); H]; 2];
        for c in 0..chunks {
            let values = &values[start(c) * row..][..ROWS * row];
            // SAFETY: sixteen rows of `row` bytes; each group's parameters are four of them.
            let both = unsafe {
                let at = values.as_ptr().add(params + 4 * g);
                if pair {
                    parameters2(at, row)
                } else {
                    [parameters(at, row); 2]
                }
            };
            for h in 0..H {
                let weights = &job.weights[(first + h) * BLOCK + start(c)..][..ROWS];
                // SAFETY: the slice has sixteen values.
                let w = unsafe { _mm512_maskz_loadu_ps(mask(c), weights.as_ptr()) };
                for (i, (scale, zero)) in both.into_iter().enumerate() {
                    scaled[i][h][c] = _mm512_mul_ps(w, scale);
                    zeros[i][h] = _mm512_fmadd_ps(w, zero, zeros[i][h]);
                }
            }
        }
        for i in 0..1 + usize::from(pair) {
            let (mut weights, mut steps) = ([[_mm256_setzero_si256(); CHUNKS]; H], [0.0; H]);
            for h in 0..H {
                (weights[h], steps[h]) = round(&scaled[i][h]);
            }
            let mut acc = [[_mm512_setzero_si512(); ACCUMULATORS]; H];
            for c in 0..chunks {
                ahead.ask(Avx512(()), g * chunks + c);
                let weights: [__m256i; H] = std::array::from_fn(|h| weights[h][c]);
                // SAFETY: sixteen rows of `values` start there, and group `g` of each lies in it.
                unsafe {
                    let at = values.as_ptr().add(start(c) * row + g * group_bytes);
                    P::add(at, row, weights, &mut acc);
                }
            }
            for h in 0..H {
                let zero = _mm512_reduce_add_ps(zeros[i][h]);
                let out = &mut job.out[(first + h) * dim + g * GROUP..][..GROUP];
                finish(P::columns(acc[h]), steps[h], zero, out);
            }
            g += 1;
        }
    }
    H
}

/// A head's scaled weights in 15 bits, and what one of their steps is.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn round(scaled: &[__m512; CHUNKS]) -> ([__m256i; CHUNKS], f32) {
    let top = _mm512_max_ps(
        _mm512_max_ps(scaled[0], scaled[1]),
        _mm512_max_ps(scaled[2], scaled[3]),
    );
    let top = _mm512_reduce_max_ps(top);
    // Less than that adds nothing, and its inverse would overflow.
    if top > 1e-30 {
        let inverse = _mm512_set1_ps(32767.0 / top);
        let one = |w| _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(w, inverse)));
        (scaled.map(one), top / 32767.0)
    } else {
        ([_mm256_setzero_si256(); CHUNKS], 0.0)
    }
}

/// Adds a group's sums, in steps, and its zeros to 32 outputs.
#[inline]
#[target_feature(enable = "avx512f")]
fn finish(columns: [__m512i; 2], step: f32, zero: f32, out: &mut [f32]) {
    let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    let (step, zero) = (_mm512_set1_ps(step), _mm512_set1_ps(zero));
    for (x, out) in columns.into_iter().zip(out.as_chunks_mut::<16>().0) {
        let x = _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(order, x));
        // SAFETY: the array has sixteen values.
        unsafe {
            let sum = _mm512_add_ps(_mm512_loadu_ps(out.as_ptr()), _mm512_fmadd_ps(x, step, zero));
            _mm512_storeu_ps(out.as_mut_ptr(), sum);
        }
    }
}

/// The halves of both added: those of the first, then those of the second.
#[inline]
#[target_feature(enable = "avx512f")]
fn halved(a: __m512i, b: __m512i) -> __m512i {
    let low = _mm512_shuffle_i64x2::<0b01_00_01_00>(a, b);
    _mm512_add_epi32(low, _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b))
}

/// Codes as bytes: four rows at a time, two in each half of a vector. Four accumulators are in use.
impl<P: Pair> Group for P {
    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        stride: usize,
        weights: [__m256i; H],
        acc: &mut [[__m512i; ACCUMULATORS]; H],
    ) {
        // SAFETY: the caller's promise, and only `run` calls this, which has the instructions.
        unsafe {
            let byte = _mm512_set1_epi16(0xff);
            for j in 0..ROWS / 4 {
                let at = |i: usize| group.add((4 * j + i) * stride);
                let (a, b) = (P::codes(at(0), at(2)), P::codes(at(1), at(3)));
                // Words are two neighbouring columns of a row; the rows of a pair are side by side.
                let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
                let x = [
                    _mm512_and_si512(low, byte),
                    _mm512_srli_epi16::<8>(low),
                    _mm512_and_si512(high, byte),
                    _mm512_srli_epi16::<8>(high),
                ];
                let pair = 2 * j as i32;
                let index = _mm512_inserti64x4::<1>(_mm512_set1_epi32(pair), _mm256_set1_epi32(pair + 1));
                for h in 0..H {
                    let w = _mm512_permutexvar_epi32(index, _mm512_castsi256_si512(weights[h]));
                    for i in 0..4 {
                        acc[h][i] = _mm512_dpwssd_epi32(acc[h][i], x[i], w);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn columns(acc: [__m512i; ACCUMULATORS]) -> [__m512i; 2] {
        // SAFETY: only `run` calls this, which has the instructions.
        unsafe {
            // Quarters: columns 0, 2, 4, 6; 16, …; 1, …; 17, …; and those 8 to the right.
            let (a, b) = (halved(acc[0], acc[1]), halved(acc[2], acc[3]));
            [
                _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
            ]
        }
    }
}

impl Pair for Int8 {
    #[inline(always)]
    unsafe fn codes(a: *const u8, b: *const u8) -> __m512i {
        // SAFETY: the caller's promise of 32 bytes each, and only `run` calls this, which has the instructions.
        unsafe {
            let a = _mm512_castsi256_si512(_mm256_loadu_si256(a.cast()));
            _mm512_inserti64x4::<1>(a, _mm256_loadu_si256(b.cast()))
        }
    }
}

/// Eight bytes each, as codes of two bits in order.
///
/// # Safety
/// Both must be valid for reading 8 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn twos(a: *const u8, b: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (a.cast::<i64>().read_unaligned(), b.cast::<i64>().read_unaligned()) };
    let x = _mm512_mask_set1_epi64(_mm512_set1_epi64(a), 0xf0, b);
    let x = _mm512_srlv_epi64(x, _mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6));
    _mm512_and_si512(x, _mm512_set1_epi8(3))
}

/// Nibbles: eight rows at a time, two in each quarter of a vector. Accumulators are columns 0, 2, 4, 6 in each
/// quarter, 1, 3, 5, 7, 8, 10, …, 9, 11, …; and the same sixteen to the right. Masks leave some codes 16 or 256 times
/// as large, which the end takes back: 256 · 15 · 32767 in a quarter of a block's rows still fits.
impl Group for Int4 {
    #[inline(always)]
    unsafe fn add<const H: usize>(
        group: *const u8,
        stride: usize,
        weights: [__m256i; H],
        acc: &mut [[__m512i; ACCUMULATORS]; H],
    ) {
        const _: () = assert!((BLOCK as u64 / 4) * 32767 * 15 * 256 < i32::MAX as u64);
        // SAFETY: the caller's promise, and only `run` calls this, which has the instructions.
        unsafe {
            for j in 0..ROWS / 8 {
                let row = |i: usize| _mm_loadu_si128(group.add((8 * j + i) * stride).cast());
                let four = |i: usize| {
                    let x = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(row(i)), row(i + 2));
                    _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(x, row(i + 4)), row(i + 6))
                };
                let (a, b) = (four(0), four(1));
                // A word is two bytes of a row, four codes; the rows of a pair are side by side.
                let p = 4 * j as i32;
                let index = _mm512_setr_epi32(
                    p,
                    p,
                    p,
                    p,
                    p + 1,
                    p + 1,
                    p + 1,
                    p + 1,
                    p + 2,
                    p + 2,
                    p + 2,
                    p + 2,
                    p + 3,
                    p + 3,
                    p + 3,
                    p + 3,
                );
                let w: [__m512i; H] = std::array::from_fn(|h| {
                    _mm512_permutexvar_epi32(index, _mm512_castsi256_si512(weights[h]))
                });
                for (half, x) in [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)]
                    .into_iter()
                    .enumerate()
                {
                    let x = [
                        _mm512_and_si512(x, _mm512_set1_epi16(0x000f)),
                        _mm512_and_si512(x, _mm512_set1_epi16(0x0f00)),
                        _mm512_and_si512(x, _mm512_set1_epi16(0x00f0)),
                        _mm512_srli_epi16::<12>(x),
                    ];
                    for h in 0..H {
                        for (i, x) in x.into_iter().enumerate() {
                            // Low nibbles are the first sixteen columns.
                            let to = 2 * half + i % 2 + 4 * (i / 2);
                            acc[h][to] = _mm512_dpwssd_epi32(acc[h][to], x, w[h]);
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn columns(acc: [__m512i; ACCUMULATORS]) -> [__m512i; 2] {
        // SAFETY: only `run` calls this, which has the instructions.
        unsafe {
            // Before quarters are added up, or they would overflow.
            let by4 = |x| _mm512_srai_epi32::<4>(x);
            let by8 = |x| _mm512_srai_epi32::<8>(x);
            let quarters = |a, b, c, d| {
                let (a, b) = (halved(a, b), halved(c, d));
                let low = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
                _mm512_add_epi32(low, _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b))
            };
            [
                quarters(acc[0], by8(acc[1]), acc[2], by8(acc[3])),
                quarters(by4(acc[4]), acc[5], by4(acc[6]), acc[7]),
            ]
        }
    }
}

impl Pair for Int2 {
    #[inline(always)]
    unsafe fn codes(a: *const u8, b: *const u8) -> __m512i {
        // SAFETY: as for int8, 8 bytes each.
        unsafe { twos(a, b) }
    }
}

impl Pair for Int3 {
    #[inline(always)]
    unsafe fn codes(a: *const u8, b: *const u8) -> __m512i {
        // SAFETY: as for int8, 8 + 4 bytes each.
        unsafe {
            let low = twos(a, b);
            let (a, b) = (
                a.add(8).cast::<i32>().read_unaligned(),
                b.add(8).cast::<i32>().read_unaligned(),
            );
            let x = _mm512_mask_set1_epi32(_mm512_set1_epi32(a), 0xff00, b);
            // Bit c of the bytes belongs to codes 4c to 4c + 3, in which it is bit 2.
            let x = _mm512_srlv_epi32(
                x,
                _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7),
            );
            let high = _mm512_and_si512(_mm512_slli_epi16::<2>(x), _mm512_set1_epi8(4));
            _mm512_or_si512(low, high)
        }
    }
}
