//! Kept sets of every selection method against oracles in f64, written from the papers: they replay every step over
//! plain lists and share nothing with the crate.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

#[path = "../common/mod.rs"]
mod common;
mod fastgen;
mod kvzip;
mod merge;
mod quest;
mod ranks;
mod replay;

use cinch_protocol::SelectMethod;
use common::*;
use replay::{Given, Layer};

/// How far off the cut ranks of a model's rows may be, relative to it, that f32 sorts otherwise than f64. Random rows
/// are never that close.
const NEAR: f64 = 1e-5;

/// Steps through both, and compares what they keep, its scores and what it gives.
fn replay(source: Source, json: &str, steps: &[usize]) {
    let Source { model, text } = source;
    let tolerance = if source.is_captured() { NEAR } else { 0.0 };
    let policy = policy(json);
    let select = policy.select.clone().unwrap();
    let plugin = plugin(policy);
    let mut seq = [open(&plugin, &model, 1, text)];
    let mut oracles: Vec<Layer> = (0..model.layers)
        .map(|layer| Layer::new(&model, text, layer))
        .collect();
    for fresh in steps {
        let outs = step(&plugin, &model, &mut seq, *fresh);
        let layers = check_invariants(&plugin, &seq[0]);
        for ((oracle, layer), out) in oracles.iter_mut().zip(&layers).zip(outs) {
            let given = Given::of(layer, tolerance);
            let outputs = oracle.step(&select, *fresh, &given);
            for (q_head, output) in outputs.iter().enumerate() {
                let last = ((q_head + 1) * fresh - 1) * model.v_dim;
                for (x, exact) in out[last..last + model.v_dim].iter().zip(output) {
                    assert!((f64::from(*x) - exact).abs() < 1e-4, "{json}: {x}, not {exact}");
                }
            }
            for (head, view) in oracle.heads.iter().zip(&layer.heads) {
                assert_eq!(
                    view.positions,
                    head.positions(),
                    "{json}, layer {}, head {} after {} tokens",
                    head.layer,
                    head.kv,
                    seq[0].seen
                );
                for (score, row) in view.scores.iter().flatten().zip(&head.rows) {
                    assert!(
                        (f64::from(*score) - row.score).abs() < 1e-4 * (1.0 + row.score),
                        "{json}: score of {} is {score}, not {}",
                        row.position,
                        row.score
                    );
                }
            }
        }
    }
}

fn plugin_of(json: &str) -> std::sync::Arc<cinch_cache::Plugin> {
    plugin(policy(json))
}

fn steps(prefill: &[usize], decode: usize) -> Vec<usize> {
    let decode = std::iter::repeat_n(1, decode);
    prefill.iter().copied().chain(decode).collect()
}

fn select(method: SelectMethod, rest: &str) -> String {
    let name = method.name();
    format!(r#"{{"store": "exact", "select": {{"method": "{name}", {rest}}}}}"#)
}

fn a_prompt_at_once_and_decoding(source: Source) {
    for method in SelectMethod::ALL {
        let json = select(*method, r#""budget": 0.5, "recent": 16, "interval": 8"#);
        replay(source, &json, &steps(&[130], 40));
    }
}

fn a_prompt_in_chunks_and_intervals_longer_than_a_window(source: Source) {
    for method in SelectMethod::ALL {
        let json = select(
            *method,
            r#""budget": 0.25, "sinks": 2, "recent": 20, "interval": 40"#,
        );
        replay(source, &json, &steps(&[70, 1, 64, 33, 2], 90));
    }
}

fn long_chunks(source: Source) {
    for method in SelectMethod::ALL {
        let json = select(*method, r#""budget": 0.6, "recent": 32, "interval": 16"#);
        replay(source, &json, &steps(&[300, 280], 20));
    }
}

fn a_second_turn(source: Source) {
    for method in SelectMethod::ALL {
        let json = select(
            *method,
            r#""budget": 0.3, "sinks": 0, "recent": 16, "interval": 1"#,
        );
        replay(source, &json, &[steps(&[60], 20), steps(&[50], 10)].concat());
    }
}

/// Nothing left to choose, everything kept, and sinks beyond what is left.
fn budgets_at_their_ends(source: Source) {
    for method in SelectMethod::ALL {
        for (rest, prompt, decode) in [
            (
                r#""budget": 0.02, "sinks": 0, "recent": 16, "interval": 1"#,
                [1, 50, 25],
                20,
            ),
            (r#""budget": 1.0, "recent": 16, "interval": 4"#, [20, 2, 2], 20),
            (
                r#""budget": 0.75, "sinks": 9, "recent": 20, "interval": 16"#,
                [40, 30, 2],
                40,
            ),
            (
                r#""budget": 0.07, "sinks": 64, "recent": 16, "interval": 3"#,
                [30, 30, 30],
                12,
            ),
        ] {
            replay(source, &select(*method, rest), &steps(&prompt, decode));
        }
    }
}

fn every_field_of_a_method_counts(source: Source) {
    use SelectMethod::{Fastgen, KeyNorm, Keyformer, Scissorhands, Snapkv};
    for (method, fields) in [
        (Snapkv, r#""window": 7"#),
        (Snapkv, r#""window": 40, "kernel": 1"#),
        (Snapkv, r#""kernel": 15"#),
        (Scissorhands, r#""window": 16"#),
        (Scissorhands, r#""window": 1"#),
        (Keyformer, r#""seed": 4294967295"#),
        (Keyformer, r#""seed": 7, "temperature": 8.0"#),
        (Keyformer, r#""temperature": 1.0"#),
        (KeyNorm, r#""skip_layers": 1"#),
        (Fastgen, r#""recover": 0.5"#),
        (Fastgen, r#""recover": 1.0"#),
    ] {
        let json = select(
            method,
            &format!(r#""budget": 0.4, "recent": 16, "interval": 5, {fields}"#),
        );
        replay(source, &json, &steps(&[90, 30], 60));
    }
}

/// Heads of one text that come to each of the policies, by how much they are to recover.
#[test]
fn profiled_heads_keep_what_they_need() {
    let mut kept = Vec::new();
    for recover in [0.5, 0.6, 0.7, 0.8, 0.9, 0.99] {
        let json = select(
            SelectMethod::Fastgen,
            &format!(r#""budget": 1.0, "recent": 16, "interval": 8, "recover": {recover}"#),
        );
        replay(
            Source::random(SMALL, 27),
            &json,
            &[steps(&[150], 40), steps(&[40], 20)].concat(),
        );
        let plugin = plugin(policy(&json));
        let mut seq = [open(&plugin, &SMALL, 1, 27)];
        step(&plugin, &SMALL, &mut seq, 150);
        let layers = check_invariants(&plugin, &seq[0]);
        let heads = layers.iter().flat_map(|layer| &layer.heads);
        kept.push(heads.map(|head| head.positions.len()).collect::<Vec<_>>());
    }
    let means: Vec<usize> = kept.iter().map(|heads| heads.iter().sum()).collect();
    assert!(means.is_sorted() && means[0] < means[5], "{kept:?}");
    assert!(kept[5].iter().all(|kept| *kept == 150), "{kept:?}");
    assert!(
        kept.iter()
            .any(|heads| heads.iter().any(|kept| *kept != heads[0])),
        "heads differ: {kept:?}"
    );
}

fn layers_and_heads_compete_and_rows_merge(source: Source, methods: &[SelectMethod]) {
    for method in methods.iter().filter(|method| method.evicts()) {
        let adaptive = method.fields().contains(&"heads");
        for wrapper in [
            r#""layers": "pyramid""#,
            r#""layers": "pyramid", "beta": 3"#,
            r#""merge": "d2o""#,
            r#""merge": "cam""#,
            r#""merge": "cam", "seed": 5"#,
            r#""heads": "adaptive""#,
            r#""heads": "adaptive", "floor": 0.0"#,
            r#""heads": "adaptive", "floor": 1.0"#,
            r#""heads": "adaptive", "layers": "pyramid", "merge": "d2o""#,
            r#""heads": "adaptive", "layers": "pyramid", "merge": "cam""#,
        ] {
            if adaptive || !wrapper.contains("adaptive") {
                let budget = r#""budget": 0.45, "recent": 16, "interval": 7"#;
                let json = select(*method, &format!("{budget}, {wrapper}"));
                replay(source, &json, &steps(&[80, 2, 60], 30));
            }
        }
    }
}

#[test]
fn noise_depends_on_the_seed_alone() {
    let kept = |seed: u32, request: usize| {
        let json = select(
            SelectMethod::Keyformer,
            &format!(r#""budget": 0.3, "recent": 16, "seed": {seed}"#),
        );
        let plugin = plugin(policy(&json));
        let mut seq = [open(&plugin, &SMALL, request, 5)];
        step(&plugin, &SMALL, &mut seq, 200);
        check_invariants(&plugin, &seq[0])[0].heads[0].positions.clone()
    };
    assert_eq!(
        kept(1, 1),
        kept(1, 2),
        "requests of one seed and text keep the same rows"
    );
    assert_ne!(kept(1, 1), kept(2, 1));
}

mod random {
    use super::*;

    #[test]
    fn a_prompt_at_once_and_decoding() {
        super::a_prompt_at_once_and_decoding(Source::random(SMALL, 20));
    }

    #[test]
    fn a_prompt_in_chunks_and_intervals_longer_than_a_window() {
        super::a_prompt_in_chunks_and_intervals_longer_than_a_window(Source::random(SMALL, 21));
    }

    #[test]
    fn long_chunks() {
        super::long_chunks(Source::random(SMALL, 22));
    }

    #[test]
    fn a_decoded_token_attends_to_the_chosen_pages_and_nothing_else() {
        quest::a_decoded_token_attends_to_the_chosen_pages_and_nothing_else(Source::random(SMALL, 31));
    }

    #[test]
    fn a_second_turn() {
        super::a_second_turn(Source::random(SMALL, 23));
    }

    #[test]
    fn budgets_at_their_ends() {
        super::budgets_at_their_ends(Source::random(SMALL, 26));
    }

    #[test]
    fn every_field_of_a_method_counts() {
        super::every_field_of_a_method_counts(Source::random(SMALL, 24));
    }

    #[test]
    fn layers_and_heads_compete_and_rows_merge() {
        super::layers_and_heads_compete_and_rows_merge(Source::random(SMALL, 25), SelectMethod::ALL);
    }
}

/// On rows of a real model.
#[cfg(feature = "captured")]
mod real {
    use super::*;

    #[test]
    fn a_prompt_at_once_and_decoding() {
        // Of more layers, Quest leaves out pages: that is a test of its own.
        super::a_prompt_at_once_and_decoding(Source::captured(2));
    }

    #[test]
    fn a_decoded_token_attends_to_the_chosen_pages_and_nothing_else() {
        quest::a_decoded_token_attends_to_the_chosen_pages_and_nothing_else(Source::captured(4));
    }

    #[test]
    fn last_layers() {
        for method in SelectMethod::ALL.iter().filter(|method| method.evicts()) {
            let json = select(*method, r#""budget": 0.4, "recent": 16, "interval": 8"#);
            replay(Source::captured(4), &json, &steps(&[150, 100], 16));
        }
    }

    /// In the steps that the model took.
    #[test]
    fn the_prompt_that_was_captured() {
        for method in SelectMethod::ALL {
            let json = select(*method, r#""budget": 0.3, "recent": 32, "interval": 16"#);
            replay(Source::captured(2), &json, &captured::steps());
        }
    }

    #[test]
    fn a_prompt_in_chunks_and_intervals_longer_than_a_window() {
        super::a_prompt_in_chunks_and_intervals_longer_than_a_window(Source::captured(2));
    }

    #[test]
    fn a_second_turn() {
        super::a_second_turn(Source::captured(2));
    }

    #[test]
    fn budgets_at_their_ends() {
        super::budgets_at_their_ends(Source::captured(1));
    }

    #[test]
    fn every_field_of_a_method_counts() {
        super::every_field_of_a_method_counts(Source::captured(2));
    }

    #[test]
    fn layers_and_heads_compete_and_rows_merge() {
        super::layers_and_heads_compete_and_rows_merge(Source::captured(2), SelectMethod::ALL);
    }
}
