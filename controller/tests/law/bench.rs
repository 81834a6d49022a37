//! An engine for the law alone: demand and inputs are set by the test, time goes in ticks of 5 s.

use std::collections::BTreeMap;
use std::time::Duration;

use cinch_controller::law::{
    ClassBounds, ClassMemory, ConditionKind, Decision, Inputs, KvMemory, LawConfig, ProcessMemory, Reading,
    Rule, State, step,
};

pub(crate) const RATIOS: [f64; 6] = [1.0, 0.577, 0.45, 0.329, 0.23, 0.184];

/// An engine whose demand and levels a test sets; it takes up every decision at once.
pub(crate) struct Bench {
    pub(crate) config: LawConfig,
    classes: BTreeMap<String, ClassBounds>,
    pub(crate) ratios: Vec<f64>,
    state: State,
    pub(crate) level: u32,
    now: f64,
    pub(crate) inputs: Inputs,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let inputs = Inputs {
            kv: fresh(memory(0.0, 0.0, 0.0)),
            process: fresh(process(0.1, 1.0)),
            latency: BTreeMap::new(),
            quality: BTreeMap::new(),
            levels: BTreeMap::new(),
            unread: None,
        };
        Self {
            config: LawConfig::default(),
            classes: BTreeMap::new(),
            ratios: RATIOS.to_vec(),
            state: State::default(),
            level: 0,
            now: 0.0,
            inputs,
        }
    }

    pub(crate) fn bounds(mut self, bounds: ClassBounds) -> Self {
        self.classes.insert("default".into(), bounds);
        self
    }

    /// One tick of 5 s at a demand of capacity; what is held follows the level.
    pub(crate) fn demand(&mut self, demand: f64) -> Decision {
        let ratio = self.ratios[self.level as usize];
        let held = (demand * ratio).min(1.0);
        let waits = (demand - held / ratio).max(0.0);
        self.inputs.kv = fresh(memory(held, demand - waits, waits));
        self.tick()
    }

    pub(crate) fn tick(&mut self) -> Decision {
        self.inputs.levels = BTreeMap::from([("default".to_owned(), self.level)]);
        let now = Duration::from_secs_f64(self.now);
        let once = || {
            step(
                &self.config,
                &self.classes,
                &self.ratios,
                self.state.clone(),
                &self.inputs,
                now,
            )
        };
        let (state, decision) = once();
        // Compared as text: garbage may hold NaN, which equals nothing.
        assert_eq!(
            format!("{:?}", (&state, &decision)),
            format!("{:?}", once()),
            "the same inputs, the same answer"
        );
        self.state = state;
        self.level = decision.levels["default"];
        self.now += 5.0;
        decision
    }

    pub(crate) fn run(&mut self, demand: f64, seconds: f64) -> Vec<Decision> {
        let end = self.now + seconds;
        let mut all = Vec::new();
        while self.now < end {
            all.push(self.demand(demand));
        }
        all
    }
}

pub(crate) fn has(decision: &Decision, kind: ConditionKind) -> bool {
    decision.conditions.iter().any(|condition| condition.kind == kind)
}

pub(crate) fn fresh<T>(value: T) -> Reading<T> {
    Reading::Fresh { value, age: 0.1 }
}

pub(crate) fn missing<T>(lost: bool) -> Reading<T> {
    Reading::Missing {
        reason: "refused".into(),
        lost,
    }
}

pub(crate) fn process(resident: f64, limit: f64) -> ProcessMemory {
    ProcessMemory { resident, limit }
}

pub(crate) fn memory(used: f64, uncompressed: f64, queued: f64) -> KvMemory {
    let class = ClassMemory {
        used,
        uncompressed,
        queued,
        waiting: if queued > 0.0 { 6.0 } else { 0.0 },
    };
    KvMemory {
        capacity: 1.0,
        classes: BTreeMap::from([("default".to_owned(), class)]),
    }
}

pub(crate) fn moves(decisions: &[Decision]) -> Vec<(u32, u32, Rule)> {
    let all = decisions.iter().flat_map(|decision| &decision.moves);
    all.map(|made| (made.from, made.to, made.rule)).collect()
}
