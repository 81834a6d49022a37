//! Six requests of different lengths at once: hooked, hooked but off, and plain mistral.rs as published.
//! Interleaved rounds on one machine; medians of the wall time, and their ratios.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use cinch_protocol::probe::Plan;
use cinch_tests::{cpu_key, six_requests};

use crate::step::Step;
use crate::workspace::Workspace;
use crate::{engine, model, plain, text};

/// Systems and how the engine is told; the unhooked one is another binary.
const SYSTEMS: [(&str, Option<&str>); 5] = [
    ("plain mistral.rs 0.8.1, candle 0.10.2", None),
    ("cinch, plugin off", Some("kv.plugin=off")),
    ("cinch, full", Some("class.default.level=0")),
    ("cinch, int8", Some("class.default.level=1")),
    ("cinch, int4", Some("class.default.level=3")),
];

/// Runs and prints the table.
pub(crate) fn six(workspace: &Workspace, rounds: usize) -> anyhow::Result<()> {
    let model = model::ready(workspace)?;
    let text = std::fs::read_to_string(text::ready(workspace)?).context("reading the text")?;
    engine::prepare(workspace)?;
    let cinch = engine::build(workspace)?;
    let unhooked = plain::build(workspace, plain::Candle::Published)?;
    let plan = Plan {
        groups: vec![six_requests(&text)],
        ..Plan::default()
    };
    let mut seconds = vec![Vec::new(); SYSTEMS.len()];
    let mut tokens = (0, 0);
    for round in 1..=rounds {
        for ((name, setting), seconds) in SYSTEMS.iter().zip(&mut seconds) {
            let step = Step::start(format!("Round {round} of {rounds}: {name}"));
            let report = match setting {
                None => plain::probe(plain::command(&unhooked, &model), &plan)?,
                Some(setting) => plain::probe(hooked(workspace, &cinch, setting, &model), &plan)?,
            };
            tokens = report.runs.iter().fold((0, 0), |(prompt, new), run| {
                (prompt + run.prompt_tokens, new + run.tokens.len())
            });
            seconds.push(report.group_seconds[0]);
            step.done(format!("{:.2} s", report.group_seconds[0]));
        }
    }
    let medians: Vec<f64> = seconds.iter_mut().map(|seconds| median(seconds)).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "SmolLM2-135M Q8_0, {threads} threads, {}, 6 requests at once, {} prompt and {} new tokens, median of {rounds}",
        cpu_key(),
        tokens.0,
        tokens.1
    );
    println!(
        "| system | seconds | tokens/s | against plain | against off |\n| --- | --- | --- | --- | --- |"
    );
    for ((name, _), median) in SYSTEMS.iter().zip(&medians) {
        println!(
            "| {name} | {median:.2} | {:.1} | {:.2} | {:.2} |",
            (tokens.0 + tokens.1) as f64 / median,
            medians[0] / median,
            medians[1] / median
        );
    }
    Ok(())
}

/// The hooked engine, told by one setting.
fn hooked(workspace: &Workspace, binary: &Path, setting: &str, model: &Path) -> Command {
    let mut command = Command::new(binary);
    command
        .arg("probe")
        .arg("--config")
        .arg(workspace.root.join("configs/engine.toml"))
        .args(["--set", setting, "--set", "log.level=warn", "--set"])
        .arg(format!("model.file={}", model.display()))
        .stdout(Stdio::null());
    command
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
