//! What can be wrong with what a caller asks for.

use cinch_hooks::HookError;
use cinch_kernels::KernelError;
use cinch_protocol::PolicyError;

/// Why the plugin refused a policy or an assignment.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A policy out of its range.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The request already runs or ran: its assignment is made before it is sent to the engine.
    #[error("request {request} was assigned too late: it already runs or ran; retune it instead")]
    AssignedLate {
        /// The engine's request id.
        request: usize,
    },
}

/// Why a running request could not be retuned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RetuneError {
    /// Nobody knows this request (finished requests are remembered for a while).
    #[error("request {request} is unknown")]
    Unknown {
        /// The engine's request id.
        request: usize,
    },
    /// The request has finished.
    #[error("request {request} has finished: only a queued or running request can be retuned")]
    Finished {
        /// The engine's request id.
        request: usize,
    },
    /// A policy out of its range.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// Kernel errors cross the seam as what they are: a tensor that does not fit.
pub(crate) fn kernel(error: KernelError) -> HookError {
    HookError::Tensor(candle_core::Error::wrap(error))
}
