//! The law's rules one by one, and what must hold for any input.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod bench;
mod properties;

use std::collections::BTreeMap;
use std::time::Duration;

use bench::{Bench, RATIOS, fresh, has, memory, missing, moves, process};
use cinch_controller::law::{
    ClassBounds, ClassMemory, ConditionKind, Decision, Inputs, KvMemory, Latency, LawConfig, Phase, Quality,
    Reading, Rule, State, step,
};

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
