//! One layer of one sequence: its heads and the attention statistics a later selection needs.
//!
//! Statistics are one score a row, kept per layer (the mean over query heads) until a policy needs them per head (the
//! sum over those that share it). Invariant: without per-head scores all heads keep the same rows, so the layer's
//! scores fit each of them.

use std::sync::Arc;

use candle_core::DType;
use cinch_hooks::LayerShape;
use cinch_kernels::Kernels;
use cinch_protocol::Store;

use crate::observe::Held;
use crate::plan::{Place, Plan, Won};
use crate::quantize::{Beside, bits};
use crate::rotary::Turns;
use crate::select::{Statistics, moments};
use crate::store::{Column, Dims, Head, Ledger, Pair, Targets};

/// Prompt queries whose weights count where not every query's do: the observation window of SnapKV
/// (arXiv 2404.14469, section 4) at its largest, cheap enough to be on for every request.
pub(crate) const OBSERVED_QUERIES: usize = 64;

/// Every how manyth decode step counts in a sample: adding a weight a row to the scores of each layer costs a few
/// percent of a step over packed rows.
pub(crate) const OBSERVED_STEPS: usize = 8;

/// One layer of one sequence.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) place: Place,
    pub(crate) shape: LayerShape,
    /// Tokens this layer has processed.
    pub(crate) seen: usize,
    /// Tokens of the prompt, those to come included; 0 where nobody said.
    pub(crate) prompt: usize,
    /// The plan it last compacted itself by.
    pub(crate) plan: Arc<Plan>,
    pub(crate) targets: Targets,
    /// The plan changed and this layer has not compacted itself by it yet.
    pub(crate) pending: bool,
    /// `seen` at the last eviction; 0: none yet. No way back before it.
    pub(crate) evicted_at: usize,
    /// What it has of an even layer's budget, where layers competed.
    pub(crate) won: Won,
    /// Tokens since eviction was last considered.
    pub(crate) since: usize,
    /// Tokens decoded since the last prefill.
    pub(crate) decoded: usize,
    /// Its prompt is to be read once more before rows go.
    pub(crate) held: bool,
    /// Tokens seen when that reading began; those since then are the present part of it.
    pub(crate) reread: Option<usize>,
    /// Whether it was compressed as a prompt was read, or by a new plan.
    pub(crate) measured: bool,
    /// What the prompt's last queries saw, for when rows go.
    pub(crate) probes: Option<Held>,
    pub(crate) heads: Vec<Head>,
    /// Mean weight over query heads, where no head has scores of its own.
    pub(crate) scores: Option<Column<f32>>,
}

/// Makes scores that another method gathered count as `full`: all of them together, as weights do, or the `first` of them, as
/// votes and largest weights do.
fn fit(scores: &mut [f32], full: f32, first: bool) {
    let now = if first {
        scores.iter().copied().fold(0.0, f32::max)
    } else {
        scores.iter().sum()
    };
    if now > 0.0 {
        scores.iter_mut().for_each(|score| *score *= full / now);
    }
}

/// What a step asks of every head after attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Compaction {
    pub(crate) evict: bool,
    pub(crate) pack: bool,
}

impl Layer {
    pub(crate) fn new(
        ledger: &Arc<Ledger>,
        kernels: Kernels,
        place: Place,
        (shape, rotary): (LayerShape, Option<Arc<Turns>>),
        plan: &Arc<Plan>,
        dtype: DType,
    ) -> Self {
        let dims = Dims {
            k: shape.k_dim,
            v: shape.v_dim,
            kernels,
        };
        let mut layer = Self {
            place,
            shape,
            seen: 0,
            prompt: 0,
            plan: plan.clone(),
            targets: plan.targets(place, dtype),
            pending: false,
            evicted_at: 0,
            won: Won::EVEN,
            since: 0,
            decoded: 0,
            held: false,
            reread: None,
            measured: false,
            probes: None,
            heads: (0..shape.kv_heads)
                .map(|_| Head::new(ledger, dims, rotary.clone()))
                .collect(),
            scores: Some(Column::new(ledger)),
        };
        if plan.head_scores() {
            layer.split_scores(ledger, 1.0);
        }
        layer
    }

    /// Whether each head has scores of its own.
    pub(crate) fn head_scores(&self) -> bool {
        self.scores.is_none()
    }

    /// Gives each head the layer's scores to go on with. `group` query heads share a KV head, and a head's
    /// own scores are sums over them.
    pub(crate) fn split_scores(&mut self, ledger: &Arc<Ledger>, group: f32) {
        if let Some(scores) = self.scores.take() {
            for head in &mut self.heads {
                let seeded = scores.as_slice().iter().map(|score| score * group).collect();
                head.scores = Some(Column::from_vec(ledger, seeded));
            }
        }
    }

    /// Takes over another plan; what it asks for happens at the compaction of this step.
    pub(crate) fn adopt_plan(&mut self, ledger: &Arc<Ledger>, plan: &Arc<Plan>, dtype: DType, group: usize) {
        let before = std::mem::replace(&mut self.plan, plan.clone());
        self.targets = plan.targets(self.place, dtype);
        self.pending = true;
        if before.policy.select != plan.policy.select {
            self.heads.iter_mut().for_each(|head| head.profile = None);
            self.won = Won::EVEN;
        }
        if plan.head_scores() {
            self.split_scores(ledger, group as f32);
        }
        let (full, first) = match plan.statistics() {
            // The most attended row has all of a query's attention.
            _ if plan.largest() && !before.largest() => (1.0 / group as f32, true),
            Statistics::Window(window)
                if (before.statistics(), before.credits()) != (plan.statistics(), plan.credits()) =>
            {
                (window as f32, plan.credits())
            }
            // As if all queries so far had been summed up.
            Statistics::Sampled | Statistics::Every if before.largest() && !plan.largest() => {
                (self.seen as f32, false)
            }
            _ => return,
        };
        if let Some(scores) = &mut self.scores {
            fit(scores.as_mut_slice(), full, first);
        }
        for scores in self.heads.iter_mut().filter_map(|head| head.scores.as_mut()) {
            fit(scores.as_mut_slice(), full * group as f32, first);
        }
    }

    /// Tokens that count as seen: those of a second reading do not.
    pub(crate) fn counted(&self) -> usize {
        self.reread.unwrap_or(self.seen)
    }

    /// What is attended to from here on is a part of its prompt's second reading.
    pub(crate) fn begin_part(&mut self) {
        if let Some(seen) = self.reread {
            self.truncate(seen);
            return;
        }
        self.reread = Some(self.seen);
        for scores in self.heads.iter_mut().filter_map(|head| head.scores.as_mut()) {
            scores.as_mut_slice().fill(0.0);
        }
    }

    /// Forgets a second reading's rows. Whether there was one.
    pub(crate) fn end_pass(&mut self) -> bool {
        self.held = false;
        let Some(seen) = self.reread.take() else {
            return false;
        };
        self.truncate(seen);
        true
    }

    /// Gets ready for a step of queries that `group` a KV head attend.
    pub(crate) fn prepare(&mut self, ledger: &Arc<Ledger>, group: usize) {
        let wanted = self.plan.method().is_some_and(|method| method.moments());
        let chooses = self.plan.attended(self.place).is_some();
        for head in &mut self.heads {
            if !chooses {
                head.pages = None;
            }
            if !wanted {
                head.moments = None;
            } else if head.moments.is_none() {
                head.moments = Some(moments::column(ledger, group, self.shape.k_dim));
            }
        }
    }

    /// Whether it is measured what a step of `fresh` tokens does to attention. Packing or evicting the few rows that were
    /// decoded since the last time is a small part of what has been done to all of them: those steps, which are many, would
    /// have a mean say that next to nothing was lost. They count only where nothing else was measured.
    pub(crate) fn measures(&self, fresh: usize) -> bool {
        fresh > 1 || self.pending || !self.measured
    }

    /// Whether every row seen is held as it came: the plan asks for it and nothing before it did otherwise.
    pub(crate) fn is_exact(&self) -> bool {
        let kept = Pair::both(self.targets.store);
        self.plan.policy.store == Store::Exact
            && self.plan.policy.select.is_none()
            && !self.targets.packs()
            && self.heads.iter().all(|head| {
                head.positions().is_none()
                    && head.kept() == self.seen
                    && head.blocks().iter().all(|block| block.pair() == kept)
            })
    }

    /// Whether a request of `plan` may go on from these rows: none was compressed harder than it asks for.
    pub(crate) fn serves(&self, plan: &Plan, dtype: DType) -> bool {
        let asked = plan.targets(self.place, dtype);
        let evicted = self.heads.iter().any(|head| head.kept() < self.seen);
        if evicted && plan.policy.select != self.plan.policy.select {
            return false;
        }
        let mut all = self.heads.iter().flat_map(Head::blocks);
        if all.any(|block| block.pair().projected) && plan.policy.project != self.plan.policy.project {
            return false;
        }
        let mut blocks = self.heads.iter().flat_map(Head::blocks).map(|block| block.pair());
        if plan.policy.store == Store::Exact {
            return blocks.all(|pair| pair == asked.packed);
        }
        blocks.all(|pair| {
            // Keys of as many bits in another basis or other groups are not what was asked for; of more bits, they are no worse.
            let keys = |pair: Pair| (pair.rotated, pair.before_rope, pair.channels);
            let same = keys(pair) == keys(asked.packed);
            let basis = same || bits(pair.k) > bits(asked.packed.k);
            // What is beside codes makes rows better, but for those that are among salient ones, or merged.
            let beside = pair.beside == asked.packed.beside
                || !matches!(pair.beside, Beside::Salient { .. } | Beside::Shared { .. });
            bits(pair.k) >= bits(asked.packed.k) && bits(pair.v) >= bits(asked.packed.v) && basis && beside
        })
    }

    /// Bytes allocated for this layer.
    pub(crate) fn bytes(&self) -> usize {
        self.heads.iter().map(Head::bytes).sum::<usize>() + self.scores.as_ref().map_or(0, Column::bytes)
    }

    /// Forgets positions `seen..`; the caller has checked that it can.
    pub(crate) fn truncate(&mut self, seen: usize) {
        let rows = self.heads.first().map_or(0, |head| head.rows_before(seen));
        for head in &mut self.heads {
            head.truncate(head.rows_before(seen));
        }
        if let Some(scores) = &mut self.scores {
            scores.truncate(rows);
        }
        self.seen = self.seen.min(seen);
        self.since = self.since.min(self.seen - self.evicted_at.min(self.seen));
    }

    pub(crate) fn fork(&self) -> Self {
        Self {
            place: self.place,
            shape: self.shape,
            seen: self.seen,
            prompt: self.prompt,
            plan: self.plan.clone(),
            targets: self.targets,
            pending: self.pending,
            evicted_at: self.evicted_at,
            won: self.won,
            since: self.since,
            decoded: self.decoded,
            held: false,
            reread: self.reread,
            measured: self.measured,
            probes: None,
            heads: self.heads.iter().map(Head::fork).collect(),
            scores: self.scores.as_ref().map(Column::duplicate),
        }
    }
}
