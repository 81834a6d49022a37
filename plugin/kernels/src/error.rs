//! What a kernel refuses, and why: every variant says what was given and what is allowed.

use thiserror::Error;

/// A kernel's refusal of its arguments.
#[derive(Clone, Debug, Error, PartialEq)]
#[non_exhaustive]
pub enum KernelError {
    /// A dimension or head count is 0.
    #[error("{what} must be at least 1, given 0")]
    Zero {
        /// Which one.
        what: &'static str,
    },
    /// A slice or count does not fit the others.
    #[error("{what}: given {given}, expected {expected}")]
    Length {
        /// Which one, with its unit.
        what: &'static str,
        /// What was given.
        given: usize,
        /// What fits.
        expected: usize,
    },
    /// A slice is not a whole number of rows.
    #[error("{what}: given {given}, expected a multiple of {row}")]
    Ragged {
        /// Which one, with its unit.
        what: &'static str,
        /// What was given.
        given: usize,
        /// The size of one row.
        row: usize,
    },
    /// Rows that are written to overlap.
    #[error("{what}: given a stride of {given}, expected at least {minimum}")]
    Stride {
        /// Which rows.
        what: &'static str,
        /// The stride that was given, in elements.
        given: usize,
        /// The dimension of a row.
        minimum: usize,
    },
    /// A number is outside its range.
    #[error("{what}: given {given}, allowed {allowed}")]
    Range {
        /// Which one.
        what: &'static str,
        /// What was given.
        given: f32,
        /// The range in words.
        allowed: &'static str,
    },
    /// Rows of this codec and dimension can't lie so.
    #[error("layout: given {given} for {codec} rows of {dim} values, which only lie row by row")]
    Layout {
        /// The layout.
        given: &'static str,
        /// The rows' codec.
        codec: &'static str,
        /// Values in a row.
        dim: usize,
    },
    /// Keys lie as only values can, or the other way round.
    #[error("layout: given {given} for {side}")]
    Side {
        /// The layout.
        given: &'static str,
        /// What lies so.
        side: &'static str,
    },
    /// A row to be packed holds an infinity or a NaN.
    #[error("row {row}, column {column}: given {given}, expected a finite value")]
    NonFinite {
        /// Row in the call's source, from 0.
        row: usize,
        /// Column in that row, from 0.
        column: usize,
        /// The value that was found.
        given: f32,
    },
    /// Attention over no rows is undefined.
    #[error("attention over no rows: expected at least one row in the parts that are merged")]
    NoRows,
    /// There is no implementation of that name.
    #[error("kernels: given {given:?}, expected one of {}", crate::NAMES.join(", "))]
    Unknown {
        /// The name that was given.
        given: String,
    },
    /// This CPU can't run an implementation.
    #[error(
        "kernels: given {given:?}, but this CPU lacks {missing}; expected one of {}",
        available()
    )]
    Unsupported {
        /// The implementation's name.
        given: &'static str,
        /// The CPU features it would need.
        missing: String,
    },
}

fn available() -> String {
    let names: Vec<_> = crate::Kernels::available().iter().map(|k| k.name()).collect();
    names.join(", ")
}
