//! What the end-to-end tests and the recorder of the unhooked engine share: the plan of probe runs, the
//! recording's format, and the CPU that a recording's bits belong to.
#![forbid(unsafe_code)]

mod cpu;
mod plan;
mod recording;

pub use cpu::cpu_key;
pub use plan::{STEPS, fidelity_runs, second_turn, six_requests};
pub use recording::{Recorded, Recording, mismatch};
