//! The law's rules one by one, and what must hold for any input.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

use std::collections::BTreeMap;
use std::time::Duration;

use cinch_controller::law::{
    ClassBounds, ClassMemory, ConditionKind, Decision, Inputs, KvMemory, Latency, LawConfig, Phase,
    ProcessMemory, Quality, Reading, Rule, State, step,
};
use proptest::prelude::*;

const RATIOS: [f64; 6] = [1.0, 0.577, 0.45, 0.329, 0.23, 0.184];

/// An engine whose demand and levels a test sets; it takes up every decision at once.
struct Bench {
    config: LawConfig,
    classes: BTreeMap<String, ClassBounds>,
    ratios: Vec<f64>,
    state: State,
    level: u32,
    now: f64,
    inputs: Inputs,
}

impl Bench {
    fn new() -> Self {
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

    fn bounds(mut self, bounds: ClassBounds) -> Self {
        self.classes.insert("default".into(), bounds);
        self
    }

    /// One tick of 5 s at a demand of capacity; what is held follows the level.
    fn demand(&mut self, demand: f64) -> Decision {
        let ratio = self.ratios[self.level as usize];
        let held = (demand * ratio).min(1.0);
        let waits = (demand - held / ratio).max(0.0);
        self.inputs.kv = fresh(memory(held, demand - waits, waits));
        self.tick()
    }

    fn tick(&mut self) -> Decision {
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

    fn run(&mut self, demand: f64, seconds: f64) -> Vec<Decision> {
        let end = self.now + seconds;
        let mut all = Vec::new();
        while self.now < end {
            all.push(self.demand(demand));
        }
        all
    }
}

fn has(decision: &Decision, kind: ConditionKind) -> bool {
    decision.conditions.iter().any(|condition| condition.kind == kind)
}

fn fresh<T>(value: T) -> Reading<T> {
    Reading::Fresh { value, age: 0.1 }
}

fn missing<T>(lost: bool) -> Reading<T> {
    Reading::Missing {
        reason: "refused".into(),
        lost,
    }
}

fn process(resident: f64, limit: f64) -> ProcessMemory {
    ProcessMemory { resident, limit }
}

fn memory(used: f64, uncompressed: f64, queued: f64) -> KvMemory {
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

fn moves(decisions: &[Decision]) -> Vec<(u32, u32, Rule)> {
    let all = decisions.iter().flat_map(|decision| &decision.moves);
    all.map(|made| (made.from, made.to, made.rule)).collect()
}

#[test]
fn a_step_of_four_times_the_load_is_met_within_thirty_seconds_and_undone_after_it() {
    for demand in [1.2, 2.0, 3.0, 4.0] {
        let mut bench = Bench::new();
        let calm = bench.run(demand / 4.0, 600.0);
        let settled = bench.level;
        let up = bench.run(demand, 30.0);
        let held = demand * RATIOS[bench.level as usize];
        assert!(
            held <= 0.85,
            "{demand}: {held} at level {} after {:?}",
            bench.level,
            moves(&up)
        );
        let highest = bench.level;
        let after = bench.run(demand, 600.0);
        assert!(moves(&after).is_empty(), "settled: {:?}", moves(&after));
        let down = bench.run(0.1, 300.0 + 120.0 * f64::from(highest) + 10.0);
        assert_eq!(bench.level, 0, "{:?}", moves(&down));
        assert!(
            moves(&down)
                .iter()
                .all(|(from, to, rule)| to < from && *rule == Rule::Down)
        );
        assert!(settled <= 1 && moves(&calm).len() <= 1, "{:?}", moves(&calm));
    }
}

#[test]
fn moderate_demand_tightens_one_level_in_two_of_three_ticks() {
    let mut bench = Bench::new();
    bench.run(0.84, 100.0);
    bench.demand(0.86);
    assert_eq!(bench.level, 0, "one tick of three");
    let second = bench.demand(0.86);
    assert_eq!(moves(&[second]), [(0, 1, Rule::Up)]);
    assert!(moves(&bench.run(0.86, 200.0)).is_empty());
}

#[test]
fn a_cache_that_fills_fast_does_not_wait_for_a_second_tick() {
    let mut bench = Bench::new();
    bench.run(0.5, 100.0);
    let filling = [bench.demand(0.65), bench.demand(0.8)];
    assert_eq!(
        moves(&filling).first().map(|made| made.2),
        Some(Rule::Critical),
        "{filling:?}"
    );
}

#[test]
fn a_start_adopts_what_it_finds_and_only_a_critical_input_moves_it() {
    let mut bench = Bench::new();
    let first = bench.run(0.9, 55.0);
    assert!(moves(&first).is_empty());
    assert_eq!(first[0].phase, Phase::Init);
    let mut bench = Bench::new();
    bench.level = 3;
    assert!(moves(&bench.run(0.9, 290.0)).is_empty(), "no window is whole yet");
    let mut bench = Bench::new();
    let first = bench.demand(3.0);
    assert_eq!(moves(&[first]), [(0, 2, Rule::Critical)]);
}

#[test]
fn a_level_somebody_else_set_is_taken_up() {
    let mut bench = Bench::new();
    bench.run(3.0, 60.0);
    assert!(bench.level > 0);
    bench.level = 0;
    bench.inputs.kv = fresh(memory(0.3, 0.3, 0.0));
    let decision = bench.tick();
    assert!(decision.moves.is_empty());
    assert_eq!(decision.levels["default"], 0);
}

#[test]
fn the_ceiling_holds_and_is_said() {
    let mut bench = Bench::new().bounds(ClassBounds {
        max_level: Some(2),
        ..ClassBounds::default()
    });
    let all = bench.run(4.0, 120.0);
    assert_eq!(bench.level, 2);
    let last = all.last().unwrap();
    assert!(has(last, ConditionKind::QualityCapped));
    assert_eq!(last.phase, Phase::Guarded);
}

#[test]
fn the_lowest_rank_gives_way_first() {
    let bench = Bench::new();
    let batch = ClassBounds {
        rank: 10,
        ..ClassBounds::default()
    };
    let bounds = BTreeMap::from([("batch".to_owned(), batch)]);
    let class = ClassMemory {
        used: 0.45,
        uncompressed: 0.45,
        queued: 0.0,
        waiting: 0.0,
    };
    let classes = BTreeMap::from([("batch".to_owned(), class), ("default".to_owned(), class)]);
    let mut levels = BTreeMap::from([("batch".to_owned(), 0), ("default".to_owned(), 0)]);
    let mut state = State::default();
    for second in 0..100 {
        let inputs = Inputs {
            kv: fresh(KvMemory {
                capacity: 1.0,
                classes: classes.clone(),
            }),
            levels: levels.clone(),
            ..bench.inputs.clone()
        };
        let now = Duration::from_secs(second * 5);
        let (next, decision) = step(&bench.config, &bounds, &RATIOS, state, &inputs, now);
        (state, levels) = (next, decision.levels);
    }
    assert_eq!((levels["batch"], levels["default"]), (1, 0));
}

#[test]
fn process_memory_tightens_without_kv_figures_and_gives_up_where_it_changes_nothing() {
    let mut bench = Bench::new();
    bench.run(0.3, 100.0);
    bench.inputs.kv = missing(true);
    bench.inputs.process = fresh(process(0.95, 1.0));
    let all: Vec<Decision> = (0..60).map(|_| bench.tick()).collect();
    assert_eq!(
        bench.level,
        3,
        "two steps without effect are enough: {:?}",
        moves(&all)
    );
    let last = all.last().unwrap();
    assert!(has(last, ConditionKind::ActuatorIneffective) && has(last, ConditionKind::MemoryMissing));
    assert!(last.renew, "one input is not all");
}

#[test]
fn missing_inputs_hold_and_lost_ones_let_the_lease_end() {
    let mut bench = Bench::new();
    bench.run(3.0, 60.0);
    let level = bench.level;
    bench.inputs.kv = Reading::Stale { age: 5.0 };
    assert!(bench.tick().renew);
    bench.inputs.kv = missing(true);
    bench.inputs.process = missing(true);
    for _ in 0..200 {
        let decision = bench.tick();
        assert!(decision.moves.is_empty() && !decision.renew);
        assert_eq!(decision.phase, Phase::Fallback);
    }
    assert_eq!(bench.level, level);
    bench.inputs.process = fresh(process(0.1, 1.0));
    // What was low before the gap shows nothing about the gap.
    assert!(moves(&bench.run(0.1, 295.0)).is_empty());
}

fn latency(ttft: f64, samples: f64) -> BTreeMap<String, Reading<Latency>> {
    let latency = Latency {
        ttft_p95: Some(ttft),
        ttft_samples: samples,
        itl_p95: None,
        itl_samples: 0.0,
    };
    BTreeMap::from([("default".to_owned(), fresh(latency))])
}

#[test]
fn latency_counts_only_with_samples_and_where_memory_is_a_cause() {
    let slo = ClassBounds {
        ttft_slo: Some(1.0),
        ..ClassBounds::default()
    };
    for (ttft, samples, demand, moved) in [
        (2.0, 50.0, 0.75, true),
        (2.0, 10.0, 0.75, false),
        (1.05, 50.0, 0.75, false),
        (2.0, 50.0, 0.3, false),
    ] {
        let mut bench = Bench::new().bounds(slo.clone());
        bench.run(demand, 60.0);
        bench.inputs.latency = latency(ttft, samples);
        let made = moves(&bench.run(demand, 12.0));
        let first = made.first() == Some(&(0, 1, Rule::Latency));
        assert_eq!(first, moved, "{ttft} {samples} {demand}: {made:?}");
    }
}

fn quality(error: f64) -> BTreeMap<String, Reading<Quality>> {
    let quality = Quality {
        error,
        samples: 100.0,
    };
    BTreeMap::from([("default".to_owned(), fresh(quality))])
}

#[test]
fn quality_goes_back_bars_the_level_and_wins_against_memory() {
    let floor = ClassBounds {
        error_floor: Some(0.1),
        ..ClassBounds::default()
    };
    let mut bench = Bench::new().bounds(floor.clone());
    bench.run(3.0, 60.0);
    assert_eq!(bench.level, 4, "0.23 · 3 fits");
    bench.inputs.quality = quality(0.12);
    let all = bench.run(3.0, 300.0);
    assert_eq!(moves(&all)[0], (4, 3, Rule::QualitySoft));
    assert!(has(all.last().unwrap(), ConditionKind::QualityCapped));
    bench.inputs.quality = quality(0.01);
    let barred = moves(&bench.run(3.0, 600.0));
    assert!(barred.iter().all(|made| made.1 < made.0), "{barred:?}");

    let mut bench = Bench::new().bounds(floor);
    bench.run(3.0, 60.0);
    bench.inputs.quality = quality(0.5);
    let hard = bench.demand(3.0);
    assert_eq!(moves(&[hard]), [(4, 0, Rule::QualityHard)]);
    bench.inputs.quality = quality(0.01);
    assert!(moves(&bench.run(3.0, 1000.0)).is_empty(), "memory has to wait");
}

#[test]
fn what_changes_direction_too_often_is_frozen_tight() {
    let mut bench = Bench::new();
    bench.config.down_window = 5.0;
    bench.config.down_cooldown = 5.0;
    bench.config.reversals = 2;
    let mut all = Vec::new();
    for _ in 0..20 {
        all.extend(bench.run(2.0, 60.0));
        all.extend(bench.run(0.1, 60.0));
    }
    let frozen = all
        .iter()
        .position(|decision| has(decision, ConditionKind::FlapDetected))
        .unwrap();
    assert_eq!(all[frozen].phase, Phase::Frozen);
    assert!(all[frozen].levels["default"] > 0);
    let during: Vec<_> = all[frozen + 1..].iter().take(200).collect();
    assert!(during.len() == 200 && during.iter().all(|decision| decision.moves.is_empty()));
}

#[test]
fn settings_out_of_range_are_named() {
    assert_eq!(LawConfig::default().validate(), Ok(()));
    let fault = |config: LawConfig| config.validate().unwrap_err();
    let close = fault(LawConfig {
        down: 0.84,
        ..LawConfig::default()
    });
    assert_eq!((close.field.as_str(), close.given.as_str()), ("down", "0.84"));
    let nan = fault(LawConfig {
        up: f64::NAN,
        ..LawConfig::default()
    });
    assert_eq!(nan.field, "up");
    let bounds = ClassBounds {
        min_level: 3,
        max_level: Some(1),
        ..ClassBounds::default()
    };
    assert_eq!(bounds.validate().unwrap_err().field, "max_level");
}

fn ladder() -> impl Strategy<Value = Vec<f64>> {
    proptest::collection::vec(0.3_f64..0.95, 1..7).prop_map(|factors| {
        let mut ratios = vec![1.0];
        for factor in factors {
            ratios.push(ratios[ratios.len() - 1] * factor);
        }
        ratios
    })
}

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(f64::NEG_INFINITY),
        -1e9_f64..1e9,
        0.0_f64..4.0
    ]
}

fn reading<T: std::fmt::Debug + Clone>(value: impl Strategy<Value = T>) -> impl Strategy<Value = Reading<T>> {
    prop_oneof![
        3 => value.prop_map(fresh),
        1 => Just(Reading::Stale { age: 9.0 }),
        1 => any::<bool>().prop_map(missing),
    ]
}

fn garbage() -> impl Strategy<Value = Inputs> {
    let kv = (number(), number(), number(), number()).prop_map(|(capacity, used, uncompressed, queued)| {
        KvMemory {
            capacity,
            ..memory(used, uncompressed, queued)
        }
    });
    let process = (number(), number()).prop_map(|(resident, limit)| process(resident, limit));
    let latency = (number(), number()).prop_map(|(p95, samples)| Latency {
        ttft_p95: Some(p95),
        ttft_samples: samples,
        itl_p95: Some(p95),
        itl_samples: samples,
    });
    let quality = (number(), number()).prop_map(|(error, samples)| Quality { error, samples });
    let all = (reading(kv), reading(process), reading(latency), reading(quality));
    all.prop_map(|(kv, process, latency, quality)| Inputs {
        kv,
        process,
        latency: BTreeMap::from([("default".to_owned(), latency)]),
        quality: BTreeMap::from([("default".to_owned(), quality)]),
        levels: BTreeMap::new(),
        unread: None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Constant demand, and ratios that are off by up to a fifth: it settles, in one direction, and stays.
    #[test]
    fn constant_demand_settles(demand in 0.0_f64..12.0, ratios in ladder(), off in 0.82_f64..1.0, start in 0_u32..7) {
        let mut bench = Bench::new();
        bench.level = start.min(ratios.len() as u32 - 1);
        bench.ratios = ratios;
        let settling = bench.run(demand * off, 300.0 + 120.0 * 8.0 + 60.0);
        let after = bench.run(demand * off, 1800.0);
        prop_assert!(moves(&after).is_empty(), "{:?} then {:?}", moves(&settling), moves(&after));
        let up: Vec<bool> = moves(&settling).iter().map(|(from, to, _)| to > from).collect();
        prop_assert!(up.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", moves(&settling));
    }

    /// Whatever is read: bounded levels, bounded steps, no panic; missing memory never loosens.
    #[test]
    fn any_input_keeps_the_bounds(
        ticks in proptest::collection::vec(garbage(), 1..60),
        ratios in ladder(),
        max in 0_u32..8,
    ) {
        let mut bench = Bench::new().bounds(ClassBounds {
            max_level: Some(max), ttft_slo: Some(0.5), error_floor: Some(0.1), ..ClassBounds::default()
        });
        bench.config.warm_up = 0.0;
        let last = (ratios.len() as u32 - 1).min(max);
        bench.ratios = ratios;
        for inputs in ticks {
            bench.inputs = inputs;
            let decision = bench.tick();
            prop_assert!(decision.levels["default"] <= last);
            for made in &decision.moves {
                prop_assert!(made.from != made.to);
                prop_assert!(made.to < made.from || made.to - made.from <= 2);
                let quality = matches!(made.rule, Rule::QualityHard | Rule::QualitySoft);
                prop_assert!(decision.demand.is_some() || made.tightens() || quality);
            }
        }
    }

    /// Nothing that is missing moves anything.
    #[test]
    fn missing_inputs_never_move(level in 0_u32..6, lost in proptest::collection::vec(any::<bool>(), 1..100)) {
        let mut bench = Bench::new();
        bench.level = level;
        bench.config.warm_up = 0.0;
        for lost in lost {
            bench.inputs.kv = missing(lost);
            bench.inputs.process = missing(lost);
            prop_assert!(bench.tick().moves.is_empty());
        }
        prop_assert_eq!(bench.level, level);
    }
}
