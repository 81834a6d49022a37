//! The stored format: how one row of `dim` values becomes bytes.
//!
//! Invariant: a row's bytes are a function of that row and its codec only, and every codec's rows have
//! a fixed size, [`Codec::row_bytes`]. All numbers are little-endian.
//!
//! | codec | row |
//! | --- | --- |
//! | `F32`, `F16`, `Bf16`, `Fp8` | `dim` values |
//! | `Int8` | `dim` codes, one byte each, then the parameters |
//! | `Int4`, `Int2` | two or four codes a byte, then the parameters |
//! | `Int3` | the codes' low two bits as in `Int2`, then their high bits, eight a byte; then the parameters |
//!
//! Integer codecs cut a row in groups of [`GROUP`] values, the last of which may be short. Each group is
//! stored as `x ≈ scale · code + zero` with codes from 0 to 255, 15, 7 or 3. The parameters follow the
//! codes of the **whole** row: scale (f16), zero (f16), a pair a group.
//!
//! Codes are stored in planes of `b` bits: 8, 4, 2, or 2 and 1 for `Int3`. A group of `n` values takes
//! `h = ⌈n·b/8⌉` bytes a plane, and byte `i` holds values `i`, `h + i`, `2h + i`, … from its low bits up (0 where
//! there is none). So every bit position unpacks to a run of neighbours: a shift and a mask, no interleaving. The
//! two planes of `Int3` follow each other group by group.
//!
//! Parameters are rounded to f16 **before** codes are chosen, so a code is the nearest one for what is
//! stored: zero is rounded down from the group's minimum and scale up, from `(max − zero) / levels`.
//! Nothing is clipped then, and the error of a value is at most `scale / 2` plus f32 rounding. A group
//! of equal values that f16 can represent has scale 0 and is exact.
//!
//! This is the asymmetric round-to-nearest quantization of KIVI (arXiv 2402.02750, section 2.2), with
//! groups along the head dimension for K and V alike.

/// Values that share a scale and a zero. Part of the stored format.
pub const GROUP: usize = 32;

/// Bytes of one group's scale and zero. Part of the stored format.
pub(crate) const PARAM_BYTES: usize = 4;

/// The largest finite f16; `F16` values and integer parameters saturate there.
pub(crate) const F16_MAX: f32 = 65504.0;

// Stored format: a full group's nibbles fill whole bytes in two equal halves, and 8-lane loops
// cover each half without a rest.
const _: () = assert!(GROUP == 32 && PARAM_BYTES == 2 * size_of::<half::f16>());
const _: () = assert!(Codec::Int8.row_bytes(64) == 64 + 2 * 4);
const _: () = assert!(Codec::Int4.row_bytes(64) == 32 + 2 * 4);
const _: () = assert!(Codec::Int4.row_bytes(33) == 16 + 1 + 2 * 4);
const _: () = assert!(Codec::Int3.row_bytes(64) == 2 * (8 + 4) + 2 * 4);
const _: () = assert!(Codec::Int3.row_bytes(33) == (8 + 4) + (1 + 1) + 2 * 4);
const _: () = assert!(Codec::Int2.row_bytes(64) == 16 + 2 * 4);
const _: () = assert!(Codec::Int2.row_bytes(37) == 8 + 2 + 2 * 4);
const _: () = assert!(Codec::F16.row_bytes(64) == 128);

/// Some bits of every code of a group. Part of the stored format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plane {
    /// Bits of a code in this plane: 1, 2, 4 or 8.
    pub(crate) bits: u8,
    /// Where in the code they belong.
    pub(crate) shift: u8,
}

/// How a row of values is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// 4 bytes a value, exact.
    F32,
    /// 2 bytes a value, 11 significant bits; saturates at ±65504.
    F16,
    /// 2 bytes a value, 8 significant bits; saturates at the largest finite bf16.
    Bf16,
    /// 1 byte a value, 4 significant bits (E4M3); saturates at ±448.
    Fp8,
    /// 1 byte a value plus 4 bytes a group of 32; saturates at ±65504.
    Int8,
    /// Half a byte a value plus 4 bytes a group of 32; saturates at ±65504.
    Int4,
    /// Three eighths of a byte a value plus 4 bytes a group of 32; saturates at ±65504.
    Int3,
    /// A quarter of a byte a value plus 4 bytes a group of 32; saturates at ±65504.
    Int2,
}

impl Codec {
    /// Every codec, widest first.
    pub const ALL: [Self; 8] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Fp8,
        Self::Int8,
        Self::Int4,
        Self::Int3,
        Self::Int2,
    ];

    /// Bytes of one row of `dim` values, scales and zeros included.
    #[must_use]
    #[inline]
    pub const fn row_bytes(self, dim: usize) -> usize {
        let params = dim.div_ceil(GROUP).saturating_mul(PARAM_BYTES);
        match self {
            Self::F32 => dim.saturating_mul(4),
            Self::F16 | Self::Bf16 => dim.saturating_mul(2),
            Self::Fp8 => dim,
            _ => self.code_bytes(dim).saturating_add(params),
        }
    }

    /// Bytes of a row's codes; its parameters start there. 0 for codecs without codes.
    pub(crate) const fn code_bytes(self, dim: usize) -> usize {
        let full = (dim / GROUP).saturating_mul(self.group_bytes(GROUP));
        full.saturating_add(self.group_bytes(dim % GROUP))
    }

    /// Bytes of the codes of a group of `n ≤ 32` values.
    pub(crate) const fn group_bytes(self, n: usize) -> usize {
        let (mut bytes, mut i) = (0, 0);
        while i < self.planes().len() {
            bytes += (n * self.planes()[i].bits as usize).div_ceil(8);
            i += 1;
        }
        bytes
    }

    /// The planes of a group's codes, in order; none for codecs without codes.
    pub(crate) const fn planes(self) -> &'static [Plane] {
        const fn plane(bits: u8, shift: u8) -> Plane {
            Plane { bits, shift }
        }
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Fp8 => &[],
            Self::Int8 => const { &[plane(8, 0)] },
            Self::Int4 => const { &[plane(4, 0)] },
            Self::Int3 => const { &[plane(2, 0), plane(1, 2)] },
            Self::Int2 => const { &[plane(2, 0)] },
        }
    }

    /// The largest code of an integer codec.
    pub(crate) const fn levels(self) -> Option<u8> {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Fp8 => None,
            Self::Int8 => Some(255),
            Self::Int4 => Some(15),
            Self::Int3 => Some(7),
            Self::Int2 => Some(3),
        }
    }

    /// The name in configs, metrics and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Int3 => "int3",
            Self::Int2 => "int2",
        }
    }
}
