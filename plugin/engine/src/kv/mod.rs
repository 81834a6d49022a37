//! All contact with the plugin. What it reports is passed on as measured; with the plugin off nothing is
//! reported at all.

mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use cinch_cache::{
    Assignment, ErrorSample, Matmul, Observer, Plugin, PluginSettings, RetuneError, RetuneReceipt,
    RotaryLayers,
};
use cinch_hooks::CachePolicy;
use cinch_kernels::Kernels;
use cinch_protocol::{Policy, RequestState, RequestView, RetuneReport, ServedCache, ServedWith};
use tracing::info;

pub use self::wire::{ClassTotals, KvTotals};
use self::wire::{finished, unknown, view};
use crate::classes::Choice;
use crate::config::{Settings, Switch};
use crate::fields::FieldFault;
use crate::http::Refusal;
use crate::metrics::Metrics;

/// How often a waiting `PATCH` looks whether its policy has been taken up.
const POLL: Duration = Duration::from_millis(5);

/// The plugin, or that it is off.
#[derive(Clone)]
pub struct Kv {
    plugin: Option<Arc<Plugin>>,
    matmul: Option<Matmul>,
    prefix_cache_bytes: u64,
    /// f16 bytes a token takes in the loaded model; 0 until one is.
    bytes_per_token: Arc<AtomicU64>,
}

struct ErrorHistogram(Metrics);

impl Observer for ErrorHistogram {
    fn attention_error(&self, class: &str, value: f64) {
        self.0.attention_error(class, value);
    }
}

impl Kv {
    /// The plugin as configured, not yet installed.
    ///
    /// # Errors
    /// A setting the plugin refuses.
    pub fn new(
        settings: &Settings,
        default: Choice,
        metrics: &Metrics,
    ) -> Result<Self, cinch_cache::CacheError> {
        let prefix_cache_bytes = if settings.engine.prefix_cache {
            settings.kv.prefix_cache_bytes
        } else {
            0
        };
        let mut matmul = None;
        let plugin = match settings.kv.plugin {
            Switch::Off => None,
            Switch::On => {
                let wanted = PluginSettings {
                    prefix_cache_bytes: usize::try_from(prefix_cache_bytes).unwrap_or(usize::MAX),
                    error_sample: ErrorSample {
                        every_layer: settings.metrics.error_every_layers,
                        heads: settings.metrics.error_heads,
                    },
                    kernels: settings.engine.kernels().unwrap_or_else(|_| Kernels::detect()),
                    ..PluginSettings::default()
                };
                info!("kernels: {}", wanted.kernels.name());
                matmul = Matmul::new(wanted.kernels);
                let plugin = Plugin::new(wanted, assignment("default", default))?;
                plugin.set_observer(Box::new(ErrorHistogram(metrics.clone())));
                Some(plugin)
            }
        };
        Ok(Self {
            plugin,
            matmul,
            prefix_cache_bytes,
            bytes_per_token: Arc::default(),
        })
    }

    /// Installs the plugin in this process. Before a model loads; nothing happens when it is off.
    ///
    /// # Errors
    /// A plugin is installed already.
    pub fn install(&self) -> Result<(), cinch_hooks::HookError> {
        self.install_as(|plugin| plugin)
    }

    /// Installs what `wrap` makes of the plugin in its place.
    ///
    /// # Errors
    /// As [`install`](Self::install).
    pub fn install_as(
        &self,
        wrap: impl FnOnce(Arc<dyn CachePolicy>) -> Arc<dyn CachePolicy>,
    ) -> Result<(), cinch_hooks::HookError> {
        if let Some(matmul) = self.matmul {
            cinch_hooks::install_matmul(Arc::new(matmul))?;
        }
        match &self.plugin {
            Some(plugin) => cinch_hooks::install(wrap(plugin.clone())),
            None => Ok(()),
        }
    }

    /// Takes from a request that ran what an uncompressed token of this model takes.
    pub fn learn_bytes_per_token(&self, view: &RequestView) {
        if let Some(bytes) = view.uncompressed_bytes.checked_div(view.seen) {
            self.bytes_per_token.store(bytes, Ordering::Relaxed);
        }
    }

    /// Says how keys of the model's managed layers turn with their positions.
    pub fn set_rotary(&self, layers: RotaryLayers) {
        if let Some(plugin) = &self.plugin {
            plugin.set_rotary(layers);
        }
    }

    /// Holds the keys of a request that is about to be sent against that; its prompt is one token again and again.
    pub fn check_rotary(&self, request: usize) {
        if let Some(plugin) = &self.plugin {
            plugin.check_rotary(request);
        }
    }

    /// What came of it: by how much of their length keys are off.
    ///
    /// # Errors
    /// What speaks against what was said.
    pub fn rotary_checked(&self) -> Result<f64, String> {
        self.plugin
            .as_ref()
            .map_or(Ok(0.0), |plugin| plugin.rotary_checked())
    }

    /// Whether the plugin is on.
    #[must_use]
    pub fn on(&self) -> bool {
        self.plugin.is_some()
    }

    /// Most bytes finished prefixes may hold.
    #[must_use]
    pub fn prefix_cache_capacity(&self) -> u64 {
        self.prefix_cache_bytes
    }

    fn plugin(&self) -> Result<&Arc<Plugin>, Refusal> {
        self.plugin.as_ref().ok_or_else(|| {
            let fault = FieldFault::new("kv.plugin", "off", "on, for this call");
            Refusal::new(
                StatusCode::CONFLICT,
                "plugin-off",
                "The plugin is off",
                fault.to_string(),
            )
            .naming(fault)
        })
    }

    #[cfg(test)]
    pub(crate) fn plugin_for_tests(&self) -> Arc<Plugin> {
        self.plugin.clone().expect("the plugin is on")
    }

    /// Refuses where the plugin is off.
    ///
    /// # Errors
    /// 409.
    pub fn require_on(&self) -> Result<(), Refusal> {
        self.plugin().map(|_| ())
    }

    /// What requests get that nobody assigned (the host engine's own).
    ///
    /// # Errors
    /// A policy the plugin refuses.
    pub fn set_default(&self, choice: Choice) -> Result<(), Refusal> {
        match &self.plugin {
            Some(plugin) => plugin.set_default(assignment("default", choice)).map_err(refused),
            None => Ok(()),
        }
    }

    /// Tells the plugin of a request before the engine hears of it; `own`: its client asked for this choice.
    ///
    /// # Errors
    /// A policy the plugin refuses.
    pub fn assign(&self, id: usize, class: &str, choice: Choice, own: bool) -> Result<(), Refusal> {
        match &self.plugin {
            Some(plugin) => {
                let assignment = Assignment {
                    own,
                    ..assignment(class, choice)
                };
                plugin.assign(id, assignment).map_err(refused)
            }
            None => Ok(()),
        }
    }

    /// Says how long a queued request's prompt is.
    pub fn note_prompt_tokens(&self, id: usize, tokens: usize) {
        if let Some(plugin) = &self.plugin {
            plugin.note_prompt_tokens(id, tokens);
        }
    }

    /// Layers that are managed; 0 until the model has run.
    #[must_use]
    pub fn layers(&self) -> usize {
        let plugin = self.plugin.as_ref();
        plugin.and_then(|plugin| plugin.layers()).unwrap_or(0)
    }

    /// The most bytes a sequence of `tokens` tokens holds under `policy`; 0 until the model has run.
    #[must_use]
    pub fn most_bytes(&self, policy: &Policy, tokens: usize) -> u64 {
        let plugin = self.plugin.as_ref();
        plugin
            .and_then(|plugin| plugin.most_bytes(policy, tokens))
            .unwrap_or(0) as u64
    }

    /// Bytes that `tokens` tokens take in f16; 0 until the model has run.
    #[must_use]
    pub fn uncompressed_bytes(&self, tokens: usize) -> u64 {
        tokens as u64 * self.bytes_per_token.load(Ordering::Relaxed)
    }

    /// What a prompt of `tokens` tokens takes under `policy` beside that while it is processed; 0 until the model has run.
    #[must_use]
    pub fn prefill_bytes(&self, policy: &Policy, tokens: usize) -> u64 {
        let plugin = self.plugin.as_ref();
        plugin
            .and_then(|plugin| plugin.prefill_bytes(policy, tokens))
            .unwrap_or(0) as u64
    }

    /// Changes the policy of a live request without waiting for its layers.
    ///
    /// # Errors
    /// As [`retune`](Self::retune).
    pub fn tighten(&self, id: usize, choice: Choice) -> Result<(), Refusal> {
        self.tell(id, &choice).map(|_| ())
    }

    fn tell(&self, id: usize, choice: &Choice) -> Result<RetuneReceipt, Refusal> {
        let told = self.plugin()?.retune(id, choice.level, choice.policy.clone());
        told.map_err(|err| match err {
            RetuneError::Unknown { .. } => unknown(id),
            RetuneError::Finished { .. } => finished(id),
            RetuneError::Policy(err) => Refusal::field(FieldFault::from(err).within("policy")),
        })
    }

    /// The request is answered or given up.
    pub fn finish(&self, id: usize) {
        if let Some(plugin) = &self.plugin {
            plugin.finish(id);
        }
    }

    /// The live requests.
    #[must_use]
    pub fn requests(&self) -> Vec<RequestView> {
        let snapshots = self
            .plugin
            .as_ref()
            .map(|plugin| plugin.requests())
            .unwrap_or_default();
        snapshots.into_iter().map(view).collect()
    }

    /// One request, live or recently finished.
    ///
    /// # Errors
    /// 404 for one nobody knows, 409 where the plugin is off.
    pub fn request(&self, id: usize) -> Result<RequestView, Refusal> {
        self.plugin()?.request(id).map(view).ok_or_else(|| unknown(id))
    }

    /// What an answer says of its cache.
    #[must_use]
    pub fn served_with(&self, id: usize, class: &str) -> ServedWith {
        let snapshot = self.plugin.as_ref().and_then(|plugin| plugin.request(id));
        let view = snapshot.map(view);
        ServedWith {
            request: id as u64,
            class: class.to_owned(),
            managed: view.is_some(),
            cache: view.map(|view| ServedCache {
                level: view.level,
                policy: view.policy,
                served: view.served,
                seen: view.seen,
                kept: view.kept,
                bytes: view.bytes,
                uncompressed_bytes: view.uncompressed_bytes,
                attention_error: view.attention_error,
            }),
        }
    }

    /// Changes the policy of a live request and waits at most `wait` for its layers to take it up.
    ///
    /// # Errors
    /// 404 for one nobody knows, 409 for a finished one, 400 for a policy out of range.
    pub async fn retune(&self, id: usize, choice: Choice, wait: Duration) -> Result<RetuneReport, Refusal> {
        let plugin = self.plugin()?;
        let receipt = self.tell(id, &choice)?;
        let deadline = Instant::now() + wait;
        let view = loop {
            let view = view(plugin.request(id).ok_or_else(|| unknown(id))?);
            // A queued request has nothing to apply it to; it will begin with it.
            let settled = view.applied || view.state != RequestState::Running;
            if settled || Instant::now() >= deadline {
                break view;
            }
            tokio::time::sleep(POLL).await;
        };
        Ok(RetuneReport {
            id: view.id,
            state: view.state,
            level: choice.level,
            policy: choice.policy,
            epoch: receipt.epoch,
            applied: view.applied,
            bytes_before: receipt.bytes_before as u64,
            bytes_after: view.bytes,
            notes: receipt.notes,
        })
    }

    /// Everything counted.
    #[must_use]
    pub fn totals(&self) -> KvTotals {
        let Some(plugin) = &self.plugin else {
            return KvTotals::default();
        };
        wire::totals(plugin.totals(), self.bytes_per_token.load(Ordering::Relaxed))
    }
}

fn assignment(class: &str, choice: Choice) -> Assignment {
    Assignment {
        class: class.to_owned(),
        level: choice.level,
        policy: choice.policy,
        own: false,
    }
}

fn refused(err: cinch_cache::CacheError) -> Refusal {
    match err {
        cinch_cache::CacheError::Policy(err) => Refusal::field(FieldFault::from(err).within("policy")),
        other => Refusal::internal(other.to_string()),
    }
}
