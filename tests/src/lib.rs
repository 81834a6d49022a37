//! What the end-to-end tests, the recorder of the unhooked engine and `cargo xtask demo` share: the plan of probe
//! runs, the recording's format, the CPU that a recording's bits belong to, a load of streaming requests, and
//! a check of JSON against the published schemas.
#![forbid(unsafe_code)]

mod cpu;
pub mod load;
mod plan;
mod recording;
pub mod schema;

pub use cpu::cpu_key;
pub use plan::{STEPS, capture, fidelity_runs, second_turn, six_requests};
pub use recording::{Recorded, Recording, mismatch};
