//! Fresh q, k and v as f32 rows in host memory: read where they lie when they are f32 on the CPU,
//! converted once otherwise.

use std::ops::Range;

use candle_core::{DType, Device, Layout, Storage, Tensor};
use cinch_hooks::{HookError, LayerShape, Qkv};
use cinch_kernels::Rows;

/// One step's shapes, checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) batch: usize,
    pub(crate) q_heads: usize,
    /// Query tokens of each row.
    pub(crate) fresh: usize,
    pub(crate) shape: LayerShape,
}

impl Geometry {
    /// Query heads that share a KV head.
    pub(crate) fn group(&self) -> usize {
        self.q_heads / self.shape.kv_heads
    }

    /// Checks every tensor against what the rows were opened with.
    pub(crate) fn check(qkv: &Qkv<'_>, batch: usize, shape: LayerShape) -> Result<Self, HookError> {
        let LayerShape {
            kv_heads,
            k_dim,
            v_dim,
        } = shape;
        let misfit = |tensor, given: &Tensor, expected: String| HookError::Shape {
            tensor,
            given: given.dims().to_vec(),
            expected,
        };
        let (q_heads, fresh) = match *qkv.q.dims() {
            [b, heads, fresh, dim]
                if b == batch
                    && b > 0
                    && fresh > 0
                    && dim == k_dim
                    && heads > 0
                    && heads.is_multiple_of(kv_heads) =>
            {
                (heads, fresh)
            }
            _ => {
                let expected =
                    format!("({batch} ≥ 1 rows, a multiple of {kv_heads} heads, at least 1 token, {k_dim})");
                return Err(misfit("q", qkv.q, expected));
            }
        };
        for (name, tensor, dim) in [("k", qkv.k, k_dim), ("v", qkv.v, v_dim)] {
            if tensor.dims() != [batch, kv_heads, fresh, dim] {
                return Err(misfit(
                    name,
                    tensor,
                    format!("({batch}, {kv_heads}, {fresh}, {dim})"),
                ));
            }
        }
        for (name, tensor) in [("q", qkv.q), ("k", qkv.k), ("v", qkv.v)] {
            if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
                return Err(HookError::DType {
                    tensor: name,
                    given: tensor.dtype(),
                });
            }
        }
        Ok(Self {
            batch,
            q_heads,
            fresh,
            shape,
        })
    }
}

/// A tensor the kernels can read: f32, on the CPU, each row's values side by side.
pub(crate) fn readable(tensor: &Tensor) -> Result<Tensor, HookError> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let stride = tensor.stride();
    let side_by_side = stride[3] == 1 || tensor.dims()[3] == 1;
    let ascending = stride[2] >= tensor.dims()[3] || tensor.dims()[2] == 1;
    Ok(if side_by_side && ascending {
        tensor
    } else {
        tensor.contiguous()?
    })
}

/// A readable tensor's rows.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    batch: usize,
    head: usize,
    token: usize,
    tokens: usize,
    dim: usize,
}

impl<'a> View<'a> {
    pub(crate) fn new(storage: &'a Storage, layout: &Layout) -> Result<Self, HookError> {
        let Storage::Cpu(storage) = storage else {
            return Err(
                candle_core::Error::Msg("a tensor that was moved to the CPU is not there".into()).into(),
            );
        };
        let (dims, stride) = (layout.dims(), layout.stride());
        Ok(Self {
            data: &storage.as_slice::<f32>()?[layout.start_offset()..],
            batch: stride[0],
            head: stride[1],
            token: if dims[2] == 1 { dims[3] } else { stride[2] },
            tokens: dims[2],
            dim: dims[3],
        })
    }

    /// All tokens of one batch row and head.
    pub(crate) fn rows(&self, batch: usize, head: usize) -> Rows<'a> {
        let from = batch * self.batch + head * self.head;
        let len = (self.tokens - 1) * self.token + self.dim;
        Rows {
            data: &self.data[from..from + len],
            stride: self.token,
            rows: self.tokens,
            dim: self.dim,
        }
    }

    /// The one token of neighbouring heads of a decode step, side by side; borrowed where they lie so.
    pub(crate) fn heads<'b>(&self, batch: usize, heads: Range<usize>, scratch: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        if self.head == self.dim {
            let from = batch * self.batch + heads.start * self.head;
            return &self.data[from..from + heads.len() * self.dim];
        }
        scratch.clear();
        for head in heads {
            scratch.extend_from_slice(self.row(batch, head, 0));
        }
        scratch
    }

    /// One token of one batch row and head.
    pub(crate) fn row(&self, batch: usize, head: usize, token: usize) -> &'a [f32] {
        let from = batch * self.batch + head * self.head + token * self.token;
        &self.data[from..from + self.dim]
    }
}

/// Some of the rows.
pub(crate) fn between<'a>(rows: &Rows<'a>, part: Range<usize>) -> Rows<'a> {
    Rows {
        data: rows.data.get(part.start * rows.stride..).unwrap_or_default(),
        rows: part.len(),
        ..*rows
    }
}

/// Strided rows side by side; borrowed where they are already.
pub(crate) fn packed<'a>(rows: &Rows<'a>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
    if rows.stride == rows.dim {
        return &rows.data[..rows.rows * rows.dim];
    }
    scratch.clear();
    for row in 0..rows.rows {
        scratch.extend_from_slice(&rows.data[row * rows.stride..][..rows.dim]);
    }
    scratch
}
