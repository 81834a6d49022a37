//! Packing, unpacking and attention on packed rows of a KV cache. Slices in, slices out.
//!
//! Invariants: a *row* is one token's key or value of one KV head; its bytes depend on that row alone,
//! so rows move, drop and join freely. Kernels keep no state and know nothing of positions: they
//! attend to the rows that they are given ("kept" rows, never "seen" tokens).
//!
//! [`Kernels`] names an implementation and has every kernel as a method. `scalar` is plain loops in `f64`,
//! which is what the others are tested against; `portable` is safe code shaped so that the compiler
//! vectorizes it. All of them check every length and shape first and answer with a [`KernelError`]; on
//! an error, output slices hold unspecified values.
//!
//! Attention accumulates in `f32`. A non-finite query or fresh row yields non-finite output, as it
//! would in plain attention; packed rows are always finite, because [`Kernels::pack`] refuses others.
#![deny(unsafe_code)]

pub mod bench;
mod check;
mod codec;
mod error;
mod fp8;
mod generic;
mod kernels;
mod layout;
mod partial;
mod portable;
mod q8_0;
mod scalar;
mod simd;
mod types;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use codec::{Codec, GROUP};
pub use error::KernelError;
pub use kernels::{Kernels, NAMES};
pub use layout::Layout;
pub use partial::{Partial, Stat, accumulate, merge, total};
pub use q8_0::{Q8Part, Q8Rows};
pub use types::{ColumnSums, Heads, Rows, RowsMut, Scratch, Segment};
