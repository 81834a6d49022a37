//! One sequence's cache, all layers. Each layer has a lock of its own: a step holds one layer of each row
//! at a time, and what others read of a sequence comes from its gauges without waiting.

use std::any::Any;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};

use candle_core::DType;
use cinch_hooks::{ExtraPass, ForkRole, HookError, LayerShape, SequenceCache, SequenceInfo};

use crate::gauges::Gauges;
use crate::layer::Layer;
use crate::plan::{Place, Plan};
use crate::registry::{Request, Served, lock};
use crate::shared::Core;
use crate::store::Head;

/// Whose a sequence is.
#[derive(Debug, Clone)]
pub(crate) enum Owner {
    /// It serves a request.
    Request(Arc<Request>),
    /// An entry of the prefix cache.
    Prefix,
    /// A fork of a prefix entry that nobody has adopted yet.
    Adrift,
}

/// One sequence's cache.
pub(crate) struct Sequence {
    /// Unique in the process; the order in which layers of several sequences are locked.
    pub(crate) id: u64,
    pub(crate) core: Arc<Core>,
    pub(crate) dtype: DType,
    pub(crate) layers: Vec<Mutex<Layer>>,
    pub(crate) gauges: Arc<Gauges>,
    shapes: Vec<LayerShape>,
    owner: Mutex<Owner>,
    /// Tokens of the prompt it is to serve, 0 as long as nobody said.
    prompt: AtomicUsize,
    /// Its prompt is to be read once more before its rows go.
    holds: AtomicBool,
    /// What the tokens it was forked with were served with.
    inherited: Vec<Served>,
}

impl Sequence {
    pub(crate) fn open(core: &Arc<Core>, info: &SequenceInfo, request: Arc<Request>) -> Self {
        let plan = request.plan();
        let layers = info
            .layers
            .iter()
            .enumerate()
            .map(|(layer, shape)| {
                let place = Place {
                    layer,
                    layers: info.layers.len(),
                };
                Layer::new(
                    &core.ledger,
                    core.settings.kernels,
                    place,
                    (*shape, core.rotary.of(layer, &info.layers).ok()),
                    &plan,
                    info.dtype,
                )
            })
            .collect();
        let sequence = Self::assemble(core, info.dtype, &info.layers, layers, Vec::new());
        request.join(&sequence.gauges, info.prompt_tokens, &[]);
        sequence.prompt.store(info.prompt_tokens, Relaxed);
        *lock(&sequence.owner) = Owner::Request(request);
        sequence
    }

    fn assemble(
        core: &Arc<Core>,
        dtype: DType,
        shapes: &[LayerShape],
        layers: Vec<Layer>,
        inherited: Vec<Served>,
    ) -> Self {
        let sequence = Self {
            id: core.next_sequence(),
            core: core.clone(),
            dtype,
            gauges: Arc::new(Gauges::new(shapes)),
            shapes: shapes.to_vec(),
            owner: Mutex::new(Owner::Adrift),
            prompt: AtomicUsize::new(0),
            holds: AtomicBool::new(false),
            inherited,
            layers: layers.into_iter().map(Mutex::new).collect(),
        };
        for (index, layer) in sequence.layers.iter().enumerate() {
            sequence.gauge(index, &lock(layer));
        }
        sequence
    }

    pub(crate) fn shapes(&self) -> &[LayerShape] {
        &self.shapes
    }

    /// Tokens of the prompt it serves, those to come included; 0 where nobody said.
    pub(crate) fn prompt(&self) -> usize {
        self.prompt.load(Relaxed)
    }

    /// Whether its prompt is to be read once more before its rows go.
    pub(crate) fn holds(&self) -> bool {
        self.holds.load(Relaxed)
    }

    pub(crate) fn hold(&self, holds: bool) {
        self.holds.store(holds, Relaxed);
    }

    pub(crate) fn owner(&self) -> Owner {
        lock(&self.owner).clone()
    }

    /// The request it serves, if any.
    pub(crate) fn request(&self) -> Option<Arc<Request>> {
        match self.owner() {
            Owner::Request(request) => Some(request),
            Owner::Prefix | Owner::Adrift => None,
        }
    }

    /// The plan to go by; a sequence without a request stays with what its layers have.
    pub(crate) fn plan(&self, layer: &Layer) -> Arc<Plan> {
        self.request()
            .map_or_else(|| layer.plan.clone(), |request| request.plan())
    }

    /// Serves `request` from now on.
    pub(crate) fn rehome(&self, request: Arc<Request>, prompt_tokens: usize) {
        match self.owner() {
            Owner::Request(old) if Arc::ptr_eq(&old, &request) => return,
            Owner::Request(old) => self.core.registry.hand_over(&old, &self.gauges),
            Owner::Prefix => self.core.prefix_gone(self.id),
            Owner::Adrift => {}
        }
        request.join(&self.gauges, prompt_tokens, &self.inherited);
        self.prompt.store(prompt_tokens, Relaxed);
        *lock(&self.owner) = Owner::Request(request);
    }

    /// Publishes what `layer` now holds.
    pub(crate) fn gauge(&self, index: usize, layer: &Layer) {
        let gauge = &self.gauges.layers[index];
        let seen = layer.counted();
        let kept = |head: &Head| match layer.reread {
            Some(seen) => head.rows_before(seen),
            None => head.kept(),
        };
        gauge.seen.store(seen, Relaxed);
        gauge.reread.store(layer.seen - seen, Relaxed);
        gauge.kept.store(layer.heads.iter().map(kept).sum(), Relaxed);
        gauge
            .kept_max
            .store(layer.heads.iter().map(kept).max().unwrap_or(0), Relaxed);
        gauge.bytes.store(layer.bytes(), Relaxed);
        if layer.held {
            // None has this number: what is held back is not applied, and admission counts on that.
            gauge.plan.store(0, Relaxed);
        } else if !layer.pending {
            gauge.plan.store(layer.plan.id, Relaxed);
        }
    }
}

impl SequenceCache for Sequence {
    fn seen(&self, layer: usize) -> usize {
        self.gauges
            .layers
            .get(layer)
            .map_or(0, |gauge| gauge.seen.load(Relaxed) + gauge.reread.load(Relaxed))
    }

    fn fork(&self, role: ForkRole) -> Result<Arc<dyn SequenceCache>, HookError> {
        let owner = self.owner();
        let inherited = match &owner {
            Owner::Request(request) => request.served(),
            Owner::Prefix | Owner::Adrift => self.inherited.clone(),
        };
        let fork = |layer: &Mutex<Layer>| {
            let mut fork = lock(layer).fork();
            fork.end_pass();
            fork
        };
        let layers = self.layers.iter().map(fork).collect();
        let fork = Self::assemble(&self.core, self.dtype, &self.shapes, layers, inherited);
        match (role, owner) {
            (ForkRole::Prefix, _) => {
                self.core.prefix_kept(fork.id, &fork.gauges);
                *lock(&fork.owner) = Owner::Prefix;
            }
            (ForkRole::Sequence, Owner::Request(request)) => fork.rehome(request, self.prompt()),
            (ForkRole::Sequence, Owner::Prefix | Owner::Adrift) => {}
        }
        Ok(Arc::new(fork))
    }

    fn truncate(&self, seen: usize) -> Result<(), HookError> {
        let (from, now) = (self.reachable_from(), self.gauges.seen());
        let refused = |reason| HookError::Truncate {
            asked: seen,
            seen: now,
            from,
            reason,
        };
        if seen > now {
            return Err(refused("it is longer than what was seen"));
        }
        if seen < from {
            return Err(refused("tokens were evicted since then"));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let mut layer = lock(layer);
            layer.truncate(seen);
            self.gauge(index, &layer);
        }
        Ok(())
    }

    fn reachable_from(&self) -> usize {
        self.layers
            .iter()
            .map(|layer| lock(layer).evicted_at)
            .max()
            .unwrap_or(0)
    }

    fn extra_pass(&self) -> Result<Option<ExtraPass>, HookError> {
        self.wants_pass()
    }

    fn begin_part(&self) -> Result<bool, HookError> {
        self.next_part()
    }

    fn end_pass(&self) -> Result<(), HookError> {
        self.close_pass()
    }

    fn bytes(&self) -> usize {
        self.gauges.bytes()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Sequence {
    fn drop(&mut self) {
        match self.owner() {
            Owner::Request(request) => self.core.registry.leave(&request, &self.gauges),
            Owner::Prefix => self.core.prefix_gone(self.id),
            Owner::Adrift => {}
        }
    }
}
