//! What must hold for any input.

use std::collections::BTreeMap;

use cinch_controller::law::{ClassBounds, Inputs, KvMemory, Latency, Quality, Reading, Rule};
use proptest::prelude::*;

use super::bench::{Bench, fresh, memory, missing, moves, process};

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

    /// An engine whose levels or ladder can't be read is not moved, and what was remembered of it stays.
    #[test]
    fn an_unread_engine_never_moves(demand in 0.0_f64..12.0, share in 0.0_f64..1.0, ticks in 1_u32..100) {
        let mut bench = Bench::new();
        bench.run(3.0, 60.0);
        let level = bench.level;
        bench.inputs.unread = Some("policies: refused".into());
        bench.inputs.process = fresh(process(share, 1.0));
        for _ in 0..ticks {
            prop_assert!(bench.demand(demand).moves.is_empty());
        }
        prop_assert_eq!(bench.level, level);
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
