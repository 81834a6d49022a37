//! How a run of packed rows lies in memory.
//!
//! Invariant: a run of any layout takes [`Layout::stored_rows`] times [`Codec::row_bytes`] bytes, and where a run may
//! be cut, the part that begins there is a run itself.
//!
//! | layout | for | a run |
//! | --- | --- | --- |
//! | `Rows` | K, V | row by row |
//! | `KeyTiles` | K | every full sixteen rows a *tile*, the rest row by row |
//! | `ValueTiles` | V | the same, with another order of code bytes in a tile |
//! | `KeyChannels` | K | tiles of 32 rows, the last one filled up; parameters are a channel's, not a row's |
//!
//! A tile of `KeyTiles` has the rows' code bytes in words of four: word `w` of row `r` at byte `4 · (16w + r)`. One of
//! `ValueTiles` has code byte `16q + i` of row `4j + b` at byte `64 · (4q + j) + 4i + b`. Then follow, in both, for each
//! group of columns the sixteen rows' scales and the sixteen rows' zeros. So a vector of 64 bytes is four values of
//! sixteen keys, or four rows of sixteen columns, which is what integer dot products take: nothing is shuffled.
//!
//! A tile of `KeyChannels` has the code bytes of two times sixteen rows in words as `KeyTiles` has them, then a scale for each
//! column, then a zero for each: the tokens of a tile share them, as in KIVI (arXiv 2402.02750, section 4.1), because keys
//! have channels of large values and tokens have none. Rows that fill a tile up have codes of 0.

use std::ops::Range;

use crate::codec::{GROUP, PARAM_BYTES};
use crate::{Codec, KernelError};

/// Rows of a tile of [`Layout::KeyTiles`] and [`Layout::ValueTiles`]. Part of the stored format.
pub(crate) const TILE: usize = 16;
/// Rows of a tile of [`Layout::KeyChannels`]: the tokens that share a channel's scale and zero. Part of the stored format.
pub(crate) const CHANNEL_TILE: usize = 32;

/// How a run of packed rows lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Row by row.
    Rows,
    /// Keys in tiles of sixteen rows. Integer codecs, whole groups.
    KeyTiles,
    /// Values in tiles of sixteen rows. `Int8` and `Int4`, whole groups.
    ValueTiles,
    /// Keys quantized channel by channel in tiles of 32 rows. Integer codecs, whole groups.
    KeyChannels,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 4] = [Self::Rows, Self::KeyTiles, Self::ValueTiles, Self::KeyChannels];

    /// Rows that a run of `rows` takes the bytes of: more than `rows` only where the last tile is filled up.
    #[must_use]
    pub const fn stored_rows(self, rows: usize) -> usize {
        match self {
            Self::KeyChannels => up(rows, CHANNEL_TILE),
            Self::Rows | Self::KeyTiles | Self::ValueTiles => rows,
        }
    }

    /// A run may be cut before every row whose number is a multiple of this.
    #[must_use]
    pub const fn step(self) -> usize {
        match self {
            Self::Rows => 1,
            Self::KeyTiles | Self::ValueTiles => TILE,
            Self::KeyChannels => CHANNEL_TILE,
        }
    }

    /// Whether rows of this codec and dimension can lie so.
    #[must_use]
    pub fn fits(self, codec: Codec, dim: usize) -> bool {
        let whole = codec.levels().is_some() && dim.is_multiple_of(GROUP);
        match self {
            Self::Rows => true,
            Self::KeyTiles | Self::KeyChannels => whole,
            Self::ValueTiles => whole && codec.group_bytes(GROUP).is_multiple_of(16),
        }
    }

    /// The name in errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::KeyTiles => "key tiles",
            Self::ValueTiles => "value tiles",
            Self::KeyChannels => "key channels",
        }
    }

    /// Stored rows that `n` rows from a cut on lie in, of a run of `stored`: to the end of the last row's tile.
    #[must_use]
    pub fn span(self, stored: usize, from: usize, n: usize) -> Range<usize> {
        from..stored.min(up(from + n, self.step()))
    }

    /// Checks a run: `bytes` of at least `rows` rows, of which the last tile may be used in part.
    pub(crate) fn check(
        self,
        what: &'static str,
        (codec, dim): (Codec, usize),
        rows: usize,
        bytes: usize,
    ) -> Result<(), KernelError> {
        if !self.fits(codec, dim) {
            return Err(KernelError::Layout {
                given: self.name(),
                codec: codec.name(),
                dim,
            });
        }
        let row = codec.row_bytes(dim);
        let (stored, expected) = (bytes / row, self.stored_rows(rows));
        // Of a run in tiles, the first `rows` are a part that ends with a whole tile, or all of it.
        let whole = up(rows, self.step());
        if bytes.is_multiple_of(row) && (stored == expected || stored == whole) {
            Ok(())
        } else {
            Err(KernelError::Length {
                what,
                given: bytes,
                expected: expected.saturating_mul(row),
            })
        }
    }
}

/// The next multiple; the largest number if there is none.
const fn up(rows: usize, step: usize) -> usize {
    match rows.checked_next_multiple_of(step) {
        Some(up) => up,
        None => usize::MAX,
    }
}

/// Where a tile's parameters are: group `g`'s scale of row `r`. Its zero is 32 bytes on.
pub(crate) const fn tile_scale(codec: Codec, dim: usize, g: usize, r: usize) -> usize {
    TILE * codec.code_bytes(dim) + g * TILE * PARAM_BYTES + 2 * r
}

/// Where a channel tile's parameters are: the scale of column `c`. Its zero is `2 · dim` bytes on.
pub(crate) const fn channel_scale(codec: Codec, dim: usize, c: usize) -> usize {
    CHANNEL_TILE * codec.code_bytes(dim) + 2 * c
}

// Stored format.
const _: () = assert!(TILE == 16 && CHANNEL_TILE == GROUP);
const _: () = assert!(channel_scale(Codec::Int4, 64, 64) + 2 * 64 == 32 * Codec::Int4.row_bytes(64));
const _: () = assert!(tile_scale(Codec::Int4, 64, 2, 0) == 16 * Codec::Int4.row_bytes(64));
