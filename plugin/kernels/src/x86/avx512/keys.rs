//! Logits of integer keys without unpacking them: sixteen keys at a time, a lane each.
//!
//! A query is rounded to 16-bit integers relative to its largest value and split in two signed bytes; codes are
//! unsigned bytes, so `vpdpbusd` multiplies and adds four of them at once. Scales and zeros apply to whole
//! groups: q·k = Σ_g scale_g · (Σ q·code) + zero_g · Σ q. The rounding of q is 2^-16 of its largest value, far
//! below what the codes' own rounding does.

use std::arch::x86_64::*;

use super::Avx512;
use crate::codec::{Codec, GROUP};
use crate::generic::decode::{BLOCK, KeyCodes};
use crate::simd::Ahead;

/// Keys at a time, one a lane.
const KEYS: usize = 16;
/// Four neighbours each: a lane's worth of a key.
const COLUMNS: usize = GROUP / 4;
/// The largest magnitude of a query's integers: both of its bytes then fit −128 to 127.
const LARGEST: f32 = (127 * 256 + 127) as f32;
/// Bytes of the buffer for fewer than sixteen keys.
const BUFFER: usize = 8192;

/// The columns of one group of sixteen keys: lane `r` of column `c` has codes `4c` to `4c + 3` of key `r`.
trait Group {
    /// # Safety
    /// `group` must be valid for reading 16 bytes (32 for int8) at each of the sixteen rows.
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS];
}

struct Int8;
struct Int4;
struct Int3;
struct Int2;

/// Makes `scores`; false if there is no room for it, and nothing was done.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn score(job: &mut KeyCodes<'_>) -> bool {
    let row = job.codec.row_bytes(job.heads.k_dim);
    // Codes are read in sixteens, which must not pass the end of the last row's parameters.
    let short = job.codec == Codec::Int2 && job.heads.k_dim == GROUP;
    if short || (job.rows < KEYS && KEYS * row > BUFFER) {
        return false;
    }
    if job.prepared.is_empty() {
        prepare(job);
    }
    let mut buffer;
    let keys = if job.rows < KEYS {
        buffer = [0; BUFFER];
        buffer[..job.keys.len()].copy_from_slice(job.keys);
        &buffer[..KEYS * row]
    } else {
        job.keys
    };
    match job.codec {
        Codec::Int8 => heads::<Int8>(job, keys, row),
        Codec::Int4 => heads::<Int4>(job, keys, row),
        Codec::Int3 => heads::<Int3>(job, keys, row),
        Codec::Int2 => heads::<Int2>(job, keys, row),
        Codec::F32 | Codec::F16 | Codec::Bf16 => return false,
    }
    true
}

/// What one head's query takes in `prepared`: its step, a sum a group, and two bytes a value.
fn query_len(groups: usize) -> usize {
    1 + groups + 2 * COLUMNS * groups
}

/// Rounds the queries. Per head: the step; each group's sum, in steps; each column's high and low bytes.
fn prepare(job: &mut KeyCodes<'_>) {
    for q in job.q.chunks_exact(job.heads.k_dim) {
        let largest = q.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let inverse = if largest > 1e-30 { LARGEST / largest } else { 0.0 };
        // What is not finite must stay so.
        let finite = q.iter().all(|x| x.is_finite());
        let step = if finite { largest / LARGEST } else { f32::NAN };
        job.prepared.push(step.to_bits().cast_signed());
        for group in q.chunks_exact(GROUP) {
            let sum: f32 = group.iter().map(|x| x * inverse).sum();
            job.prepared.push(sum.to_bits().cast_signed());
        }
        for four in q.as_chunks::<4>().0 {
            let x = four.map(|x| (x * inverse).round_ties_even() as i32);
            let low = x.map(|x| x as i8);
            let high: [i8; 4] = std::array::from_fn(|i| ((x[i] - i32::from(low[i])) >> 8) as i8);
            for bytes in [high, low] {
                job.prepared
                    .push(i32::from_le_bytes(bytes.map(i8::cast_unsigned)));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn heads<G: Group>(job: &mut KeyCodes<'_>, keys: &[u8], row: usize) {
    let mut h = 0;
    while h < job.heads.q_heads {
        h += match job.heads.q_heads - h {
            1 => run::<G, 1>(job, keys, row, h),
            2 => run::<G, 2>(job, keys, row, h),
            3 => run::<G, 3>(job, keys, row, h),
            _ => run::<G, 4>(job, keys, row, h),
        };
    }
}

/// H heads from `first` on. Returns H.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn run<G: Group, const H: usize>(job: &mut KeyCodes<'_>, keys: &[u8], row: usize, first: usize) -> usize {
    let groups = job.heads.k_dim / GROUP;
    let (len, group_bytes) = (query_len(groups), job.codec.group_bytes(GROUP));
    let params = job.codec.code_bytes(job.heads.k_dim);
    let queries: [&[i32]; H] = std::array::from_fn(|h| &job.prepared[(first + h) * len..][..len]);
    let rows = keys.len() / row;
    let ahead = match first {
        0 => Ahead::new(job.ahead, rows.div_ceil(KEYS) * groups),
        _ => Ahead::NOTHING,
    };
    let mut r = 0;
    while r < rows {
        // The last sixteen may overlap the ones before; the same dot products are written again.
        let start = r.min(rows - KEYS);
        let keys = &keys[start * row..][..KEYS * row];
        let mut acc = [_mm512_setzero_ps(); H];
        let mut g = 0;
        while g < groups {
            // SAFETY: `keys` is sixteen rows of `row` bytes. A group's codes are followed by at least its
            // parameters, which are four bytes: reading 16 bytes of the last int3 or int2 group stays in the row
            // (12 + 4; and 8 + 8, as int2 has two groups at least, as `score` made sure). A query has `len`
            // numbers, `2 · COLUMNS` of them for each group after the first `1 + groups`.
            unsafe {
                let pair = g + 1 < groups;
                let at = keys.as_ptr().add(params + 4 * g);
                let both = if pair {
                    parameters2(at, row)
                } else {
                    [parameters(at, row); 2]
                };
                ahead.ask(Avx512(()), r / KEYS * groups + g);
                if pair {
                    ahead.ask(Avx512(()), r / KEYS * groups + g + 1);
                }
                for (scale, zero) in both.into_iter().take(1 + usize::from(pair)) {
                    let columns = G::columns(keys.as_ptr().add(g * group_bytes), row);
                    let sums: [__m512; H] = dots(
                        columns,
                        queries.map(|q| q.as_ptr().add(1 + groups + 2 * COLUMNS * g)),
                    );
                    for h in 0..H {
                        let sum = f32::from_bits((*queries[h].as_ptr().add(1 + g)).cast_unsigned());
                        acc[h] = _mm512_fmadd_ps(sums[h], scale, acc[h]);
                        acc[h] = _mm512_fmadd_ps(zero, _mm512_set1_ps(sum), acc[h]);
                    }
                    g += 1;
                }
            }
        }
        for h in 0..H {
            let step = f32::from_bits(queries[h][0].cast_unsigned());
            let out = &mut job.scores[(first + h) * BLOCK + start..][..KEYS];
            // SAFETY: the slice has sixteen values.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(acc[h], _mm512_set1_ps(step))) };
        }
        r += KEYS;
    }
    H
}

/// Dot products of one group with H queries, in steps.
///
/// # Safety
/// The queries must be valid for reading `2 · COLUMNS` numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dots<const H: usize>(columns: [__m512i; COLUMNS], q: [*const i32; H]) -> [__m512; H] {
    let mut high = [_mm512_setzero_si512(); H];
    let mut low = [_mm512_setzero_si512(); H];
    for (c, column) in columns.into_iter().enumerate() {
        for h in 0..H {
            // SAFETY: the caller's promise.
            let (x, y) = unsafe { (*q[h].add(2 * c), *q[h].add(2 * c + 1)) };
            high[h] = _mm512_dpbusd_epi32(high[h], column, _mm512_set1_epi32(x));
            low[h] = _mm512_dpbusd_epi32(low[h], column, _mm512_set1_epi32(y));
        }
    }
    // At most 32 · 255 · 32639: no overflow.
    std::array::from_fn(|h| _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(high[h]), low[h])))
}

/// Scales and zeros of two neighbouring groups of sixteen rows.
///
/// # Safety
/// `at` must be valid for reading 8 bytes at each of the sixteen rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn parameters2(at: *const u8, stride: usize) -> [(__m512, __m512); 2] {
    // Two rows each: scale, zero, scale, zero, in 16 bits.
    let two = |r: usize| {
        // SAFETY: the caller's promise.
        unsafe {
            let low = _mm_loadl_epi64(at.add(r * stride).cast());
            let high = at.add((r + 1) * stride).cast::<f64>();
            _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), high))
        }
    };
    let eight = |r: usize| {
        let x = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(two(r)), two(r + 2));
        _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(x, two(r + 4)), two(r + 6))
    };
    let (a, b) = (eight(0), eight(8));
    // Word 4r + i of both: sixteen rows of scales, then of zeros.
    const FIRST: [i16; 32] = words(0);
    const SECOND: [i16; 32] = words(2);
    let pick = |index: &[i16; 32]| {
        // SAFETY: the array has the 64 bytes.
        let index = unsafe { _mm512_loadu_si512(index.as_ptr().cast()) };
        let x = _mm512_permutex2var_epi16(a, index, b);
        (
            _mm512_cvtph_ps(_mm512_castsi512_si256(x)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(x)),
        )
    };
    [pick(&FIRST), pick(&SECOND)]
}

const fn words(first: i16) -> [i16; 32] {
    let (mut out, mut i) = ([0; 32], 0);
    while i < 16 {
        out[i] = 4 * i as i16 + first;
        out[16 + i] = 4 * i as i16 + first + 1;
        i += 1;
    }
    out
}

/// Scales and zeros of one group of sixteen rows.
///
/// # Safety
/// `at` must be valid for reading 4 bytes at each of the sixteen rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn parameters(at: *const u8, stride: usize) -> (__m512, __m512) {
    let (mut a, mut b) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    for r in 0..8 {
        // SAFETY: the caller's promise. Broadcasts from memory under a mask need no shuffle.
        let (x, y) = unsafe {
            let x = at.add(r * stride).cast::<i32>().read_unaligned();
            (x, at.add((r + 8) * stride).cast::<i32>().read_unaligned())
        };
        a = _mm512_mask_set1_epi32(a, 1 << r, x);
        b = _mm512_mask_set1_epi32(b, 1 << (r + 8), y);
    }
    let pairs = _mm512_or_si512(a, b);
    let scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    let zero = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(pairs)));
    (scale, zero)
}

/// Sixteen rows of sixteen bytes, transposed by four bytes: lane `r` of vector `i` has bytes `4i` to `4i + 3` of
/// row `r`.
///
/// # Safety
/// `at` must be valid for reading 16 bytes at each of the sixteen rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn transpose(at: *const u8, stride: usize) -> [__m512i; 4] {
    let mut z = [_mm512_setzero_si512(); 4];
    for (i, z) in z.iter_mut().enumerate() {
        // Rows i, 4 + i, 8 + i and 12 + i, so that interleaving within 128 bits puts lanes in row order.
        // SAFETY: the caller's promise.
        let row = |r: usize| unsafe { _mm_loadu_si128(at.add((i + 4 * r) * stride).cast()) };
        let x = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(row(0)), row(1));
        *z = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(x, row(2)), row(3));
    }
    let (a, b) = (
        _mm512_unpacklo_epi32(z[0], z[1]),
        _mm512_unpacklo_epi32(z[2], z[3]),
    );
    let (c, d) = (
        _mm512_unpackhi_epi32(z[0], z[1]),
        _mm512_unpackhi_epi32(z[2], z[3]),
    );
    [
        _mm512_unpacklo_epi64(a, b),
        _mm512_unpackhi_epi64(a, b),
        _mm512_unpacklo_epi64(c, d),
        _mm512_unpackhi_epi64(c, d),
    ]
}

impl Group for Int8 {
    #[inline(always)]
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise, and only `run` calls this, which has the instructions.
        unsafe {
            let [a, b, c, d] = transpose(group, stride);
            let [e, f, g, h] = transpose(group.add(16), stride);
            [a, b, c, d, e, f, g, h]
        }
    }
}

impl Group for Int4 {
    #[inline(always)]
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS] {
        // SAFETY: as for int8.
        unsafe {
            let x = transpose(group, stride);
            let mask = _mm512_set1_epi8(15);
            // Low nibbles are codes 0 to 15, high ones 16 to 31.
            std::array::from_fn(|c| match c {
                0..4 => _mm512_and_si512(x[c], mask),
                _ => _mm512_and_si512(_mm512_srli_epi16::<4>(x[c - 4]), mask),
            })
        }
    }
}

/// Two bits each of eight codes in two vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn twos(x: [__m512i; 2]) -> [__m512i; COLUMNS] {
    let mask = _mm512_set1_epi8(3);
    let shifted = |i: usize| {
        [
            x[i],
            _mm512_srli_epi16::<2>(x[i]),
            _mm512_srli_epi16::<4>(x[i]),
            _mm512_srli_epi16::<6>(x[i]),
        ]
    };
    let (a, b) = (shifted(0), shifted(1));
    std::array::from_fn(|c| {
        let x = if c % 2 == 0 { a[c / 2] } else { b[c / 2] };
        _mm512_and_si512(x, mask)
    })
}

impl Group for Int2 {
    #[inline(always)]
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS] {
        // SAFETY: as for int8.
        unsafe {
            let [a, b, _, _] = transpose(group, stride);
            twos([a, b])
        }
    }
}

impl Group for Int3 {
    #[inline(always)]
    unsafe fn columns(group: *const u8, stride: usize) -> [__m512i; COLUMNS] {
        // SAFETY: as for int8.
        unsafe {
            let [a, b, high, _] = transpose(group, stride);
            let low = twos([a, b]);
            let bit = _mm512_set1_epi8(4);
            // Bit c of the high plane's bytes belongs to codes 4c to 4c + 3, in which it is bit 2.
            let high = [
                _mm512_slli_epi16::<2>(high),
                _mm512_slli_epi16::<1>(high),
                high,
                _mm512_srli_epi16::<1>(high),
                _mm512_srli_epi16::<2>(high),
                _mm512_srli_epi16::<3>(high),
                _mm512_srli_epi16::<4>(high),
                _mm512_srli_epi16::<5>(high),
            ];
            std::array::from_fn(|c| _mm512_or_si512(low[c], _mm512_and_si512(high[c], bit)))
        }
    }
}
