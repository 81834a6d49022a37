//! `cargo xtask up`: everything from nothing to a server that answers, and a clean stop.

mod addresses;
mod ready;

use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use crate::step::Step;
use crate::workspace::Workspace;
use crate::{engine, model};
use addresses::Addresses;

/// Between two looks at the server and at the signals.
const TICK: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the OpenAI API listens [default: as configured, 127.0.0.1:8080].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where the policy API listens [default: as configured, 127.0.0.1:9180].
    #[arg(long, value_name = "ADDRESS")]
    api_listen: Option<String>,
    /// The engine's configuration [default: configs/engine.toml].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set a field of the configuration, as in `--set kv.plugin=off`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Serve this GGUF file instead of the demo model.
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Run the `cinch` in this folder instead of preparing and building one.
    #[arg(long, value_name = "DIR")]
    release_dir: Option<PathBuf>,
    /// More arguments for `cinch serve`.
    #[arg(last = true)]
    extra: Vec<String>,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<ExitCode> {
    let config = args
        .config
        .clone()
        .unwrap_or_else(|| workspace.root.join("configs/engine.toml"));
    let text = std::fs::read_to_string(&config).with_context(|| format!("reading {}", config.display()))?;
    let mut sets = overrides(args);
    // What would fail at the end is said before a build of a quarter of an hour.
    let addresses = Addresses::find(&text, &sets, |name| std::env::var(name).ok())?;
    addresses.check_free()?;

    let gguf = match &args.model {
        Some(path) => path.clone(),
        None => model::ready(workspace)?,
    };
    sets.insert(0, format!("model.file={}", gguf.display()));
    let binary = match &args.release_dir {
        Some(dir) => dir.join(format!("cinch{}", std::env::consts::EXE_SUFFIX)),
        None => {
            engine::prepare(workspace)?;
            engine::build(workspace)?
        }
    };

    let mut command = Command::new(&binary);
    command.arg("serve").arg("--config").arg(&config);
    command
        .args(sets.iter().flat_map(|set| ["--set", set]))
        .args(&args.extra)
        .stdin(Stdio::null());
    // A group of its own: Ctrl-C reaches it through us, once, not from the terminal as well.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    serve(command, &addresses).with_context(|| format!("running {}", binary.display()))
}

/// The fields set on the command line, the engine's own `--set` arguments after `--` included.
fn overrides(args: &Args) -> Vec<String> {
    let listen = args
        .listen
        .iter()
        .map(|address| format!("server.listen={address}"));
    let api = args
        .api_listen
        .iter()
        .map(|address| format!("api.listen={address}"));
    listen.chain(api).chain(args.sets.iter().cloned()).collect()
}

fn serve(mut command: Command, addresses: &Addresses) -> anyhow::Result<ExitCode> {
    let (signal, signals) = mpsc::channel();
    ctrlc::set_handler(move || {
        // Nobody listens any more once the server has ended.
        let _ended = signal.send(());
    })
    .context("watching for Ctrl-C")?;
    let mut step = Step::start("Starting the server and loading the model");
    let mut child = command.spawn().context("starting it")?;
    let api = addresses.api;
    let mut stopping = false;
    let mut waiting = true;
    loop {
        match signals.recv_timeout(TICK) {
            Ok(()) => {
                stopping = true;
                interrupt(&child)?;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
        }
        if let Some(status) = child.try_wait().context("waiting for it")? {
            return Ok(exit_code(status, stopping));
        }
        if waiting && !stopping {
            if ready::is_ready(api) {
                waiting = false;
                step.say("ready");
                eprint!("{}", addresses.welcome());
            } else {
                step.waiting("loading");
            }
        }
    }
}

fn interrupt(child: &Child) -> anyhow::Result<()> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("its process id")?;
    match kill_process(pid, Signal::INT) {
        // It ended by itself a moment ago.
        Err(rustix::io::Errno::SRCH) => Ok(()),
        result => result.context("stopping it"),
    }
}

/// 0 where it was asked to stop and did; else what it ended with, which it has explained itself.
fn exit_code(status: ExitStatus, asked: bool) -> ExitCode {
    match status.code() {
        Some(0) if asked => ExitCode::SUCCESS,
        Some(code) => {
            eprintln!("error: the server ended by itself: {status}");
            ExitCode::from(u8::try_from(code).ok().filter(|&code| code != 0).unwrap_or(1))
        }
        None => {
            eprintln!("error: the server was ended: {status}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(script: &str) -> ExitStatus {
        Command::new("sh").args(["-c", script]).status().unwrap()
    }

    #[test]
    fn only_a_stop_that_was_asked_for_is_a_success() {
        let code = |script, asked| format!("{:?}", exit_code(end(script), asked));
        assert_eq!(code("exit 0", true), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code("exit 0", false), format!("{:?}", ExitCode::from(1)));
        assert_eq!(code("exit 2", false), format!("{:?}", ExitCode::from(2)));
        assert_eq!(code("kill -9 $$", true), format!("{:?}", ExitCode::FAILURE));
    }

    #[test]
    fn an_interrupt_reaches_the_server_and_an_ended_one_is_no_error() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap 'exit 3' INT; while :; do sleep 0.01; done"]);
        let mut child = shell.spawn().unwrap();
        // The trap is set when the shell gets to it.
        std::thread::sleep(Duration::from_millis(300));
        interrupt(&child).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(3));
        interrupt(&child).unwrap();
    }

    #[test]
    fn addresses_come_first_and_may_be_overridden_by_set() {
        let args = Args {
            listen: Some("127.0.0.1:1".into()),
            api_listen: None,
            config: None,
            sets: vec!["server.listen=127.0.0.1:2".into()],
            model: None,
            release_dir: None,
            extra: Vec::new(),
        };
        assert_eq!(
            overrides(&args),
            ["server.listen=127.0.0.1:1", "server.listen=127.0.0.1:2"]
        );
    }
}
