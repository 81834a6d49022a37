//! What is read: an engine's `/metrics` and, for latency and quality, a Prometheus if there is one.

mod checked;
pub mod exposition;
mod observe;
mod promql;
mod tracker;
mod window;

pub use observe::Observer;
pub use promql::Prometheus;
pub use tracker::Tracker;
