//! A second, smaller seam: the engine's products with quantized weights.

use std::sync::{Arc, OnceLock};

use candle_core::quantized::QTensor;
use candle_core::{Result, Tensor};

use crate::HookError;

/// Multiplies by quantized weights in the engine's place.
pub trait QuantizedMatmul: Send + Sync {
    /// `x` (…, k) times the transpose of `weights` (n, k): (…, n), with the bits that the engine's own gives.
    /// `None`: these are not taken, the engine's own is to run.
    ///
    /// # Errors
    /// Tensors that can't be read.
    fn matmul(&self, x: &Tensor, weights: &QTensor) -> Result<Option<Tensor>>;
}

static INSTALLED: OnceLock<Arc<dyn QuantizedMatmul>> = OnceLock::new();

/// Installs the process's multiplication.
///
/// # Errors
/// [`HookError::AlreadyInstalled`] on a second call.
pub fn install_matmul(matmul: Arc<dyn QuantizedMatmul>) -> std::result::Result<(), HookError> {
    INSTALLED.set(matmul).map_err(|_| HookError::AlreadyInstalled)
}

/// The installed multiplication, or `None`: the engine then multiplies as upstream does.
#[must_use]
pub fn installed_matmul() -> Option<&'static Arc<dyn QuantizedMatmul>> {
    INSTALLED.get()
}
