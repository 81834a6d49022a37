//! What the plugin and all its sequences share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use candle_core::DType;
use cinch_hooks::LayerShape;

use crate::gauges::Gauges;
use crate::observe::Observer;
use crate::plan::Plan;
use crate::registry::{Registry, lock};
use crate::rotary::{Check, Rotaries};
use crate::settings::PluginSettings;
use crate::store::Ledger;

/// Prefix cache as the engine reports it.
#[derive(Debug, Default)]
pub(crate) struct PrefixReport {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
}

/// What is known of the model once it has opened a sequence.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) layers: Vec<LayerShape>,
    pub(crate) dtype: DType,
    /// Positions.
    pub(crate) context: usize,
}

/// Shared by the plugin and its sequences.
pub(crate) struct Core {
    pub(crate) settings: PluginSettings,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) registry: Registry,
    pub(crate) prefix: PrefixReport,
    pub(crate) model: OnceLock<Model>,
    /// How its keys turn with their positions.
    pub(crate) rotary: Rotaries,
    pub(crate) check: Check,
    /// Query heads that share a KV head, at most; 0 until the model has attended.
    pub(crate) group: AtomicUsize,
    prefixes: Mutex<HashMap<u64, Arc<Gauges>>>,
    default: RwLock<Arc<(String, Arc<Plan>)>>,
    observer: RwLock<Option<Arc<dyn Observer>>>,
    plans: AtomicU64,
    sequences: AtomicU64,
}

impl Core {
    pub(crate) fn new(settings: PluginSettings, default: (String, Arc<Plan>)) -> Self {
        let plans = AtomicU64::new(default.1.id);
        Self {
            settings,
            ledger: Arc::default(),
            registry: Registry::default(),
            prefix: PrefixReport::default(),
            model: OnceLock::new(),
            rotary: Rotaries::default(),
            check: Check::default(),
            group: AtomicUsize::new(0),
            prefixes: Mutex::default(),
            default: RwLock::new(Arc::new(default)),
            observer: RwLock::new(None),
            plans,
            sequences: AtomicU64::new(0),
        }
    }

    pub(crate) fn next_plan(&self) -> u64 {
        self.plans.fetch_add(1, Relaxed) + 1
    }

    pub(crate) fn next_sequence(&self) -> u64 {
        self.sequences.fetch_add(1, Relaxed)
    }

    pub(crate) fn default(&self) -> Arc<(String, Arc<Plan>)> {
        self.default
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_default(&self, default: (String, Arc<Plan>)) {
        *self.default.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(default);
    }

    pub(crate) fn observer(&self) -> Option<Arc<dyn Observer>> {
        self.observer
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_observer(&self, observer: Arc<dyn Observer>) {
        *self.observer.write().unwrap_or_else(PoisonError::into_inner) = Some(observer);
    }

    pub(crate) fn prefix_kept(&self, sequence: u64, gauges: &Arc<Gauges>) {
        lock(&self.prefixes).insert(sequence, gauges.clone());
    }

    pub(crate) fn prefix_gone(&self, sequence: u64) {
        lock(&self.prefixes).remove(&sequence);
    }

    /// Entries and bytes that the prefix cache holds.
    pub(crate) fn prefix_size(&self) -> (usize, usize) {
        let prefixes = lock(&self.prefixes);
        (
            prefixes.len(),
            prefixes.values().map(|gauges| gauges.bytes()).sum(),
        )
    }
}
