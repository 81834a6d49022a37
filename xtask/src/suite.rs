//! `cargo xtask test`: every test, cheapest first.

use std::path::Path;
use std::process::Command;

use crate::process::{self, cargo};
use crate::step::Step;
use crate::workspace::Workspace;
use crate::{controller, engine, model, text};

/// The package whose integration tests drive the real engine.
const END_TO_END: &str = "cinch-tests";

/// Runs everything; with `fast`, what needs no engine.
pub(crate) fn run(workspace: &Workspace, fast: bool) -> anyhow::Result<()> {
    let step = Step::start("Testing the workspace");
    for mut command in workspace_tests(workspace, process::in_path("cargo-nextest").is_some()) {
        process::run(&mut command)?;
    }
    step.done("the workspace's tests pass");
    if fast {
        eprintln!("==> Left out by --fast: the engine's tests and the end-to-end tests");
        return Ok(());
    }

    engine::prepare(workspace)?;
    let binary = engine::build(workspace)?;
    let step = Step::start("Testing the engine");
    process::run(cargo(workspace, &workspace.engine()).args(["test", "--release"]))?;
    step.done("the engine's tests pass");

    let controller = controller::build(workspace)?;
    let gguf = model::ready(workspace)?;
    let text = text::ready(workspace)?;
    let step = Step::start("Testing end to end");
    let mut tests = end_to_end(workspace, &binary, &gguf, &text);
    process::run(tests.env("CINCH_CONTROLLER_BIN", &controller))?;
    step.done("the end-to-end tests pass");
    Ok(())
}

fn workspace_tests(workspace: &Workspace, nextest: bool) -> Vec<Command> {
    let prometheus = process::in_path("prometheus").is_some();
    if !prometheus {
        eprintln!(
            "==> Left out: the controller against a real Prometheus; install Debian's package prometheus"
        );
    }
    let command = |args: &[&str]| {
        let mut command = cargo(workspace, &workspace.root);
        command.args(args).args(["--workspace", "--exclude", END_TO_END]);
        if prometheus {
            command.args(["--features", "cinch-controller/prometheus-tests"]);
        }
        command
    };
    let mut commands = if nextest {
        // nextest runs no doc tests.
        vec![
            command(&["nextest", "run", "--no-fail-fast"]),
            command(&["test", "--doc", "--quiet"]),
        ]
    } else {
        vec![command(&["test", "--no-fail-fast"])]
    };
    let mut own = cargo(workspace, &workspace.root);
    own.args(["test", "--quiet", "--package", END_TO_END, "--lib"]);
    commands.push(own);
    commands
}

/// One test at a time: each drives an engine that takes every core, and some measure.
fn end_to_end(workspace: &Workspace, binary: &Path, gguf: &Path, text: &Path) -> Command {
    let mut command = cargo(workspace, &workspace.root);
    command.args([
        "test",
        "--package",
        END_TO_END,
        "--features",
        "e2e",
        "--no-fail-fast",
        "--",
        "--test-threads=1",
        "--nocapture",
    ]);
    command
        .env("CINCH_BIN", binary)
        .env("CINCH_MODEL", gguf)
        .env("CINCH_TEXT", text);
    command
}
