//! What every report begins with: by which program, when, of which model, on which machine and text.

use std::fs;

use serde::{Deserialize, Serialize};

use super::options::Mode;
use super::points;
use crate::bench::{cpu, today};
use crate::config::Settings;

/// The beginning of a report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct About {
    /// Raised when a field of the report changes its meaning or goes.
    pub(super) format: u32,
    /// The version of the program.
    pub(super) cinch: String,
    /// When it was written, as YYYY-MM-DD.
    pub(super) date: String,
    /// How much was measured.
    pub(super) mode: Mode,
    /// What was measured.
    pub(super) model: ModelAbout,
    /// On what.
    pub(super) machine: Machine,
    /// Which text.
    pub(super) text: Text,
}

impl About {
    /// Written by this program, today.
    pub(super) fn new(format: u32, mode: Mode, model: ModelAbout, machine: Machine, text: Text) -> Self {
        Self {
            format,
            cinch: env!("CARGO_PKG_VERSION").to_owned(),
            date: today(),
            mode,
            model,
            machine,
            text,
        }
    }
}

/// The model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ModelAbout {
    /// Its file's stem, or its id.
    pub(super) name: String,
    /// What it is told apart by.
    pub(super) fingerprint: String,
    /// What activations are in.
    pub(super) dtype: String,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    /// Its CPU.
    pub(super) cpu: String,
    /// Hardware threads.
    pub(super) threads: usize,
    /// The implementation of the kernels.
    pub(super) kernels: String,
}

impl Machine {
    /// This one, with kernels as configured.
    pub(super) fn of(settings: &Settings) -> Self {
        let kernels = settings.engine.kernels().map_or("none", |kernels| kernels.name());
        Self {
            cpu: cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            kernels: kernels.to_owned(),
        }
    }
}

/// The text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Text {
    /// Its file's or folder's name.
    pub(super) name: String,
    /// SHA-256 of all of it.
    pub(super) sha256: String,
    /// Tokens of all of it.
    pub(super) tokens: usize,
}

impl Text {
    /// `text`, of so many tokens.
    pub(super) fn of(name: &str, text: &str, tokens: usize) -> Self {
        Self {
            name: name.to_owned(),
            sha256: points::sha256(text.as_bytes()),
            tokens,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Of no program and no model there is.
    pub(in super::super) fn about(format: u32, date: &str) -> About {
        About {
            format,
            cinch: "0.1.0".into(),
            date: date.into(),
            mode: Mode::Quick,
            model: ModelAbout {
                name: "m.Q8_0".into(),
                fingerprint: format!("sha256:{}", "0f".repeat(32)),
                dtype: "f32".into(),
            },
            machine: Machine {
                cpu: "a CPU".into(),
                threads: 2,
                kernels: "scalar".into(),
            },
            text: Text {
                name: "t.txt".into(),
                sha256: "ab".repeat(32),
                tokens: 5000,
            },
        }
    }
}
