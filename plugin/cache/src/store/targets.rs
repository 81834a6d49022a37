//! What a policy wants a head's rows to be packed as, and which of them.

use cinch_kernels::{Codec, Layout};

use super::Pair;
use crate::quantize::Beside;

/// Rows that a store without quantization opens at a time for decoded tokens.
pub(super) const TAIL_ROWS: usize = 64;

/// Which codecs rows end up in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Targets {
    /// Codec of rows in full precision.
    pub(crate) store: Codec,
    /// Codecs of rows between sinks and recent window.
    pub(crate) packed: Pair,
    /// First positions that stay in full precision.
    pub(crate) sinks: usize,
    /// Last rows that stay in full precision.
    pub(crate) residual: usize,
}

impl Targets {
    pub(crate) fn packs(&self) -> bool {
        self.packed != Pair::both(self.store)
    }

    /// Rows packed at a time: the recent window holds `residual ..= residual + batch` rows.
    pub(crate) fn batch(&self) -> usize {
        // What goes beside codes is paid for block by block.
        let least = if self.packed.beside == Beside::Nothing {
            16
        } else {
            64
        };
        (self.residual / 4).max(least).next_multiple_of(self.step())
    }

    /// Rows are packed by so many: tokens that share a channel's scale are packed together.
    pub(super) fn step(&self) -> usize {
        if self.packed.channels {
            Layout::KeyChannels.step()
        } else {
            1
        }
    }

    /// Of `total` rows, where those end that are to be packed and begin at `sinks`.
    pub(super) fn window(&self, sinks: usize, total: usize) -> usize {
        let packed = total.saturating_sub(self.residual).saturating_sub(sinks);
        sinks + packed / self.step() * self.step()
    }

    pub(crate) fn tail_capacity(&self) -> usize {
        if self.packs() {
            self.residual + self.batch() + self.step() - 1
        } else {
            TAIL_ROWS
        }
    }
}
