//! The unhooked engine: recorded once for the fidelity tests, built as published for the benchmark.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use cinch_protocol::probe::{Plan, Report};
use cinch_tests::{Recorded, Recording, cpu_key, fidelity_runs, second_turn};

use crate::step::Step;
use crate::workspace::Workspace;
use crate::{digest, engine, model, process, text};

/// Which candle the unhooked engine stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Candle {
    /// The one mistralrs-core 0.8.1 is published with.
    Published,
    /// Ours: the same arithmetic as the hooked engine's.
    Raised,
}

/// Builds the unhooked engine's probe, in a folder and a target directory of its own.
pub(crate) fn build(workspace: &Workspace, candle: Candle) -> anyhow::Result<PathBuf> {
    let (name, version) = match candle {
        Candle::Published => ("published", "0.10.2"),
        Candle::Raised => ("raised", "0.11.1"),
    };
    let dir = workspace.home.join("plain").join(name);
    let mut manifest = fs::read_to_string(workspace.engine().join("plain/Cargo.toml"))
        .context("reading plugin/engine/plain/Cargo.toml")?
        .replace("candle-core = \"*\"", &format!("candle-core = \"={version}\""))
        .replace(
            "src/main.rs",
            &workspace.engine().join("plain/src/main.rs").to_string_lossy(),
        )
        .replace(
            "../../../controller",
            &workspace.root.join("controller").to_string_lossy(),
        );
    if candle == Candle::Raised {
        engine::prepare_plain(workspace, &dir.join("upstream"))?;
        manifest += "\n[patch.crates-io]\n";
        for krate in ["core", "quant", "vision"] {
            manifest += &format!("mistralrs-{krate} = {{ path = \"upstream/mistralrs-{krate}\" }}\n");
        }
    }
    let write = |path: &str, data: &[u8]| {
        let path = dir.join(path);
        if fs::read(&path).ok().as_deref() == Some(data) {
            return Ok(());
        }
        digest::write_atomically(&path, data).with_context(|| format!("writing {}", path.display()))
    };
    write("Cargo.toml", manifest.as_bytes())?;
    let flags = fs::read(workspace.root.join(".cargo/config.toml")).context("reading .cargo/config.toml")?;
    write(".cargo/config.toml", &flags)?;
    let step = Step::start(format!(
        "Building the unhooked engine on candle {version} (8 to 20 minutes)"
    ));
    let target = workspace.home.join("plain/target").join(name);
    let mut cargo = process::cargo(workspace, &dir);
    process::run(
        cargo
            .args(["build", "--release"])
            .env("CARGO_TARGET_DIR", &target),
    )?;
    let binary = target.join("release/cinch-plain");
    step.done(format!("built {}", binary.display()));
    Ok(binary)
}

/// The unhooked engine's probe of `model`.
pub(crate) fn command(binary: &Path, model: &Path) -> Command {
    let mut command = Command::new(binary);
    command.arg(model);
    command
}

/// Runs a plan on a probe: its command gets the plan's file and the report's as last arguments.
pub(crate) fn probe(mut command: Command, plan: &Plan) -> anyhow::Result<Report> {
    let dir = tempfile::tempdir().context("creating a folder for the probe")?;
    let (path, out) = (dir.path().join("plan.json"), dir.path().join("report.json"));
    fs::write(&path, serde_json::to_vec(plan)?).context("writing the plan")?;
    process::run(command.args([&path, &out]))?;
    serde_json::from_slice(&fs::read(&out).context("reading the report")?).context("parsing the report")
}

/// `cargo xtask record-plain`: what the unhooked engine answers on this CPU, into tests/recordings.
pub(crate) fn record(workspace: &Workspace) -> anyhow::Result<()> {
    let model = model::ready(workspace)?;
    let text = fs::read_to_string(text::ready(workspace)?).context("reading the text")?;
    let binary = build(workspace, Candle::Raised)?;
    let mut step = Step::start("Recording 20 prompts and 2 second turns");
    let runs = fidelity_runs(&text);
    let plan = Plan {
        groups: runs.iter().map(|run| vec![run.clone()]).collect(),
        ..Plan::default()
    };
    let first = probe(command(&binary, &model), &plan)?;
    step.waiting("second turns");
    let more = first.runs[0].prompt.clone();
    let turns = |i: usize| [vec![runs[i].clone()], vec![second_turn(&first.runs[i], &more)]];
    let plan = Plan {
        prefix_cache: true,
        groups: [6, 12].map(turns).concat(),
        ..Plan::default()
    };
    let second = probe(command(&binary, &model), &plan)?;
    let recording = Recording {
        cpu: cpu_key(),
        engine: "mistralrs-core 0.8.1, candle 0.11.1".to_owned(),
        model_sha256: digest::file(&model).context("reading the model")?,
        runs: first
            .runs
            .iter()
            .chain(second.runs.iter().skip(1).step_by(2))
            .map(Recorded::from)
            .collect(),
    };
    let path = workspace
        .root
        .join("tests/recordings")
        .join(format!("{}.json", recording.cpu));
    digest::write_atomically(&path, &serde_json::to_vec(&recording)?)
        .with_context(|| format!("writing {}", path.display()))?;
    step.done(format!("wrote {}", path.display()));
    Ok(())
}
