//! Admission: a request runs when what it may come to hold fits beside what the others may come to hold.
//!
//! Each admitted request has a reservation: the most its sequences can hold at their present policy and full
//! length, or what they hold by measure where that is more. A retune that tightens lowers it, and makes room,
//! at once. Who does not fit waits in a queue, in order of arrival, with the class's policy of the moment it is
//! admitted. Locks: this one first, then the plugin's and the classes' own.

mod ledger;
mod pace;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use cinch_protocol::{Overload, Policy, RequestView};
use tokio::sync::oneshot;

use crate::classes::{Choice, Classes};
use crate::config::Settings;
use crate::fields::FieldFault;
use crate::http::Refusal;
use crate::kv::Kv;
use ledger::{Ledger, Left};
use pace::Pace;

/// What a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    /// Its class.
    pub class: String,
    /// The policy it asked for itself; absent: the class's.
    pub own: Option<Choice>,
    /// Tokens of its prompt, counted before the engine has it.
    pub prompt_tokens: usize,
    /// Tokens it may generate.
    pub new_tokens: usize,
    /// Sequences that it runs as.
    pub choices: usize,
}

/// Why a request in the queue is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Admitted,
    Stopping,
}

struct Entry {
    demand: Demand,
    /// Its policy is its own, or was changed while it waited: the class's does not count any more.
    fixed: bool,
    waiter: Option<oneshot::Sender<Verdict>>,
}

struct State {
    ledger: Ledger,
    entries: HashMap<usize, Entry>,
    pace: Pace,
    stopping: bool,
}

/// The gate in front of the engine.
pub struct Admission {
    state: Mutex<State>,
    kv: Kv,
    classes: Arc<Classes>,
    max_queue: usize,
    max_wait: Duration,
}

/// A place in the queue or among the admitted; dropped, it is free again.
pub struct Place {
    admission: Arc<Admission>,
    id: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.leave(self.id);
    }
}

impl Admission {
    /// Nobody admitted yet.
    #[must_use]
    pub fn new(settings: &Settings, kv: Kv, classes: Arc<Classes>) -> Arc<Self> {
        let max_queue = settings.admission.max_queue;
        Arc::new(Self {
            state: Mutex::new(State {
                ledger: Ledger::new(settings.kv.capacity_bytes, max_queue),
                entries: HashMap::new(),
                pace: Pace::default(),
                stopping: false,
            }),
            kv,
            classes,
            max_queue,
            max_wait: Duration::from_secs(settings.admission.max_wait_seconds),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves the ledger whole, so a panic elsewhere does not make it wrong.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `id`'s turn. The plugin knows the request from now on; it is for the caller to finish it there.
    ///
    /// # Errors
    /// 413 for what can never fit, 503 where the queue is full, the wait too long, or the server stopping.
    pub async fn enter(self: &Arc<Self>, id: usize, demand: Demand) -> Result<Place, Refusal> {
        let choice = self.choice(&demand)?;
        self.possible(&demand, &choice)?;
        let (sender, turn) = oneshot::channel();
        {
            let mut state = self.state();
            if state.stopping {
                return Err(stopping());
            }
            if !state.ledger.join(id) {
                let what = format!("{} requests wait already", state.ledger.queue().len());
                return Err(self.overloaded(&mut state, &demand, &choice, &what));
            }
            self.kv
                .assign(id, &demand.class, choice, demand.own.is_some())
                .inspect_err(|_| {
                    state.ledger.leave(id);
                })?;
            self.kv.note_prompt_tokens(id, demand.prompt_tokens);
            let entry = Entry {
                fixed: demand.own.is_some(),
                demand,
                waiter: Some(sender),
            };
            state.entries.insert(id, entry);
        }
        let place = Place {
            admission: self.clone(),
            id,
        };
        self.pump();
        match tokio::time::timeout(self.max_wait, turn).await {
            Ok(Ok(Verdict::Admitted)) => Ok(place),
            Ok(Ok(Verdict::Stopping) | Err(_)) => Err(stopping()),
            Err(_) => {
                let mut state = self.state();
                let Some((demand, fixed)) = state
                    .entries
                    .get(&id)
                    .map(|entry| (entry.demand.clone(), entry.fixed))
                else {
                    return Err(stopping());
                };
                let choice = self.present(id, &demand, fixed, None)?;
                let what = format!("no room came up in {} s", self.max_wait.as_secs());
                Err(self.overloaded(&mut state, &demand, &choice, &what))
            }
        }
    }

    /// Brings reservations up to date and admits from the front of the queue whoever fits.
    pub fn pump(&self) {
        let mut state = self.state();
        let state = &mut *state;
        let views: BTreeMap<usize, RequestView> = self
            .kv
            .requests()
            .into_iter()
            .map(|view| (view.id as usize, view))
            .collect();
        let admitted: Vec<usize> = state.ledger.admitted().collect();
        for id in admitted {
            if let (Some(entry), Some(view)) = (state.entries.get(&id), views.get(&id)) {
                let reserved = self.reservation(&entry.demand, view, &view.policy);
                state.ledger.set(id, reserved);
            }
        }
        while let Some(id) = state.ledger.front() {
            let Some(entry) = state.entries.get_mut(&id) else {
                state.ledger.leave(id);
                continue;
            };
            let Ok(choice) = self.present(id, &entry.demand, entry.fixed, views.get(&id)) else {
                break;
            };
            if !state.ledger.admit(self.need(&entry.demand, &choice.policy)) {
                break;
            }
            let known = views.get(&id);
            let as_it_was = known.is_some_and(|v| (v.level, &v.policy) == (choice.level, &choice.policy));
            if !entry.fixed && !as_it_was {
                // Not begun, so this can't come too late; were it refused, the request would keep the policy
                // it queued with, which the next pump accounts for.
                let _kept = self.kv.assign(id, &entry.demand.class, choice, false);
                self.kv.note_prompt_tokens(id, entry.demand.prompt_tokens);
            }
            if let Some(waiter) = entry.waiter.take() {
                // Nobody listens any more: its place is about to be dropped.
                let _gone = waiter.send(Verdict::Admitted);
            }
        }
    }

    /// Whether anybody waits.
    #[must_use]
    pub fn has_queue(&self) -> bool {
        self.state().ledger.front().is_some()
    }

    /// Bytes that admitted requests hold or may grow to.
    #[must_use]
    pub fn reserved_bytes(&self) -> u64 {
        self.state().ledger.reserved()
    }

    /// Lets a change of a request's policy through, and reserves for it; `field` is where it was given.
    ///
    /// # Errors
    /// 409 where the request might then outgrow what is free.
    pub fn retuned(&self, id: usize, choice: &Choice, field: &str) -> Result<(), Refusal> {
        let view = self.kv.request(id)?;
        let mut state = self.state();
        let Some(entry) = state.entries.get_mut(&id) else {
            return Ok(());
        };
        let wanted = match entry.waiter {
            Some(_) => self.need(&entry.demand, &choice.policy),
            None => self.reservation(&entry.demand, &view, &choice.policy),
        };
        let waits = entry.waiter.is_some();
        let held = state.ledger.reservation(id).unwrap_or(0);
        let most = if waits {
            state.ledger.capacity()
        } else {
            held + state.ledger.free()
        };
        if wanted > most.max(held) {
            let given = format!("{}, which may come to {wanted} bytes", choice.policy);
            let allowed = format!("what stays within {most} bytes");
            let fault = FieldFault::new(field, given, allowed);
            let title = "There is no room for it";
            return Err(
                Refusal::new(StatusCode::CONFLICT, "no-room", title, fault.to_string()).naming(fault),
            );
        }
        if let Some(entry) = state.entries.get_mut(&id) {
            entry.fixed = true;
        }
        state.ledger.set(id, wanted);
        Ok(())
    }

    /// Sends everybody away who waits, and everybody who comes.
    pub fn stop(&self) {
        let mut state = self.state();
        state.stopping = true;
        for entry in state.entries.values_mut() {
            if let Some(waiter) = entry.waiter.take() {
                // As above.
                let _gone = waiter.send(Verdict::Stopping);
            }
        }
        let waiting: Vec<usize> = state.ledger.queue().collect();
        for id in waiting {
            state.ledger.leave(id);
        }
    }

    fn leave(&self, id: usize) {
        {
            let mut state = self.state();
            state.entries.remove(&id);
            if state.ledger.leave(id) == Left::Admitted {
                state.pace.ended(Instant::now());
            }
        }
        self.pump();
    }

    fn choice(&self, demand: &Demand) -> Result<Choice, FieldFault> {
        match &demand.own {
            Some(own) => Ok(own.clone()),
            None => self.classes.current(&demand.class, "class"),
        }
    }

    /// What a waiting request would be served with now.
    fn present(
        &self,
        id: usize,
        demand: &Demand,
        fixed: bool,
        view: Option<&RequestView>,
    ) -> Result<Choice, Refusal> {
        if !fixed {
            return Ok(self.choice(demand)?);
        }
        let view = match view {
            Some(view) => view.clone(),
            None => self.kv.request(id)?,
        };
        Ok(Choice {
            level: view.level,
            policy: view.policy,
        })
    }

    /// The most a request holds that has not begun, and what its prompt takes in passing.
    fn need(&self, demand: &Demand, policy: &Policy) -> u64 {
        let tokens = demand.prompt_tokens + demand.new_tokens;
        let held = self.kv.most_bytes(policy, tokens) * demand.choices as u64;
        held + self.kv.prefill_bytes(policy, demand.prompt_tokens)
    }

    /// The most a request holds that was begun under whatever policy, if `policy` is what it goes on with.
    fn reservation(&self, demand: &Demand, view: &RequestView, policy: &Policy) -> u64 {
        // The engine has counted the prompt's tokens by now.
        let prompt = demand.prompt_tokens.max(view.prompt_tokens as usize);
        let demand = Demand {
            prompt_tokens: prompt,
            ..demand.clone()
        };
        // A prompt that is read twice is seen before that is over, and its layers have not applied their policy until then.
        let twice = policy
            .select
            .as_ref()
            .is_some_and(|select| select.method.rereads());
        let processed = view.seen >= (prompt * demand.choices) as u64 && (view.applied || !twice);
        let passing = if processed {
            self.kv.prefill_bytes(policy, prompt)
        } else {
            0
        };
        let most = self.need(&demand, policy) - passing;
        if view.applied || view.bytes == 0 {
            return most.max(view.bytes);
        }
        // Retuned, and not every layer has taken it up: those that have processed their tokens hold what they hold
        // until their next step, the others come on top.
        let all = self.kv.uncompressed_bytes(prompt * demand.choices).max(1);
        let to_come = 1.0 - (view.uncompressed_bytes as f64 / all as f64).min(1.0);
        most.max(view.bytes + (most as f64 * to_come).ceil() as u64)
    }

    /// Refuses what can never fit: at its own policy, or, where that may be tightened, at the last level.
    fn possible(&self, demand: &Demand, choice: &Choice) -> Result<(), Refusal> {
        let capacity = self.state().ledger.capacity();
        let last = self.classes.ladder().levels.last();
        let tightest = match last {
            Some(last) if demand.own.is_none() && choice.level.is_some() => &last.policy,
            _ => &choice.policy,
        };
        let need = self.need(demand, tightest).min(self.need(demand, &choice.policy));
        if need <= capacity {
            return Ok(());
        }
        let given = format!(
            "{} prompt tokens and {} new ones in {} choice(s), which may come to {need} bytes at {tightest}",
            demand.prompt_tokens, demand.new_tokens, demand.choices
        );
        let allowed = format!("what fits into {capacity} bytes (kv.capacity_bytes)");
        let fault = FieldFault::new("max_tokens", given, allowed);
        let title = "The request does not fit into the KV cache";
        Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too-large",
            title,
            fault.to_string(),
        )
        .naming(fault))
    }

    fn overloaded(&self, state: &mut State, demand: &Demand, choice: &Choice, what: &str) -> Refusal {
        let need = self.need(demand, &choice.policy);
        let queued: u64 = state
            .ledger
            .queue()
            .filter_map(|id| state.entries.get(&id).map(|entry| (id, entry)))
            .filter_map(|(id, entry)| {
                let choice = self.present(id, &entry.demand, entry.fixed, None).ok()?;
                Some(self.need(&entry.demand, &choice.policy))
            })
            .sum();
        let length = state.ledger.queue().len();
        let most = self.max_wait.as_secs();
        let overload = Overload {
            queue_length: length as u64,
            max_queue: self.max_queue as u64,
            need_bytes: need,
            reserved_bytes: state.ledger.reserved(),
            demanded_bytes: state.ledger.reserved() + queued,
            capacity_bytes: state.ledger.capacity(),
            retry_after_seconds: state.pace.seconds(length + 1, Instant::now(), most),
        };
        let detail = format!(
            "{what}: {} of {} bytes of KV cache are demanded, and this request may come to {need}",
            overload.demanded_bytes, overload.capacity_bytes
        );
        let mut refusal = Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "overloaded",
            "There is no room at the moment",
            detail,
        );
        refusal.0.overload = Some(overload);
        refusal
    }
}

/// The server stops before the request's turn came.
fn stopping() -> Refusal {
    Refusal::not_ready("the server is stopping; this request was still waiting for room")
}

#[cfg(test)]
mod tests;
