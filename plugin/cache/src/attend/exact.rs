//! Rows of the `exact` store give the engine's own output, bit for bit: its attention runs over the rows as
//! they came. The order in which an attention adds is part of its result: a quantized model rounds its
//! activations again at every matmul, and turns the last bit of a sum into another token sooner or later.

use std::sync::MutexGuard;

use candle_core::{DType, Device, Tensor};
use cinch_hooks::{DenseAttention, HookError};

use crate::layer::Layer;

/// `out` (batch, query heads, fresh, v_dim) with the rows that are exact replaced by what the engine gives.
pub(crate) fn replace(
    layers: &[MutexGuard<'_, Layer>],
    q: &Tensor,
    out: Tensor,
    engine: &dyn DenseAttention,
) -> Result<Tensor, HookError> {
    if !layers.iter().any(|layer| layer.is_exact()) {
        return Ok(out);
    }
    let mut rows = Vec::with_capacity(layers.len());
    for (row, layer) in layers.iter().enumerate() {
        rows.push(if layer.is_exact() {
            let (k, v) = dense(layer, q.dtype(), q.device())?;
            engine.attend(&q.narrow(0, row, 1)?, &k, &v)?
        } else {
            out.narrow(0, row, 1)?
        });
    }
    Ok(Tensor::cat(&rows, 0)?)
}

/// All K (1, kv heads, seen, k_dim) and V of a layer.
fn dense(layer: &Layer, dtype: DType, device: &Device) -> Result<(Tensor, Tensor), HookError> {
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for head in &layer.heads {
        let (head_k, head_v) = head.unpack()?;
        k.extend_from_slice(&head_k);
        v.extend_from_slice(&head_v);
    }
    let shape = layer.shape;
    let tensor = |data: Vec<f32>, dim: usize| -> Result<Tensor, HookError> {
        let tensor = Tensor::from_vec(data, (1, shape.kv_heads, layer.seen, dim), &Device::Cpu)?;
        Ok(tensor.to_dtype(dtype)?.to_device(device)?)
    };
    Ok((tensor(k, shape.k_dim)?, tensor(v, shape.v_dim)?))
}
