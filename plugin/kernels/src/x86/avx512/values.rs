//! Weighted sums of integer values without unpacking them: lanes are columns, a pair of rows at a time.
//!
//! A row's weight times its group's scale is rounded to 15 bits relative to the block's largest; codes are
//! widened to 16 bits and those of two rows put side by side, so that `vpdpwssd` multiplies and adds both.
//! Zeros contribute Σ weight · zero a group. The rounding is 2^-16 of the block's largest contribution, far
//! below what the codes' own rounding does.

use std::arch::x86_64::*;

use super::keys::parameters;
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, ValueCodes};

/// Rows whose scales and weights share a vector.
const ROWS: usize = 16;
const CHUNKS: usize = BLOCK / ROWS;
/// Bytes of the buffer for fewer than sixteen rows.
const BUFFER: usize = 8192;

// A lane adds up half of a block's rows.
const _: () = assert!((BLOCK as u64 / 2) * 32767 * 255 < i32::MAX as u64);

/// The codes of one group in two rows.
trait Pair {
    /// 32 codes of the first row, then of the second, as bytes in order.
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
    let mut buffer = [0; BUFFER];
    let values = if job.rows < ROWS {
        // The weights past the rows are 0.
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
fn heads<P: Pair>(job: &mut ValueCodes<'_>, values: &[u8], row: usize) {
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
fn run<P: Pair, const H: usize>(job: &mut ValueCodes<'_>, values: &[u8], row: usize, first: usize) -> usize {
    let dim = job.heads.v_dim;
    let (params, group_bytes) = (job.codec.code_bytes(dim), job.codec.group_bytes(GROUP));
    let rows = values.len() / row;
    let chunks = rows.div_ceil(ROWS);
    // The last chunk may overlap the one before: rows that were there already get no weight here.
    let start = |c: usize| (ROWS * c).min(rows - ROWS);
    let mask = |c: usize| u16::MAX << (ROWS * c - start(c));
    for g in 0..dim / GROUP {
        let mut scaled = [[_mm512_setzero_ps(); CHUNKS]; H];
        let mut zeros = [_mm512_setzero_ps(); H];
        let mut top = [_mm512_setzero_ps(); H];
        for c in 0..chunks {
            let values = &values[start(c) * row..][..ROWS * row];
            // SAFETY: sixteen rows of `row` bytes; a group's parameters are four of them.
            let (scale, zero) = unsafe { parameters(values.as_ptr().add(params + 4 * g), row) };
            for h in 0..H {
                let weights = &job.weights[(first + h) * BLOCK + start(c)..][..ROWS];
                // SAFETY: the slice has sixteen values.
                let w = unsafe { _mm512_maskz_loadu_ps(mask(c), weights.as_ptr()) };
                scaled[h][c] = _mm512_mul_ps(w, scale);
                zeros[h] = _mm512_fmadd_ps(w, zero, zeros[h]);
                top[h] = _mm512_max_ps(scaled[h][c], top[h]);
            }
        }
        let mut weights = [[_mm256_setzero_si256(); CHUNKS]; H];
        let mut steps = [0.0; H];
        for h in 0..H {
            let top = _mm512_reduce_max_ps(top[h]);
            // Less than that adds nothing, and its inverse would overflow.
            if top > 1e-30 {
                steps[h] = top / 32767.0;
                let inverse = _mm512_set1_ps(32767.0 / top);
                for c in 0..chunks {
                    let w = _mm512_cvtps_epi32(_mm512_mul_ps(scaled[h][c], inverse));
                    weights[h][c] = _mm512_cvtepi32_epi16(w);
                }
            }
        }
        let mut acc = [[_mm512_setzero_si512(); 4]; H];
        let byte = _mm512_set1_epi16(0xff);
        for c in 0..chunks {
            let values = &values[start(c) * row + g * group_bytes..];
            for j in 0..ROWS / 4 {
                // SAFETY: row 4j + 3 of the chunk is one of `values`' rows, and its group lies in it.
                let (a, b) = unsafe {
                    let at = |i: usize| values.as_ptr().add((4 * j + i) * row);
                    (P::codes(at(0), at(2)), P::codes(at(1), at(3)))
                };
                // Words are two neighbouring columns of a row; rows of a pair are side by side.
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
                    let w = _mm512_permutexvar_epi32(index, _mm512_castsi256_si512(weights[h][c]));
                    for i in 0..4 {
                        acc[h][i] = _mm512_dpwssd_epi32(acc[h][i], x[i], w);
                    }
                }
            }
        }
        for h in 0..H {
            let zero = _mm512_reduce_add_ps(zeros[h]);
            let out = &mut job.out[(first + h) * dim + g * GROUP..][..GROUP];
            finish(acc[h], steps[h], zero, out);
        }
    }
    H
}

/// Adds both halves of a group's sums, in steps, and its zeros to 32 outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn finish(acc: [__m512i; 4], step: f32, zero: f32, out: &mut [f32]) {
    let half = |x: __m512i| _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x));
    let [even, odd, even2, odd2] = acc.map(half);
    // 128 bits of columns 0, 2, 4, 6, then of 16, 18, 20, 22; and so on.
    let (a, b) = (_mm256_unpacklo_epi32(even, odd), _mm256_unpackhi_epi32(even, odd));
    let (c, d) = (
        _mm256_unpacklo_epi32(even2, odd2),
        _mm256_unpackhi_epi32(even2, odd2),
    );
    let columns = [
        _mm256_permute2x128_si256::<0x20>(a, b),
        _mm256_permute2x128_si256::<0x20>(c, d),
        _mm256_permute2x128_si256::<0x31>(a, b),
        _mm256_permute2x128_si256::<0x31>(c, d),
    ];
    let (step, zero) = (_mm256_set1_ps(step), _mm256_set1_ps(zero));
    for (x, out) in columns.into_iter().zip(out.as_chunks_mut::<8>().0) {
        let x = _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), step, zero);
        // SAFETY: the array has eight values.
        unsafe {
            let sum = _mm256_add_ps(_mm256_loadu_ps(out.as_ptr()), x);
            _mm256_storeu_ps(out.as_mut_ptr(), sum);
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

impl Pair for Int4 {
    #[inline(always)]
    unsafe fn codes(a: *const u8, b: *const u8) -> __m512i {
        // SAFETY: as for int8, 16 bytes each.
        unsafe {
            let a = _mm512_broadcast_i32x4(_mm_loadu_si128(a.cast()));
            let x = _mm512_mask_broadcast_i32x4(a, 0xff00, _mm_loadu_si128(b.cast()));
            // The second sixteen codes of a row are its high nibbles.
            let x = _mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
            _mm512_and_si512(x, _mm512_set1_epi8(15))
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
