//! `cargo xtask up`: everything from nothing to an engine and a controller that answer, and a clean stop of both.

pub(crate) mod launch;
mod ready;
pub(crate) mod service;
pub(crate) mod settings;
mod welcome;

use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use anyhow::Context;

use crate::model;
use crate::step::Step;
use crate::workspace::Workspace;
use launch::ControllerFlags;
use service::Service;
use settings::{Controller, Engine, Mode};

/// Between two looks at the services and at the signals.
const TICK: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the OpenAI API listens [default: as configured, 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where the policy API listens [default: as configured, 127.0.0.1:9180]. The controller follows.
    #[arg(long, value_name = "ADDRESS")]
    api_listen: Option<String>,
    /// The engine's configuration [default: configs/engine.toml].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set a field of the engine's configuration, as in `--set kv.plugin=off`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Serve this GGUF file instead of the demo model.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Start no controller.
    #[arg(long)]
    no_controller: bool,
    /// What the controller's decisions do [default: as configured, recommend].
    #[arg(long, value_name = "MODE", conflicts_with = "no_controller")]
    controller_mode: Option<Mode>,
    /// Where the controller listens [default: as configured, 127.0.0.1:9190].
    #[arg(long, value_name = "ADDRESS", conflicts_with = "no_controller")]
    controller_listen: Option<String>,
    /// The controller's configuration [default: configs/controller.toml]. Its engines are not taken from there: it
    /// watches the one that is started here.
    #[arg(long, value_name = "FILE", conflicts_with = "no_controller")]
    controller_config: Option<PathBuf>,
    /// Set a field of the controller's configuration, as in `--controller-set tick_seconds=1`.
    #[arg(
        long = "controller-set",
        value_name = "KEY=VALUE",
        conflicts_with = "no_controller"
    )]
    controller_sets: Vec<String>,
    /// Run the `cinch` and `cinch-controller` in this folder instead of preparing and building them.
    #[arg(long, value_name = "DIR")]
    release_dir: Option<PathBuf>,
    /// More arguments for `cinch serve`.
    #[arg(last = true)]
    extra: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<ExitCode> {
    let or_own = |given: &Option<PathBuf>, own| given.clone().unwrap_or_else(|| workspace.root.join(own));
    let config = or_own(&args.config, "configs/engine.toml");
    let mut sets = engine_sets(args);
    // What would fail at the end is said before a build of a quarter of an hour.
    let engine = Engine::load(&config, &sets)?;
    let flags = (!args.no_controller).then(|| ControllerFlags {
        config: or_own(&args.controller_config, "configs/controller.toml"),
        sets: controller_sets(args),
    });
    let controller = flags
        .as_ref()
        .map(|flags| Controller::load(&flags.config, &flags.sets))
        .transpose()?;
    settings::check_free(&engine, controller.as_ref())?;

    let release_dir = args.release_dir.as_deref();
    let programs = launch::build(workspace, release_dir, &engine, flags.as_ref())?;
    let gguf = match &args.model {
        Some(path) => path.clone(),
        None => model::ready(workspace)?,
    };
    sets.insert(0, format!("model.file={}", gguf.display()));
    let mut command = launch::engine_command(&programs.engine, &config, &sets);
    command.args(&args.extra);

    let signals = signals()?;
    let step = Step::start("Starting the engine and loading the model");
    let service = Service::start("engine", command, (engine.api, "/readyz"))?;
    let mut running = Running {
        services: vec![service],
        signals,
        stopping: false,
    };
    if let Some(code) = running.until_ready(step)? {
        return Ok(code);
    }
    if let (Some(flags), Some(binary), Some(controller)) = (&flags, &programs.controller, &controller) {
        // Not before the engine answers: what it cannot read yet would be its first news.
        let step = Step::start("Starting the controller");
        let command = flags.command(binary, "run", &engine);
        let service = Service::start("controller", command, (controller.listen, "/healthz"))?;
        running.services.push(service);
        if let Some(code) = running.until_ready(step)? {
            return Ok(code);
        }
    }
    eprint!("{}", welcome::text(&engine, controller.as_ref()));
    loop {
        if let Some(code) = running.look()? {
            return Ok(code);
        }
    }
}

/// The engine's fields set on the command line; what is said by name comes first, so that `--set` may override it.
fn engine_sets(args: &Args) -> Vec<String> {
    let listen = args.listen.iter().map(|it| format!("server.listen={it}"));
    let api = args.api_listen.iter().map(|it| format!("api.listen={it}"));
    listen.chain(api).chain(args.sets.iter().cloned()).collect()
}

/// The same of the controller.
fn controller_sets(args: &Args) -> Vec<String> {
    let listen = args.controller_listen.iter().map(|it| format!("listen={it}"));
    let mode = args.controller_mode.map(|mode| format!("mode={}", mode.name()));
    let named = listen.chain(mode);
    named.chain(args.controller_sets.iter().cloned()).collect()
}

/// Hears Ctrl-C and termination, each time.
pub(crate) fn signals() -> anyhow::Result<Receiver<()>> {
    let (signal, signals) = mpsc::channel();
    ctrlc::set_handler(move || {
        // Nobody listens any more once everything has ended.
        let _ended = signal.send(());
    })
    .context("watching for Ctrl-C")?;
    Ok(signals)
}

/// What runs, and whether it was told to stop.
struct Running {
    services: Vec<Service>,
    signals: Receiver<()>,
    stopping: bool,
}

impl Running {
    /// Waits until the last service is ready; an exit code, where everything has ended instead.
    fn until_ready(&mut self, mut step: Step) -> anyhow::Result<Option<ExitCode>> {
        loop {
            if let Some(code) = self.look()? {
                return Ok(Some(code));
            }
            if self.stopping {
                continue;
            }
            if self.services.last().is_some_and(Service::ready) {
                step.done("ready");
                return Ok(None);
            }
            step.waiting("waiting for it");
        }
    }

    /// Waits a little. Passes a signal on; where one has ended by itself, says which, and stops the others; answers
    /// with the exit code once all have ended.
    fn look(&mut self) -> anyhow::Result<Option<ExitCode>> {
        match self.signals.recv_timeout(TICK) {
            Ok(()) => {
                self.stopping = true;
                for service in &mut self.services {
                    service.interrupt()?;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
        }
        let mut all = true;
        for service in &mut self.services {
            match (service.ended()?, self.stopping) {
                (None, _) => all = false,
                (Some(status), false) => {
                    let name = service.name();
                    return self.fallen(name, status).map(Some);
                }
                (Some(_), true) => {}
            }
        }
        if !all {
            return Ok(None);
        }
        for service in &mut self.services {
            if let Some(status) = service.ended()?
                && !status.success()
            {
                eprintln!("error: the {} did not stop cleanly: {status}", service.name());
                return Ok(Some(failure(status)));
            }
        }
        Ok(Some(ExitCode::SUCCESS))
    }

    /// One ended by itself.
    fn fallen(&mut self, name: &str, status: ExitStatus) -> anyhow::Result<ExitCode> {
        eprintln!("error: the {name} ended by itself: {status}");
        for service in &mut self.services {
            if service.ended()?.is_none() {
                eprintln!("==> Stopping the {}", service.name());
                service.stop()?;
            }
        }
        Ok(failure(status))
    }
}

/// What it ended with, which it has explained itself; never success.
fn failure(status: ExitStatus) -> ExitCode {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.filter(|&code| code != 0)
        .map_or(ExitCode::FAILURE, ExitCode::from)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::mpsc::Sender;

    use clap::Parser;

    use super::*;

    const NOWHERE: (std::net::SocketAddr, &str) = (
        std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1),
        "/",
    );
    /// Runs until it is interrupted, and ends well.
    const GOOD: &str = "trap 'exit 0' INT; while :; do sleep 0.01; done";

    fn running(scripts: &[(&'static str, &str)]) -> (Running, Sender<()>) {
        let (signal, signals) = mpsc::channel();
        let start = |&(name, script): &(&'static str, &str)| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            Service::start(name, command, NOWHERE).unwrap()
        };
        let running = Running {
            services: scripts.iter().map(start).collect(),
            signals,
            stopping: false,
        };
        // Traps are set when the shells get to it.
        std::thread::sleep(Duration::from_millis(300));
        (running, signal)
    }

    fn end(running: &mut Running) -> String {
        loop {
            if let Some(code) = running.look().unwrap() {
                return format!("{code:?}");
            }
        }
    }

    #[test]
    fn a_signal_stops_all() {
        let (mut all, signal) = running(&[("engine", GOOD), ("controller", GOOD)]);
        assert!(all.look().unwrap().is_none());
        signal.send(()).unwrap();
        assert_eq!(end(&mut all), format!("{:?}", ExitCode::SUCCESS));
        let (mut all, signal) = running(&[("engine", "trap 'exit 4' INT; while :; do sleep 0.01; done")]);
        signal.send(()).unwrap();
        assert_eq!(end(&mut all), format!("{:?}", ExitCode::from(4)));
    }

    #[test]
    fn one_that_ends_by_itself_stops_the_other_and_is_no_success() {
        for (script, code) in [
            ("exit 2", ExitCode::from(2)),
            ("exit 0", ExitCode::FAILURE),
            ("kill -9 $$", ExitCode::FAILURE),
        ] {
            let (mut all, _signal) = running(&[("engine", GOOD), ("controller", script)]);
            assert_eq!(end(&mut all), format!("{code:?}"), "{script}");
            for service in &mut all.services {
                assert!(service.ended().unwrap().is_some());
            }
        }
    }

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn what_is_named_comes_first_and_may_be_overridden_by_set() {
        let words = [
            "up",
            "--listen=127.0.0.1:1",
            "--set=server.listen=127.0.0.1:2",
            "--controller-mode=live",
            "--controller-set=mode=off",
        ];
        let args = Cli::parse_from(words).args;
        assert_eq!(
            engine_sets(&args),
            ["server.listen=127.0.0.1:1", "server.listen=127.0.0.1:2"]
        );
        assert_eq!(controller_sets(&args), ["mode=live", "mode=off"]);
        let Err(err) = Cli::try_parse_from(["up", "--controller-mode=fast"]) else {
            panic!("there is no such mode");
        };
        let said = err.to_string();
        assert!(said.contains("fast") && said.contains("new_requests"), "{said}");
        assert!(Cli::try_parse_from(["up", "--no-controller", "--controller-mode=live"]).is_err());
    }
}
