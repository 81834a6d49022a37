//! The plugin as the engine's host sees it: assignments, retunes, figures.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use candle_core::{DType, Tensor};
use cinch_hooks::{
    AttendParams, CachePolicy, DenseAttention, ForkRole, HookError, Qkv, SequenceCache, SequenceInfo,
};
use cinch_protocol::{Bits, Policy, Quantize, SelectMethod, Store};

use crate::attend;
use crate::bound;
use crate::error::{CacheError, RetuneError};
use crate::inspect::{self, HeadRows, LayerView};
use crate::observe::Observer;
use crate::plan::{Place, Plan};
use crate::registry::{Assignment, Found, Request, RequestSnapshot, lock};
use crate::reread;
use crate::rotary::{self, RotaryLayers};
use crate::sequence::{Owner, Sequence};
use crate::settings::PluginSettings;
use crate::shared::{Core, Model};
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

    fn serve(&self, info: &SequenceInfo) -> Arc<Request> {
        self.core.registry.serve(info.request, &self.core.default())
    }
}

/// What a retune can't undo and where its statistics come from.
fn notes(before: &RequestSnapshot, policy: &Policy) -> Vec<String> {
    let mut notes = Vec::new();
    if before.seen == 0 {
        return notes;
    }
    let bits = |policy: &Policy| {
        let store = if policy.store == Store::Exact { 32 } else { 16 };
        let of = |bits: Bits| if bits == Bits::B16 { store } else { u32::from(bits) };
        policy
            .quantize
            .as_ref()
            .map_or((store, store), |q| (of(q.k_bits), of(q.v_bits)))
    };
    let (old, new) = (bits(&before.policy), bits(policy));
    if new.0 > old.0 || new.1 > old.1 {
        notes.push(format!(
            "bits: tokens already packed stay at k{} v{}; more bits apply to what comes next",
            old.0.min(new.0),
            old.1.min(new.1)
        ));
    }
    let grouped = |policy: &Policy| policy.quantize.as_ref().map(|q| q.method);
    if grouped(&before.policy) != grouped(policy) && new.0 >= old.0 && old.0 < 16 {
        notes.push("method: keys already packed stay in the groups they are in".to_owned());
    }
    if before.policy.project.is_some() && before.policy.project != policy.project {
        notes.push("project: rows already projected, and the bases that they are in, stay".to_owned());
    }
    let rotates = |policy: &Policy| policy.quantize.as_ref().is_some_and(|q| q.rotate_k);
    if rotates(&before.policy) != rotates(policy) && new.0 >= old.0 && old.0 < 16 {
        notes.push("rotate_k: keys already packed stay in the basis they are in".to_owned());
    }
    let before_rope = |policy: &Policy| policy.quantize.as_ref().is_some_and(Quantize::before_rope);
    if before_rope(&before.policy) != before_rope(policy) && new.0 >= old.0 && old.0 < 16 {
        notes.push(
            "rope: keys already packed stay on the side of their rotary embedding that they are on"
                .to_owned(),
        );
    }
    if (before.kept as usize) < before.seen {
        notes.push(format!(
            "budget: {} of {} tokens seen are evicted on average over layers and heads and do not come back",
            before.seen - before.kept.round() as usize,
            before.seen
        ));
    }
    let method = |policy: &Policy| policy.select.as_ref().map(|select| select.method);
    if let Some(to) = method(policy)
        && !before
            .served
            .iter()
            .any(|served| method(&served.policy) == Some(to))
    {
        let from = before.served.last().and_then(|served| method(&served.policy));
        notes.extend(beginning(to, from, in_prompt(before)).map(|how| format!("statistics: {how}")));
    }
    notes
}

/// Whether some of a request's prompts are not processed yet.
fn in_prompt(request: &RequestSnapshot) -> bool {
    request.seen < request.prompt_tokens * request.sequences.max(1)
}

/// How a method that a request was not served with so far comes by its statistics, in the middle of its prompt or behind it;
/// `None`: it needs none of before.
fn beginning(method: SelectMethod, from: Option<SelectMethod>, in_prompt: bool) -> Option<&'static str> {
    let sums = matches!(method, SelectMethod::H2o | SelectMethod::Keyformer);
    match method {
        _ if sums && from == Some(SelectMethod::Kvzip) => Some(
            "every head starts from the largest weights that its rows received, which count as the sums of all queries so far",
        ),
        SelectMethod::Kvzip if in_prompt => Some(
            "the prompt is read once more if its last part has not begun; if it has, rows rank by attention received so far, \
             the most attended row of a head having all of a query's, and by the largest weight that decoded tokens give",
        ),
        SelectMethod::Kvzip => Some(
            "the prompt is not read once more, since tokens were decoded behind it: rows rank by attention received so far, \
             the most attended row of a head having all of a query's, and by the largest weight that decoded tokens give",
        ),
        SelectMethod::H2o | SelectMethod::Keyformer => Some(
            "every head starts from a sample, its own or its layer's mean: attention of the last 64 queries of each part \
             of the prompt and of some decoded tokens; what the method counts is accumulated from now on",
        ),
        SelectMethod::Snapkv | SelectMethod::Scissorhands => Some(
            "every head starts from attention received so far, its own or its layer's mean, which counts as one window \
             of queries and fades as others come",
        ),
        SelectMethod::Fastgen => Some(
            "every head is profiled by attention received so far, its own or its layer's mean, not by that of the prompt's \
             last queries",
        ),
        SelectMethod::ExpectedAttention => Some(
            "rows rank by attention received until the queries of 16 tokens, or every eighth of decoded ones, are known",
        ),
        SelectMethod::Streaming
        | SelectMethod::Tova
        | SelectMethod::KeyNorm
        | SelectMethod::Keydiff
        | SelectMethod::Quest
        | SelectMethod::Lagkv => None,
    }
}

impl CachePolicy for Plugin {
    fn open(&self, info: &SequenceInfo) -> Result<Arc<dyn SequenceCache>, HookError> {
        check(info)?;
        self.core.model.get_or_init(|| Model {
            layers: info.layers.clone(),
            dtype: info.dtype,
            context: info.context,
        });
        let request = self.serve(info);
        let plan = request.plan();
        plan.fits(&info.layers, &self.core.rotary)
            .and_then(|()| reread::fits(&plan, info.prompt_tokens, info.context))
            .map_err(|error| HookError::Policy {
                request: info.request,
                reason: error.to_string(),
            })?;
        Ok(Arc::new(Sequence::open(&self.core, info, request)))
    }

    fn adopt(
        &self,
        cache: Arc<dyn SequenceCache>,
        info: &SequenceInfo,
    ) -> Result<Arc<dyn SequenceCache>, HookError> {
        check(info)?;
        let sequence = cache
            .as_any()
            .downcast_ref::<Sequence>()
            .filter(|sequence| Arc::ptr_eq(&sequence.core, &self.core))
            .ok_or(HookError::ForeignCache { row: 0 })?;
        if matches!(sequence.owner(), Owner::Prefix) {
            // The entry itself stays in the prefix cache.
            return self.adopt(cache.fork(ForkRole::Sequence)?, info);
        }
        if sequence.shapes() != info.layers || sequence.dtype != info.dtype {
            return Err(HookError::Policy {
                request: info.request,
                reason: "a prefix of another model: layers or dtype differ".into(),
            });
        }
        let request = self.serve(info);
        let plan = request.plan();
        if !sequence
            .layers
            .iter()
            .all(|layer| lock(layer).serves(&plan, info.dtype))
        {
            return Err(HookError::Policy {
                request: info.request,
                reason: "a prefix that was compressed harder than this request asks for".into(),
            });
        }
        sequence.rehome(request, info.prompt_tokens);
        Ok(cache)
    }

    fn attend(
        &self,
        layer: usize,
        rows: &[Arc<dyn SequenceCache>],
        qkv: Qkv<'_>,
        params: &AttendParams,
        engine: &dyn DenseAttention,
    ) -> Result<Tensor, HookError> {
        attend::attend(&self.core, layer, rows, qkv, params, engine)
    }

    fn prefix_cache_limit(&self) -> usize {
        self.core.settings.prefix_cache_bytes
    }

    fn prefix_cache_report(&self, _entries: usize, _bytes: usize, lookup_hit: Option<bool>) {
        match lookup_hit {
            Some(true) => self.core.prefix.hits.fetch_add(1, Relaxed),
            Some(false) => self.core.prefix.misses.fetch_add(1, Relaxed),
            None => 0,
        };
    }
}

/// Whether a model's layers can be stored at all.
fn check(info: &SequenceInfo) -> Result<(), HookError> {
    if !matches!(info.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(HookError::DType {
            tensor: "activations",
            given: info.dtype,
        });
    }
    let empty = info
        .layers
        .iter()
        .position(|l| l.kv_heads == 0 || l.k_dim == 0 || l.v_dim == 0);
    match empty {
        Some(layer) => Err(HookError::Policy {
            request: info.request,
            reason: format!(
                "layer {layer}: given {:?}, allowed: at least one KV head and dimension",
                info.layers[layer]
            ),
        }),
        None if info.layers.is_empty() => Err(HookError::Policy {
            request: info.request,
            reason: "layers: given 0, allowed: at least 1".into(),
        }),
        None => Ok(()),
    }
}
