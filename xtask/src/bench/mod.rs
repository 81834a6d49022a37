//! `cargo xtask bench`: `cinch bench` on the demo model, beside other systems if asked, kept as a record if asked.
//!
//! What is measured and how is `cinch bench`'s alone; here is only where the others come from, and where the
//! figures go.

mod llama_cpp;
mod record;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use cinch_protocol::bench::{Measured, Other, Record};
use cinch_tests::cpu_key;
use clap::{Args as ClapArgs, ValueEnum};

use crate::step::Step;
use crate::workspace::Workspace;
use crate::{engine, model, plain, process, text};

/// What the benchmark is told. What is left out is `cinch bench`'s to choose, but for the contexts.
#[derive(Debug, ClapArgs)]
pub(crate) struct Args {
    /// Another system to measure in turn with the engine; built first.
    #[arg(long, value_enum, value_delimiter = ',')]
    against: Vec<Against>,
    /// Prompt lengths of single requests. 512 is one chunk of a prefill: what the bound on memory is made of.
    #[arg(long, default_value = "64,512,2048,8000", value_name = "N,N,…")]
    contexts: String,
    /// Names of ladder levels, int8, int4, int3 or int2, policies spelled out, or off.
    #[arg(long, value_name = "NAME,{…},…")]
    policies: Option<String>,
    /// Requests at once.
    #[arg(long, value_name = "N,N,…")]
    concurrency: Option<String>,
    /// Tokens that each request generates.
    #[arg(long, value_name = "N")]
    new_tokens: Option<usize>,
    /// How often everything is measured.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Measure the attention kernel by itself too.
    #[arg(long)]
    kernel: bool,
    /// Where all figures go, JSON. Default: bench/measured.json beside the models.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where they are plotted. Default: bench/measured.svg beside the models.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Keep a record, with its plot, in benches/records.
    #[arg(long)]
    record: bool,
}

/// Who can be measured against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Against {
    /// mistralrs-core 0.8.1 as published.
    Mistralrs,
    /// llama-cpp-python, with its KV cache in f16, q8_0 and q4_0.
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

/// Builds what is needed, measures, prints the table.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<()> {
    let model = model::ready(workspace)?;
    let text = text::ready(workspace)?;
    let folder = workspace.home.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    engine::prepare(workspace)?;
    let cinch = engine::build(workspace)?;
    let mut others = Vec::new();
    let path = |path: &PathBuf| path.to_string_lossy().into_owned();
    if args.against.contains(&Against::Mistralrs) {
        let binary = plain::build(workspace, plain::Candle::Published)?;
        others.push(Other {
            system: "mistralrs".to_owned(),
            kv: None,
            command: vec![path(&binary), path(&model)],
            max_concurrency: None,
        });
    }
    if args.against.contains(&Against::LlamaCpp) {
        others.extend(llama_cpp::ready(workspace, &model)?);
    }
    let or_default = |given: &Option<PathBuf>, name: &str| {
        let given = given.clone().unwrap_or_else(|| folder.join(name));
        std::path::absolute(&given).with_context(|| format!("where {} is", given.display()))
    };
    let (json, svg) = (
        or_default(&args.json, "measured.json")?,
        or_default(&args.svg, "measured.svg")?,
    );

    let step = Step::start("Measuring");
    let mut command = Command::new(cinch);
    command
        .arg("bench")
        .arg("--config")
        .arg(workspace.root.join("configs/engine.toml"))
        .arg("--set")
        .arg(format!("model.file={}", model.display()))
        .arg("--text")
        .arg(text)
        .args(["--contexts", &args.contexts]);
    let numbers = [("--new-tokens", args.new_tokens), ("--rounds", args.rounds)];
    for (option, number) in numbers {
        command.args(
            number
                .iter()
                .flat_map(|number| [option.to_owned(), number.to_string()]),
        );
    }
    let lists = [
        ("--policies", &args.policies),
        ("--concurrency", &args.concurrency),
    ];
    for (option, list) in lists {
        command.args(list.iter().flat_map(|list| [option, list]));
    }
    for other in &others {
        command.arg("--other").arg(serde_json::to_string(other)?);
    }
    if args.kernel {
        command.arg("--kernel");
    }
    process::run(command.arg("--json").arg(&json).arg("--svg").arg(&svg))?;
    step.done(format!("wrote {} and {}", json.display(), svg.display()));

    if args.record {
        let measured = fs::read(&json).with_context(|| format!("reading {}", json.display()))?;
        let measured: Measured = serde_json::from_slice(&measured).context("the figures")?;
        let record = Record::of(&measured, &cpu_key(), &record::commit(workspace)?);
        let path = record::keep(&workspace.root.join("benches/records"), record)?;
        let plot = path.with_extension("svg");
        fs::copy(&svg, &plot).with_context(|| format!("writing {}", plot.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}
