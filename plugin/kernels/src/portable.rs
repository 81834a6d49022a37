//! Safe code that the compiler vectorizes: fixed-size chunks, accumulators in arrays, no bounds checks
//! in an inner loop.
//!
//! Invariant: a packed row is unpacked once a call and pass, into a tile that stays in the first-level
//! cache, and every query head of the group then reads that tile. Unpacking costs one multiply-add a
//! value, the same as folding scale and zero into the dot product would, and is shared by the heads.
//!
//! Speed needs the target's vector features at compile time (`-C target-cpu=native` or `x86-64-v3`);
//! without them the results are the same up to the rounding of multiply-add.

mod decode;
mod math;
mod pack;
mod prefill;
mod rotate;
mod unpack;

pub(crate) use decode::attend_decode;
pub(crate) use pack::pack;
pub(crate) use prefill::attend_prefill;
pub(crate) use rotate::rotate;
pub(crate) use unpack::unpack;

/// Row widths in tiles are multiples of this: two 8-lane vectors.
const LANES: usize = 16;

/// `dim`, rounded up to whole lanes.
fn width(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}
