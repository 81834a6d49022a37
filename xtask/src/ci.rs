//! `cargo xtask ci`: format, lints, licences, docs, then every test.

use std::path::PathBuf;
use std::process::Command;

use anyhow::bail;

use crate::process::{self, cargo};
use crate::step::Step;
use crate::workspace::Workspace;
use crate::{engine, suite};

/// The cargo-deny that is built where none is found.
const DENY_VERSION: &str = "0.20.2";

/// The package of the engine's workspace; its prepared neighbours are not ours to lint.
const ENGINE: &str = "cinch-engine";

pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    let (root, plugin) = (&workspace.root, &workspace.engine());
    step("Checking the format", |run| {
        run(cargo(workspace, root).args(["fmt", "--all", "--check"]))?;
        run(cargo(workspace, plugin).args(["fmt", "--package", ENGINE, "--check"]))
    })?;
    step("Linting the workspace", |run| {
        run(cargo(workspace, root).args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--",
            "-D",
            "warnings",
        ]))
    })?;
    step("Documenting the workspace", |run| {
        run(strict(cargo(workspace, root).args([
            "doc",
            "--workspace",
            "--no-deps",
        ])))
    })?;

    // Cargo reads the engine's manifest only with the prepared sources in place.
    engine::prepare(workspace)?;
    let deny = deny(workspace)?;
    step("Checking licences, bans and sources of every dependency", |run| {
        for dir in [root, plugin] {
            let mut command = Command::new(&deny);
            command
                .current_dir(dir)
                .arg("--manifest-path")
                .arg(dir.join("Cargo.toml"));
            command.arg("--config").arg(root.join("deny.toml"));
            run(command.args(["check", "--hide-inclusion-graph", "licenses", "bans", "sources"]))?;
        }
        Ok(())
    })?;
    step("Linting the engine", |run| {
        let mut command = cargo(workspace, plugin);
        command.args([
            "clippy",
            "--release",
            "--package",
            ENGINE,
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]);
        run(&mut command)
    })?;
    step("Documenting the engine", |run| {
        run(strict(cargo(workspace, plugin).args([
            "doc",
            "--release",
            "--package",
            ENGINE,
            "--no-deps",
        ])))
    })?;
    suite::run(workspace, false)
}

fn step(
    what: &str,
    body: impl FnOnce(&dyn Fn(&mut Command) -> anyhow::Result<()>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let step = Step::start(what);
    body(&|command| Ok(process::run(command)?))?;
    step.done("fine");
    Ok(())
}

fn strict(command: &mut Command) -> &mut Command {
    command.env("RUSTDOCFLAGS", "-D warnings")
}

/// cargo-deny: from the cache, from `PATH`, or built once into the cache.
fn deny(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let tools = workspace.home.join("tools");
    let built = tools
        .join("bin")
        .join(format!("cargo-deny{}", std::env::consts::EXE_SUFFIX));
    if built.is_file() {
        return Ok(built);
    }
    if let Some(found) = process::in_path("cargo-deny") {
        return Ok(found);
    }
    let step = Step::start(format!("Building cargo-deny {DENY_VERSION}, once (some minutes)"));
    let mut install = cargo(workspace, &workspace.root);
    install
        .args([
            "install",
            "cargo-deny",
            "--locked",
            "--version",
            DENY_VERSION,
            "--root",
        ])
        .arg(&tools);
    // Its own, temporary one: what it builds is of no use to us afterwards.
    process::run(install.env_remove("CARGO_TARGET_DIR"))?;
    if !built.is_file() {
        bail!("cargo install left no {}", built.display());
    }
    step.done(format!("built {}", built.display()));
    Ok(built)
}
