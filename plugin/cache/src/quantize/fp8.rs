//! FP8 E4M3 (arXiv 2209.05433), unscaled, as GPU engines store their cache with a scale of 1: a value keeps its exponent
//! and three bits of mantissa, so that no group's outlier costs the others anything; magnitudes beyond 448 saturate.
//!
//! When not to use it: wherever `int8` will do. It has as many bits and no parameters, 11 % fewer bytes, but a relative
//! error of up to 2⁻⁴ where int8's is 2⁻⁸ of its group's range.

use cinch_kernels::Codec;
use cinch_protocol::Bits;

pub(super) fn codec(bits: Bits) -> Option<Codec> {
    (bits == Bits::B8).then_some(Codec::Fp8)
}
