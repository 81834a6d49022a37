//! What the law remembers of one engine. Histories are bounded by their windows and by a count.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

/// Ticks of which two must agree.
const VOTES: usize = 3;
/// Most samples of a window: a window of a day at a tick of 20 s.
const SAMPLES: usize = 4320;
/// Samples the fill rate is taken over.
const SLOPE: usize = 4;

/// The last three votes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Votes(VecDeque<bool>);

impl Votes {
    /// Adds a vote; whether two of the last three are yes.
    pub(super) fn add(&mut self, yes: bool) -> bool {
        self.0.push_back(yes);
        while self.0.len() > VOTES {
            self.0.pop_front();
        }
        self.0.iter().filter(|yes| **yes).count() >= 2
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Recommendations of a window; the most compressed one counts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Window(VecDeque<(f64, u32)>);

impl Window {
    pub(super) fn add(&mut self, now: f64, level: u32, length: f64) {
        self.0.push_back((now, level));
        // The newest sample that is older than the window stays: it shows that the window is whole.
        while self.0.len() > 2 && self.0[1].0 <= now - length || self.0.len() > SAMPLES {
            self.0.pop_front();
        }
    }

    /// The most compressed recommendation, if samples cover the whole window.
    pub(super) fn most(&self, now: f64, length: f64) -> Option<u32> {
        let whole = self.0.front().is_some_and(|(at, _)| *at <= now - length);
        whole.then(|| self.0.iter().map(|(_, level)| *level).max().unwrap_or(0))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// What tightened, and what it was worth then.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Effect {
    before: Option<f64>,
    useless: u32,
}

impl Effect {
    /// Whether stepping for this cause goes nowhere: two steps in a row changed `value` by less than `share`.
    pub(super) fn ineffective(&self) -> bool {
        self.useless >= 2
    }

    /// A step is about to be made for this cause.
    pub(super) fn stepping(&mut self, value: f64, share: f64) {
        match self.before {
            Some(before) if value > before * (1.0 - share) => self.useless += 1,
            _ => self.useless = 0,
        }
        self.before = Some(value);
    }

    pub(super) fn gone(&mut self) {
        *self = Self::default();
    }
}

/// A level that broke its class's floor, and all above it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Bar {
    pub(super) level: u32,
    pub(super) until: f64,
    pub(super) length: f64,
}

/// One class.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct ClassState {
    /// The level it was last wanted at.
    pub(super) level: u32,
    pub(super) last_up: Option<f64>,
    pub(super) last_down: Option<f64>,
    /// Whether the last move tightened.
    pub(super) tightened: Option<bool>,
    pub(super) reversals: VecDeque<f64>,
    pub(super) frozen_until: Option<f64>,
    pub(super) window: Window,
    pub(super) latency: Votes,
    pub(super) latency_effect: Effect,
    pub(super) quality: Votes,
    pub(super) quality_at: Option<f64>,
    pub(super) bar: Option<Bar>,
}

impl ClassState {
    pub(super) fn frozen(&self, now: f64) -> bool {
        self.frozen_until.is_some_and(|until| now < until)
    }

    /// The tightest level that quality lets it have.
    pub(super) fn allowed(&self, most: u32, now: f64) -> u32 {
        match &self.bar {
            Some(bar) if now < bar.until => most.min(bar.level.saturating_sub(1)),
            _ => most,
        }
    }

    /// Counts a move; whether the class reversed too often within an hour.
    pub(super) fn moved(&mut self, tightened: bool, now: f64, most: u32) -> bool {
        if self.tightened.is_some_and(|before| before != tightened) {
            self.reversals.push_back(now);
        }
        self.tightened = Some(tightened);
        while self.reversals.front().is_some_and(|at| *at < now - 3600.0) {
            self.reversals.pop_front();
        }
        self.reversals.len() > most as usize
    }
}

/// What the law remembers of one engine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub(super) started: Option<f64>,
    pub(super) demand: Votes,
    pub(super) process: Votes,
    pub(super) queue: Votes,
    pub(super) usage_effect: Effect,
    pub(super) process_effect: Effect,
    pub(super) queue_effect: Effect,
    pub(super) used: VecDeque<(f64, f64)>,
    pub(super) last_up: Option<f64>,
    pub(super) last_down: Option<f64>,
    pub(super) classes: BTreeMap<String, ClassState>,
}

impl State {
    /// Adds a sample of bytes held (of capacity); seconds until the cache is full at the present rate.
    pub(super) fn full_in(&mut self, now: f64, usage: f64) -> Option<f64> {
        self.used.push_back((now, usage));
        while self.used.len() > SLOPE {
            self.used.pop_front();
        }
        let (first, last) = (self.used.front()?, self.used.back()?);
        let rate = (last.1 - first.1) / (last.0 - first.0);
        // One sample has no rate (0/0); a falling cache never fills.
        (self.used.len() == SLOPE && rate > 0.0).then(|| (1.0 - usage).max(0.0) / rate)
    }
}
