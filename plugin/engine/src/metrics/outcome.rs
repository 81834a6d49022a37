//! How requests end, as the metrics count it.

use axum::http::StatusCode;

use crate::http::Refusal;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Answered.
    Ok,
    /// The engine failed.
    Error,
    /// The client went away, or the server stopped.
    Canceled,
    /// Not taken: bad input, or not ready.
    Rejected,
    /// Not taken: no room for it.
    Overloaded,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Ok,
        Self::Error,
        Self::Canceled,
        Self::Rejected,
        Self::Overloaded,
    ];

    /// Of a request that was refused.
    #[must_use]
    pub fn of(refusal: &Refusal) -> Self {
        match refusal.status() {
            _ if refusal.0.overload.is_some() => Self::Overloaded,
            StatusCode::SERVICE_UNAVAILABLE => Self::Canceled,
            status if status.is_client_error() => Self::Rejected,
            _ => Self::Error,
        }
    }

    /// The label's value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Canceled => "canceled",
            Self::Rejected => "rejected",
            Self::Overloaded => "overloaded",
        }
    }
}
