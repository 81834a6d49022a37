//! The plugin as the engine's layers see it: sequences are opened, adopted from the prefix cache, and attended to.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use candle_core::{DType, Tensor};
use cinch_hooks::{
    AttendParams, CachePolicy, DenseAttention, ForkRole, HookError, Qkv, SequenceCache, SequenceInfo,
};

use super::Plugin;
use crate::attend;
use crate::registry::{Request, lock};
use crate::reread;
use crate::sequence::{Owner, Sequence};
use crate::shared::Model;

impl Plugin {
    fn serve(&self, info: &SequenceInfo) -> Arc<Request> {
        self.core.registry.serve(info.request, &self.core.default())
    }
}

impl CachePolicy for Plugin {
    fn open(&self, info: &SequenceInfo) -> Result<Arc<dyn SequenceCache>, HookError> {
        check(info)?;
        self.core.model.get_or_init(|| Model {
            layers: info.layers.clone(),
            dtype: info.dtype,
            context: info.context,
        });
        let request = self.serve(info);
        let plan = request.plan();
        plan.fits(&info.layers, &self.core.rotary)
            .and_then(|()| reread::fits(&plan, info.prompt_tokens, info.context))
            .map_err(|error| HookError::Policy {
                request: info.request,
                reason: error.to_string(),
            })?;
        Ok(Arc::new(Sequence::open(&self.core, info, request)))
    }

    fn adopt(
        &self,
        cache: Arc<dyn SequenceCache>,
        info: &SequenceInfo,
    ) -> Result<Arc<dyn SequenceCache>, HookError> {
        check(info)?;
        let sequence = cache
            .as_any()
            .downcast_ref::<Sequence>()
            .filter(|sequence| Arc::ptr_eq(&sequence.core, &self.core))
            .ok_or(HookError::ForeignCache { row: 0 })?;
        if matches!(sequence.owner(), Owner::Prefix) {
            // The entry itself stays in the prefix cache.
            return self.adopt(cache.fork(ForkRole::Sequence)?, info);
        }
        if sequence.shapes() != info.layers || sequence.dtype != info.dtype {
            return Err(HookError::Policy {
                request: info.request,
                reason: "a prefix of another model: layers or dtype differ".into(),
            });
        }
        let request = self.serve(info);
        let plan = request.plan();
        if !sequence
            .layers
            .iter()
            .all(|layer| lock(layer).serves(&plan, info.dtype))
        {
            return Err(HookError::Policy {
                request: info.request,
                reason: "a prefix that was compressed harder than this request asks for".into(),
            });
        }
        sequence.rehome(request, info.prompt_tokens);
        Ok(cache)
    }

    fn attend(
        &self,
        layer: usize,
        rows: &[Arc<dyn SequenceCache>],
        qkv: Qkv<'_>,
        params: &AttendParams,
        engine: &dyn DenseAttention,
    ) -> Result<Tensor, HookError> {
        attend::attend(&self.core, layer, rows, qkv, params, engine)
    }

    fn prefix_cache_limit(&self) -> usize {
        self.core.settings.prefix_cache_bytes
    }

    fn prefix_cache_report(&self, _entries: usize, _bytes: usize, lookup_hit: Option<bool>) {
        match lookup_hit {
            Some(true) => self.core.prefix.hits.fetch_add(1, Relaxed),
            Some(false) => self.core.prefix.misses.fetch_add(1, Relaxed),
            None => 0,
        };
    }
}

/// Whether a model's layers can be stored at all.
fn check(info: &SequenceInfo) -> Result<(), HookError> {
    if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(HookError::DType {
            tensor: "activations",
            given: info.dtype,
        });
    }
    let empty = info
        .layers
        .iter()
        .position(|l| l.kv_heads == 0 || l.k_dim == 0 || l.v_dim == 0);
    match empty {
        Some(layer) => Err(HookError::Policy {
            request: info.request,
            reason: format!(
                "layer {layer}: given {:?}, allowed: at least one KV head and dimension",
                info.layers[layer]
            ),
        }),
        None if info.layers.is_empty() => Err(HookError::Policy {
            request: info.request,
            reason: "layers: given 0, allowed: at least 1".into(),
        }),
        None => Ok(()),
    }
}
