//! Sliding-window layers of managed sequences: there each sequence keeps a rotating cache of the engine's own, which the
//! window bounds and nothing compresses. One a sequence, so that rows of different lengths share a batch here too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Tensor, D};

use crate::attention::{Sdpa, SdpaParams};
use crate::kv_cache::{KvCache, NormalCache};
use crate::pipeline::text_models_inputs_processor::FlashParams;

/// The dimension of tokens in (batch, heads, tokens, head dim).
const TOKENS: usize = 2;

/// A sequence's rotating caches, one a sliding-window layer.
#[derive(Clone)]
pub(crate) struct Windows(Arc<[Mutex<KvCache>]>);

impl Windows {
    /// Empty ones, of so many tokens each.
    pub(super) fn new(sizes: impl Iterator<Item = usize>) -> Self {
        let new = |tokens| KvCache::new_rotating(TOKENS, tokens, NormalCache::CACHE_GROW_SIZE);
        Self(sizes.map(|tokens| Mutex::new(new(tokens))).collect())
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, KvCache> {
        self.0[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tokens that a window has seen.
    pub(super) fn seen(&self, index: usize) -> usize {
        self.lock(index).current_seq_len()
    }

    /// Copies: the engine writes to a rotating cache in place.
    pub(super) fn fork(&self) -> Result<Self> {
        let copy = |cache: &Mutex<KvCache>| -> Result<Mutex<KvCache>> {
            let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let KvCache::Rotating { k, v } = &mut cache {
                for side in [k, v] {
                    side.all_data = side.all_data.as_ref().map(Tensor::copy).transpose()?;
                }
            }
            Ok(Mutex::new(cache))
        };
        Ok(Self(self.0.iter().map(copy).collect::<Result<_>>()?))
    }

    /// Goes back to what `saved` is a copy of.
    pub(super) fn restore(&self, saved: &Self) -> Result<()> {
        for (cache, saved) in self.0.iter().zip(saved.fork()?.0.iter()) {
            let saved = saved.lock().unwrap_or_else(PoisonError::into_inner).clone();
            *cache.lock().unwrap_or_else(PoisonError::into_inner) = saved;
        }
        Ok(())
    }

    /// Forgets tokens from `seen` on; not where older ones have left the window.
    pub(super) fn truncate(&self, seen: usize) -> Result<()> {
        (0..self.0.len()).try_for_each(|index| self.lock(index).set_len(seen))
    }

    /// The shortest length that `truncate` can reach.
    pub(super) fn reachable_from(&self) -> usize {
        let from = |index: usize| {
            let cache = self.lock(index);
            if cache.try_set_len(0).is_ok() { 0 } else { cache.current_seq_len() }
        };
        (0..self.0.len()).map(from).max().unwrap_or(0)
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        let side = |data: &Option<Tensor>| {
            data.as_ref().map_or(0, |data| data.elem_count() * data.dtype().size_in_bytes())
        };
        (0..self.0.len())
            .map(|index| match &*self.lock(index) {
                KvCache::Rotating { k, v } => side(&k.all_data) + side(&v.all_data),
                _ => 0,
            })
            .sum()
    }
}

/// Attention of a batch in the sliding-window layer `index`: row by row, as the engine does it for one sequence.
#[allow(clippy::too_many_arguments)]
pub(super) fn attend(
    rows: &[Windows],
    index: usize,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    flash: Option<&FlashParams>,
    sdpa: &SdpaParams,
) -> Result<Tensor> {
    let fresh = q.dim(TOKENS)?;
    if fresh > 1 && mask.is_none_or(super::is_placeholder) {
        candle_core::bail!("attention of {fresh} new tokens to a sliding window without its mask can't be managed");
    }
    let attend = |(row, windows): (usize, &Windows)| {
        let part = |x: &Tensor| x.narrow(0, row, 1)?.contiguous();
        let (k, v) = windows.lock(index).append(&part(k)?, &part(v)?)?;
        let mask = mask.map(|mask| last_columns(mask, k.dim(TOKENS)?)).transpose()?;
        // Nothing is pending any more, so this goes the way it goes without a policy.
        Sdpa.run_attention(&part(q)?, &k, &v, mask.as_ref(), flash, sdpa)
    };
    let rows = rows.iter().enumerate().map(attend).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&rows, 0)
}

/// A mask has a column a token of the sequence; K has only those that the window still holds and the fresh ones.
fn last_columns(mask: &Tensor, columns: usize) -> Result<Tensor> {
    let total = mask.dim(D::Minus1)?;
    if columns >= total {
        return Ok(mask.clone());
    }
    mask.narrow(D::Minus1, total - columns, columns)?.contiguous()
}
