//! Round to nearest, asymmetric, per token in groups of 32 along the head dim, f16 scale and zero point:
//! the baseline that KIVI (arXiv 2402.02750, section 3.1) starts from.
//!
//! When not to use it: K of 4 bits or fewer on small models. Keys have outlier channels that share a group with
//! small ones; give K 8 bits there (`k_bits = 8, v_bits = 4`), or rotate it (`rotate_k = true`).

use cinch_kernels::Codec;
use cinch_protocol::Bits;

pub(super) fn codec(bits: Bits) -> Option<Codec> {
    match bits {
        Bits::B2 => Some(Codec::Int2),
        Bits::B3 => Some(Codec::Int3),
        Bits::B4 => Some(Codec::Int4),
        Bits::B8 => Some(Codec::Int8),
        Bits::B16 => None,
    }
}
