//! The plugin as the engine's host sees it: assignments, retunes, figures.

mod hooks;
mod notes;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use cinch_hooks::{HookError, SequenceCache};
use cinch_protocol::Policy;

use self::notes::{in_prompt, notes};
use crate::bound;
use crate::error::{CacheError, RetuneError};
use crate::inspect::{self, HeadRows, LayerView};
use crate::observe::Observer;
use crate::plan::{Place, Plan};
use crate::registry::{Assignment, Found, RequestSnapshot};
use crate::reread;
use crate::rotary::{self, RotaryLayers};
use crate::settings::PluginSettings;
use crate::shared::Core;
use crate::totals::Totals;

/// The cache plugin. One per process is installed in the engine.
pub struct Plugin {
    core: Arc<Core>,
}

/// What a retune will do and can't do.
#[derive(Debug, Clone, PartialEq)]
pub struct RetuneReceipt {
    /// Grows with every plan made: the policy is applied when a snapshot of the request says so.
    pub epoch: u64,
    /// What can't be undone, where statistics come from, which method stands in.
    pub notes: Vec<String>,
    /// Bytes the request held when it was retuned.
    pub bytes_before: usize,
}

impl Plugin {
    /// A plugin that serves requests nobody assigned with `default`.
    ///
    /// # Errors
    /// The default policy is out of range.
    pub fn new(settings: PluginSettings, default: Assignment) -> Result<Arc<Self>, CacheError> {
        let plan = Arc::new(Plan::compile(1, default.level, default.policy)?);
        let core = Core::new(settings, (default.class.clone(), plan));
        core.registry.counters(&default.class);
        Ok(Arc::new(Self { core: Arc::new(core) }))
    }

    fn plan(&self, level: Option<u32>, policy: Policy) -> Result<Arc<Plan>, cinch_protocol::PolicyError> {
        let plan = Plan::compile(self.core.next_plan(), level, policy)?;
        // Before a model is loaded, `open` tells.
        if let Some(model) = self.core.model.get() {
            plan.fits(&model.layers, &self.core.rotary)?;
        }
        Ok(Arc::new(plan))
    }

    /// What requests get that nobody assigned, from now on.
    ///
    /// # Errors
    /// A policy out of range.
    pub fn set_default(&self, default: Assignment) -> Result<(), CacheError> {
        let plan = self.plan(default.level, default.policy)?;
        self.core.registry.counters(&default.class);
        self.core.set_default((default.class, plan));
        Ok(())
    }

    /// Registers a request as queued, before it is sent to the engine.
    ///
    /// # Errors
    /// A policy out of range; [`CacheError::AssignedLate`] if the engine already has the request.
    pub fn assign(&self, request: usize, assignment: Assignment) -> Result<(), CacheError> {
        let plan = self.plan(assignment.level, assignment.policy)?;
        if self
            .core
            .registry
            .assign(request, &assignment.class, plan, assignment.own)
        {
            Ok(())
        } else {
            Err(CacheError::AssignedLate { request })
        }
    }

    /// Says how long a queued request's prompt is, before the engine has opened it.
    pub fn note_prompt_tokens(&self, request: usize, tokens: usize) {
        if let Some(Found::Live(request)) = self.core.registry.find(request) {
            request.note_prompt_tokens(tokens);
        }
    }

    /// The response is complete, or the client went away. What it was served with is remembered.
    pub fn finish(&self, request: usize) {
        self.core.registry.finish(request);
    }

    /// Changes the policy of a queued or running request, all its sequences. Every layer compacts itself
    /// at its next step; tokens already compressed are not restored.
    ///
    /// # Errors
    /// The request is unknown or has finished, or the policy is out of range.
    pub fn retune(
        &self,
        request: usize,
        level: Option<u32>,
        policy: Policy,
    ) -> Result<RetuneReceipt, RetuneError> {
        let found = match self.core.registry.find(request) {
            None => return Err(RetuneError::Unknown { request }),
            Some(Found::Finished(_)) => return Err(RetuneError::Finished { request }),
            Some(Found::Live(found)) => found,
        };
        let plan = self.plan(level, policy)?;
        let before = found.snapshot();
        if let Some(model) = self.core.model.get()
            && in_prompt(&before)
        {
            reread::fits(&plan, before.prompt_tokens, model.context)?;
        }
        let notes = notes(&before, &plan.policy);
        let epoch = plan.id;
        found.set_plan(plan);
        found.counters.retuned();
        tracing::debug!(request, epoch, policy = %found.plan().policy, "retuned");
        Ok(RetuneReceipt {
            epoch,
            notes,
            bytes_before: before.bytes,
        })
    }

    /// A live or recently finished request (the last 1024 are remembered).
    #[must_use]
    pub fn request(&self, id: usize) -> Option<RequestSnapshot> {
        self.core.registry.find(id).map(|found| match found {
            Found::Live(request) | Found::Finished(request) => request.snapshot(),
        })
    }

    /// All live requests, by id.
    #[must_use]
    pub fn requests(&self) -> Vec<RequestSnapshot> {
        self.core
            .registry
            .live()
            .iter()
            .map(|request| request.snapshot())
            .collect()
    }

    /// All figures, for metrics.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let (prefix_entries, prefix_bytes) = self.core.prefix_size();
        let mut totals = Totals {
            live_bytes: self.core.ledger.live(),
            peak_bytes: self.core.ledger.peak(),
            prefix_bytes,
            prefix_entries,
            prefix_hits: self.core.prefix.hits.load(Relaxed),
            prefix_misses: self.core.prefix.misses.load(Relaxed),
            ..Totals::default()
        };
        for (class, counters) in self.core.registry.classes() {
            totals.classes.insert(class, counters.read());
        }
        for request in self.requests() {
            totals.uncompressed_bytes += request.uncompressed_bytes;
            totals
                .classes
                .entry(request.class.clone())
                .or_default()
                .add(&request);
        }
        totals
    }

    /// Layers that the plugin keeps, which `quantize.layers` counts; `None` until a sequence has been opened.
    #[must_use]
    pub fn layers(&self) -> Option<usize> {
        self.core.model.get().map(|model| model.layers.len())
    }

    /// The most bytes a sequence of `tokens` tokens holds under `policy` from its first token on; `None` until a
    /// sequence has been opened, or for a policy out of range.
    #[must_use]
    pub fn most_bytes(&self, policy: &Policy, tokens: usize) -> Option<usize> {
        self.most(policy, |of| bound::layer(of, tokens))
    }

    /// What a prompt of `tokens` tokens takes beside that while it is processed: the largest layer in f16, which is
    /// compressed when the next one begins, and, where it is read twice, what all layers hold until then. `None` as in
    /// [`most_bytes`](Self::most_bytes).
    #[must_use]
    pub fn prefill_bytes(&self, policy: &Policy, tokens: usize) -> Option<usize> {
        let model = self.core.model.get()?;
        let largest = model
            .layers
            .iter()
            .map(|shape| bound::uncompressed(shape, tokens));
        let held = self.most(policy, |of| bound::rereading(of, tokens))?;
        Some(largest.max()? + held.saturating_sub(self.most_bytes(policy, tokens)?))
    }

    /// A bound of all layers.
    fn most(&self, policy: &Policy, bound: impl Fn(&bound::Of<'_>) -> usize) -> Option<usize> {
        let model = self.core.model.get()?;
        let plan = Plan::compile(0, None, policy.clone()).ok()?;
        let of = |(layer, shape)| {
            bound(&bound::Of {
                place: Place {
                    layer,
                    layers: model.layers.len(),
                },
                shape,
                group: self.core.group.load(Relaxed).max(1),
                plan: &plan,
                dtype: model.dtype,
            })
        };
        Some(model.layers.iter().enumerate().map(of).sum())
    }

    /// Says how keys of the model's managed layers turn with their positions, before its first request. Until then that is
    /// not known, and policies that need it are refused.
    pub fn set_rotary(&self, layers: RotaryLayers) {
        self.core.rotary.set(layers);
    }

    /// Compares the keys of a request's prompt with what [`set_rotary`](Self::set_rotary) said of them. The prompt must be
    /// one token, two times or more.
    pub fn check_rotary(&self, request: usize) {
        self.core.check.begin(request);
    }

    /// Ends that: by how much of their length the same token's keys differ when they are turned back, at most. If it is too
    /// much, how keys turn is not known any more.
    ///
    /// # Errors
    /// What speaks against what was said.
    pub fn rotary_checked(&self) -> Result<f64, String> {
        let worst = self.core.check.end();
        let layers = self.core.model.get().map_or(0, |model| model.layers.len());
        rotary::verdict(&worst, layers).inspect_err(|reason| {
            self.core.rotary.set(RotaryLayers::Unknown(reason.clone()));
        })
    }

    /// Who is told of measurements as they happen. Replaces the one before.
    pub fn set_observer(&self, observer: Box<dyn Observer>) {
        self.core.set_observer(observer.into());
    }

    /// A look inside a sequence's stores, one entry a layer; `None` if the cache is not this plugin's kind.
    /// Waits for a step that runs.
    #[must_use]
    pub fn inspect(&self, cache: &dyn SequenceCache) -> Option<Vec<LayerView>> {
        inspect::inspect(cache)
    }

    /// What a head's rows come back as; `None` if the cache is not this plugin's kind, or has no such layer or head.
    /// Waits for a step that runs.
    ///
    /// # Errors
    /// Rows that can't be unpacked.
    pub fn rows(
        &self,
        cache: &dyn SequenceCache,
        layer: usize,
        kv_head: usize,
    ) -> Result<Option<HeadRows>, HookError> {
        inspect::rows(cache, layer, kv_head)
    }
}
