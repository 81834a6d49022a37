//! Requests: what each was assigned, the sequences that serve it, and what is remembered of it when it
//! has finished. Locks here are held for bookkeeping only, never while a step runs.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use cinch_protocol::Policy;

use crate::gauges::{Gauges, Measures};
use crate::plan::Plan;
use crate::totals::Counters;

/// Finished requests that are remembered.
const REMEMBERED: usize = 1024;

/// What a request is served with.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// Class of request, for metrics.
    pub class: String,
    /// Level of the ladder the policy comes from; `None`: not from a ladder.
    pub level: Option<u32>,
    /// The policy.
    pub policy: Policy,
    /// Whether the request's client asked for this policy itself.
    pub own: bool,
}

/// Where a request is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestState {
    /// Assigned, nothing processed yet.
    Queued,
    /// Some tokens processed.
    Running,
    /// Its response is complete, or its client went away.
    Finished,
}

/// A policy and from which token on it was in force. A tighter one also applies to the tokens before.
#[derive(Debug, Clone, PartialEq)]
pub struct Served {
    /// The policy.
    pub policy: Policy,
    /// Its level, if it came from a ladder.
    pub level: Option<u32>,
    /// Tokens seen when it came into force.
    pub from_seen: usize,
}

/// A request as it is now, or as it was when it finished.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestSnapshot {
    /// The engine's request id.
    pub request: usize,
    /// Where it is in its life.
    pub state: RequestState,
    /// Its class.
    pub class: String,
    /// Whether its client asked for its policy itself.
    pub own: bool,
    /// Its level, if its policy comes from a ladder.
    pub level: Option<u32>,
    /// Its policy now.
    pub policy: Policy,
    /// Sequences that serve it (n > 1 has several).
    pub sequences: usize,
    /// Tokens of the prompt, as far as known.
    pub prompt_tokens: usize,
    /// Tokens seen, all sequences.
    pub seen: usize,
    /// Rows kept, mean over layers and heads, summed over sequences.
    pub kept: f64,
    /// Rows of the fullest head.
    pub kept_max: usize,
    /// Bytes allocated; blocks that sequences share count in each.
    pub bytes: usize,
    /// Bytes that f16 rows of all tokens seen would take.
    pub uncompressed_bytes: usize,
    /// Mean relative L2 error of attention output over its compressions; `None`: nothing measured yet.
    pub attention_error: Option<f64>,
    /// Whether every layer has compacted itself by the policy.
    pub applied: bool,
    /// All policies it was served with, in order.
    pub served: Vec<Served>,
}

/// A request's state. `class` is fixed; the plan changes with each retune.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: usize,
    pub(crate) class: String,
    pub(crate) counters: Arc<Counters>,
    /// Its client asked for its policy itself.
    own: bool,
    /// Made by `open` because nobody assigned it: nobody will call `finish` either.
    implicit: bool,
    plan: RwLock<Arc<Plan>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sequences: Vec<Arc<Gauges>>,
    prompt_tokens: usize,
    ran: bool,
    /// Figures of the sequences that have ended, as they were last.
    ended: Option<Measures>,
    ended_sequences: usize,
    served: Vec<Served>,
    error_sum: f64,
    error_count: u64,
    /// Set once: what is remembered.
    finished: Option<RequestSnapshot>,
}

/// A poisoned lock only means that some step panicked: figures stay readable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Request {
    pub(crate) fn plan(&self) -> Arc<Plan> {
        self.plan.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_plan(&self, plan: Arc<Plan>) {
        let mut state = lock(&self.state);
        let seen = state
            .sequences
            .iter()
            .map(|gauges| gauges.seen())
            .max()
            .unwrap_or(0);
        let served = Served {
            policy: plan.policy.clone(),
            level: plan.level,
            from_seen: seen,
        };
        // Nothing was processed under a policy that was replaced at the same length.
        state.served.retain(|old| old.from_seen < seen);
        state.served.push(served);
        *self.plan.write().unwrap_or_else(PoisonError::into_inner) = plan;
    }

    /// A sequence serves this request from now on; `inherited` is what its first tokens were served with.
    pub(crate) fn join(&self, gauges: &Arc<Gauges>, prompt_tokens: usize, inherited: &[Served]) {
        let seen = gauges.seen();
        let plan = self.plan();
        let mut state = lock(&self.state);
        state.sequences.push(gauges.clone());
        state.prompt_tokens = state.prompt_tokens.max(prompt_tokens);
        let before: Vec<Served> = inherited
            .iter()
            .filter(|old| old.from_seen < seen)
            .cloned()
            .collect();
        let same = before.last().is_some_and(|old| old.policy == plan.policy);
        if !before.is_empty() && !state.ran {
            state.served = before;
            if !same {
                state.served.push(Served {
                    policy: plan.policy.clone(),
                    level: plan.level,
                    from_seen: seen,
                });
            }
        }
    }

    pub(crate) fn served(&self) -> Vec<Served> {
        lock(&self.state).served.clone()
    }

    pub(crate) fn note_prompt_tokens(&self, tokens: usize) {
        lock(&self.state).prompt_tokens = tokens;
    }

    pub(crate) fn note_running(&self) {
        lock(&self.state).ran = true;
    }

    pub(crate) fn note_errors(&self, errors: &[f64]) {
        let mut state = lock(&self.state);
        state.error_sum += errors.iter().sum::<f64>();
        state.error_count += errors.len() as u64;
    }

    pub(crate) fn snapshot(&self) -> RequestSnapshot {
        self.snapshot_of(&lock(&self.state))
    }

    fn snapshot_of(&self, state: &State) -> RequestSnapshot {
        if let Some(finished) = &state.finished {
            return finished.clone();
        }
        let plan = self.plan();
        let mut measures = Measures::default();
        for gauges in &state.sequences {
            measures.add(&gauges.measure());
        }
        if state.sequences.is_empty() {
            measures = state.ended.unwrap_or_default();
        }
        RequestSnapshot {
            request: self.id,
            state: if state.ran {
                RequestState::Running
            } else {
                RequestState::Queued
            },
            class: self.class.clone(),
            own: self.own,
            level: plan.level,
            policy: plan.policy.clone(),
            sequences: if state.sequences.is_empty() {
                state.ended_sequences
            } else {
                state.sequences.len()
            },
            prompt_tokens: state.prompt_tokens,
            seen: measures.seen,
            kept: measures.kept,
            kept_max: measures.kept_max,
            bytes: measures.bytes,
            uncompressed_bytes: measures.uncompressed,
            attention_error: (state.error_count > 0).then(|| state.error_sum / state.error_count as f64),
            applied: state.sequences.iter().all(|gauges| gauges.applied(plan.id)),
            served: state.served.clone(),
        }
    }
}

/// All requests of a plugin.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    requests: Mutex<Requests>,
    classes: Mutex<BTreeMap<String, Arc<Counters>>>,
}

#[derive(Debug, Default)]
struct Requests {
    live: BTreeMap<usize, Arc<Request>>,
    finished: HashMap<usize, Arc<Request>>,
    order: VecDeque<usize>,
}

/// A request found by its id.
pub(crate) enum Found {
    Live(Arc<Request>),
    Finished(Arc<Request>),
}

impl Registry {
    pub(crate) fn counters(&self, class: &str) -> Arc<Counters> {
        lock(&self.classes).entry(class.to_owned()).or_default().clone()
    }

    pub(crate) fn classes(&self) -> BTreeMap<String, Arc<Counters>> {
        lock(&self.classes).clone()
    }

    pub(crate) fn find(&self, id: usize) -> Option<Found> {
        let requests = lock(&self.requests);
        match requests.live.get(&id) {
            Some(request) => Some(Found::Live(request.clone())),
            None => requests
                .finished
                .get(&id)
                .map(|request| Found::Finished(request.clone())),
        }
    }

    pub(crate) fn live(&self) -> Vec<Arc<Request>> {
        lock(&self.requests).live.values().cloned().collect()
    }

    /// Registers a request as queued. `false` if its id already runs or ran.
    pub(crate) fn assign(&self, id: usize, class: &str, plan: Arc<Plan>, own: bool) -> bool {
        let request = self.request(id, class, plan, own, false);
        let mut requests = lock(&self.requests);
        let late = requests.finished.contains_key(&id)
            || requests
                .live
                .get(&id)
                .is_some_and(|old| !lock(&old.state).sequences.is_empty());
        if !late {
            requests.live.insert(id, request);
        }
        !late
    }

    /// The request a new sequence serves; one nobody assigned gets the default. A request that finished
    /// before the engine got to it goes on unlisted.
    pub(crate) fn serve(&self, id: usize, default: &(String, Arc<Plan>)) -> Arc<Request> {
        match self.find(id) {
            Some(Found::Live(request) | Found::Finished(request)) => request,
            None => {
                let request = self.request(id, &default.0, default.1.clone(), false, true);
                lock(&self.requests).live.entry(id).or_insert(request).clone()
            }
        }
    }

    fn request(&self, id: usize, class: &str, plan: Arc<Plan>, own: bool, implicit: bool) -> Arc<Request> {
        let served = Served {
            policy: plan.policy.clone(),
            level: plan.level,
            from_seen: 0,
        };
        Arc::new(Request {
            id,
            class: class.to_owned(),
            counters: self.counters(class),
            own,
            implicit,
            plan: RwLock::new(plan),
            state: Mutex::new(State {
                served: vec![served],
                ..State::default()
            }),
        })
    }

    /// A sequence of `request` goes on as another request's.
    pub(crate) fn hand_over(&self, request: &Request, gauges: &Arc<Gauges>) {
        lock(&request.state)
            .sequences
            .retain(|other| !Arc::ptr_eq(other, gauges));
    }

    /// A sequence of `request` has ended. The last one that ran finishes the request.
    pub(crate) fn leave(&self, request: &Arc<Request>, gauges: &Arc<Gauges>) {
        let (over, unused) = {
            let mut state = lock(&request.state);
            let measures = gauges.measure();
            let before = request.snapshot_of(&state);
            state.sequences.retain(|other| !Arc::ptr_eq(other, gauges));
            if measures.seen > 0 {
                state.ended.get_or_insert_default().add(&measures);
                state.ended_sequences += 1;
            }
            let empty = state.sequences.is_empty();
            let over = empty && measures.seen > 0 && state.finished.is_none();
            if over {
                let ended = state.ended.unwrap_or_default();
                state.finished = Some(RequestSnapshot {
                    state: RequestState::Finished,
                    sequences: state.ended_sequences,
                    seen: ended.seen,
                    kept: ended.kept,
                    kept_max: ended.kept_max,
                    bytes: ended.bytes,
                    uncompressed_bytes: ended.uncompressed,
                    ..before
                });
            }
            (over, empty && !state.ran && request.implicit)
        };
        if over {
            self.remember(request);
        } else if unused {
            lock(&self.requests).live.remove(&request.id);
        }
    }

    /// The response is complete or the client went away.
    pub(crate) fn finish(&self, id: usize) {
        let Some(Found::Live(request)) = self.find(id) else {
            return;
        };
        {
            let mut state = lock(&request.state);
            let snapshot = request.snapshot_of(&state);
            state.finished.get_or_insert(RequestSnapshot {
                state: RequestState::Finished,
                ..snapshot
            });
        }
        self.remember(&request);
    }

    fn remember(&self, request: &Arc<Request>) {
        let mut requests = lock(&self.requests);
        if requests.live.remove(&request.id).is_none() {
            return;
        }
        requests.finished.insert(request.id, request.clone());
        requests.order.push_back(request.id);
        if requests.order.len() > REMEMBERED
            && let Some(oldest) = requests.order.pop_front()
        {
            requests.finished.remove(&oldest);
        }
    }
}
