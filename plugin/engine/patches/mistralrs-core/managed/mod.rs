//! Managed sequences: their KV cache lives behind `cinch_hooks`, not in tensors of the engine.
//!
//! A layer's `append` does not store anything. It leaves the rows' handles for `run_attention`, which
//! the same model calls next, in the same layer, on the same thread; that hands q, k and v to the
//! installed policy. An entry still there at the next `append` means that the architecture goes round
//! `run_attention`: an error, never a silent fallback.

mod chunk;
mod greedy;
mod pass;
mod prefix;
mod schedule;
mod window;

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, TensorId};
use cinch_hooks::{AttendParams, LayerShape, Qkv, SequenceCache, SequenceInfo};

use crate::attention::{Sdpa, SdpaParams};
use crate::kv_cache::{EitherCache, KvCache};
use crate::layers_masker::CausalMasker;
use crate::paged_attention::KvCacheLayout;
use crate::pipeline::text_models_inputs_processor::FlashParams;
use crate::pipeline::Pipeline;
use crate::sequence::Sequence;

pub use chunk::Chunks;
pub(crate) use chunk::{decoded, run as run_chunk, spent as spent_on_chunks, whole as whole_prompts};
pub(crate) use greedy::most_likely;
pub(crate) use pass::kept_logits;
pub(crate) use prefix::ManagedPrefixes;
pub(crate) use schedule::schedule;

use window::Windows;

/// What a layer of the model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// So manyth of those that the policy manages.
    Managed(usize),
    /// So manyth of those with a sliding window, of so many tokens.
    Window { index: usize, tokens: usize },
}

/// One managed sequence's caches.
#[derive(Clone)]
pub(crate) struct Handle {
    cache: Arc<dyn SequenceCache>,
    windows: Windows,
    /// One entry a layer of the model.
    places: Arc<[Place]>,
}

/// Those of the rows of a batch.
struct Batch {
    rows: Vec<Arc<dyn SequenceCache>>,
    windows: Vec<Windows>,
    places: Arc<[Place]>,
}

impl Batch {
    /// `None` without rows. All are of one model.
    fn new(handles: Vec<Handle>) -> Option<Arc<Self>> {
        let places = handles.first()?.places.clone();
        let (rows, windows) = handles.into_iter().map(|handle| (handle.cache, handle.windows)).unzip();
        Some(Arc::new(Self { rows, windows, places }))
    }

    fn layer(self: &Arc<Self>, layer: usize) -> KvCache {
        KvCache::Managed(ManagedCache { batch: self.clone(), layer })
    }
}

/// One layer of a batch of managed sequences.
#[derive(Clone)]
pub struct ManagedCache {
    batch: Arc<Batch>,
    layer: usize,
}

impl fmt::Debug for ManagedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ManagedCache {{ layer: {}, rows: {} }}", self.layer, self.batch.rows.len())
    }
}

/// What `append` left for `run_attention`.
struct Pending {
    k: TensorId,
    cache: ManagedCache,
}

thread_local! {
    static PENDING: RefCell<Option<Pending>> = const { RefCell::new(None) };
    /// The mask last found to be causal: every layer of a forward pass brings the same tensor.
    static CAUSAL: RefCell<Option<TensorId>> = const { RefCell::new(None) };
}

/// Whether sequences of this process are managed.
pub(crate) fn installed() -> bool {
    cinch_hooks::installed().is_some()
}

impl ManagedCache {
    pub(crate) fn append(&self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let left = PENDING.with(|pending| {
            pending.replace(Some(Pending { k: k.id(), cache: self.clone() }))
        });
        if let Some(left) = left {
            PENDING.with(RefCell::take);
            candle_core::bail!(
                "this architecture can't be managed: layer {} appended K and V but did not attend through \
                 run_attention with them (MLA, cross-attention and similar are not supported)",
                left.cache.layer
            );
        }
        Ok((k.clone(), v.clone()))
    }

    /// Tokens seen, as masks and positions need it: the longest row's.
    pub(crate) fn seen(&self) -> usize {
        let seen = match self.place() {
            Place::Managed(layer) => self.batch.rows.iter().map(|row| row.seen(layer)).max(),
            Place::Window { index, .. } => self.batch.windows.iter().map(|row| row.seen(index)).max(),
        };
        seen.unwrap_or(0)
    }

    fn place(&self) -> Place {
        self.batch.places[self.layer]
    }

    /// Takes the handles that `append` left for `k`, if it left any.
    pub(crate) fn take(k: &Tensor) -> Result<Option<Self>> {
        PENDING.with(|pending| {
            let mut pending = pending.borrow_mut();
            match pending.take() {
                None => Ok(None),
                Some(entry) if entry.k == k.id() => Ok(Some(entry.cache)),
                Some(entry) => candle_core::bail!(
                    "this architecture can't be managed: layer {} attends with another K than it appended \
                     (it changes K after the cache)",
                    entry.cache.layer
                ),
            }
        })
    }

    pub(crate) fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Option<&Tensor>,
        flash: Option<&FlashParams>,
        sdpa: &SdpaParams,
    ) -> Result<Tensor> {
        let Some(policy) = cinch_hooks::installed() else {
            candle_core::bail!("a managed cache without an installed policy");
        };
        let layer = match self.place() {
            Place::Managed(layer) => layer,
            Place::Window { index, .. } => {
                return window::attend(&self.batch.windows, index, q, k, v, mask, flash, sdpa)
            }
        };
        if sdpa.sinks.is_some() {
            candle_core::bail!("attention sinks in the model's weights can't be managed (layer {})", self.layer);
        }
        let seen = self.seen();
        if let Some(window) = sdpa.sliding_window.filter(|window| seen + q.dim(2).unwrap_or(0) > *window) {
            candle_core::bail!("layer {}: a sliding window of {window} tokens can't be managed", self.layer);
        }
        check_causal(mask, q.dim(2)?, seen)?;
        let params = AttendParams {
            scale: sdpa.softmax_scale,
            // mistral.rs writes "no cap" as None and as 1.0.
            softcap: sdpa.softcap.filter(|cap| *cap != 1.0),
        };
        // Nothing is pending any more, so this goes the way it goes without a policy.
        let engine = |q: &Tensor, k: &Tensor, v: &Tensor| {
            let real = match mask.filter(|mask| is_placeholder(mask)) {
                Some(mask) => causal_mask(q.dim(2)?, k.dim(2)?, mask.dtype(), q.device())?,
                None => None,
            };
            Sdpa.run_attention(q, k, v, real.as_ref().or(mask), flash, sdpa)
        };
        policy
            .attend(layer, &self.batch.rows, Qkv { q, k, v }, &params, &engine)
            .map_err(candle_core::Error::wrap)
    }
}

/// A mask that only says "causal", for a managed batch: the real one has a value a query and key, and is not
/// looked at. It is what upstream makes where a flash kernel applies causality itself.
pub(crate) fn placeholder_mask(dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::zeros((1, 1), dtype, device)
}

fn is_placeholder(mask: &Tensor) -> bool {
    mask.dims() == [1, 1]
}

/// The mask that a placeholder stands for, of the last `fresh` of `total` tokens.
fn causal_mask(fresh: usize, total: usize, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
    let shape = Tensor::zeros((1, fresh), DType::U8, device)?;
    let seen = [total - fresh];
    CausalMasker.make_causal_mask_as_attn_bias(&shape, &&seen[..], dtype)
}

/// Refuses every mask but the causal one over `seen` past and `fresh` new tokens.
fn check_causal(mask: Option<&Tensor>, fresh: usize, seen: usize) -> Result<()> {
    let Some(mask) = mask else {
        if fresh == 1 {
            return Ok(());
        }
        candle_core::bail!("attention over {fresh} new tokens without a mask can't be managed: it is not causal");
    };
    if CAUSAL.with(|known| *known.borrow() == Some(mask.id())) {
        return Ok(());
    }
    let dims = mask.dims();
    let total = seen + fresh;
    if !(is_placeholder(mask) && fresh > 1) {
        let fits = dims.len() >= 2
            && dims[dims.len() - 2..] == [fresh, total]
            && dims[..dims.len() - 2].iter().all(|d| *d == 1);
        if !fits {
            candle_core::bail!("mask of shape {dims:?} can't be managed: expected a causal mask of [{fresh}, {total}]");
        }
        let values = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let causal = values.chunks_exact(total).enumerate().all(|(i, row)| {
            let (open, closed) = row.split_at(seen + i + 1);
            open.iter().all(|x| *x == 0.0) && closed.iter().all(|x| *x == f32::NEG_INFINITY)
        });
        if !causal {
            candle_core::bail!("this mask can't be managed: it is not plain causal (sliding window, images or chunks)");
        }
    }
    CAUSAL.with(|known| known.replace(Some(mask.id())));
    Ok(())
}

impl Handle {
    fn new(cache: Arc<dyn SequenceCache>, places: Arc<[Place]>) -> Self {
        let size = |place: &Place| match place {
            Place::Window { tokens, .. } => Some(*tokens),
            Place::Managed(_) => None,
        };
        let windows = Windows::new(places.iter().filter_map(size));
        Self { cache, windows, places }
    }

    /// As the engine keeps a sequence's cache: one entry a layer.
    pub(crate) fn layers(&self) -> Vec<Option<KvCache>> {
        let batch = Batch::new(vec![self.clone()]);
        (0..self.places.len()).map(|layer| batch.as_ref().map(|batch| batch.layer(layer))).collect()
    }
}

/// The handle of a managed sequence.
pub(crate) fn handle(seq: &mut Sequence) -> Option<Handle> {
    match seq.normal_cache().first() {
        Some(Some(KvCache::Managed(managed))) => Some(Handle {
            cache: managed.batch.rows.first()?.clone(),
            windows: managed.batch.windows.first()?.clone(),
            places: managed.batch.places.clone(),
        }),
        _ => None,
    }
}

/// Puts the handles of `seqs` in the model's cache: nothing is copied. False if they are not managed.
pub(crate) fn gather<'a>(
    cache: &mut [KvCache],
    seqs: impl Iterator<Item = &'a mut Sequence>,
) -> bool {
    if !installed() {
        return false;
    }
    let Some(batch) = seqs.map(handle).collect::<Option<Vec<_>>>().and_then(Batch::new) else {
        return false;
    };
    // Whatever an aborted forward pass left behind belongs to no batch any more.
    PENDING.with(RefCell::take);
    for (layer, slot) in cache.iter_mut().enumerate() {
        *slot = batch.layer(layer);
    }
    true
}

/// What the plugin is told of a new sequence and what each layer of its model is, or why it can't be managed.
fn describe(
    pipeline: &dyn Pipeline,
    request: usize,
    sequence: usize,
    choice: usize,
    prompt_tokens: usize,
) -> std::result::Result<(SequenceInfo, Arc<[Place]>), String> {
    let refuse = |reason: &str| Err(format!("this model can't be managed by a KV-cache policy: {reason}"));
    let EitherCache::Normal(normal) = pipeline.cache() else {
        return refuse("it keeps recurrent state or a cache of its own kind (hybrid, x-lora)");
    };
    let metadata = pipeline.get_metadata();
    let Some(model) = metadata.model_metadata.as_ref() else {
        return refuse("it does not say how its heads are shaped");
    };
    if matches!(model.kv_cache_layout(), KvCacheLayout::Mla { .. }) {
        return refuse("multi-head latent attention (MLA) has a compressed cache of its own");
    }
    let normal = normal.lock().map_err(|_| "the model's cache lock is poisoned".to_string())?;
    let (mut layers, mut windows, mut places) = (Vec::new(), 0, Vec::with_capacity(normal.0.len()));
    for (layer, cache) in normal.0.iter().enumerate() {
        let window = match cache {
            KvCache::Normal { .. } => None,
            // One that the context never fills is none.
            KvCache::Rotating { k, .. } => Some(k.max_seq_len()).filter(|tokens| *tokens < metadata.max_seq_len),
            KvCache::Managed(managed) => match managed.place() {
                Place::Managed(_) => None,
                Place::Window { tokens, .. } => Some(tokens),
            },
            KvCache::Shared { owner } => {
                return refuse(&format!("layer {layer} shares the cache of layer {owner}"))
            }
        };
        if let Some(tokens) = window {
            places.push(Place::Window { index: windows, tokens });
            windows += 1;
        } else {
            places.push(Place::Managed(layers.len()));
            layers.push(LayerShape {
                kv_heads: model.num_kv_heads_for_layer(layer),
                k_dim: model.k_head_dim_for_layer(layer),
                v_dim: model.v_head_dim_for_layer(layer),
            });
        }
    }
    if let (true, Some(Place::Window { tokens, .. })) = (layers.is_empty(), places.first()) {
        return refuse(&format!(
            "every layer has a sliding window, of {tokens} tokens: none is left to manage"
        ));
    }
    let info = SequenceInfo {
        request,
        sequence,
        choice,
        prompt_tokens,
        context: metadata.max_seq_len,
        layers,
        dtype: metadata.activation_dtype,
        device: pipeline.device(),
    };
    Ok((info, places.into()))
}

/// Opens a managed sequence's cache; `None` when no policy is installed.
pub(crate) fn open(
    pipeline: &dyn Pipeline,
    request: usize,
    sequence: usize,
    choice: usize,
    prompt_tokens: usize,
) -> std::result::Result<Option<(SequenceInfo, Handle)>, String> {
    let Some(policy) = cinch_hooks::installed() else {
        return Ok(None);
    };
    let (info, places) = describe(pipeline, request, sequence, choice, prompt_tokens)?;
    let cache = policy.open(&info).map_err(|err| err.to_string())?;
    Ok(Some((info, Handle::new(cache, places))))
}

/// A layer alone can't be truncated: its sequence is forked first, then truncated in all layers.
pub(crate) fn refuse_set_len(len: usize) -> Result<()> {
    candle_core::bail!("a managed layer can't be cut to {len} tokens: its sequence is forked and truncated instead")
}
