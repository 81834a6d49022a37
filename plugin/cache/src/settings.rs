//! What the plugin is started with.

use cinch_kernels::Kernels;

/// Settings that hold for the life of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginSettings {
    /// Bytes that finished sequences may hold for prefix reuse. 0: none are kept.
    pub prefix_cache_bytes: usize,
    /// Where the live attention error is measured.
    pub error_sample: ErrorSample,
    /// Attend through tensor operations even on CPU: slower, for tests of that path.
    pub force_device_path: bool,
    /// The implementation of packing and attention.
    pub kernels: Kernels,
    /// Attend on the calling thread alone, instead of on candle's pool: for tests that count allocations.
    pub serial: bool,
}

/// Which layers and heads measure what a compression did to their attention output. Each measurement
/// costs one more attention step of that head, so a few are enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorSample {
    /// Every n-th layer, from layer 0. 0: measure nowhere.
    pub every_layer: usize,
    /// KV heads of such a layer, from head 0.
    pub heads: usize,
}

impl Default for ErrorSample {
    fn default() -> Self {
        Self {
            every_layer: 5,
            heads: 1,
        }
    }
}

impl ErrorSample {
    pub(crate) fn includes(&self, layer: usize, head: usize) -> bool {
        self.every_layer > 0 && layer.is_multiple_of(self.every_layer) && head < self.heads
    }
}

impl Default for PluginSettings {
    fn default() -> Self {
        Self {
            prefix_cache_bytes: 256 << 20,
            error_sample: ErrorSample::default(),
            force_device_path: false,
            kernels: Kernels::detect(),
            serial: false,
        }
    }
}
