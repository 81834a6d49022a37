//! Quest's pages, written from the paper: what a decoded token attends to, and that it attends to nothing else.

use cinch_cache::{HeadView, LayerView, PluginSettings};

use crate::common::*;
use crate::ranks::dot;
use crate::replay::wide;
use crate::{plugin_of, steps};

/// Runs of sixteen rows, from each block's first one on.
fn pages(head: &HeadView) -> Vec<std::ops::Range<usize>> {
    let mut start = 0;
    let mut pages = Vec::new();
    for block in &head.blocks {
        // Tokens that share a channel's scale can't be attended to apart.
        let size = if block.channels { 32 } else { 16 };
        pages.extend(
            (0..block.rows)
                .step_by(size)
                .map(|row| start + row..start + block.rows.min(row + size)),
        );
        start += block.rows;
    }
    pages
}

/// What the paper chooses of a head whose keys are as they came.
struct Choice {
    positions: Vec<u32>,
    /// How far the last page taken and the first one left are apart, over the largest bound.
    margin: f64,
}

fn choose(
    source: Source,
    view: &HeadView,
    (layer, kv): (usize, usize),
    token: usize,
    (budget, sinks, recent): (f64, usize, usize),
) -> Choice {
    let key = |row: usize| {
        let position = view.positions[row] as usize;
        wide(&source.vector(layer, What::K, kv, position))
    };
    let group = source.model.group;
    let queries: Vec<Vec<f64>> = (kv * group..(kv + 1) * group)
        .map(|head| wide(&source.vector(layer, What::Q, head, token)))
        .collect();
    let kept = view.positions.len();
    let total = (budget * kept as f64 - 1e-9).ceil() as usize;
    let always = |rows: &std::ops::Range<usize>| {
        let mut positions = rows.clone().map(|row| view.positions[row] as usize);
        positions.any(|position| position < sinks || position + recent > token)
    };
    let (mut chosen, others): (Vec<_>, Vec<_>) = pages(view).into_iter().partition(always);
    let bound = |rows: &std::ops::Range<usize>| {
        let keys: Vec<Vec<f64>> = rows.clone().map(key).collect();
        let extreme = |c: usize, pick: fn(f64, f64) -> f64| keys.iter().map(|k| k[c]).reduce(pick).unwrap();
        let of = |q: &Vec<f64>| -> f64 {
            (0..q.len())
                .map(|c| (q[c] * extreme(c, f64::min)).max(q[c] * extreme(c, f64::max)))
                .sum()
        };
        let largest = queries.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
        for (q, k) in queries.iter().flat_map(|q| keys.iter().map(move |k| (q, k))) {
            assert!(
                dot(q, k) <= largest + 1e-9 * (1.0 + largest.abs()),
                "it is a bound"
            );
        }
        largest
    };
    let mut others: Vec<(f64, std::ops::Range<usize>)> =
        others.into_iter().map(|rows| (bound(&rows), rows)).collect();
    others.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut taken: usize = chosen.iter().map(ExactSizeIterator::len).sum();
    let mut margin = f64::INFINITY;
    for (index, (bound, page)) in others.iter().enumerate() {
        if taken >= total {
            if index > 0 {
                margin = (others[index - 1].0 - bound) / others[0].0.abs();
            }
            break;
        }
        taken += page.len();
        chosen.push(page.clone());
    }
    let mut positions: Vec<u32> = chosen
        .into_iter()
        .flatten()
        .map(|row| view.positions[row])
        .collect();
    positions.sort_unstable();
    Choice { positions, margin }
}

/// What a head attends to in a step: its rows before, in their blocks, and the token itself.
fn with_token(view: &HeadView, token: usize) -> HeadView {
    let mut view = view.clone();
    view.positions.push(token as u32);
    match view.blocks.last_mut() {
        Some(block) if block.rows < block.capacity => block.rows += 1,
        _ => {
            let block = view.blocks[view.blocks.len() - 1];
            view.blocks.push(cinch_cache::BlockView {
                rows: 1,
                channels: false,
                ..block
            });
        }
    }
    view
}

/// The largest difference between a decode step's output and attention over exactly what the paper chooses; heads whose
/// pages are closer than `margin` are left out. Answers with how many were not.
fn compare(
    source: Source,
    before: &[LayerView],
    outs: &[Vec<f32>],
    token: usize,
    fields: (f64, usize, usize),
    (margin, tolerance): (f64, f64),
) -> usize {
    let Source { model, text } = source;
    let mut compared = 0;
    for (layer, (view, out)) in before.iter().zip(outs).enumerate() {
        for (kv, head) in view.heads.iter().enumerate() {
            let view = with_token(head, token);
            let choice = choose(source, &view, (layer, kv), token, fields);
            if choice.margin < margin {
                continue;
            }
            compared += 1;
            for head in kv * model.group..(kv + 1) * model.group {
                let exact = attention(&model, text, layer, head, token, &choice.positions);
                for (x, exact) in out[head * model.v_dim..].iter().zip(exact) {
                    assert!(
                        (f64::from(*x) - exact).abs() < tolerance,
                        "layer {layer}, head {head}, token {token}: {x}, not {exact}"
                    );
                }
            }
        }
    }
    compared
}

pub(crate) fn a_decoded_token_attends_to_the_chosen_pages_and_nothing_else(source: Source) {
    let Source { model, text } = source;
    for (budget, sinks, recent, prefill) in [
        (0.3, 4, 16, vec![300]),
        (0.02, 0, 16, vec![150]),
        (0.6, 20, 40, vec![50, 70, 90]),
        (0.07, 64, 16, vec![600]),
    ] {
        let plugin = plugin_of(&format!(
            r#"{{"store": "exact", "select": {{"method": "quest", "budget": {budget}, "sinks": {sinks}, "recent": {recent},
                "skip_layers": 0}}}}"#
        ));
        let mut seq = [open(&plugin, &model, 1, text)];
        for fresh in prefill {
            step(&plugin, &model, &mut seq, fresh);
        }
        let (mut sparse, heads) = (0, model.layers * model.kv_heads);
        for _ in 0..40 {
            let (before, token) = (check_invariants(&plugin, &seq[0]), seq[0].seen);
            let outs = step(&plugin, &model, &mut seq, 1);
            let fields = (budget, sinks, recent);
            assert_eq!(
                compare(source, &before, &outs, token, fields, (1e-6, 1e-4)),
                heads
            );
            let view = with_token(&before[0].heads[0], token);
            let chosen = choose(source, &view, (0, 0), token, fields).positions.len();
            sparse += usize::from(chosen < token + 1);
            let least = (budget * (token + 1) as f64).ceil() as usize;
            assert!(
                chosen >= least && chosen < least.max(sinks + recent) + 64,
                "{chosen} of {token}"
            );
            // Statistics are those of what was attended to.
            let after = check_invariants(&plugin, &seq[0]);
            if token.is_multiple_of(8) {
                let (old, new) = (
                    before[1].scores.as_ref().unwrap(),
                    after[1].scores.as_ref().unwrap(),
                );
                let mut expected = vec![0.0; token + 1];
                for head in 0..model.q_heads() {
                    let kv = head / model.group;
                    let view = with_token(&before[1].heads[kv], token);
                    let positions = choose(source, &view, (1, kv), token, fields).positions;
                    let weights = weights(&model, text, 1, head, token, &positions);
                    for (position, weight) in positions.iter().zip(weights) {
                        expected[*position as usize] += 8.0 * weight / model.q_heads() as f64;
                    }
                }
                for (row, (new, expected)) in new.iter().zip(expected).enumerate() {
                    let grown = f64::from(*new) - f64::from(old.get(row).copied().unwrap_or(0.0));
                    assert!(
                        (grown - expected).abs() < 1e-3,
                        "row {row}: {grown}, not {expected}"
                    );
                }
            }
        }
        assert_eq!(sparse, 40, "some rows are left out");
    }
}

/// A long head is cut into parts for every thread, which begin where pages do.
#[test]
fn long_heads_are_attended_to_in_parts() {
    let json =
        r#"{"store": "exact", "select": {"method": "quest", "budget": 0.6, "recent": 16, "skip_layers": 0}}"#;
    let plugin = plugin_with(policy(json), PluginSettings::default());
    let mut seq = [open(&plugin, &SMALL, 1, 32)];
    step(&plugin, &SMALL, &mut seq, 2000);
    for _ in 0..2 {
        let (before, token) = (check_invariants(&plugin, &seq[0]), seq[0].seen);
        let outs = step(&plugin, &SMALL, &mut seq, 1);
        assert_eq!(
            compare(
                Source::random(SMALL, 32),
                &before,
                &outs,
                token,
                (0.6, 4, 16),
                (1e-6, 1e-4)
            ),
            4
        );
    }
}

#[test]
fn with_a_budget_of_everything_nothing_is_left_out() {
    for rest in ["", r#", "quantize": {"k_bits": 4, "v_bits": 4, "residual": 16}"#] {
        let quest = plugin_of(&format!(
            r#"{{"select": {{"method": "quest", "budget": 1.0, "skip_layers": 0}}{rest}}}"#
        ));
        let plain = plugin_of(&format!("{{{}}}", rest.trim_start_matches(", ")));
        let mut both = [[open(&quest, &SMALL, 1, 33)], [open(&plain, &SMALL, 1, 33)]];
        for fresh in steps(&[150], 30) {
            let a = step(&quest, &SMALL, &mut both[0], fresh);
            let b = step(&plain, &SMALL, &mut both[1], fresh);
            assert_eq!(a, b);
        }
    }
}

/// Bounds are those of keys as they are packed: where pages are not close to each other, they are the ones of the keys
/// as they came.
#[test]
fn packed_keys_are_chosen_alike() {
    for quantize in [
        r#"{"k_bits": 8, "v_bits": 8, "residual": 16}"#,
        r#"{"k_bits": 8, "v_bits": 8, "rotate_k": true, "residual": 16}"#,
        r#"{"method": "kivi", "k_bits": 8, "v_bits": 8, "residual": 16}"#,
    ] {
        let plugin = plugin_of(&format!(
            r#"{{"select": {{"method": "quest", "budget": 0.4, "recent": 16, "skip_layers": 0}}, "quantize": {quantize}}}"#
        ));
        let mut seq = [open(&plugin, &SMALL, 1, 34)];
        step(&plugin, &SMALL, &mut seq, 400);
        let mut compared = 0;
        for _ in 0..40 {
            let (before, token) = (check_invariants(&plugin, &seq[0]), seq[0].seen);
            let outs = step(&plugin, &SMALL, &mut seq, 1);
            compared += compare(
                Source::random(SMALL, 34),
                &before,
                &outs,
                token,
                (0.4, 4, 16),
                (0.003, 0.03),
            );
        }
        assert!(compared > 40, "{quantize}: {compared} heads were clear");
    }
}

#[test]
fn first_layers_attend_to_everything() {
    let plugin = plugin_of(
        r#"{"store": "exact", "select": {"method": "quest", "budget": 0.1, "recent": 16, "skip_layers": 1}}"#,
    );
    let mut seq = [open(&plugin, &SMALL, 1, 35)];
    step(&plugin, &SMALL, &mut seq, 200);
    let outs = step(&plugin, &SMALL, &mut seq, 1);
    assert!(against_full(&SMALL, &seq, 1, 0, &outs[0]) < 1e-5);
    assert!(against_full(&SMALL, &seq, 1, 1, &outs[1]) > 1e-3);
}

/// Bounds come with the first decoded token and go with a retune; a head that another method left gaps in is served.
#[test]
fn bounds_follow_the_policy_and_the_rows() {
    let json =
        r#"{"store": "exact", "select": {"method": "quest", "budget": 0.3, "recent": 16, "skip_layers": 0}}"#;
    let fields = (0.3, 4, 16);
    let plugin =
        plugin_of(r#"{"store": "exact", "select": {"method": "streaming", "budget": 0.8, "recent": 32}}"#);
    let mut seq = [open(&plugin, &SMALL, 1, 36)];
    step(&plugin, &SMALL, &mut seq, 400);
    let without = seq[0].cache.bytes();
    plugin.retune(1, None, policy(json)).unwrap();
    let decode = |seq: &mut [Seq; 1], text: u64| {
        let (before, token) = (check_invariants(&plugin, &seq[0]), seq[0].seen);
        seq[0].text = text;
        let outs = step(&plugin, &SMALL, seq, 1);
        // Keys of other texts are other keys: only steps of the first one have an oracle.
        if text == 36 {
            assert_eq!(
                compare(
                    Source::random(SMALL, 36),
                    &before,
                    &outs,
                    token,
                    fields,
                    (1e-6, 1e-4)
                ),
                4
            );
        }
        outs
    };
    let first: Vec<_> = (0..20).map(|_| decode(&mut seq, 36)).collect();
    assert!(
        check_invariants(&plugin, &seq[0])
            .iter()
            .all(|layer| layer.heads[0].positions.len() < layer.seen)
    );
    // Two f32 a channel of 16 rows.
    let bounds = SMALL.layers * SMALL.kv_heads * 320 / 16 * 2 * SMALL.k_dim * 4;
    let grown = seq[0].cache.bytes() - without;
    assert!(grown > bounds, "{grown} bytes more, {bounds} of them bounds");
    // Back, and forth with other tokens, and back, and forth with the same ones again.
    let mut fork = [seq[0].clone()];
    fork[0].cache = seq[0].cache.fork(cinch_hooks::ForkRole::Sequence).unwrap();
    let back = |seq: &mut [Seq; 1]| {
        seq[0].cache.truncate(401).unwrap();
        seq[0].seen = 401;
    };
    back(&mut seq);
    (0..40).for_each(|_| drop(decode(&mut seq, 37)));
    back(&mut seq);
    for outs in &first[1..] {
        assert_eq!(decode(&mut seq, 36), *outs);
    }
    assert_eq!(
        decode(&mut fork, 36),
        decode(&mut seq, 36),
        "a fork goes on alike"
    );
    drop(fork);
    let with = seq[0].cache.bytes();
    plugin.retune(1, None, policy(r#"{"store": "exact"}"#)).unwrap();
    step(&plugin, &SMALL, &mut seq, 1);
    let left = with - seq[0].cache.bytes();
    assert!(left >= bounds, "{left} bytes went, {bounds} of them bounds");
    assert_eq!(plugin.totals().live_bytes, seq[0].cache.bytes());
}

/// Bounds of what a truncation cut off are not those of what comes in its place, as many rows as it may be.
#[test]
fn a_prompt_in_the_place_of_other_rows_has_bounds_of_its_own() {
    let plugin = plugin_of(
        r#"{"store": "exact", "select": {"method": "quest", "budget": 0.3, "recent": 16, "skip_layers": 0}}"#,
    );
    let mut seq = [open(&plugin, &SMALL, 1, 38)];
    step(&plugin, &SMALL, &mut seq, 100);
    step(&plugin, &SMALL, &mut seq, 1);
    seq[0].text = 39;
    for _ in 0..60 {
        step(&plugin, &SMALL, &mut seq, 1);
    }
    seq[0].cache.truncate(101).unwrap();
    (seq[0].seen, seq[0].text) = (101, 38);
    step(&plugin, &SMALL, &mut seq, 60);
    for _ in 0..20 {
        let (before, token) = (check_invariants(&plugin, &seq[0]), seq[0].seen);
        let outs = step(&plugin, &SMALL, &mut seq, 1);
        assert_eq!(
            compare(
                Source::random(SMALL, 38),
                &before,
                &outs,
                token,
                (0.3, 4, 16),
                (1e-6, 1e-4)
            ),
            4
        );
    }
}
