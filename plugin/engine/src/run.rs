//! `cinch serve`: listeners first, then the model, then requests, until a signal.

use std::future::IntoFuture;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cinch_protocol::probe::Plan;
use mistralrs_core::Request;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::capture::Capturing;
use crate::config::{ConfigError, ModelKind, Settings};
use crate::fields::FieldFault;
use crate::model::{self, EndOfText, ModelError};
use crate::state::{App, Phase, SetupError};
use crate::{api, capture, fingerprint, keeper, probe, serve as openai};

/// What cancelled answers get to reach their clients.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why `cinch` ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// A field of it, found wrong against the world.
    #[error("{0}")]
    Field(#[from] FieldFault),
    /// A port that can't be had.
    #[error("{field} {address}: {}; choose another with --set {field}=…", words(source))]
    Bind {
        /// Which listener.
        field: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The process could not be set up.
    #[error("{0}")]
    Setup(#[from] SetupError),
    /// The plugin could not be installed.
    #[error("{0}")]
    Install(#[from] cinch_hooks::HookError),
    /// The model.
    #[error("{0}")]
    Model(#[from] ModelError),
    /// A probe.
    #[error("probe: {0:#}")]
    Probe(anyhow::Error),
    /// A benchmark.
    #[error("bench: {0:#}")]
    Bench(anyhow::Error),
    /// An evaluation.
    #[error("eval: {0:#}")]
    Eval(anyhow::Error),
    /// A calibration.
    #[error("calibrate: {0:#}")]
    Calibrate(anyhow::Error),
    /// The operating system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl RunError {
    /// 2 for what the user wrote, 1 for the rest.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Field(_) | Self::Model(ModelError::File(_)) => 2,
            _ => 1,
        }
    }
}

fn words(err: &io::Error) -> String {
    match err.kind() {
        io::ErrorKind::AddrInUse => "address already in use".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        io::ErrorKind::AddrNotAvailable => "not an address of this machine".into(),
        _ => err.to_string(),
    }
}

/// `cinch check-config`: what can be checked without loading. A model that is not there yet is not an error.
///
/// # Errors
/// The field that can't be.
pub fn check(settings: &Settings) -> Result<(), RunError> {
    let missing = settings.model.kind == ModelKind::Gguf && !model::file_exists(&settings.model);
    if missing {
        eprintln!("note: model.file is not there yet");
        return Ok(());
    }
    model::check(settings)?;
    Ok(fingerprint::check_ladder(settings)?)
}

/// Serves until SIGINT or SIGTERM.
///
/// # Errors
/// What kept it from serving.
pub fn serve(settings: Settings) -> Result<(), RunError> {
    model::check(&settings)?;
    fingerprint::check_ladder(&settings)?;
    let runtime = threads()?;
    let served = runtime.block_on(run(settings));
    // A load that a signal interrupts can't be stopped, only left behind.
    runtime.shutdown_background();
    served
}

/// `cinch probe`: the plan's runs through the engine as it would serve them.
///
/// # Errors
/// What kept it from running, or a file that can't be read or written.
pub fn probe(mut settings: Settings, plan: &Path, out: &Path) -> Result<(), RunError> {
    let failed = RunError::Probe;
    let text = std::fs::read(plan).map_err(|err| failed(anyhow::anyhow!("{}: {err}", plan.display())))?;
    let plan: Plan =
        serde_json::from_slice(&text).map_err(|err| failed(anyhow::anyhow!("{}: {err}", plan.display())))?;
    settings.engine.prefix_cache = plan.prefix_cache;
    model::check(&settings)?;
    fingerprint::check_ladder(&settings)?;
    let run = async {
        let app = App::new(settings)?;
        let wanted = capture::wanted(&plan).map_err(failed)?;
        if wanted.is_some() && !app.kv.on() {
            return Err(FieldFault::new("kv.plugin", "off", "on, for a plan with capture").into());
        }
        let mut capturing = None;
        app.kv.install_as(|plugin| match wanted {
            None => plugin,
            Some(wanted) => capturing
                .insert(Arc::new(Capturing::new(plugin, wanted.clone())))
                .clone(),
        })?;
        let end = if plan.timing {
            EndOfText::Ignored
        } else {
            EndOfText::Ends
        };
        let loaded = model::load(&app.settings, end).await?;
        let name = model::served_name(&app.settings.model);
        model::self_test(&name, &loaded, &app.kv).await?;
        let choice = app.classes.current("default", "class")?;
        let assign = |id| {
            if let Err(refusal) = app.kv.assign(id, "default", choice.clone(), false) {
                warn!("request {id}: {}", refusal.0.detail);
            }
            if let Some(capturing) = &capturing {
                capturing.follow(id);
            }
        };
        let report = probe::run_with(loaded.mistralrs, &plan, assign).await;
        let mut report = report.map_err(failed)?;
        if let Some(capturing) = &capturing {
            capturing.save().map_err(failed)?;
        }
        report.dtype = Some(loaded.dtype.as_str().to_owned());
        report.kv_peak_bytes = app.kv.on().then(|| app.kv.totals().peak_bytes);
        Ok::<_, RunError>(report)
    };
    let runtime = threads()?;
    let report = runtime.block_on(run);
    runtime.shutdown_background();
    let text = serde_json::to_vec_pretty(&report?).map_err(|err| failed(err.into()))?;
    std::fs::write(out, text).map_err(|err| failed(anyhow::anyhow!("{}: {err}", out.display())))
}

pub(crate) fn threads() -> Result<Runtime, RunError> {
    Runtime::new().map_err(|source| RunError::System {
        what: "can't start threads",
        source,
    })
}

async fn run(settings: Settings) -> Result<(), RunError> {
    let app = App::new(settings)?;
    let server = bind("server.listen", app.settings.server.listen).await?;
    let policy = bind("api.listen", app.settings.api.listen).await?;
    let (stop, stopped) = watch::channel(());
    let openai = listen(server, openai::router(app.clone()), stopped.clone());
    let api = listen(policy, api::router(app.clone()), stopped);
    app.kv.install()?;

    let mut signals = Signals::new()?;
    tokio::select! {
        ready = get_ready(&app) => ready?,
        () = signals.next() => {
            info!("stopped while loading");
            return Ok(());
        }
    }
    let keeper = tokio::spawn(keeper::run(app.clone()));
    signals.next().await;

    info!(
        "stopping: running requests get {} s to finish",
        app.settings.server.drain_seconds
    );
    app.set_phase(Phase::Stopping);
    app.admission.stop();
    keeper.abort();
    drop(stop);
    let closed = async { tokio::join!(openai, api) };
    tokio::pin!(closed);
    let drain = Duration::from_secs(app.settings.server.drain_seconds);
    let in_time = tokio::select! {
        closed = tokio::time::timeout(drain, &mut closed) => closed.is_ok(),
        () = signals.next() => false,
    };
    if !in_time {
        app.cancel_all();
        // Nothing is left to do for a client that does not read.
        let _unread = tokio::time::timeout(LAST_WORDS, closed).await;
    }
    if let Some(sender) = app
        .loaded()
        .and_then(|loaded| loaded.mistralrs.get_sender(None).ok())
    {
        let _ended_before = sender.try_send(Request::Terminate);
    }
    info!("stopped");
    Ok(())
}

async fn get_ready(app: &Arc<App>) -> Result<(), RunError> {
    let loaded = model::load(&app.settings, EndOfText::Ends).await?;
    app.set_phase(Phase::Testing);
    let name = model::served_name(&app.settings.model);
    model::self_test(&name, &loaded, &app.kv).await?;
    app.set_loaded(loaded);
    app.set_phase(Phase::Ready);
    info!("ready: {name} on http://{}", app.settings.server.listen);
    Ok(())
}

async fn bind(field: &'static str, address: SocketAddr) -> Result<TcpListener, RunError> {
    let bound = TcpListener::bind(address).await;
    let listener = bound.map_err(|source| RunError::Bind {
        field,
        address,
        source,
    })?;
    match listener.local_addr() {
        Ok(local) => info!("{field}: http://{local}"),
        Err(err) => warn!("{field}: {err}"),
    }
    Ok(listener)
}

fn listen(
    listener: TcpListener,
    router: axum::Router,
    mut stopped: watch::Receiver<()>,
) -> JoinHandle<io::Result<()>> {
    let signal = async move {
        // Resolves with an error when the sender is dropped: that is the signal.
        let _dropped = stopped.changed().await;
    };
    tokio::spawn(
        axum::serve(listener, router)
            .with_graceful_shutdown(signal)
            .into_future(),
    )
}

struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self, RunError> {
        let listen = |kind| {
            signal(kind).map_err(|source| RunError::System {
                what: "can't listen for signals",
                source,
            })
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
