//! Which implementation runs. Invariant: a [`Kernels`] exists only for an implementation that this CPU can
//! run, so having one is the proof that calls through it need no further check.

use crate::generic::{self, Leveled};
use crate::q8_0::Product;
#[cfg(target_arch = "x86_64")]
use crate::x86::{Avx2, Avx512};
use crate::{
    Codec, ColumnSums, Heads, KernelError, Layout, Partial, Rows, RowsMut, Scratch, Segment, check,
    portable::Portable, scalar,
};

/// An implementation of every kernel, chosen once and passed down; as small as a byte.
///
/// All implementations pack the same bytes and unpack the same values, bit for bit; attention agrees
/// within the rounding of `f32` sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernels(Isa);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Isa {
    Scalar,
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

/// Every implementation there is, on any machine, slowest first.
pub const NAMES: [&str; 4] = ["scalar", "portable", "avx2", "avx512"];

/// An implementation's own function.
macro_rules! dispatch {
    ($kernels:ident, $name:ident($($arg:expr),*)) => {
        match $kernels.0 {
            Isa::Scalar => scalar::$name($($arg),*),
            Isa::Portable(s) => s.$name($($arg),*),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(s) => s.$name($($arg),*),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(s) => s.$name($($arg),*),
        }
    };
}

impl Kernels {
    /// The fastest implementation that this CPU can run.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Ok(s) = Avx512::detect() {
                return Self(Isa::Avx512(s));
            }
            if let Ok(s) = Avx2::detect() {
                return Self(Isa::Avx2(s));
            }
        }
        Self(Isa::Portable(Portable))
    }

    /// The named implementation.
    ///
    /// # Errors
    /// [`KernelError::Unknown`] if there is none of that name, [`KernelError::Unsupported`] if this CPU can't
    /// run it.
    pub fn forced(name: &str) -> Result<Self, KernelError> {
        match name {
            "scalar" => Ok(Self(Isa::Scalar)),
            "portable" => Ok(Self(Isa::Portable(Portable))),
            #[cfg(target_arch = "x86_64")]
            "avx2" => Avx2::detect().map(|s| Self(Isa::Avx2(s))),
            #[cfg(target_arch = "x86_64")]
            "avx512" => Avx512::detect().map(|s| Self(Isa::Avx512(s))),
            #[cfg(not(target_arch = "x86_64"))]
            "avx2" | "avx512" => Err(KernelError::Unsupported {
                given: if name == "avx2" { "avx2" } else { "avx512" },
                missing: "x86-64".into(),
            }),
            _ => Err(KernelError::Unknown { given: name.into() }),
        }
    }

    /// Every implementation that this CPU can run, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        NAMES.iter().filter_map(|name| Self::forced(name).ok()).collect()
    }

    /// The product by an implementation's own code; false where it has none.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "only x86-64 has some")
    )]
    pub(crate) fn own_q8_0(self, product: &Product<'_>, out: &mut [&mut [f32]]) -> bool {
        match self.0 {
            Isa::Scalar | Isa::Portable(_) => return false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(s) => s.q8_0_matmul(product, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(s) => s.q8_0_matmul(product, out),
        }
        #[cfg_attr(not(target_arch = "x86_64"), expect(unreachable_code, reason = "likewise"))]
        true
    }

    /// The name, as in configs and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Isa::Scalar => "scalar",
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
        }
    }

    /// Packs rows of `dim` values into `dst`, which has `codec.row_bytes(dim)` bytes for each.
    ///
    /// Magnitudes beyond what the codec represents saturate (65504 for `F16` and integers). The error of a
    /// value is at most 2^-11 of it for `F16`, 2^-8 for `Bf16`, and half of its group's stored scale for
    /// integers.
    ///
    /// # Errors
    /// [`KernelError::NonFinite`] names the first row that holds an infinity or a NaN; other variants tell
    /// of a dimension of 0 or lengths that do not fit.
    pub fn pack(self, codec: Codec, dim: usize, src: &[f32], dst: &mut [u8]) -> Result<(), KernelError> {
        dispatch!(self, pack(codec, dim, src, dst))
    }

    /// Unpacks rows of `codec.row_bytes(dim)` bytes into `dst`, `dim` values each.
    ///
    /// # Errors
    /// A dimension of 0 or lengths that do not fit.
    pub fn unpack(self, codec: Codec, dim: usize, src: &[u8], dst: &mut [f32]) -> Result<(), KernelError> {
        dispatch!(self, unpack(codec, dim, src, dst))
    }

    /// Packs a run of rows in a layout, into `layout.stored_rows(rows) · codec.row_bytes(dim)` bytes; otherwise as
    /// [`Kernels::pack`]. Of [`Layout::KeyChannels`], scale and zero are of a column over a tile's rows, and so are errors.
    ///
    /// # Errors
    /// As [`Kernels::pack`], and [`KernelError::Layout`] where rows of this codec and dimension can't lie so.
    pub fn pack_run(
        self,
        layout: Layout,
        codec: Codec,
        dim: usize,
        src: &[f32],
        dst: &mut [u8],
    ) -> Result<(), KernelError> {
        dispatch!(self, pack_run(layout, codec, dim, src, dst))
    }

    /// Unpacks the first rows of a run that [`Kernels::pack_run`] made: all of it, or as far as the last row's tile goes.
    ///
    /// # Errors
    /// As [`Kernels::unpack`], and [`KernelError::Layout`].
    pub fn unpack_run(
        self,
        layout: Layout,
        codec: Codec,
        dim: usize,
        src: &[u8],
        dst: &mut [f32],
    ) -> Result<(), KernelError> {
        dispatch!(self, unpack_run(layout, codec, dim, src, dst))
    }

    /// As [`Kernels::pack_run`], but code `i` stands for `levels[i]`, not for `i`: a value is stored as the code whose
    /// `scale · level + zero` is nearest (non-uniform quantization, as in KVQuant, arXiv 2401.18079, section 3.3). `levels`
    /// are as many as the codec has codes, numbers that f16 has, in order, from 0 to its largest code.
    ///
    /// # Errors
    /// As [`Kernels::pack_run`]; levels that are not so, and codecs without codes.
    pub fn pack_levels(
        self,
        layout: Layout,
        codec: Codec,
        dim: usize,
        levels: &[f32],
        src: &[f32],
        dst: &mut [u8],
    ) -> Result<(), KernelError> {
        if self.0 == Isa::Scalar {
            return scalar::pack_levels(layout, codec, dim, levels, src, dst);
        }
        check::levels(codec, levels)?;
        let middles = generic::middles(levels);
        generic::pack_run(Leveled::new(levels, &middles), layout, codec, dim, src, dst)
    }

    /// Unpacks what [`Kernels::pack_levels`] packed with the same levels; else as [`Kernels::unpack_run`].
    ///
    /// # Errors
    /// As [`Kernels::unpack_run`]; levels as there.
    pub fn unpack_levels(
        self,
        layout: Layout,
        codec: Codec,
        dim: usize,
        levels: &[f32],
        src: &[u8],
        dst: &mut [f32],
    ) -> Result<(), KernelError> {
        if self.0 == Isa::Scalar {
            return scalar::unpack_levels(layout, codec, dim, levels, src, dst);
        }
        check::levels(codec, levels)?;
        generic::unpack_run(Leveled::new(levels, &[]), layout, codec, dim, src, dst)
    }

    /// Copies a run so that it lies row by row.
    ///
    /// # Errors
    /// Lengths that do not fit, and [`KernelError::Layout`] for [`Layout::KeyChannels`], whose rows have no bytes of their
    /// own.
    pub fn to_rows(
        self,
        layout: Layout,
        codec: Codec,
        dim: usize,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), KernelError> {
        dispatch!(self, to_rows(layout, codec, dim, src, dst))
    }

    /// Copies rows that lie row by row to a run of a layout.
    ///
    /// # Errors
    /// As [`Kernels::to_rows`].
    pub fn of_rows(
        self,
        layout: Layout,
        codec: Codec,
        dim: usize,
        src: &[u8],
        dst: &mut [u8],
    ) -> Result<(), KernelError> {
        dispatch!(self, of_rows(layout, codec, dim, src, dst))
    }

    /// How this implementation attends fastest to keys of this codec and dimension that have parameters of their own.
    #[must_use]
    pub fn key_layout(self, codec: Codec, dim: usize) -> Layout {
        self.tiled(Layout::KeyTiles, codec, dim)
    }

    /// How this implementation attends fastest to values of this codec and dimension.
    #[must_use]
    pub fn value_layout(self, codec: Codec, dim: usize) -> Layout {
        self.tiled(Layout::ValueTiles, codec, dim)
    }

    fn tiled(self, layout: Layout, codec: Codec, dim: usize) -> Layout {
        // The others unpack rows first, and tiles would only add work.
        let uses = match self.0 {
            Isa::Scalar | Isa::Portable(_) => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) | Isa::Avx512(_) => true,
        };
        if uses && layout.fits(codec, dim) {
            layout
        } else {
            Layout::Rows
        }
    }

    /// Rotates rows of `dim` values in place by the normalized Walsh-Hadamard transform, which is its own
    /// inverse; natural (Hadamard) order.
    ///
    /// A `dim` that is not a power of two is cut in its power-of-two parts, largest first (80 = 64 + 16), and
    /// each part is rotated by itself. Part of the stored format: keys of a segment with
    /// [`Segment::k_rotated`] were rotated this way.
    ///
    /// Rotation spreads outlier channels over all of a part's values before quantization, as in `QuaRot`
    /// (arXiv 2404.00456, section 4.2); `(Rq)·(Rk) = q·k` because R is orthogonal.
    ///
    /// # Errors
    /// A dimension of 0, or a length that is not a whole number of rows.
    pub fn rotate(self, dim: usize, rows: &mut [f32]) -> Result<(), KernelError> {
        dispatch!(self, rotate(dim, rows))
    }

    /// Attention of one query token per query head over all rows of `segments`, which may be any part of a
    /// KV head's rows: results of several parts go together by [`crate::merge`].
    ///
    /// * `q`: `q_heads × k_dim`, not rotated.
    /// * `partial`: overwritten; over no rows it is neutral (maximum −∞, sum and output 0).
    /// * `weights`: if given, `q_heads × rows` values, overwritten by e^(logit − maximum of the head in
    ///   `partial`), rows in the order of the segments.
    ///
    /// # Errors
    /// Shapes that do not fit, or a scale or cap out of range.
    pub fn attend_decode(
        self,
        heads: &Heads,
        segments: &[Segment<'_>],
        q: &[f32],
        partial: &mut Partial,
        weights: Option<&mut [f32]>,
        scratch: &mut Scratch,
    ) -> Result<(), KernelError> {
        dispatch!(self, attend_decode(heads, segments, q, partial, weights, scratch))
    }

    /// Causal attention of a run of fresh tokens of one KV head: the run's query `i` sees all rows of `past`
    /// and fresh rows `0..=first_query + i`. Fresh rows are used exactly, past rows as stored.
    ///
    /// * `fresh_k`, `fresh_v`: `t × k_dim` and `t × v_dim`.
    /// * `q`, `out`: per query head `n × k_dim` and `n × v_dim`, for fresh tokens `first_query..first_query + n`
    ///   only; `out` is overwritten.
    /// * `sums`: if given, each key's slot grows by its attention weight, summed over the query heads and the
    ///   run's last queries.
    ///
    /// # Errors
    /// Shapes that do not fit, or a scale or cap out of range.
    #[expect(
        clippy::too_many_arguments,
        reason = "three inputs, two outputs and what they are used with"
    )]
    pub fn attend_prefill(
        self,
        heads: &Heads,
        past: &[Segment<'_>],
        fresh_k: Rows<'_>,
        fresh_v: Rows<'_>,
        first_query: usize,
        q: &[Rows<'_>],
        out: &mut [RowsMut<'_>],
        sums: Option<ColumnSums<'_>>,
        scratch: &mut Scratch,
    ) -> Result<(), KernelError> {
        let call = crate::types::Prefill {
            heads,
            past,
            fresh_k,
            fresh_v,
            first_query,
            q,
        };
        dispatch!(self, attend_prefill(&call, out, sums, scratch))
    }

    /// Computes nothing but multiply-adds; for [`crate::bench`]. Returns how many operations.
    pub(crate) fn multiply_adds(self, steps: usize) -> usize {
        let mut sum = 0.0;
        let done = match self.0 {
            Isa::Scalar | Isa::Portable(_) => Portable.multiply_adds(steps, &mut sum),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(s) => s.multiply_adds(steps, &mut sum),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(s) => s.multiply_adds(steps, &mut sum),
        };
        std::hint::black_box(sum);
        if done.is_ok() {
            steps * generic::OPERATIONS
        } else {
            0
        }
    }
}
