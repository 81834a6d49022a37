//! `cargo xtask demo`: an engine with little KV memory, more load than fits, and a controller at work, to be watched.
//!
//! Everything runs on free ports of its own, so that it disturbs nothing; what the services say goes into files.

mod board;
mod drive;
mod figures;
mod format;
mod plan;
mod screen;
mod summary;
mod view;
mod watch;

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use cinch_tests::load;
use serde_json::Value;

use crate::step::Step;
use crate::up::launch::{self, ControllerFlags};
use crate::up::service::Service;
use crate::up::settings::{Controller, Engine};
use crate::up::signals;
use crate::workspace::Workspace;
use crate::{digest, model, text};
use drive::{Load, Show, drive};
use figures::{Figures, Services};
pub(crate) use plan::Args;
use plan::Geometry;
use view::Scene;
use watch::Watch;

/// Between two looks at services and signals.
const TICK: Duration = Duration::from_millis(50);
/// Longest until a service is ready.
const READY: Duration = Duration::from_secs(300);
/// What differs from configs/controller.toml: a load of a few minutes needs quicker steps than one of a day.
const QUICK: [&str; 3] = ["tick_seconds=1", "law.warm_up=0", "law.up_cooldown=5"];
/// Last lines of a log that are shown where its service ended.
const TAIL: usize = 15;

/// A service, and where what it says goes.
struct Logged {
    service: Service,
    log: PathBuf,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> anyhow::Result<ExitCode> {
    args.check()?;
    let config = workspace.root.join("configs/engine.toml");
    let [openai, api, listen] = free_ports()?;
    let mut sets = vec![
        format!("server.listen={openai}"),
        format!("api.listen={api}"),
        // The peak counts every block there is; those of finished requests are not the load's.
        "engine.prefix_cache=false".to_owned(),
    ];
    let flags = controller_flags(workspace, args, listen);
    let engine = Engine::load(&config, &sets)?;
    let controller = Controller::load(&flags.config, &flags.sets)?;

    let programs = launch::build(workspace, args.release_dir.as_deref(), &engine, Some(&flags))?;
    let gguf = model::ready(workspace)?;
    let text = std::fs::read_to_string(text::ready(workspace)?).context("reading the text")?;
    let capacity = args.capacity(&Geometry::read(&gguf)?)?;
    sets.push(format!("kv.capacity_bytes={capacity}"));
    sets.push(format!("model.file={}", gguf.display()));
    sets.extend(args.sets.iter().cloned());
    let bodies: Vec<Value> = load::prompts(&text, args.requests, args.prompt_tokens)
        .iter()
        .map(|prompt| load::completion(prompt, args.max_tokens))
        .collect();

    let signals = signals()?;
    let dir = workspace.home.join("demo");
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let mut services = Vec::new();
    let binary = programs.controller.context("the controller was not built")?;
    let starts = [
        (
            "engine",
            launch::engine_command(&programs.engine, &config, &sets),
            (engine.api, "/readyz"),
        ),
        (
            "controller",
            flags.command(&binary, "run", &engine),
            (controller.listen, "/healthz"),
        ),
    ];
    for (name, command, probe) in starts {
        services.push(started(&dir, name, command, probe)?);
        if !ready(&mut services, &signals)? {
            return Ok(interrupted());
        }
    }
    let mut watch = Watch::new(&engine, &controller);
    let scene = Scene {
        mode: controller.mode.name(),
        requests: args.requests,
        prompt_tokens: args.prompt_tokens,
        max_tokens: args.max_tokens,
        fit: args.fit(),
        capacity,
        ladder: watch.ladder(),
        ttft_slo: args.ttft_slo,
        itl_slo: args.itl_slo,
    };
    let before = watch.engine_started();
    watch.starts_now();
    let mut show = Show::new(scene);
    let load = Load {
        url: format!("{}/v1/completions", engine.openai_url()),
        bodies,
        release_within: args.release_within.map(Duration::from_secs),
    };
    let Some(over) = drive(&load, &watch, &mut services, &signals, &mut show)? else {
        return Ok(interrupted());
    };
    let known = Services {
        engine_started: (before, watch.engine_started()),
        writes: watch.writes(),
        fallen: fallen(&mut services)?,
    };
    let mut figures = Figures::new(args, capacity, &over.outcomes, &over.seen, known, over.wall);
    figures.released_after = over.released_after;
    let failures = figures.failures();
    show.summary(&figures);
    if let Some(path) = &args.json {
        let mut json = serde_json::to_vec_pretty(&figures).context("the figures as JSON")?;
        json.push(b'\n');
        digest::write_atomically(path, &json).with_context(|| format!("writing {}", path.display()))?;
    }
    for failure in &failures {
        eprintln!("error: {failure}");
    }
    if !failures.is_empty() {
        for Logged { log, .. } in &services {
            eprintln!("    its log: {}", log.display());
        }
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// As configured, but for what a short load needs and what was asked for.
fn controller_flags(workspace: &Workspace, args: &Args, listen: SocketAddr) -> ControllerFlags {
    let mut sets: Vec<String> = QUICK.iter().map(|&set| set.to_owned()).collect();
    sets.push(format!("class.default.ttft_slo={:?}", args.ttft_slo));
    sets.push(format!("class.default.itl_slo={:?}", args.itl_slo));
    sets.extend(args.controller_sets.iter().cloned());
    sets.push(format!("listen={listen}"));
    sets.push(format!("mode={}", args.mode.name()));
    ControllerFlags {
        config: workspace.root.join("configs/controller.toml"),
        sets,
    }
}

/// Three ports that nobody has, for the moment.
fn free_ports() -> anyhow::Result<[SocketAddr; 3]> {
    let bind = || TcpListener::bind("127.0.0.1:0").and_then(|it| Ok((it.local_addr()?, it)));
    // Held together, so that they differ.
    let held = [bind(), bind(), bind()].map(|bound| bound.context("finding a free port"));
    let [a, b, c] = held;
    let (a, b, c) = (a?, b?, c?);
    Ok([a.0, b.0, c.0])
}

fn interrupted() -> ExitCode {
    eprintln!("    interrupted");
    ExitCode::from(130)
}

fn started(
    dir: &Path,
    name: &'static str,
    mut command: Command,
    probe: (SocketAddr, &'static str),
) -> anyhow::Result<Logged> {
    let log = dir.join(format!("{name}.log"));
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let second = file.try_clone().context("its log")?;
    command.stdout(file).stderr(second);
    let service = Service::start(name, command, probe)?;
    Ok(Logged { service, log })
}

/// Waits for the service that was started last; `false` on Ctrl-C.
fn ready(services: &mut [Logged], signals: &Receiver<()>) -> anyhow::Result<bool> {
    let Some(Logged { service, log }) = services.last_mut() else {
        return Ok(true);
    };
    let name = service.name();
    let mut step = Step::start(format!("Starting the {name}; it writes to {}", log.display()));
    let start = Instant::now();
    while !service.ready() {
        if signals.try_recv().is_ok() {
            return Ok(false);
        }
        if let Some(status) = service.ended()? {
            bail!("the {name} ended by itself: {status}\n{}", tail(log));
        }
        if start.elapsed() > READY {
            bail!(
                "the {name} is not ready after {} s\n{}",
                READY.as_secs(),
                tail(log)
            );
        }
        step.waiting("waiting for it");
        std::thread::sleep(TICK);
    }
    step.done("ready");
    Ok(true)
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

fn fallen(services: &mut [Logged]) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for Logged { service, .. } in services {
        if let Some(status) = service.ended()? {
            names.push(format!("{} ({status})", service.name()));
        }
    }
    Ok(names)
}
