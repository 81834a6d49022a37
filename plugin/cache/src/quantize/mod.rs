//! How rows are packed: which codec a policy's bits mean, and that codecs only ever go down for rows
//! already stored. One method a file.

pub(crate) mod kivi;
pub(crate) mod rtn;

use cinch_kernels::Codec;
use cinch_protocol::{Quantize, QuantizeMethod};

/// Bits a value takes, without scales.
pub(crate) fn bits(codec: Codec) -> u32 {
    match codec {
        Codec::F32 => 32,
        Codec::F16 | Codec::Bf16 => 16,
        Codec::Int8 => 8,
        Codec::Int4 => 4,
        Codec::Int3 => 3,
        Codec::Int2 => 2,
    }
}

/// The codec a stored row ends up in: information that is gone does not come back, so never one of more bits.
pub(crate) fn lower(current: Codec, target: Codec) -> Codec {
    if bits(target) < bits(current) {
        target
    } else {
        current
    }
}

/// Codecs of K and V that a policy packs a layer's rows into; `None`: they stay in the store's own.
pub(crate) fn codecs(quantize: &Quantize, layer: usize) -> (Option<Codec>, Option<Codec>) {
    let (k, v) = quantize.bits(layer);
    // Both give a value as many bits; they differ in which values share a scale.
    match quantize.method {
        QuantizeMethod::Rtn | QuantizeMethod::Kivi => (rtn::codec(k), rtn::codec(v)),
    }
}

/// Whether a policy packs anything in any layer.
pub(crate) fn packs(quantize: &Quantize) -> bool {
    quantize.all_bits().any(|bits| rtn::codec(bits).is_some())
}

/// Whether the tokens of a tile share a channel's scale and zero.
pub(crate) fn by_channel(quantize: &Quantize) -> bool {
    quantize.method == QuantizeMethod::Kivi
}
