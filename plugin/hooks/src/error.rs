use candle_core::DType;

/// Why a hook refused.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// A second [`install`](crate::install).
    #[error(
        "a cache policy is already installed in this process; it can be installed once, before a model loads"
    )]
    AlreadyInstalled,
    /// The engine never opened a cache for what it now attends with.
    #[error("row {row}: its cache was opened by another policy than the installed one")]
    ForeignCache {
        /// Batch row.
        row: usize,
    },
    /// Layer index out of range.
    #[error("layer {given} does not exist: the sequence was opened with {layers} layers")]
    Layer {
        /// Given layer.
        given: usize,
        /// Layers opened.
        layers: usize,
    },
    /// Tensor shapes do not fit what was opened.
    #[error("{tensor}: shape {given:?} does not fit, expected {expected}")]
    Shape {
        /// Which tensor.
        tensor: &'static str,
        /// Its shape.
        given: Vec<usize>,
        /// What was expected, in words.
        expected: String,
    },
    /// A dtype without kernels.
    #[error("{tensor}: dtype {given:?} is not supported, allowed: f32, f16, bf16")]
    DType {
        /// Which tensor.
        tensor: &'static str,
        /// Its dtype.
        given: DType,
    },
    /// Rows needed at the asked length are gone or no longer exact.
    #[error(
        "cannot go back to {asked} tokens: of {seen} seen, only {from}..={seen} can still be reached ({reason})"
    )]
    Truncate {
        /// Asked length.
        asked: usize,
        /// Tokens seen.
        seen: usize,
        /// The shortest length still reachable.
        from: usize,
        /// Why.
        reason: &'static str,
    },
    /// The sequence's policy can't be applied to this model.
    #[error("policy of request {request}: {reason}")]
    Policy {
        /// The engine's request id.
        request: usize,
        /// What is wrong: names field, given and allowed.
        reason: String,
    },
    /// From candle.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}
