//! Eviction and packing of one head: its rows are ranked, those to stay are chosen, and the store is rebuilt.

use std::borrow::Cow;

use cinch_hooks::HookError;

use crate::layer::Compaction;
use crate::plan::{Place, Plan};
use crate::project::Queries;
use crate::quantize::{Beside, zipcache};
use crate::select::adaptive::{self, Candidate};
use crate::select::merge::{Merged, merge};
use crate::select::moments::Moments;
use crate::select::{self, Budget, Edges, Reads, Rows, Statistics};
use crate::store::{Column, Dims, Head, Rebuilt, Targets};

/// What a head's rows are ranked by, beside the rows themselves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) place: Place,
    /// Tokens seen, those of this step included.
    pub(crate) seen: usize,
    /// Tokens of the prompt, those to come included.
    pub(crate) prompt: usize,
    /// What logits are scaled by.
    pub(crate) scale: f32,
    /// The layer's scores, for a head that has none of its own.
    pub(crate) layer_scores: &'a [f32],
    /// Whether some rows go, of this head or, where heads compete, of another one.
    pub(crate) over: bool,
}

/// A head's ranked rows, and how many may stay.
#[derive(Debug)]
pub(crate) struct Ranked {
    ranks: Vec<f32>,
    edges: Edges,
    kept: usize,
    total: usize,
}

/// Ranks the rows of a head where some rows go.
pub(crate) fn rank(head: &Head, plan: &Plan, context: &Context<'_>) -> Result<Option<Ranked>, HookError> {
    let budget = plan.budget(context.place, context.seen, context.prompt);
    let Some((method, budget)) = plan.method().zip(budget) else {
        return Ok(None);
    };
    let (kept, Budget { total, .. }) = (head.kept(), budget);
    if !context.over {
        return Ok(None);
    }
    let edges = budget.edges(kept, context.seen, |position| head.rows_before(position));
    let reads = method.reads();
    let k = match reads {
        Reads::Nothing => Vec::new(),
        Reads::Keys | Reads::KeysAndValues => head.unpack_keys()?,
    };
    let v = match reads {
        Reads::Nothing | Reads::Keys => Vec::new(),
        Reads::KeysAndValues => head.unpack_values()?,
    };
    let Dims {
        k: k_dim, v: v_dim, ..
    } = head.dims();
    let rows = Rows {
        kept,
        edges,
        scores: head
            .scores
            .as_ref()
            .map_or(context.layer_scores, Column::as_slice),
        k: &k,
        k_dim,
        v: &v,
        v_dim,
        moments: head
            .moments
            .as_ref()
            .and_then(|column| Moments::read(column, k_dim)),
        scale: context.scale,
    };
    let ranks = method.rank(&rows);
    let ranks = Cow::into_owned(ranks);
    Ok(Some(Ranked {
        ranks,
        edges,
        kept,
        total,
    }))
}

/// Lets a layer's heads compete for its budget.
pub(crate) fn compete(heads: &mut [&mut Ranked], floor: f64) {
    let total = heads.first().map_or(0, |head| head.total);
    let candidates: Vec<Candidate<'_>> = heads
        .iter()
        .map(|head| Candidate {
            ranks: &head.ranks,
            edges: head.edges,
            kept: head.kept,
        })
        .collect();
    let shares = adaptive::share(&candidates, total, floor);
    for (head, share) in heads.iter_mut().zip(shares) {
        head.total = share;
    }
}

/// Drops what was ranked too low and packs what is left. Answers with the rows kept if any were dropped.
pub(crate) fn compact(
    head: &mut Head,
    plan: &Plan,
    targets: &Targets,
    what: Compaction,
    ranked: Option<Ranked>,
    context: &Context<'_>,
    queries: impl FnOnce() -> Queries,
) -> Result<(Rebuilt, Option<Vec<u32>>), HookError> {
    let keep = ranked
        .filter(|ranked| ranked.total < ranked.kept)
        .map(|ranked| select::keep(&ranked.ranks, ranked.kept, ranked.edges, ranked.total));
    if keep.is_none() && !what.pack {
        return Ok((Rebuilt::default(), None));
    }
    // Keys turn with their positions: those of the prompt's first part alone say little of those to come.
    let whole = context.seen >= context.prompt;
    let project = plan.policy.project.as_ref().filter(|_| whole);
    if let Some(project) = project.filter(|_| head.bases.is_none()) {
        head.learn(project, queries)?;
    }
    let merged = match &keep {
        Some(keep) if plan.merges() => merged(head, plan, keep)?,
        _ => Merged::default(),
    };
    let salience = match targets.packed.beside {
        Beside::Salient { .. } => salience(head, plan, context),
        Beside::Nothing | Beside::Levels { .. } | Beside::Error { .. } => Vec::new(),
    };
    let rebuilt = head.compact(keep.as_deref(), targets, &salience)?;
    head.replace(&merged.rows, &merged.k, &merged.v)?;
    Ok((rebuilt, keep))
}

/// What each row of a head counts for.
fn salience(head: &Head, plan: &Plan, context: &Context<'_>) -> Vec<f32> {
    let scores = head
        .scores
        .as_ref()
        .map_or(context.layer_scores, Column::as_slice);
    let every = plan.statistics() == Statistics::Every;
    zipcache::salience(scores, head.positions(), context.seen, every)
}

/// What becomes of the rows that evicted ones are merged into.
fn merged(head: &mut Head, plan: &Plan, keep: &[u32]) -> Result<Merged, HookError> {
    let (k, v) = head.unpack()?;
    let Dims {
        k: k_dim, v: v_dim, ..
    } = head.dims();
    let sinks = head.rows_before(plan.sinks());
    let mut threshold = head.threshold;
    let merged = merge((&k, k_dim), (&v, v_dim), keep, sinks, &mut threshold);
    head.threshold = threshold;
    Ok(merged)
}
