//! The command line. Errors are one line on standard error that begins with `error: `; exit codes: 0 done,
//! 1 failed while serving or loading, 2 bad command line or configuration.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{Log, LogFormat, LogLevel, Settings};
use crate::run::{self, RunError};
use crate::{bench, eval};

/// A mistral.rs server whose KV cache is compressed, measured and retuned while requests run.
#[derive(Debug, Parser)]
#[command(name = "cinch", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Load the model and serve it.
    Serve(Source),
    /// Run prompts through the serving path without a server, and write down every step: for tests and
    /// measurements. Requests are of the class `default`.
    Probe {
        #[command(flatten)]
        source: Source,
        /// What to run, JSON.
        plan: PathBuf,
        /// Where the report goes, JSON.
        out: PathBuf,
    },
    /// Measure rates, latencies and memory through the serving path, system beside system, each measurement in a
    /// process of its own.
    Bench {
        #[command(flatten)]
        source: Source,
        #[command(flatten)]
        options: bench::Options,
    },
    /// Measure what each method costs in quality and saves in bytes, on the configured model and a text of yours; writes
    /// a report and the ladder that engine and controller run on.
    Eval {
        #[command(flatten)]
        source: Source,
        #[command(flatten)]
        options: eval::Options,
    },
    /// Measure how much each layer's keys and values take to few bits, each alone, and spread the bits of uniform policies
    /// over them; says whether that is better at as many bytes.
    Calibrate {
        #[command(flatten)]
        source: Source,
        #[command(flatten)]
        options: eval::calibrate::Options,
    },
    /// Check the configuration, and the model file if it is there, without serving.
    CheckConfig(Source),
}

#[derive(Debug, Args)]
struct Source {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Set a field, over file and environment: `--set kv.capacity_bytes=536870912`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

impl Source {
    fn load(&self) -> Result<Settings, RunError> {
        Ok(Settings::load(&self.config, &self.overrides)?)
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(source) => source.load().and_then(|settings| {
            log(&settings.log);
            run::serve(settings)
        }),
        Command::Probe { source, plan, out } => source.load().and_then(|settings| {
            log(&settings.log);
            run::probe(settings, &plan, &out)
        }),
        Command::Bench { source, options } => source.load().and_then(|settings| {
            log(&settings.log);
            bench::run(&options, &settings, &source.config, &source.overrides)
        }),
        Command::Eval { source, options } => source.load().and_then(|settings| {
            log(&settings.log);
            eval::run(&options, settings, &source.config, &source.overrides)
        }),
        Command::Calibrate { source, options } => source.load().and_then(|settings| {
            log(&settings.log);
            eval::calibrate::run(&options, settings, &source.overrides)
        }),
        Command::CheckConfig(source) => source.load().and_then(|settings| {
            run::check(&settings)?;
            println!("{}: ok", source.config.display());
            Ok(())
        }),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err}");
            ExitCode::from(err.exit_code())
        }
    }
}

/// Our own lines at the configured level; mistral.rs' only from `debug` on, its warnings always.
fn log(log: &Log) {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let others = if level >= LevelFilter::DEBUG {
        LevelFilter::INFO
    } else {
        level.min(LevelFilter::WARN)
    };
    let filter = Targets::new().with_default(others).with_target("cinch", level);
    let layer = fmt::layer().with_writer(std::io::stderr);
    let layer = match log.format {
        LogFormat::Text => layer
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    // A test process may have a subscriber already.
    let _set_before = tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init();
}
