//! KIVI (arXiv 2402.02750, section 4): keys are quantized per channel, over the 32 tokens of a tile, and values per token
//! in groups of 32. Keys have channels of large values, the same ones in every token; within a channel the range is
//! small. The most recent tokens stay in full precision until they fill a tile and the policy's `residual`, which the
//! paper sets to 128: they are part of the memory.
//!
//! Tokens that an eviction leaves of several tiles share new ones; their parameters are then made of what the old ones
//! unpack to, so that such keys are rounded again.
//!
//! When not to use it: 4 bits and more with rotated keys (`rtn` with `rotate_k`), which are as good and need no residual
//! of whole tiles; policies that evict often at 2 bits, for the rounding above.

use cinch_kernels::{Codec, Layout};
use cinch_protocol::{PolicyError, QuantizeMethod};

/// Whether keys of this dimension can be quantized so: in whole groups of 32 channels.
pub(super) fn check(method: QuantizeMethod, codec: Codec, k_dim: usize) -> Result<(), PolicyError> {
    if Layout::KeyChannels.fits(codec, k_dim) {
        return Ok(());
    }
    let name = method.name();
    let allowed = format!("rtn: {name} needs keys of a multiple of 32 values, these have {k_dim}");
    Err(PolicyError::new("quantize.method", name, &allowed))
}
