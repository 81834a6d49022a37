//! Codes and parameters of sixteen rows at a time.
//!
//! Invariant: nothing is read past a row's end. Codes are read in sixteens: a group of int3 has 12 bytes, and at least
//! the 4 of its parameters follow; one of int2 has 8, and 8 of parameters follow if there are two groups.
//!
//! Loops go by index and steps are functions, not closures: a closure is compiled without its caller's instructions,
//! and where it is not inlined, each call empties the registers.

use std::arch::x86_64::*;

use super::super::query::COLUMNS;
use crate::codec::Codec;

/// Rows at a time.
pub(super) const ROWS: usize = 16;
/// Bytes of the buffer for fewer than sixteen rows.
const BUFFER: usize = 8192;

/// Codes of less than a byte.
pub(super) trait Bits {
    const CODEC: Codec;

    /// Of four vectors with bytes 0 to 3, 4 to 7, 8 to 11 and 12 to 15 of a group in every lane: codes `4c` to `4c + 3` in
    /// every lane of vector `c`. What is past the group's bytes does not matter.
    ///
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn codes(bytes: [__m512i; 4]) -> [__m512i; COLUMNS];
}

pub(super) struct Int4;
pub(super) struct Int3;
pub(super) struct Int2;

/// Room for a copy of few rows; cleared only when there is need for it.
#[derive(Default)]
pub(super) struct Buffer(Option<[u8; BUFFER]>);

/// At least sixteen rows: those given, or a copy that zeros follow. None if they are too long for that.
#[inline(always)]
pub(super) fn sixteen<'a>(rows: &'a [u8], row: usize, buffer: &'a mut Buffer) -> Option<&'a [u8]> {
    if rows.len() >= ROWS * row {
        return Some(rows);
    }
    if ROWS * row > BUFFER {
        return None;
    }
    let copy = buffer.0.insert([0; BUFFER]);
    copy[..rows.len()].copy_from_slice(rows);
    Some(&copy[..ROWS * row])
}

/// Scales and zeros of group `g` and of the next one, if there is one; else of `g` twice.
///
/// # Safety
/// `rows` must be valid for reading sixteen rows, `stride` bytes from one to the next, that have the parameters of
/// `groups` groups `params` bytes from their start.
#[inline(always)]
pub(super) unsafe fn two_groups(
    rows: *const u8,
    stride: usize,
    params: usize,
    g: usize,
    groups: usize,
) -> [(__m512, __m512); 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let at = rows.add(params + 4 * g);
        if g + 1 < groups {
            pair(at, stride)
        } else {
            [single(at, stride); 2]
        }
    }
}

/// Scales and zeros of two neighbouring groups of sixteen rows.
///
/// # Safety
/// `at` must be valid for reading 8 bytes at each of the sixteen rows.
#[inline(always)]
unsafe fn pair(at: *const u8, stride: usize) -> [(__m512, __m512); 2] {
    static FIRST: [i16; 32] = words(0);
    static SECOND: [i16; 32] = words(2);
    // SAFETY: the caller's promise; the arrays have 64 bytes.
    unsafe {
        let (a, b) = (eight(at, stride), eight(at.add(8 * stride), stride));
        let first = _mm512_permutex2var_epi16(a, _mm512_loadu_si512(FIRST.as_ptr().cast()), b);
        let second = _mm512_permutex2var_epi16(a, _mm512_loadu_si512(SECOND.as_ptr().cast()), b);
        [
            (
                _mm512_cvtph_ps(_mm512_castsi512_si256(first)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(first)),
            ),
            (
                _mm512_cvtph_ps(_mm512_castsi512_si256(second)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(second)),
            ),
        ]
    }
}

/// Eight bytes of each of eight rows.
///
/// # Safety
/// `at` must be valid for reading 8 bytes at each of the eight rows.
#[inline(always)]
unsafe fn eight(at: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let x = _mm512_castsi128_si512(two(at, stride));
        let x = _mm512_inserti32x4::<1>(x, two(at.add(2 * stride), stride));
        let x = _mm512_inserti32x4::<2>(x, two(at.add(4 * stride), stride));
        _mm512_inserti32x4::<3>(x, two(at.add(6 * stride), stride))
    }
}

/// Eight bytes of each of two rows: scale, zero, scale, zero, in 16 bits.
///
/// # Safety
/// `at` must be valid for reading 8 bytes at each of the two rows.
#[inline(always)]
unsafe fn two(at: *const u8, stride: usize) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm_castsi128_pd(_mm_loadl_epi64(at.cast()));
        _mm_castpd_si128(_mm_loadh_pd(low, at.add(stride).cast()))
    }
}

/// Word `4r + first` of sixteen rows of four words, then word `4r + first + 1`.
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
#[inline(always)]
unsafe fn single(at: *const u8, stride: usize) -> (__m512, __m512) {
    let mut pairs = [0i32; ROWS];
    // SAFETY: the caller's promise; the array has the 64 bytes.
    unsafe {
        for r in 0..ROWS {
            pairs[r] = at.add(r * stride).cast::<i32>().read_unaligned();
        }
        let pairs = _mm512_loadu_si512(pairs.as_ptr().cast());
        let zeros = _mm512_srli_epi32::<16>(pairs);
        (
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)),
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(zeros)),
        )
    }
}

/// Rows `i`, `4 + i`, `8 + i` and `12 + i` in the quarters of vector `i`, so that interleaving within 128 bits keeps
/// rows in order.
///
/// # Safety
/// `at` must be valid for reading 16 bytes at each of the sixteen rows.
#[inline(always)]
unsafe fn quarters(at: *const u8, stride: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut out = [_mm512_setzero_si512(); 4];
        for i in 0..4 {
            let at = at.add(i * stride).cast::<__m128i>();
            let x = _mm512_castsi128_si512(_mm_loadu_si128(at));
            let x = _mm512_inserti32x4::<1>(x, _mm_loadu_si128(at.byte_add(4 * stride)));
            let x = _mm512_inserti32x4::<2>(x, _mm_loadu_si128(at.byte_add(8 * stride)));
            out[i] = _mm512_inserti32x4::<3>(x, _mm_loadu_si128(at.byte_add(12 * stride)));
        }
        out
    }
}

/// Sixteen rows of sixteen bytes, transposed by four bytes: lane `r` of vector `i` has bytes `4i` to `4i + 3` of
/// row `r`.
///
/// # Safety
/// As for `quarters`.
#[inline(always)]
pub(super) unsafe fn transpose(at: *const u8, stride: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let [w, x, y, z] = quarters(at, stride);
        let (a, b) = (_mm512_unpacklo_epi32(w, x), _mm512_unpacklo_epi32(y, z));
        let (c, d) = (_mm512_unpackhi_epi32(w, x), _mm512_unpackhi_epi32(y, z));
        [
            _mm512_unpacklo_epi64(a, b),
            _mm512_unpackhi_epi64(a, b),
            _mm512_unpacklo_epi64(c, d),
            _mm512_unpackhi_epi64(c, d),
        ]
    }
}

/// Sixteen rows of sixteen bytes, interleaved by four rows: byte `i` of lane `4p + k` of vector `j` is byte `4j + k` of
/// row `4p + i`.
///
/// # Safety
/// As for `quarters`.
#[inline(always)]
pub(super) unsafe fn interleave(at: *const u8, stride: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let [w, x, y, z] = quarters(at, stride);
        let (a, b) = (_mm512_unpacklo_epi8(w, x), _mm512_unpacklo_epi8(y, z));
        let (c, d) = (_mm512_unpackhi_epi8(w, x), _mm512_unpackhi_epi8(y, z));
        [
            _mm512_unpacklo_epi16(a, b),
            _mm512_unpackhi_epi16(a, b),
            _mm512_unpacklo_epi16(c, d),
            _mm512_unpackhi_epi16(c, d),
        ]
    }
}

impl Bits for Int4 {
    const CODEC: Codec = Codec::Int4;

    #[inline(always)]
    unsafe fn codes(x: [__m512i; 4]) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let [a, b, c, d] = x;
            // Low nibbles are codes 0 to 15, high ones 16 to 31.
            [
                _mm512_and_si512(a, mask),
                _mm512_and_si512(b, mask),
                _mm512_and_si512(c, mask),
                _mm512_and_si512(d, mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(a), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(b), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(c), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(d), mask),
            ]
        }
    }
}

/// Two bits each of eight codes in two vectors.
///
/// # Safety
/// The CPU must have the instructions.
#[inline(always)]
unsafe fn twos(x: [__m512i; 2]) -> [__m512i; COLUMNS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mask = _mm512_set1_epi8(3);
        let [a, b] = x;
        [
            _mm512_and_si512(a, mask),
            _mm512_and_si512(b, mask),
            _mm512_and_si512(_mm512_srli_epi16::<2>(a), mask),
            _mm512_and_si512(_mm512_srli_epi16::<2>(b), mask),
            _mm512_and_si512(_mm512_srli_epi16::<4>(a), mask),
            _mm512_and_si512(_mm512_srli_epi16::<4>(b), mask),
            _mm512_and_si512(_mm512_srli_epi16::<6>(a), mask),
            _mm512_and_si512(_mm512_srli_epi16::<6>(b), mask),
        ]
    }
}

impl Bits for Int2 {
    const CODEC: Codec = Codec::Int2;

    #[inline(always)]
    unsafe fn codes(x: [__m512i; 4]) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise.
        unsafe { twos([x[0], x[1]]) }
    }
}

impl Bits for Int3 {
    const CODEC: Codec = Codec::Int3;

    #[inline(always)]
    unsafe fn codes(x: [__m512i; 4]) -> [__m512i; COLUMNS] {
        // SAFETY: the caller's promise.
        unsafe {
            let (low, high) = (twos([x[0], x[1]]), x[2]);
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
            let mut out = low;
            for c in 0..COLUMNS {
                // The low bits, or the high one where the mask has it.
                out[c] = _mm512_or_si512(low[c], _mm512_and_si512(high[c], bit));
            }
            out
        }
    }
}
