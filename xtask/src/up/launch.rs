//! Building and starting engine and controller: the same for `up` and `demo`.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::workspace::Workspace;
use crate::{controller, engine, process};

use super::settings::Engine;

/// The two programs; none of the second where no controller is wanted.
pub(crate) struct Programs {
    pub(crate) engine: PathBuf,
    pub(crate) controller: Option<PathBuf>,
}

/// How a controller is told.
pub(crate) struct ControllerFlags {
    pub(crate) config: PathBuf,
    pub(crate) sets: Vec<String>,
}

impl ControllerFlags {
    /// `cinch-controller subcommand`, for this engine.
    pub(crate) fn command(&self, binary: &Path, subcommand: &str, engine: &Engine) -> Command {
        let mut command = Command::new(binary);
        command.arg(subcommand).arg("--config").arg(&self.config);
        command.args(self.sets.iter().flat_map(|set| ["--set", set]));
        let (variable, engines) = engine.for_controller();
        command.env(variable, engines);
        command
    }
}

/// `cinch serve`.
pub(crate) fn engine_command(binary: &Path, config: &Path, sets: &[String]) -> Command {
    let mut command = Command::new(binary);
    command.arg("serve").arg("--config").arg(config);
    command.args(sets.iter().flat_map(|set| ["--set", set]));
    command
}

/// Builds both, or takes them from `release_dir`. The controller comes first, and checks its settings: it takes a
/// minute where the engine takes a quarter of an hour.
pub(crate) fn build(
    workspace: &Workspace,
    release_dir: Option<&Path>,
    engine: &Engine,
    flags: Option<&ControllerFlags>,
) -> anyhow::Result<Programs> {
    let there = |name| release_dir.map(|dir| dir.join(format!("{name}{}", std::env::consts::EXE_SUFFIX)));
    let controller = match flags {
        Some(flags) => {
            let binary = there("cinch-controller").map_or_else(|| controller::build(workspace), Ok)?;
            process::capture(&mut flags.command(&binary, "check-config", engine))?;
            Some(binary)
        }
        None => None,
    };
    let engine = match there("cinch") {
        Some(binary) => binary,
        None => {
            engine::prepare(workspace)?;
            engine::build(workspace)?
        }
    };
    Ok(Programs { engine, controller })
}
