//! The engine's products with Q8_0 weights, on our kernels where they are faster. Invariant: the bits are those
//! candle gives, so that it does not matter to a model's answers whose code ran.

use std::cell::RefCell;
use std::sync::Mutex;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::utils::barrier_pool;
use candle_core::{DType, Result, Storage, Tensor};
use cinch_hooks::QuantizedMatmul;
use cinch_kernels::{Kernels, Q8Rows};

use crate::registry::lock;

/// From this many rows on, threads take rows each; below, columns each.
const ROWS: usize = 32;
/// Rows that are one piece of work then: weights are read from the second-level cache once for all of them.
const ROWS_EACH: usize = 16;
/// Columns that are one piece of work otherwise, at least.
const COLUMNS_EACH: usize = 32;

thread_local! {
    /// Quantized activations, reused from product to product.
    static ACTIVATIONS: RefCell<Q8Rows> = RefCell::default();
}

/// Multiplies by Q8_0 weights on the CPU.
#[derive(Debug, Clone, Copy)]
pub struct Matmul {
    kernels: Kernels,
    /// Whether candle repacks some weights on this CPU.
    repacks: bool,
}

impl Matmul {
    /// With these kernels; `None` where candle's own code is as good.
    #[must_use]
    pub fn new(kernels: Kernels) -> Option<Self> {
        kernels.has_q8_0().then_some(Self {
            kernels,
            repacks: repacks(),
        })
    }

    /// Whether candle multiplies weights of this shape row by row. Others it repacks, with activations in blocks of
    /// 256: other bits, and as fast.
    fn by_rows(self, n: usize, k: usize) -> bool {
        let repacked = self.repacks && k.is_multiple_of(256) && n.is_multiple_of(16);
        k > 0 && n > 0 && k.is_multiple_of(32) && !repacked
    }
}

/// Whether candle repacks Q8_0 on this CPU: with an integer dot product of unsigned by signed bytes only.
fn repacks() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni"))
            || is_x86_feature_detected!("avxvnni")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        true
    }
}

impl QuantizedMatmul for Matmul {
    fn matmul(&self, x: &Tensor, weights: &QTensor) -> Result<Option<Tensor>> {
        let (dims, shape) = (x.dims(), weights.shape().dims());
        let &[n, k] = shape else { return Ok(None) };
        let taken = weights.dtype() == GgmlDType::Q8_0
            && x.dtype() == DType::F32
            && x.device().is_cpu()
            && weights.device().is_cpu()
            && x.is_contiguous()
            && dims.len() >= 2
            && dims.last() == Some(&k)
            && x.elem_count() > 0
            && self.by_rows(n, k);
        if !taken {
            return Ok(None);
        }
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            return Ok(None);
        };
        let values = &storage.as_slice::<f32>()?[layout.start_offset()..][..x.elem_count()];
        let mut out = vec![0.0; values.len() / k * n];
        ACTIVATIONS.with_borrow_mut(|activations| {
            self.run(values, &weights.data()?, (n, k), activations, &mut out)
        })?;
        let mut dims = dims.to_vec();
        dims.pop();
        dims.push(n);
        Tensor::from_vec(out, dims, x.device()).map(Some)
    }
}

impl Matmul {
    fn run(
        self,
        values: &[f32],
        weights: &[u8],
        (n, k): (usize, usize),
        activations: &mut Q8Rows,
        out: &mut [f32],
    ) -> Result<()> {
        let rows = values.len() / k;
        activations.resize(rows, k).map_err(candle_core::Error::wrap)?;
        if rows < ROWS {
            for mut part in activations.parts(rows.next_multiple_of(2)) {
                part.quantize(values);
            }
            return self.by_columns(weights, n, activations, out);
        }
        let parts: Vec<_> = activations
            .parts(ROWS_EACH)
            .zip(values.chunks(ROWS_EACH * k))
            .map(Mutex::new)
            .collect();
        barrier_pool().execute_chunked(parts.len(), |range| {
            for part in &parts[range] {
                let (part, values) = &mut *lock(part);
                part.quantize(values);
            }
        });
        drop(parts);
        let outs: Vec<_> = out.chunks_mut(ROWS_EACH * n).map(Mutex::new).collect();
        let (failed, activations) = (Mutex::new(None), &*activations);
        barrier_pool().execute_chunked(outs.len(), |range| {
            for part in range {
                let mut out = lock(&outs[part]);
                let mut out: Vec<&mut [f32]> = out.chunks_exact_mut(n).collect();
                let first = part * ROWS_EACH;
                let done =
                    self.kernels
                        .q8_0_matmul(weights, 0..n, activations, first..first + out.len(), &mut out);
                if let Err(error) = done {
                    lock(&failed).get_or_insert(error);
                }
            }
        });
        lock(&failed)
            .take()
            .map_or(Ok(()), |error| Err(candle_core::Error::wrap(error)))
    }

    fn by_columns(self, weights: &[u8], n: usize, activations: &Q8Rows, out: &mut [f32]) -> Result<()> {
        let threads = barrier_pool().n_workers() + 1;
        let each = n.div_ceil(threads * 8).max(COLUMNS_EACH).next_multiple_of(2);
        let mut rest: Vec<&mut [f32]> = out.chunks_exact_mut(n).collect();
        let parts: Vec<_> = (0..n.div_ceil(each))
            .map(|part| {
                let columns = part * each..n.min((part + 1) * each);
                let outs = rest.iter_mut();
                let outs: Vec<&mut [f32]> = outs
                    .map(|rest| rest.split_off_mut(..columns.len()).unwrap_or_default())
                    .collect();
                Mutex::new((columns, outs))
            })
            .collect();
        let failed = Mutex::new(None);
        barrier_pool().execute_chunked(parts.len(), |range| {
            for part in &parts[range] {
                let (columns, outs) = &mut *lock(part);
                let rows = 0..outs.len();
                let done = self
                    .kernels
                    .q8_0_matmul(weights, columns.clone(), activations, rows, outs);
                if let Err(error) = done {
                    lock(&failed).get_or_insert(error);
                }
            }
        });
        lock(&failed)
            .take()
            .map_or(Ok(()), |error| Err(candle_core::Error::wrap(error)))
    }
}
