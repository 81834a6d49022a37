//! Values of three and two bits, which lie row by row: sixteen rows of a group at a time are brought into the order of an int4
//! tile, four rows side by side and two codes a byte, once for all heads.
//!
//! Byte `i` of a group has codes `i`, `8 + i`, `16 + i` and `24 + i`, two bits each: every other one is a nibble already. Of
//! int3, bit `n` of the bytes that follow belongs to codes `4n` to `4n + 3`.

use std::arch::x86_64::*;

use super::values::{Block, Buffer, EIGHT, Group, NIBBLES, add_nibbles, round};
use crate::codec::{Codec, GROUP, PARAM_BYTES};
use crate::generic::decode::BLOCK;
use crate::layout::TILE;

pub(super) struct Int3;
pub(super) struct Int2;

/// The parts that both have in common.
macro_rules! rows {
    ($name:ident, $levels:literal) => {
        impl Group for $name {
            const CODEC: Codec = Codec::$name;
            type Fours = i32;
            const AT: [[usize; 2]; 2] = NIBBLES;

            #[inline(always)]
            unsafe fn parameters(block: *const u8, dim: usize, c: usize, g: usize) -> (__m256, __m256) {
                let (row, codes) = (Self::CODEC.row_bytes(dim), Self::CODEC.code_bytes(dim));
                // SAFETY: the caller's promise; a pair a group follows each row's codes.
                unsafe { pairs(block.add(EIGHT * c * row + codes + PARAM_BYTES * g), row) }
            }

            #[inline(always)]
            unsafe fn group(
                block: *const u8,
                dim: usize,
                t: usize,
                g: usize,
                buffer: &mut Buffer,
            ) -> *const u8 {
                let row = Self::CODEC.row_bytes(dim);
                // SAFETY: the caller's promise; four rows from each fourth on.
                unsafe {
                    for j in 0..4 {
                        let at = block.add((TILE * t + 4 * j) * row + g * Self::CODEC.group_bytes(GROUP));
                        [buffer[2 * j], buffer[2 * j + 1]] = Self::nibbles(at, row);
                    }
                }
                buffer.as_ptr().cast()
            }

            #[inline(always)]
            unsafe fn round(scaled: &Block, top: f32, zeros: &mut __m256, to: &mut [i32; BLOCK / 4]) -> f32 {
                // SAFETY: the caller's promise.
                unsafe { round(scaled, top, $levels / 2.0, zeros, to) }
            }

            #[inline(always)]
            unsafe fn add<const H: usize>(
                group: *const u8,
                part: usize,
                weights: &[[i32; BLOCK / 4]; H],
                t: usize,
                sums: &mut [[__m256i; 2]; H],
            ) {
                // SAFETY: the caller's promise: a buffer.
                unsafe { add_nibbles(group, part, weights, t, sums) }
            }
        }
    };
}

rows!(Int3, 7.0);
rows!(Int2, 3.0);

impl Int2 {
    /// A group of four rows: codes 0 to 7 and 16 to 23 as nibbles, then the others.
    ///
    /// # Safety
    /// `at` must be valid for reading 8 bytes at each of the four rows, and the CPU must have the instructions.
    #[inline(always)]
    unsafe fn nibbles(at: *const u8, stride: usize) -> [__m256i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let row = |i: usize| _mm_loadl_epi64(at.add(i * stride).cast());
            let (a, b) = (
                _mm_unpacklo_epi8(row(0), row(1)),
                _mm_unpacklo_epi8(row(2), row(3)),
            );
            let x = _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
            let mask = _mm256_set1_epi8(0x33);
            [
                _mm256_and_si256(x, mask),
                _mm256_and_si256(_mm256_srli_epi16::<2>(x), mask),
            ]
        }
    }
}

impl Int3 {
    /// As of `Int2`.
    ///
    /// # Safety
    /// `at` must be valid for reading 12 bytes at each of the four rows, and the CPU must have the instructions.
    #[inline(always)]
    unsafe fn nibbles(at: *const u8, stride: usize) -> [__m256i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let [first, second] = Int2::nibbles(at, stride);
            let row = |i: usize| _mm_cvtsi32_si128(at.add(i * stride + 8).cast::<i32>().read_unaligned());
            let (a, b) = (
                _mm_unpacklo_epi8(row(0), row(1)),
                _mm_unpacklo_epi8(row(2), row(3)),
            );
            let high = _mm256_broadcastsi128_si256(_mm_unpacklo_epi16(a, b));
            // In the first 128 bits codes 0 to 3 of eight, in the second ones 4 to 7: neighbouring bits of the same bytes.
            let (bits, even) = (_mm256_set1_epi8(0x44), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
            let of = |shift: i32| {
                let x = _mm256_srlv_epi32(high, _mm256_add_epi32(even, _mm256_set1_epi32(shift)));
                _mm256_and_si256(_mm256_slli_epi32::<2>(x), bits)
            };
            [_mm256_or_si256(first, of(0)), _mm256_or_si256(second, of(2))]
        }
    }
}

/// Scales and zeros of eight rows.
///
/// # Safety
/// `at` must be valid for reading a pair at each of the eight rows, and the CPU must have the instructions.
#[inline(always)]
unsafe fn pairs(at: *const u8, stride: usize) -> (__m256, __m256) {
    let mut pairs = [0i32; EIGHT];
    // SAFETY: the caller's promise; the array has the 32 bytes.
    unsafe {
        for r in 0..EIGHT {
            pairs[r] = at.add(r * stride).cast::<i32>().read_unaligned();
        }
        let x = _mm256_loadu_si256(pairs.as_ptr().cast());
        // Words of eight lanes to the front: 0 to 3 and 4 to 7 of both halves.
        let low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
        let both = _mm256_packus_epi32(low, _mm256_srli_epi32::<16>(x));
        let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(both);
        (
            _mm256_cvtph_ps(_mm256_castsi256_si128(both)),
            _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(both)),
        )
    }
}
