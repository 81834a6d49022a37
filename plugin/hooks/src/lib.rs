//! The seam between a serving engine and a KV-cache plugin.
//!
//! The patched engine knows these traits and nothing else of the plugin; the plugin knows them and
//! nothing of the engine. Invariant kept on both sides: **`seen` counts tokens the model has
//! processed, never rows the cache kept**. Positions (RoPE) and masks follow `seen`.
//!
//! One [`CachePolicy`] is [`install`]ed per process, before a model loads. The engine asks it to
//! [`open`](CachePolicy::open) a [`SequenceCache`] per sequence, then calls
//! [`attend`](CachePolicy::attend) once per layer and step for a whole batch whose rows may have
//! different lengths.
#![forbid(unsafe_code)]

mod error;
mod matmul;
mod types;

use std::any::Any;
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

pub use error::HookError;
pub use matmul::{QuantizedMatmul, install_matmul, installed_matmul};
pub use types::{AttendParams, ExtraPass, ForkRole, LayerShape, Qkv, SequenceInfo};

/// Decides how sequences are cached. Installed once per process.
pub trait CachePolicy: Send + Sync {
    /// Opens the cache of a new sequence. Called before its first token is processed.
    ///
    /// # Errors
    /// A typed refusal; the engine answers the request with its message.
    fn open(&self, sequence: &SequenceInfo) -> Result<Arc<dyn SequenceCache>, HookError>;

    /// Gives a fork that came out of the prefix cache to the sequence that goes on with it.
    ///
    /// # Errors
    /// A typed refusal, which the engine treats as a prefix-cache miss.
    fn adopt(
        &self,
        cache: Arc<dyn SequenceCache>,
        _sequence: &SequenceInfo,
    ) -> Result<Arc<dyn SequenceCache>, HookError> {
        Ok(cache)
    }

    /// Appends the fresh K and V of `layer` to every row's cache and returns the attention output,
    /// shape (batch, query heads, query tokens, head dim), in the dtype of `q`.
    ///
    /// `layer` counts in [`SequenceInfo::layers`]. `rows[i]` is the cache of batch row `i`; rows may differ in `seen`. `engine` is the engine's own
    /// attention, for rows that must give its very output.
    ///
    /// # Errors
    /// A typed refusal; no row's cache is left half appended at this layer.
    fn attend(
        &self,
        layer: usize,
        rows: &[Arc<dyn SequenceCache>],
        qkv: Qkv<'_>,
        params: &AttendParams,
        engine: &dyn DenseAttention,
    ) -> Result<Tensor, HookError>;

    /// Bytes that finished sequences may hold for prefix reuse; the engine evicts the oldest past it.
    fn prefix_cache_limit(&self) -> usize {
        usize::MAX
    }

    /// Told whenever the prefix cache changes or is asked: what it holds, and whether a lookup hit.
    fn prefix_cache_report(&self, _entries: usize, _bytes: usize, _lookup_hit: Option<bool>) {}
}

/// The engine's own attention over dense K and V, as it would run without a policy.
pub trait DenseAttention {
    /// Attends with q (1, query heads, query tokens, k_dim) to all of k (1, kv heads, seen, k_dim) and v
    /// (1, kv heads, seen, v_dim), under the step's own mask; (1, query heads, query tokens, v_dim).
    ///
    /// # Errors
    /// The engine's.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor>;
}

impl<F: Fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>> DenseAttention for F {
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        self(q, k, v)
    }
}

/// One sequence's cache, all layers. The engine holds it in many places, so mutability is interior.
pub trait SequenceCache: Send + Sync {
    /// Tokens this sequence's `layer` has processed; in an extra pass, those of its present part included.
    fn seen(&self, layer: usize) -> usize;

    /// An independent continuation of this cache; the original never changes through it.
    ///
    /// # Errors
    /// A typed refusal, which the engine treats as a prefix-cache miss.
    fn fork(&self, role: ForkRole) -> Result<Arc<dyn SequenceCache>, HookError>;

    /// Forgets tokens at positions `seen..` in all layers.
    ///
    /// # Errors
    /// [`HookError::Truncate`] where the rows needed at `seen` are no longer exact or were evicted.
    fn truncate(&self, seen: usize) -> Result<(), HookError>;

    /// The shortest length [`truncate`](Self::truncate) can still reach. The default: no way back.
    fn reachable_from(&self) -> usize {
        self.seen(0)
    }

    /// Whether the prompt, once it is processed, is to be read once more before its first token is sampled, and how. Who asks
    /// and is told so does that, or says [`end_pass`](Self::end_pass): until then the cache may hold back what it evicts.
    ///
    /// # Errors
    /// A typed refusal: there is no room for the pass.
    fn extra_pass(&self) -> Result<Option<ExtraPass>, HookError> {
        Ok(None)
    }

    /// What is attended to from here on is a part of the extra pass, right behind the prompt; rows of a part before it are
    /// forgotten. False if the pass is not wanted any more.
    ///
    /// # Errors
    /// A typed refusal.
    fn begin_part(&self) -> Result<bool, HookError> {
        Ok(false)
    }

    /// The extra pass is over, or does not come: its rows are forgotten, and what was held back is done.
    ///
    /// # Errors
    /// A typed refusal.
    fn end_pass(&self) -> Result<(), HookError> {
        Ok(())
    }

    /// Bytes held, measured from the allocations themselves.
    fn bytes(&self) -> usize;

    /// The plugin's way back to its own type.
    fn as_any(&self) -> &dyn Any;
}

static INSTALLED: OnceLock<Arc<dyn CachePolicy>> = OnceLock::new();

/// Installs the process's policy. Models loaded afterwards are managed by it.
///
/// # Errors
/// [`HookError::AlreadyInstalled`] on a second call: handles of two policies must never meet.
pub fn install(policy: Arc<dyn CachePolicy>) -> Result<(), HookError> {
    INSTALLED.set(policy).map_err(|_| HookError::AlreadyInstalled)
}

/// The installed policy, or `None`: the engine then runs exactly as upstream does.
#[must_use]
pub fn installed() -> Option<&'static Arc<dyn CachePolicy>> {
    INSTALLED.get()
}

// The engine stores both as trait objects: this must go on compiling.
const _: fn(&dyn CachePolicy, &dyn SequenceCache) = |_, _| {};
