//! `cargo xtask …`: everything a person or CI runs.
//!
//! Each command is a thin assembly of functions that are tested in their own modules; anything
//! that takes long says what it does, that it goes on, and how long it took.
#![forbid(unsafe_code)]

mod bench;
mod ci;
mod controller;
mod demo;
mod digest;
mod engine;
mod model;
mod patch;
mod plain;
mod process;
mod step;
mod suite;
mod text;
mod up;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything a person or CI runs.", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch the demo model and re-quantize it to Q8_0.
    Model,
    /// Fetch the English text that tests and benchmarks measure on.
    Text,
    /// Prepare the patched mistral.rs sources and build the `cinch` binary.
    Engine {
        /// Prepare and check the sources, build nothing.
        #[arg(long)]
        check_only: bool,
    },
    /// Model, engine and controller, then serve until Ctrl-C.
    Up(Box<up::Args>),
    /// Overfill a small KV capacity and watch the controller make room: free ports, a summary in the end.
    Demo(Box<demo::Args>),
    /// Run every test: workspace, engine, end to end.
    Test {
        /// Only what needs no engine.
        #[arg(long)]
        fast: bool,
    },
    /// What CI runs: format, lints, licences, docs, then `test`.
    Ci,
    /// Record what the unhooked engine answers on this CPU into tests/recordings (builds it first).
    RecordPlain,
    /// Rates, latencies and memory of the engine on the demo model, in turn with other systems if asked.
    Bench(bench::Args),
    /// Aids for writing plugin/engine/patches.
    #[command(subcommand)]
    Patch(PatchCommand),
}

#[derive(Subcommand)]
enum PatchCommand {
    /// Print the hash a hunk at LINE that replaces N lines must carry, and the file's.
    Hash {
        /// A file, or `<crate>/<path>` in the pristine sources.
        file: PathBuf,
        /// 1-based line.
        line: usize,
        /// Lines replaced; 0 and 1 give the same hash.
        #[arg(default_value_t = 0)]
        replace: usize,
    },
    /// Fill in the empty sha256 fields from the pristine sources.
    Refresh,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find()?;
    match cli.command {
        Command::Model => {
            let path = model::ready(&workspace)?;
            println!("{}", path.display());
        }
        Command::Text => println!("{}", text::ready(&workspace)?.display()),
        Command::Engine { check_only } => {
            engine::prepare(&workspace)?;
            if !check_only {
                println!("{}", engine::build(&workspace)?.display());
            }
        }
        Command::Up(args) => return up::run(&workspace, &args),
        Command::Demo(args) => return demo::run(&workspace, &args),
        Command::Test { fast } => suite::run(&workspace, fast)?,
        Command::RecordPlain => plain::record(&workspace)?,
        Command::Bench(args) => bench::run(&workspace, &args)?,
        Command::Ci => ci::run(&workspace)?,
        Command::Patch(PatchCommand::Hash { file, line, replace }) => {
            engine::print_hash(&workspace, &file, line, replace)?;
        }
        Command::Patch(PatchCommand::Refresh) => engine::refresh(&workspace)?,
    }
    Ok(ExitCode::SUCCESS)
}
