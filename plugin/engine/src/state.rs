//! What both listeners share. The model arrives later than the listeners: until then, and again when the
//! process stops, [`App::engine`] refuses.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use mistralrs_core::MistralRs;
use tokio::sync::watch;

use crate::admission::Admission;
use crate::classes::Classes;
use crate::config::{Settings, Switch};
use crate::http::Refusal;
use crate::kv::Kv;
use crate::metrics::Metrics;

/// Where the process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// The model is being loaded.
    Loading,
    /// The model is loaded and being tested.
    Testing,
    /// Requests are served.
    Ready,
    /// A stop signal came.
    Stopping,
}

impl Phase {
    const ALL: [Self; 4] = [Self::Loading, Self::Testing, Self::Ready, Self::Stopping];

    /// For people.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Loading => "the model is being loaded",
            Self::Testing => "the model is loaded and being tested",
            Self::Ready => "ready",
            Self::Stopping => "the server is stopping",
        }
    }
}

/// Counts a text's tokens; `None`: the model has no tokenizer for it.
pub type TokenCount = Arc<dyn Fn(&str) -> Option<usize> + Send + Sync>;

/// A text's tokens, with those that start and end a prompt if asked; `None`: the model has no tokenizer for it.
pub type Encode = Arc<dyn Fn(&str, bool) -> Option<Vec<u32>> + Send + Sync>;

/// A loaded model.
pub struct Loaded {
    /// The host engine.
    pub mistralrs: Arc<MistralRs>,
    /// Its own routes.
    pub upstream: axum::Router,
    /// Counts a text's tokens.
    pub tokens: TokenCount,
    /// A text's tokens.
    pub encode: Encode,
    /// Tokens that the model can attend to.
    pub context: usize,
    /// What activations are in.
    pub dtype: candle_core::DType,
    /// How its keys turn with their positions, as its description says.
    pub rotary: cinch_cache::RotaryLayers,
}

/// Shared by all handlers.
pub struct App {
    /// As configured.
    pub settings: Settings,
    /// Classes and ladder.
    pub classes: Arc<Classes>,
    /// The plugin.
    pub kv: Kv,
    /// The gate in front of the engine.
    pub admission: Arc<Admission>,
    /// The metrics.
    pub metrics: Metrics,
    loaded: OnceLock<Loaded>,
    phase: AtomicU8,
    cancel: watch::Sender<bool>,
}

/// Why the process could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The plugin refused its settings.
    #[error("plugin: {0}")]
    Plugin(#[from] cinch_cache::CacheError),
    /// The metrics are defined wrongly.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A class is not as it must be.
    #[error("{0}")]
    Class(#[from] crate::fields::FieldFault),
}

impl App {
    /// From checked settings; no model yet.
    ///
    /// # Errors
    /// The plugin refused its settings; a class is not as it must be.
    pub fn new(settings: Settings) -> Result<Arc<Self>, SetupError> {
        let classes = Arc::new(Classes::new(&settings)?);
        // "off" is mistral.rs as it comes: none of ours run.
        let kernels = match (settings.kv.plugin, settings.engine.kernels()) {
            (Switch::On, Ok(kernels)) => kernels.name(),
            _ => "none",
        };
        let metrics = Metrics::new(&classes.names(), classes.ladder(), kernels)?;
        metrics.set_capacity(settings.kv.capacity_bytes);
        let kv = Kv::new(&settings, classes.current("default", "class.default")?, &metrics)?;
        Ok(Arc::new(Self {
            admission: Admission::new(&settings, kv.clone(), classes.clone()),
            classes,
            kv,
            metrics,
            loaded: OnceLock::new(),
            phase: AtomicU8::new(Phase::Loading as u8),
            cancel: watch::channel(false).0,
            settings,
        }))
    }

    /// Where the process is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::Acquire))]
    }

    /// Goes on to `phase`; stopping is for good.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        self.metrics.set_ready(self.phase() == Phase::Ready);
    }

    /// Hands the loaded model over. A second one is ignored.
    pub fn set_loaded(&self, loaded: Loaded) {
        let _first_wins = self.loaded.set(loaded);
    }

    /// The model, if requests can be served.
    ///
    /// # Errors
    /// 503 with the phase.
    pub fn engine(&self) -> Result<&Loaded, Refusal> {
        match (self.phase(), self.loaded.get()) {
            (Phase::Ready, Some(loaded)) => Ok(loaded),
            (phase, _) => Err(Refusal::not_ready(phase.describe())),
        }
    }

    /// The model, once it is loaded.
    #[must_use]
    pub fn loaded(&self) -> Option<&Loaded> {
        self.loaded.get()
    }

    /// Cancels the requests that still run.
    pub fn cancel_all(&self) {
        self.cancel.send_replace(true);
    }

    /// Resolves when the requests that still run are to give up.
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut watch = self.cancel.subscribe();
        async move {
            // The sender lives as long as the process; were it gone, giving up would be right too.
            let _closed = watch.wait_for(|cancelled| *cancelled).await;
        }
    }
}
