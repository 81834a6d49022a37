//! Settings from a file, the environment and the command line: a later source wins, and an error names the source
//! the offending value came from, the field, what was given and what is allowed.
#![forbid(unsafe_code)]

mod error;
pub mod fields;
mod load;

pub use error::ConfigError;
pub use fields::FieldFault;
pub use load::{Merged, Program};
