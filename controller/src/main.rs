//! The `cinch-controller` binary. Errors are one line on standard error that begins with `error: `; exit codes: 0
//! done, 1 failed while running, 2 bad command line or settings.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use cinch_controller::config::{Log, LogFormat, LogLevel, Settings};
use cinch_controller::run::{RunError, run};
use clap::{Args, Parser, Subcommand};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Moves compression levels of running engines so that memory and latency targets hold.
#[derive(Debug, Parser)]
#[command(name = "cinch-controller", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch the engines and, as the mode allows, move their levels.
    Run(Source),
    /// Check the settings without running.
    CheckConfig(Source),
}

#[derive(Debug, Args)]
struct Source {
    /// The settings file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Set a field, over file and environment: `--set mode=live`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

fn main() -> ExitCode {
    match command(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err}");
            ExitCode::from(err.exit_code())
        }
    }
}

fn command(command: Command) -> Result<(), RunError> {
    match command {
        Command::CheckConfig(source) => {
            Settings::load(&source.config, &source.overrides)?;
            println!("{}: ok", source.config.display());
            Ok(())
        }
        Command::Run(source) => {
            log(&Settings::load(&source.config, &source.overrides)?.log);
            // A scrape a second of a few engines is no work for more than one thread.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|source| RunError::System {
                    what: "can't start",
                    source,
                })?;
            runtime.block_on(run(source.config, source.overrides))
        }
    }
}

fn log(log: &Log) {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    let ours = Targets::new().with_target("cinch_controller", level);
    let layer = match log.format {
        LogFormat::Text => fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .boxed(),
        LogFormat::Json => fmt::layer().json().with_writer(std::io::stderr).boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(ours))
        .init();
}
