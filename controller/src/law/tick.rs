//! One tick: the memory and latency rules.

use std::collections::BTreeMap;

use super::config::{ClassBounds, LawConfig};
use super::demand::{self, Demand};
use super::state::{ClassState, State};
use super::types::{Condition, ConditionKind, Inputs, Move, Reading, Rule};

/// What a tick works on.
pub(super) struct Tick<'a> {
    pub(super) config: &'a LawConfig,
    classes: &'a BTreeMap<String, ClassBounds>,
    pub(super) ratios: &'a [f64],
    pub(super) state: State,
    pub(super) inputs: &'a Inputs,
    pub(super) now: f64,
    pub(super) demand: Option<Demand<'a>>,
    /// Before any move.
    pub(super) before: BTreeMap<String, u32>,
    /// After the moves so far.
    pub(super) levels: BTreeMap<String, u32>,
    pub(super) moves: Vec<Move>,
    pub(super) conditions: Vec<Condition>,
}

/// Why memory wants to be tightened.
struct Pressure {
    rule: Rule,
    reason: String,
    /// Levels a class may go at once.
    most: u32,
}

impl<'a> Tick<'a> {
    pub(super) fn new(
        config: &'a LawConfig,
        classes: &'a BTreeMap<String, ClassBounds>,
        ratios: &'a [f64],
        mut state: State,
        inputs: &'a Inputs,
        now: f64,
    ) -> Self {
        state.started.get_or_insert(now);
        Self {
            demand: Demand::of(&inputs.kv, ratios),
            before: inputs.levels.clone(),
            levels: inputs.levels.clone(),
            config,
            classes,
            ratios,
            state,
            inputs,
            now,
            moves: Vec::new(),
            conditions: Vec::new(),
        }
    }

    pub(super) fn bounds(&self, class: &str) -> ClassBounds {
        let named = self
            .classes
            .get(class)
            .or_else(|| self.classes.get(super::DEFAULT_CLASS));
        named.cloned().unwrap_or_default()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.levels.keys().cloned().collect()
    }

    pub(super) fn class(&mut self, class: &str) -> &mut ClassState {
        self.state.classes.entry(class.to_owned()).or_default()
    }

    pub(super) fn say(&mut self, kind: ConditionKind, class: Option<&str>, message: String) {
        self.conditions.push(Condition {
            kind,
            class: class.map(str::to_owned),
            message,
        });
    }

    pub(super) fn warming_up(&self) -> bool {
        self.now - self.state.started.unwrap_or(self.now) < self.config.warm_up
    }

    /// Takes up the levels that hold, and forgets classes that are gone.
    pub(super) fn adopt(&mut self) {
        let inputs = self.inputs;
        if inputs.unread.is_none() {
            let levels = &inputs.levels;
            self.state.classes.retain(|name, _| levels.contains_key(name));
        }
        for (name, level) in &inputs.levels {
            let class = self.class(name);
            if class.level != *level {
                // Somebody else's move is no reversal of ours.
                class.tightened = None;
                class.window.clear();
                class.level = *level;
            }
        }
    }

    /// Neither levels nor ratios are known: nothing can be weighed against them, and no window spans the gap.
    pub(super) fn blind(&mut self) {
        let state = &mut self.state;
        state.used.clear();
        for votes in [&mut state.demand, &mut state.process, &mut state.queue] {
            votes.clear();
        }
        for class in state.classes.values_mut() {
            class.window.clear();
            class.latency.clear();
        }
    }

    /// The tightest level a class may have now.
    pub(super) fn ceiling(&mut self, class: &str) -> u32 {
        let most = self.bounds(class).most(self.ratios.len());
        let now = self.now;
        self.class(class).allowed(most, now)
    }

    pub(super) fn go(&mut self, class: &str, to: u32, rule: Rule, reason: String) {
        let from = self.levels[class];
        if from == to {
            return;
        }
        let tightens = to > from;
        let (now, freeze, reversals) = (self.now, self.config.freeze, self.config.reversals);
        let state = self.class(class);
        let flapping =
            state.moved(tightens, now, reversals) && !matches!(rule, Rule::QualityHard | Rule::QualitySoft);
        state.level = to;
        if tightens {
            state.last_up = Some(now);
            self.state.last_up = Some(now);
        } else {
            state.last_down = Some(now);
            self.state.last_down = Some(now);
        }
        if flapping {
            // Frozen at the tighter side of the last move: too little memory loses requests.
            let state = self.class(class);
            state.frozen_until = Some(now + freeze);
            state.reversals.clear();
            if !tightens {
                state.level = from;
                return;
            }
        }
        self.levels.insert(class.to_owned(), to);
        // One move a class and tick: a second step is the first one's end.
        match self.moves.iter_mut().find(|made| made.class == class) {
            Some(made) => made.to = to,
            None => self.moves.push(Move {
                class: class.to_owned(),
                from,
                to,
                rule,
                reason,
            }),
        }
    }

    /// Classes that can give way now: of the lowest rank, those that ask for memory.
    fn givers(&mut self) -> Vec<String> {
        let mut givers: Vec<(u32, String)> = Vec::new();
        for name in self.names() {
            let asks = self.demand.as_ref().is_none_or(|demand| demand.asks(&name));
            let frozen = self
                .state
                .classes
                .get(&name)
                .is_some_and(|class| class.frozen(self.now));
            if asks && !frozen && self.levels[&name] < self.ceiling(&name) {
                givers.push((self.bounds(&name).rank, name));
            }
        }
        let lowest = givers.iter().map(|(rank, _)| *rank).min();
        givers.retain(|(rank, _)| Some(*rank) == lowest);
        givers.into_iter().map(|(_, name)| name).collect()
    }

    /// Up and critical.
    pub(super) fn tighten(&mut self) {
        let Some(pressure) = self.pressure() else { return };
        let mut stepped = false;
        for _ in 0..pressure.most {
            let projected = self.demand.as_ref().map(|demand| demand.at(&self.levels));
            if stepped && projected.is_none_or(|projected| projected <= self.config.up) {
                return;
            }
            let givers = self.givers();
            if givers.is_empty() && !stepped {
                self.say(
                    ConditionKind::QualityCapped,
                    None,
                    format!("{}, and no class may be compressed harder", pressure.reason),
                );
            }
            for class in givers {
                let to = self.levels[&class] + 1;
                self.go(&class, to, pressure.rule, pressure.reason.clone());
                stepped = true;
            }
        }
    }

    /// Whether memory wants more, and may have it by now. Votes and rates are kept even where it may not.
    fn pressure(&mut self) -> Option<Pressure> {
        let config = self.config;
        let since_up = self.state.last_up.map_or(f64::INFINITY, |at| self.now - at);
        let mut critical = None;
        let mut up = None;
        if let Some(demand) = self.demand.clone() {
            let (projected, usage) = (demand.at(&self.levels), demand.usage());
            let full = self.state.full_in(self.now, usage);
            let follows = demand.follows(&self.levels);
            if projected > 1.0 {
                // What waits refills whatever is freed: a demand over the capacity is a full cache ahead.
                critical = Some((
                    2,
                    format!("demand {:.0} % of capacity at these levels", projected * 100.0),
                ));
            } else if usage > config.critical && follows {
                critical = Some((1, format!("{:.0} % of capacity held", usage * 100.0)));
            } else if let Some(full) =
                full.filter(|full| *full < config.full_within && usage > config.down && follows)
            {
                critical = Some((
                    2,
                    format!("full in {full:.0} s at this rate, {:.0} % held", usage * 100.0),
                ));
            }
            // A critical step for bytes held alone must show in the bytes held.
            if projected <= config.up && critical.is_some() {
                if self.state.usage_effect.ineffective() {
                    critical = None;
                    self.ineffective(format!("{:.0} % of capacity held", usage * 100.0));
                } else if since_up >= config.critical_cooldown {
                    self.state.usage_effect.stepping(usage, config.effect);
                }
            } else if usage <= config.critical {
                self.state.usage_effect.gone();
            }
            if self.state.demand.add(projected > config.up) {
                up = Some(format!(
                    "demand {:.0} % of capacity at these levels",
                    projected * 100.0
                ));
            }
            let waiting = demand.waiting(None);
            // A queue while demand would fit one level lower is not for lack of memory.
            let queued = waiting > config.queue && usage > config.queue_usage && projected > config.down;
            if self.state.queue.add(queued) && up.is_none() {
                up = self.caused(
                    Cause::Queue,
                    waiting,
                    format!("{waiting:.0} requests wait"),
                    since_up,
                );
            } else if !queued {
                self.state.queue_effect.gone();
            }
        } else {
            self.state.used.clear();
            self.state.demand.clear();
            self.state.queue.clear();
        }
        if let Some(share) = demand::process(&self.inputs.process) {
            let over = share > config.process;
            if self.state.process.add(over) && up.is_none() {
                let reason = format!("process memory at {:.0} % of its limit", share * 100.0);
                up = self.caused(Cause::Process, share, reason, since_up);
            } else if !over {
                self.state.process_effect.gone();
            }
        }
        match (critical, up) {
            (Some((most, reason)), _) if since_up >= config.critical_cooldown => Some(Pressure {
                rule: Rule::Critical,
                reason,
                most,
            }),
            (None, Some(reason)) if since_up >= config.up_cooldown && !self.warming_up() => Some(Pressure {
                rule: Rule::Up,
                reason,
                most: 1,
            }),
            _ => None,
        }
    }

    fn caused(&mut self, cause: Cause, value: f64, reason: String, since_up: f64) -> Option<String> {
        let (share, ready) = (
            self.config.effect,
            since_up >= self.config.up_cooldown && !self.warming_up(),
        );
        let effect = match cause {
            Cause::Queue => &mut self.state.queue_effect,
            Cause::Process => &mut self.state.process_effect,
        };
        if effect.ineffective() {
            self.ineffective(reason);
            return None;
        }
        if ready {
            effect.stepping(value, share);
        }
        Some(reason)
    }

    fn ineffective(&mut self, reason: String) {
        let percent = self.config.effect * 100.0;
        self.say(
            ConditionKind::ActuatorIneffective,
            None,
            format!("{reason}: two steps changed it by less than {percent:.0} %"),
        );
    }

    /// Latency over its objective, where memory is a cause.
    pub(super) fn latency(&mut self) {
        let Some(demand) = self.demand.clone() else { return };
        for class in self.names() {
            let bounds = self.bounds(&class);
            let Some(Reading::Fresh { value, .. }) = self.inputs.latency.get(&class) else {
                self.class(&class).latency.clear();
                continue;
            };
            let over = |what: &str, p95: Option<f64>, samples: f64, slo: Option<f64>| {
                let (p95, slo) = (p95.filter(|p95| p95.is_finite())?, slo?);
                let counts =
                    samples >= self.config.latency_samples && p95 > slo * self.config.latency_tolerance;
                counts.then(|| (p95 / slo, format!("{what} p95 {p95:.3} s, objective {slo} s")))
            };
            let worst = over("first token", value.ttft_p95, value.ttft_samples, bounds.ttft_slo)
                .or_else(|| over("next token", value.itl_p95, value.itl_samples, bounds.itl_slo));
            let memory = (demand.waiting(Some(&class)) > 0.0 || demand.usage() > self.config.queue_usage)
                && demand.at(&self.before) > self.config.down;
            let (now, cooldown, share) = (self.now, self.config.up_cooldown, self.config.effect);
            let (ceiling, level, warming_up) = (self.ceiling(&class), self.levels[&class], self.warming_up());
            let state = self.class(&class);
            let agreed = state.latency.add(worst.is_some() && memory);
            let Some((excess, reason)) = worst else {
                state.latency_effect.gone();
                continue;
            };
            let ready = state.last_up.is_none_or(|at| now - at >= cooldown);
            if !agreed || !ready || warming_up || state.frozen(now) || level >= ceiling {
                continue;
            }
            if state.latency_effect.ineffective() {
                self.ineffective(reason);
                continue;
            }
            state.latency_effect.stepping(excess, share);
            self.go(&class, level + 1, Rule::Latency, reason);
        }
    }

    /// Down: one level of one class, the highest rank first, where demand has been low for the whole window.
    pub(super) fn loosen(&mut self) {
        let Some(demand) = self.demand.clone() else {
            // A window with a hole shows nothing.
            self.state
                .classes
                .values_mut()
                .for_each(|class| class.window.clear());
            return;
        };
        let (now, config) = (self.now, self.config);
        let mut names: Vec<(u32, String)> = self
            .names()
            .into_iter()
            .map(|name| (self.bounds(&name).rank, name))
            .collect();
        names.sort_by(|a, b| b.cmp(a));
        let since_down = self.state.last_down.map_or(f64::INFINITY, |at| now - at);
        // What process memory has tightened is not loosened into the same corner.
        let roomy = demand::process(&self.inputs.process)
            .is_none_or(|share| share <= config.process * config.down / config.up);
        let quiet =
            roomy && self.moves.is_empty() && since_down >= config.down_cooldown && !self.warming_up();
        for (_, class) in names {
            let least = self.bounds(&class).min_level;
            let recommended = demand.recommended(&self.levels, &class, config.down).max(least);
            let level = self.levels[&class];
            let still = quiet && self.moves.is_empty();
            let state = self.class(&class);
            state.window.add(now, recommended, config.down_window);
            let most = state.window.most(now, config.down_window);
            let rested = state.last_up.is_none_or(|at| now - at >= config.down_cooldown);
            if still && rested && !state.frozen(now) && most.is_some_and(|most| most < level) {
                let mut lower = self.levels.clone();
                lower.insert(class.clone(), level - 1);
                let reason = format!(
                    "demand at most {:.0} % of capacity one level lower for {:.0} s",
                    demand.at(&lower) * 100.0,
                    config.down_window
                );
                self.go(&class, level - 1, Rule::Down, reason);
            }
        }
    }
}

enum Cause {
    Queue,
    Process,
}
