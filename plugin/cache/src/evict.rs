//! Eviction and packing of one head: its rows are ranked, those to stay are chosen, and the store is rebuilt.

use std::borrow::Cow;

use cinch_hooks::HookError;
use cinch_protocol::Merge;

use crate::layer::Compaction;
use crate::plan::{Place, Plan, Won};
use crate::project::Queries;
use crate::quantize::{Beside, zipcache};
use crate::select::adaptive::{self, Candidate};
use crate::select::merge::{Merged, cam, d2o};
use crate::select::moments::Moments;
use crate::select::{self, Budget, Edges, Reads, Rows, Statistics};
use crate::store::{Column, Dims, Head, Rebuilt, Targets};

/// What a head's rows are ranked by, beside the rows themselves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) place: Place,
    /// KV head.
    pub(crate) kv: usize,
    /// Tokens seen, those of this step included.
    pub(crate) seen: usize,
    /// Tokens of the prompt, those to come included.
    pub(crate) prompt: usize,
    /// What the layer has of an even one's budget.
    pub(crate) won: Won,
    /// What logits are scaled by.
    pub(crate) scale: f32,
    /// The layer's scores, for a head that has none of its own.
    pub(crate) layer_scores: &'a [f32],
    /// Whether some rows may go, of this head or, where heads compete, of another one.
    pub(crate) over: bool,
    /// Whether a prompt ended with this step.
    pub(crate) prefilled: bool,
}

impl<'a> Context<'a> {
    fn scores(&self, head: &'a Head) -> &'a [f32] {
        head.scores.as_ref().map_or(self.layer_scores, Column::as_slice)
    }
}

/// A head's ranked rows, and how many may stay.
#[derive(Debug)]
pub(crate) struct Ranked {
    ranks: Vec<f32>,
    edges: Edges,
    kept: usize,
    pub(crate) total: usize,
}

/// Whether rows of a head go that holds `own` of its layer's `all`, in so many heads.
pub(crate) fn over(plan: &Plan, budget: Option<Budget>, heads: usize, all: usize, own: usize) -> bool {
    let narrows = plan.method().is_some_and(|method| method.profiles());
    budget.is_some_and(|budget| match plan.floor() {
        Some(_) => heads * budget.total < all,
        None => narrows || budget.total < own,
    })
}

/// Ranks the rows of a head where some rows go.
pub(crate) fn rank(head: &mut Head, plan: &Plan, context: &Context<'_>) -> Result<Option<Ranked>, HookError> {
    let budget = plan.budget(context.place, context.seen, context.prompt, context.won);
    let Some((method, budget)) = plan.method().zip(budget) else {
        return Ok(None);
    };
    if !context.over {
        return Ok(None);
    }
    let kept = head.kept();
    let edges = |budget: Budget| budget.edges(kept, context.seen, |position| head.rows_before(position));
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
    let mut rows = Rows {
        kept,
        seen: context.seen,
        positions: head.positions(),
        edges: edges(budget),
        scores: context.scores(head),
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
    let (mut budget, mut profile) = (budget, head.profile);
    // A prompt's first parts say little of what its end attends to.
    if method.profiles() && context.seen >= context.prompt {
        profile = profile.filter(|_| !context.prefilled);
        budget = method.narrow(budget, &rows, &mut profile);
        rows.edges = edges(budget);
    }
    let ranked = Ranked {
        ranks: Cow::into_owned(method.rank(&rows)),
        edges: rows.edges,
        kept,
        total: budget.total,
    };
    head.profile = profile;
    Ok(Some(ranked))
}

/// Lets heads compete for the budgets of all of them together, which are the same.
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
    queries: Option<impl FnOnce() -> Queries>,
) -> Result<(Rebuilt, Option<Vec<u32>>), HookError> {
    let keep = ranked
        .filter(|ranked| ranked.total < ranked.kept)
        .map(|ranked| select::keep(&ranked.ranks, ranked.kept, ranked.edges, ranked.total));
    if keep.is_none() && !what.pack {
        return Ok((Rebuilt::default(), None));
    }
    // Keys turn with their positions: those of the prompt's first part alone say little of those to come.
    let whole = context.seen >= context.prompt;
    let project = plan.projects().filter(|_| whole);
    if let Some((project, queries)) = project.zip(queries).filter(|_| head.bases.is_none()) {
        head.learn(project, queries)?;
    }
    let merged = match &keep {
        Some(keep) => merged(head, plan, keep, context)?,
        None => Merged::default(),
    };
    let salience = match targets.packed.beside {
        Beside::Salient { .. } => salience(head, plan, context),
        Beside::Nothing | Beside::Levels { .. } | Beside::Error { .. } | Beside::Shared { .. } => Vec::new(),
    };
    let rebuilt = head.compact(keep.as_deref(), targets, &salience)?;
    head.replace(&merged.rows, merged.k.as_deref(), &merged.v)?;
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
fn merged(head: &mut Head, plan: &Plan, keep: &[u32], context: &Context<'_>) -> Result<Merged, HookError> {
    let Dims {
        k: k_dim, v: v_dim, ..
    } = head.dims();
    Ok(match plan.merge() {
        (Merge::None, _) => Merged::default(),
        (Merge::D2o, _) => {
            let (k, v) = head.unpack()?;
            let sinks = head.rows_before(plan.sinks());
            d2o::merge((&k, k_dim), (&v, v_dim), keep, sinks, &mut head.threshold)
        }
        (Merge::Cam, seed) => {
            let source = cam::Source {
                seed,
                layer: context.place.layer,
                kv: context.kv,
                positions: head.positions(),
            };
            let v = head.unpack_values()?;
            cam::merge((&v, v_dim), context.scores(head), keep, &source)
        }
    })
}
