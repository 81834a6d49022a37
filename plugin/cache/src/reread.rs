//! A prompt's second reading, where its method ranks by that: what was held back for it is done when it is over.
//!
//! Invariants: rows of it are seen by no one but itself, and none is left behind; a layer that is in it keeps its plan.

use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

use cinch_hooks::{ExtraPass, HookError};
use cinch_protocol::PolicyError;

use crate::attend::settle::{Settled, report};
use crate::attend::spread;
use crate::evict::{self, Context, Ranked, compact, rank};
use crate::layer::{Compaction, Layer};
use crate::observe::relative_error;
use crate::plan::{Plan, Won};
use crate::project::Queries;
use crate::registry::lock;
use crate::sequence::Sequence;
use crate::store::{Head, Rebuilt};

/// Positions behind a prompt that a second reading takes at the least: its instruction, and a part worth reading.
const ROOM: usize = 128;

/// Whether a prompt of so many tokens can be read again by a plan that asks for it, in a model of `context` positions.
pub(crate) fn fits(plan: &Plan, prompt: usize, context: usize) -> Result<(), PolicyError> {
    if plan.rereads().is_none() || prompt + ROOM <= context {
        return Ok(());
    }
    let method = plan
        .policy
        .select
        .as_ref()
        .map_or("", |select| select.method.name());
    let allowed = format!(
        "for prompts of at most {} tokens: it reads them again behind themselves, and the model has {context} positions",
        context.saturating_sub(ROOM)
    );
    Err(PolicyError::new(
        "select.method",
        format!("{method} for a prompt of {prompt} tokens"),
        &allowed,
    ))
}

impl Sequence {
    /// How its prompt is to be read again, if its policy asks for that. Until then its rows stay.
    pub(crate) fn wants_pass(&self) -> Result<Option<ExtraPass>, HookError> {
        let Some(request) = self.request() else {
            return Ok(None);
        };
        let plan = request.plan();
        let context = self.core.model.get().map_or(0, |model| model.context);
        fits(&plan, self.prompt(), context).map_err(|error| HookError::Policy {
            request: request.id,
            reason: error.to_string(),
        })?;
        let pass = plan.rereads();
        self.hold(pass.is_some());
        Ok(pass)
    }

    /// The next part of it begins. False if it is not wanted any more.
    pub(crate) fn next_part(&self) -> Result<bool, HookError> {
        if self.wants_pass()?.is_none() {
            return Ok(false);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let mut layer = lock(layer);
            if layer.reread.is_none() {
                self.catch_up(&mut layer);
            }
            layer.begin_part();
            self.gauge(index, &layer);
        }
        Ok(true)
    }

    /// It is over: its rows go, and then those of the prompt that it found least in.
    pub(crate) fn close_pass(&self) -> Result<(), HookError> {
        self.hold(false);
        let ranked = Mutex::new(self.layers.iter().map(|_| None).collect::<Vec<_>>());
        self.each_layer(|index| {
            let mut layer = lock(&self.layers[index]);
            if layer.end_pass() && self.plan(&layer).rereads().is_some() {
                self.catch_up(&mut layer);
                let heads = ranks(&mut layer)?;
                lock(&ranked)[index] = Some(heads);
            }
            Ok(())
        })?;
        self.compete(&mut lock(&ranked));
        self.each_layer(|index| {
            let mut layer = lock(&self.layers[index]);
            let ranked = lock(&ranked)[index].take();
            // Without, whatever the plan is by now, the next token finds that it is due.
            let settled = ranked.map_or(Ok(Settled::default()), |ranked| settle(&mut layer, ranked))?;
            layer.probes = None;
            self.gauge(index, &layer);
            drop(layer);
            report(&self.core, &[self], &[settled]);
            Ok(())
        })
    }

    /// Lets the heads of all layers compete whose plan says so, and layers remember how they came out.
    fn compete(&self, ranked: &mut [Option<Heads>]) {
        let mut heads = Vec::new();
        let mut won = Vec::new();
        for (layer, ranked) in self.layers.iter().zip(ranked) {
            let plan = lock(layer).plan.clone();
            if let Some((ranked, floor)) = ranked
                .as_mut()
                .zip(plan.floor())
                .filter(|_| plan.layers_compete())
            {
                let from = heads.len();
                heads.extend(ranked.iter_mut().flatten());
                won.push((layer, from..heads.len(), floor));
            }
        }
        let (Some((.., floor)), Some(even)) = (won.first(), heads.first().map(|head| head.total)) else {
            return;
        };
        evict::compete(&mut heads, *floor);
        for (layer, own, _) in &won {
            let rows = heads[own.clone()].iter().map(|head| head.total).sum();
            let of = even * own.len();
            lock(layer).won = Won { rows, of };
        }
    }

    fn each_layer(&self, f: impl Fn(usize) -> Result<(), HookError> + Sync) -> Result<(), HookError> {
        if self.core.settings.serial {
            return (0..self.layers.len()).try_for_each(f);
        }
        spread(self.layers.len(), f)
    }

    /// Takes over a plan that has come since its last step.
    fn catch_up(&self, layer: &mut Layer) {
        let plan = self.plan(layer);
        if plan.id != layer.plan.id {
            let group = self.core.group.load(Relaxed).max(1);
            layer.adopt_plan(&self.core.ledger, &plan, self.dtype, group);
        }
    }
}

/// A layer's heads; `None`: nothing of it goes.
type Heads = Vec<Option<Ranked>>;

fn contexts(layer: &Layer) -> Vec<Context<'static>> {
    let plan = &layer.plan;
    let budget = plan.budget(layer.place, layer.seen, layer.prompt, layer.won);
    let (heads, all) = (layer.heads.len(), layer.heads.iter().map(Head::kept).sum());
    let scale = layer.probes.as_ref().map_or(1.0, |held| held.heads.scale);
    let context = |(kv, head): (usize, &Head)| Context {
        place: layer.place,
        kv,
        seen: layer.seen,
        prompt: layer.prompt,
        won: layer.won,
        scale,
        layer_scores: &[],
        over: evict::over(plan, budget, heads, all, head.kept()),
        prefilled: true,
    };
    layer.heads.iter().enumerate().map(context).collect()
}

/// Ranks the rows of each head; those of a layer compete here, if not with those of others.
fn ranks(layer: &mut Layer) -> Result<Heads, HookError> {
    layer.won = Won::EVEN;
    let (plan, contexts) = (layer.plan.clone(), contexts(layer));
    let heads = layer.heads.iter_mut().zip(&contexts);
    let mut ranked = heads
        .map(|(head, context)| rank(head, &plan, context))
        .collect::<Result<Heads, _>>()?;
    if let Some(floor) = plan.floor().filter(|_| !plan.layers_compete()) {
        let mut ranked: Vec<&mut Ranked> = ranked.iter_mut().flatten().collect();
        evict::compete(&mut ranked, floor);
    }
    Ok(ranked)
}

/// Evicts and packs, as a step would.
fn settle(layer: &mut Layer, ranked: Heads) -> Result<Settled, HookError> {
    let (plan, contexts, heads) = (layer.plan.clone(), contexts(layer), layer.heads.len());
    let what = Compaction {
        evict: true,
        pack: true,
    };
    let mut settled = Settled::default();
    for (kv, ((head, context), ranked)) in layer.heads.iter_mut().zip(&contexts).zip(ranked).enumerate() {
        // Bases were made of the prompt's own queries, when it was read.
        let (rebuilt, _) = compact(
            head,
            &plan,
            &layer.targets,
            what,
            ranked,
            context,
            None::<fn() -> Queries>,
        )?;
        if rebuilt == Rebuilt::default() {
            continue;
        }
        settled.changed = true;
        settled.evicted += rebuilt.evicted as f64 / heads as f64;
        let Some(held) = &layer.probes else { continue };
        let probes = held.of(kv);
        if !probes.is_empty() {
            settled.errors.extend(relative_error(head, &held.heads, &probes)?);
        }
    }
    if settled.evicted > 0.0 {
        layer.evicted_at = layer.seen;
    }
    layer.measured |= settled.changed;
    layer.since = 0;
    layer.pending = false;
    Ok(settled)
}
