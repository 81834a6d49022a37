//! `cargo xtask test`: every test, cheapest first.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::process::{self, cargo};
use crate::step::Step;
use crate::workspace::Workspace;
use crate::{controller, engine, model, plain, text};

/// The package whose integration tests drive the real engine.
const END_TO_END: &str = "cinch-tests";

/// The same features in every run, or cargo builds what it has built once more.
const FEATURES: [&str; 2] = [
    "--features",
    "cinch-controller/prometheus-tests,cinch-cache/captured",
];

/// What tests that need rows of a real model have in their names.
const ON_CAPTURED_ROWS: &str = "real::";

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
        eprintln!(
            "==> Left out by --fast: the engine's tests, oracles on rows of a real model, the end-to-end tests"
        );
        return Ok(());
    }

    engine::prepare(workspace)?;
    let binary = engine::build(workspace)?;
    let step = Step::start("Testing the engine");
    process::run(cargo(workspace, &workspace.engine()).args(["test", "--release"]))?;
    step.done("the engine's tests pass");

    let gguf = model::ready(workspace)?;
    let text = text::ready(workspace)?;
    let step = Step::start("Testing the cache on rows of the demo model");
    let rows = capture(workspace, &binary, &gguf, &text)?;
    process::run(on_captured_rows(workspace).env("CINCH_QKV", rows))?;
    step.done("its oracles agree");

    let controller = controller::build(workspace)?;
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
        command.args(FEATURES);
        command
    };
    let without = ["--", "--skip", ON_CAPTURED_ROWS];
    let mut commands = if nextest {
        // nextest runs no doc tests.
        vec![
            command(&["nextest", "run", "--no-fail-fast"]),
            command(&["test", "--doc", "--quiet"]),
        ]
    } else {
        vec![command(&["test", "--no-fail-fast"])]
    };
    commands[0].args(without);
    let mut own = cargo(workspace, &workspace.root);
    own.args(["test", "--quiet", "--package", END_TO_END, "--lib"]);
    own.args(["--test", "dashboard_files"]);
    commands.push(own);
    commands
}

/// Has the engine write down what attention is given in some layers of the demo model.
fn capture(workspace: &Workspace, binary: &Path, gguf: &Path, text: &Path) -> anyhow::Result<PathBuf> {
    let text = std::fs::read_to_string(text).context("reading the text")?;
    let rows = workspace.target.join("captured.safetensors");
    let mut probe = Command::new(binary);
    probe
        .args(["probe", "--config"])
        .arg(workspace.root.join("configs/engine.toml"));
    for setting in [
        &*format!("model.file={}", gguf.display()),
        "log.level=warn",
        // Rows of later layers are the model's own only where attention is.
        r#"class.default.policy={ store = "exact" }"#,
    ] {
        probe.args(["--set", setting]);
    }
    plain::probe(probe, &cinch_tests::capture(&text, rows.clone()))?;
    Ok(rows)
}

fn on_captured_rows(workspace: &Workspace) -> Command {
    let mut command = cargo(workspace, &workspace.root);
    command.args(["test", "--workspace", "--exclude", END_TO_END]);
    command.args(FEATURES).args(["--no-fail-fast"]);
    command.args(["--test", "selection", "--test", "packed", "--", ON_CAPTURED_ROWS]);
    command
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
