//! Building the controller.

use std::path::PathBuf;

use crate::process::{self, cargo};
use crate::step::Step;
use crate::workspace::Workspace;

/// Builds it in release mode; its path.
pub(crate) fn build(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let step = Step::start("Building the controller in release mode");
    let mut build = cargo(workspace, &workspace.root);
    process::run(build.args(["build", "--release", "--package", "cinch-controller"]))?;
    let name = format!("cinch-controller{}", std::env::consts::EXE_SUFFIX);
    let binary = workspace.target.join("release").join(name);
    step.done(format!("built {}", binary.display()));
    Ok(binary)
}
