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

/// Programs that tests run.
struct Programs {
    names: &'static [&'static str],
    use_of: &'static str,
    packages: &'static str,
}

const PROMETHEUS: Programs = Programs {
    names: &["prometheus", "promtool"],
    use_of: "rules, dashboards and the controller are tested with it (its service, if it starts, can be stopped: tests start \
             their own)",
    packages: "prometheus",
};

const BROWSER: Programs = Programs {
    names: &["chromium", "chromedriver"],
    use_of: "the report of cinch eval is tested in it",
    packages: "chromium chromium-driver",
};

/// Runs everything; with `fast`, what needs no engine.
pub(crate) fn run(workspace: &Workspace, fast: bool) -> anyhow::Result<()> {
    needed(&PROMETHEUS, process::in_path)?;
    if !fast {
        needed(&BROWSER, process::in_path)?;
    }
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

/// Fails with how to get it if a program is missing; `find` says where it is.
fn needed(programs: &Programs, find: impl Fn(&str) -> Option<PathBuf>) -> anyhow::Result<()> {
    for program in programs.names {
        if find(program).is_none() {
            let Programs { use_of, packages, .. } = programs;
            bail!(
                "{program}: not found in PATH; {use_of}. On Debian: apt-get install --no-install-recommends {packages}"
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
    fn what_is_missing_is_named_with_its_packages() {
        let only = |there: &'static str| move |name: &str| (name == there).then(|| PathBuf::from(name));
        let err = needed(&PROMETHEUS, only("prometheus")).unwrap_err().to_string();
        assert!(err.starts_with("promtool: not found"), "{err}");
        assert!(err.ends_with("--no-install-recommends prometheus"), "{err}");
        let err = needed(&BROWSER, only("chromium")).unwrap_err().to_string();
        assert!(err.starts_with("chromedriver: not found"), "{err}");
        assert!(err.ends_with("chromium chromium-driver"), "{err}");
        assert!(needed(&BROWSER, only("chromedriver")).is_err());
        for programs in [&PROMETHEUS, &BROWSER] {
            assert!(needed(programs, |name| Some(name.into())).is_ok());
        }
    }
}
