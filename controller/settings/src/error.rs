//! What can be wrong with a configuration.

use std::path::PathBuf;

use crate::fields::FieldFault;

/// Why a configuration was refused. One line each, meant to follow `error: `.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{}: {source}; --config names the configuration file", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML.
    #[error("{origin}: not valid TOML: {reason}")]
    Syntax {
        /// File, environment variable or option.
        origin: String,
        /// Where and why, one line.
        reason: String,
    },
    /// A `--set` that is not `key=value`.
    #[error("--set {given}: given no `=`, allowed key=value, as in {example}")]
    Override {
        /// What was given.
        given: String,
        /// A right one.
        example: &'static str,
    },
    /// A field that does not fit.
    #[error("{origin}: {fault}")]
    Field {
        /// File, environment variable or option.
        origin: String,
        /// What is wrong with it.
        fault: FieldFault,
    },
}
