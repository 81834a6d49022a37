//! Weights of values as integers, for products with codes.
//!
//! Those of int8 get 15 bits: the rounding is 2^-16 of the block's largest contribution. Those of fewer bits get 8, and
//! 255 steps alone would lose many small weights next to a large one, and all to the same side. So the place at which a
//! weight is rounded up differs from row to row, evenly spread: of rows that weigh 0.3 steps, 3 in 10 count as one.
//! What the roundings add up to is known exactly, and its product with the middle code is taken back. What is left
//! is at most about 0.5 steps · √64 rows · a standard deviation of codes: 0.07 of a scale for int4 and a
//! block whose heaviest row weighs 1, where the codes' own rounding is 0.29 of a scale for that one row alone.

use super::query::LARGEST;
use crate::generic::decode::BLOCK;

/// Steps in a block's heaviest row, of one byte: rounded up, it still is one.
pub(super) const BYTE: f32 = 254.0;
/// The same of two bytes.
pub(super) const WORD: f32 = LARGEST[1];

/// What is added to each row of a block before its weight is rounded down to a byte: multiples of the golden ratio, whose
/// fractions are evenly spread over any run of rows (Weyl's sequence).
pub(super) static PLACES: [f32; BLOCK] = {
    let (mut out, mut i) = ([0.0; BLOCK], 0);
    while i < BLOCK {
        let x = (i as f64 + 0.5) * 0.618_033_988_749_894_9;
        out[i] = (x - (x as u64) as f64) as f32;
        i += 1;
    }
    out
};

// A sum of a block's products with codes of eight bits fits 32 bits.
const _: () = assert!(BLOCK as u64 * WORD as u64 * 255 < i32::MAX as u64);
