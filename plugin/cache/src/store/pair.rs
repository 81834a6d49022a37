//! What rows are stored as: codecs of K and V, and what is done to rows before and beside that.

use cinch_kernels::{Codec, Kernels, Layout};

use super::side::Side;
use crate::quantize::{Beside, bits, lower};

/// Head dimensions of one KV head, and what packs its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dims {
    pub(crate) k: usize,
    pub(crate) v: usize,
    pub(crate) kernels: Kernels,
}

/// Codecs of a run of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) k: Codec,
    pub(crate) v: Codec,
    /// Keys are stored as [`Kernels::rotate`] left them.
    pub(crate) rotated: bool,
    /// Keys are stored as they were before their rotary embedding.
    pub(crate) before_rope: bool,
    /// Tokens share a channel's scale and zero, not a token's channels: [`Layout::KeyChannels`].
    pub(crate) channels: bool,
    /// Rows are coordinates in the head's bases.
    pub(crate) projected: bool,
    /// What is held beside codes.
    pub(crate) beside: Beside,
}

impl Pair {
    pub(crate) fn both(codec: Codec) -> Self {
        Self {
            k: codec,
            v: codec,
            rotated: false,
            before_rope: false,
            channels: false,
            projected: false,
            beside: Beside::Nothing,
        }
    }

    /// The codecs of rows that keep the fewest bits.
    pub(crate) fn least(self) -> (Codec, Codec) {
        let least = |codec| {
            if bits(codec) < 16 {
                self.beside.least(codec)
            } else {
                codec
            }
        };
        (least(self.k), least(self.v))
    }

    /// What rows of this pair become where `wanted` is asked for: K and V never gain bits, nor dimensions.
    pub(crate) fn lowered(self, wanted: Self) -> Self {
        let (k, v) = (lower(self.k, wanted.k), lower(self.v, wanted.v));
        let (least, asked) = (self.least(), wanted.least());
        let below = (lower(least.0, asked.0), lower(least.1, asked.1));
        // Rows of few bits among others would gain some if all were packed alike.
        let mixed = matches!(self.beside, Beside::Salient { .. });
        let gain = bits(asked.0) > bits(least.0) || bits(asked.1) > bits(least.1);
        let kept = ((k, v) == (self.k, self.v) && below == least) || (mixed && gain);
        // What is not packed anew stays as it is.
        let own = if kept { self } else { wanted };
        let keys = if k == self.k && self.beside == own.beside {
            self
        } else {
            own
        };
        let projected = self.projected || wanted.projected;
        Self {
            k: if kept { self.k } else { k },
            v: if kept { self.v } else { v },
            rotated: keys.rotated,
            // Bases are of keys as they are cached.
            before_rope: keys.before_rope && !projected,
            channels: keys.channels,
            projected,
            beside: match (own.beside, wanted.beside) {
                // To wait for another head's rows changes nothing of these, whatever their codecs.
                (Beside::Nothing, Beside::Shared { .. }) => wanted.beside,
                _ => own.beside,
            },
        }
    }

    /// Rows whose codes are among a block's own bytes, K's and V's, of so many of which some are salient.
    pub(super) fn held(self, rows: usize, salient: usize) -> (usize, usize) {
        let least = self.least();
        match self.beside {
            Beside::Salient { .. } => (
                if bits(self.k) < 16 { 0 } else { rows },
                if least.1 == self.v { rows } else { rows - salient },
            ),
            Beside::Nothing | Beside::Levels { .. } | Beside::Error { .. } | Beside::Shared { .. } => {
                (rows, rows)
            }
        }
    }

    pub(super) fn sides(self, dims: Dims) -> (Side, Side) {
        // Rows that come back with more than their codes are unpacked first: no layout is faster than another.
        let plain = self.beside.is_plain();
        let k = match plain {
            _ if self.channels => Layout::KeyChannels,
            true => dims.kernels.key_layout(self.k, dims.k),
            false => Layout::Rows,
        };
        let v = match plain {
            true => dims.kernels.value_layout(self.v, dims.v),
            false => Layout::Rows,
        };
        let (k_codec, v_codec) = self.least();
        (Side::new(k_codec, dims.k, k), Side::new(v_codec, dims.v, v))
    }
}
