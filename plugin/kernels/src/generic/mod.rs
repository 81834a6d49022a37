//! The kernels, written once for any [`Simd`](crate::simd::Simd).
//!
//! Invariant: a packed row is read from memory once a call and pass, whatever the number of query heads: it is
//! used from registers, or unpacked into a tile that stays in the first-level cache.

mod arrange;
mod block;
mod channels;
pub(crate) mod decode;
mod kept;
mod levels;
mod math;
mod pack;
mod prefill;
mod rotate;
mod rows;
mod tile;
mod unpack;

pub(crate) use arrange::{of_rows, pack_run, to_rows, unpack_run};
pub(crate) use decode::attend_decode;
pub(crate) use levels::{Leveled, middles};
pub(crate) use pack::pack;
pub(crate) use prefill::attend_prefill;
pub(crate) use rotate::rotate;
pub(crate) use unpack::unpack;

use crate::KernelError;
use crate::simd::{LANES, Simd};

/// `dim`, rounded up to whole lanes.
fn width(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

/// A buffer of `len` times the value, at the start of a cache line: vectors of 64 bytes that cross two lines take twice
/// as long. Allocates only when the buffer has never been as long.
fn reset(buffer: &mut Vec<f32>, len: usize, value: f32) -> &mut [f32] {
    const LINE: usize = 64 / size_of::<f32>();
    buffer.clear();
    buffer.resize(len + LINE, value);
    // An implementation may decline to tell; then the start is as good as any.
    let start = buffer.as_ptr().align_offset(64);
    let start = if start < LINE { start } else { 0 };
    &mut buffer[start..start + len]
}

/// Operations of a step of `multiply_adds`.
pub(crate) const OPERATIONS: usize = 2 * 12 * LANES;

/// Nothing but multiply-adds, twelve that don't wait for each other a step: what a machine can do at most.
#[inline(always)]
pub(crate) fn multiply_adds<S: Simd>(s: S, steps: usize, sum: &mut f32) -> Result<(), KernelError> {
    let (mut acc, x) = ([s.splat(0.5); 12], s.splat(std::hint::black_box(0.999)));
    for _ in 0..steps {
        for acc in &mut acc {
            *acc = s.madd(*acc, x, x);
        }
    }
    *sum = acc.into_iter().map(|v| s.sum(v)).sum();
    Ok(())
}

/// Every implementation's entry points: the generic kernels, compiled with its instructions.
macro_rules! entries {
    ($token:ty $(, $features:literal)?) => {
        impl $token {
            entries!(@ $token, multiply_adds($($features)?)(steps: usize, sum: &mut f32));
            entries!(@ $token, pack($($features)?)(
                codec: crate::Codec, dim: usize, src: &[f32], dst: &mut [u8]));
            entries!(@ $token, unpack($($features)?)(
                codec: crate::Codec, dim: usize, src: &[u8], dst: &mut [f32]));
            entries!(@ $token, pack_run($($features)?)(
                layout: crate::Layout, codec: crate::Codec, dim: usize, src: &[f32], dst: &mut [u8]));
            entries!(@ $token, unpack_run($($features)?)(
                layout: crate::Layout, codec: crate::Codec, dim: usize, src: &[u8], dst: &mut [f32]));
            entries!(@ $token, to_rows($($features)?)(
                layout: crate::Layout, codec: crate::Codec, dim: usize, src: &[u8], dst: &mut [u8]));
            entries!(@ $token, of_rows($($features)?)(
                layout: crate::Layout, codec: crate::Codec, dim: usize, src: &[u8], dst: &mut [u8]));
            entries!(@ $token, rotate($($features)?)(dim: usize, rows: &mut [f32]));
            entries!(@ $token, attend_decode($($features)?)(
                heads: &crate::Heads, segments: &[crate::Segment<'_>], q: &[f32], partial: &mut crate::Partial,
                weights: Option<&mut [f32]>, scratch: &mut crate::Scratch));
            entries!(@ $token, attend_prefill($($features)?)(
                call: &crate::types::Prefill<'_>, out: &mut [crate::RowsMut<'_>],
                sums: Option<crate::ColumnSums<'_>>, scratch: &mut crate::Scratch));
        }
    };
    (@ $token:ty, $name:ident($features:literal)($($arg:ident: $type:ty),*)) => {
        pub(crate) fn $name(self, $($arg: $type),*) -> Result<(), crate::KernelError> {
            #[target_feature(enable = $features)]
            fn run(s: $token, $($arg: $type),*) -> Result<(), crate::KernelError> {
                crate::generic::$name(s, $($arg),*)
            }
            // SAFETY: `self` exists only where these features were detected.
            unsafe { run(self, $($arg),*) }
        }
    };
    (@ $token:ty, $name:ident()($($arg:ident: $type:ty),*)) => {
        pub(crate) fn $name(self, $($arg: $type),*) -> Result<(), crate::KernelError> {
            crate::generic::$name(self, $($arg),*)
        }
    };
}
pub(crate) use entries;
