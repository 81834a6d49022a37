//! `cinch-controller run`: a loop an engine, the listener, and the settings file watched for changes.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cinch_settings::ConfigError;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::config::Settings;
use crate::engine::Engine;
use crate::http;
use crate::law::FRESH;
use crate::link::{Http, LinkError};
use crate::shared::Shared;
use crate::sources::Prometheus;

/// Longest wait for any answer: a retune's comes when the request's layers have followed.
const TIMEOUT: Duration = Duration::from_secs(4);
/// How often the settings file is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Why the controller ends with an error.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The settings.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// A port that can't be had.
    #[error("listen {address}: {source}; choose another with --set listen=…")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The operating system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// An HTTP client could not be set up.
    #[error("{0}")]
    Client(#[from] LinkError),
    /// The metrics are defined wrongly.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl RunError {
    /// 2 for what the user wrote, 1 for the rest.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 2,
            _ => 1,
        }
    }
}

/// Runs until SIGINT or SIGTERM. Leases are left to end by themselves.
///
/// # Errors
/// What kept it from running.
pub async fn run(path: PathBuf, overrides: Vec<String>) -> Result<(), RunError> {
    let settings = Arc::new(Settings::load(&path, &overrides)?);
    let shared = Arc::new(Shared::new(settings.mode)?);
    let listen = settings.listen;
    let listener = TcpListener::bind(listen).await;
    let listener = listener.map_err(|source| RunError::Bind {
        address: listen,
        source,
    })?;
    info!("listening on http://{listen}, mode {}", settings.mode.name());

    let (changed, watched) = watch::channel(settings.clone());
    let mut loops = JoinSet::new();
    for engine in &settings.engine {
        let link = Http::new(&engine.url, engine.token.as_deref(), TIMEOUT)?;
        let prometheus = match &settings.prometheus {
            Some(source) => {
                let selector = format!("{{{}={:?}}}", source.label, engine.name);
                // What it says later than this is too old to act on.
                let http = Http::new(&source.url, None, FRESH)?;
                Some(Prometheus::new(http, &selector, watched.clone()))
            }
            None => None,
        };
        let engine = Engine::new(&engine.name, link, prometheus, watched.clone(), shared.clone());
        loops.spawn(engine.run());
    }
    let server = axum::serve(listener, http::router(shared.clone()));
    let mut stop = signals()?;
    tokio::select! {
        served = server => served.map_err(|source| RunError::System { what: "listener", source })?,
        () = reload(&path, &overrides, &changed, &shared) => {}
        ended = loops.join_next() => warn!("an engine's loop ended: {ended:?}"),
        _ = stop.0.recv() => {}
        _ = stop.1.recv() => {}
    }
    info!("stopped; levels hold until their leases end");
    Ok(())
}

fn signals() -> Result<(tokio::signal::unix::Signal, tokio::signal::unix::Signal), RunError> {
    let listen = |kind| {
        signal(kind).map_err(|source| RunError::System {
            what: "can't listen for signals",
            source,
        })
    };
    Ok((listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?))
}

/// Follows the settings file for ever: a good change takes force, a bad one is said and the old settings stay.
async fn reload(path: &Path, overrides: &[String], changed: &watch::Sender<Arc<Settings>>, shared: &Shared) {
    let mut seen = stamp(path);
    loop {
        tokio::time::sleep(LOOK).await;
        let now = stamp(path);
        if now == seen {
            continue;
        }
        seen = now;
        match Settings::load(path, overrides) {
            Ok(new) => {
                let old = changed.borrow().clone();
                if (&old.engine, old.listen, &old.prometheus) != (&new.engine, new.listen, &new.prometheus) {
                    warn!(
                        "changes to listen, engine and prometheus need a restart; the rest is in force now"
                    );
                }
                info!("settings read again, mode {}", new.mode.name());
                shared.settings(Ok(new.mode));
                changed.send_replace(Arc::new(new));
            }
            Err(err) => {
                warn!("settings not taken, the old ones stay: {err}");
                shared.settings(Err(err.to_string()));
            }
        }
    }
}

/// Changes when the file does; none while there is no file, as between the two steps of a replacement.
fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let data = std::fs::metadata(path).ok()?;
    Some((data.modified().ok()?, data.len()))
}
