//! `cargo xtask test`: every test, cheapest first.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::bail;

use crate::process::{self, cargo};
use crate::step::Step;
use crate::workspace::Workspace;
use crate::{controller, engine, model, text};

/// The package whose integration tests drive the real engine.
const END_TO_END: &str = "cinch-tests";

/// Runs everything; with `fast`, what needs no engine.
pub(crate) fn run(workspace: &Workspace, fast: bool) -> anyhow::Result<()> {
    prometheus(process::in_path)?;
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
    let command = |args: &[&str]| {
        let mut command = cargo(workspace, &workspace.root);
        command.args(args).args(["--workspace", "--exclude", END_TO_END]);
        command.args(["--features", "cinch-controller/prometheus-tests"]);
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
    own.args(["--test", "dashboard_files"]);
    commands.push(own);
    commands
}

/// Rules, dashboards and the controller are tested with a real Prometheus, found by `find`.
fn prometheus(find: impl Fn(&str) -> Option<PathBuf>) -> anyhow::Result<()> {
    for program in ["prometheus", "promtool"] {
        if find(program).is_none() {
            bail!(
                "{program}: not found in PATH; the tests need it. On Debian and Ubuntu: apt-get install \
                 --no-install-recommends prometheus (its service, if it starts, can be stopped: tests start their own)"
            );
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_prometheus_it_says_how_to_get_one() {
        let only = |there: &'static str| move |name: &str| (name == there).then(|| PathBuf::from(name));
        let err = prometheus(only("prometheus")).unwrap_err().to_string();
        assert!(err.starts_with("promtool: not found"), "{err}");
        assert!(err.contains("apt-get install"), "{err}");
        assert!(prometheus(only("promtool")).is_err());
        assert!(prometheus(|name| Some(name.into())).is_ok());
    }
}
