//! Keys that are packed as they were before their rotary embedding, against an oracle in f64 written from KVQuant (arXiv
//! 2401.18079): keys turned back by their positions, levels of channels by k-means (section 3.3), outliers as they are (section
//! 3.4), turned forth again (section 3.2). And that what the engine says of the embedding is not taken on trust.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use cinch_cache::{Pairing, Plugin, Rotary, RotaryLayers};
use cinch_hooks::{CachePolicy, ForkRole};
use common::single::*;
use common::*;

const ROWS: usize = 300;
const BASE: f64 = 10_000.0;

/// Rows that are packed, all in one block: from the sinks on, whole tiles of 32 up to the recent window.
const PACKED: std::ops::Range<usize> = 4..4 + 256;

/// Keys before their embedding, of which a channel is twenty times the others, as real ones have.
fn plain(token: usize) -> Vec<f64> {
    let mut key = wide(&random(What::K, 0, token));
    key[5] += 20.0;
    key[40] -= 8.0;
    key
}

/// Pair i of the first `dims` dimensions, turned by `position` times base^(−2i/dims).
fn turned(x: &[f64], position: f64, dims: usize, pairing: Pairing) -> Vec<f64> {
    let mut out = x.to_vec();
    for i in 0..dims / 2 {
        let (sin, cos) = (position * BASE.powf(-2.0 * i as f64 / dims as f64)).sin_cos();
        let (a, b) = match pairing {
            Pairing::Halves => (i, i + dims / 2),
            Pairing::Neighbours => (2 * i, 2 * i + 1),
        };
        (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
    }
    out
}

fn alike(dims: usize, pairing: Pairing) -> RotaryLayers {
    RotaryLayers::Alike(Rotary::new(BASE, dims, pairing))
}

/// Random rows, but these keys.
fn with_keys(key: impl Fn(usize) -> Vec<f64>) -> impl Fn(What, usize, usize) -> Vec<f32> {
    move |what, head, token| match what {
        What::K => key(token).into_iter().map(|x| x as f32).collect(),
        What::Q | What::V => random(what, head, token),
    }
}

/// The output of one decoded token over `ROWS` keys that are turned as said.
fn served(json: &str, dims: usize, pairing: Pairing) -> Vec<f32> {
    let plugin = plugin(policy(json));
    plugin.set_rotary(alike(dims, pairing));
    let seq = open(&plugin, &ONE, 1, 1);
    let row = with_keys(|token| turned(&plain(token), token as f64, dims, pairing));
    attend(&plugin, &seq, 0, ROWS - 1, &row);
    let out = attend(&plugin, &seq, ROWS - 1, ROWS, &row);
    let blocks = &plugin.inspect(&*seq.cache).unwrap()[0].heads[0].blocks;
    let packed: Vec<_> = blocks.iter().filter(|block| block.k != block.v).collect();
    assert!(packed.len() == 1 && packed[0].rows == PACKED.len());
    assert_eq!(packed[0].before_rope, !json.contains("after"));
    out
}

/// The same in f64, of these keys.
fn oracle(keys: &[Vec<f64>]) -> Vec<f64> {
    let row = |what, head, token| wide(&random(what, head, token));
    let queries: Vec<_> = (0..GROUP).map(|head| row(What::Q, head, ROWS - 1)).collect();
    let values: Vec<_> = (0..keys.len()).map(|token| row(What::V, 0, token)).collect();
    attended(&queries, keys, &values)
}

/// f16, the next one below `x` or above it where the nearest is on the other side.
fn nudged(x: f64, up: bool) -> f64 {
    let near = half::f16::from_f64(x);
    let wrong = if up { near.to_f64() < x } else { near.to_f64() > x };
    let away = (near.to_f64() > 0.0) == up;
    let bits = i32::from(near.to_bits()) + if away { 1 } else { -1 };
    if wrong {
        half::f16::from_bits(bits as u16).to_f64()
    } else {
        near.to_f64()
    }
}

/// What KVQuant makes of a block's keys: `outliers` of them kept, those farthest off their channel's mean in standard
/// deviations; the others at the nearest of `2^bits` levels that k-means puts in the ranges of each channel's 32 tokens.
fn quantized(keys: &[Vec<f64>], bits: u32, outliers: usize) -> Vec<Vec<f64>> {
    let (n, most) = (keys.len(), f64::from((1 << bits) - 1));
    let mut out = keys.to_vec();
    let (mut far, mut means) = (Vec::new(), vec![0.0; DIM]);
    for channel in 0..DIM {
        let mean = keys.iter().map(|key| key[channel]).sum::<f64>() / n as f64;
        let variance = keys.iter().map(|key| (key[channel] - mean).powi(2)).sum::<f64>() / n as f64;
        means[channel] = mean;
        far.extend((0..n).map(|row| ((keys[row][channel] - mean).abs() / variance.sqrt(), row, channel)));
    }
    far.sort_by(|a, b| b.0.total_cmp(&a.0));
    far.truncate(outliers);
    for (_, row, channel) in &far {
        out[*row][*channel] = means[*channel];
    }
    let groups: Vec<(usize, usize)> = (0..n)
        .step_by(32)
        .flat_map(|tile| (0..DIM).map(move |c| (tile, c)))
        .collect();
    let range = |out: &[Vec<f64>], (tile, channel): (usize, usize)| {
        let column = out[tile..tile + 32].iter().map(|key| key[channel]);
        column.fold((f64::MAX, f64::MIN), |(min, max), x| (min.min(x), max.max(x)))
    };
    let mut normal = Vec::new();
    for group in &groups {
        let (min, max) = range(&out, *group);
        normal.extend(
            out[group.0..group.0 + 32]
                .iter()
                .map(|key| (key[group.1] - min) / (max - min) * most),
        );
    }
    let nearest = |levels: &[f64], x: f64| {
        let all = 0..levels.len();
        all.min_by(|a, b| (levels[*a] - x).abs().total_cmp(&(levels[*b] - x).abs()))
            .unwrap()
    };
    let mut levels: Vec<f64> = (0..=most as u32).map(f64::from).collect();
    for _ in 0..16 {
        let mut sums = vec![(0.0, 0.0); levels.len()];
        for x in &normal {
            let (sum, count) = &mut sums[nearest(&levels, *x)];
            (*sum, *count) = (*sum + x, *count + 1.0);
        }
        for (level, (sum, count)) in levels.iter_mut().zip(sums) {
            if count > 0.0 {
                *level = sum / count;
            }
        }
    }
    for (tile, channel) in groups {
        let (min, max) = range(&out, (tile, channel));
        let zero = nudged(min, false);
        let scale = nudged((max - zero) / most, true);
        for key in &mut out[tile..tile + 32] {
            key[channel] = zero + scale * levels[nearest(&levels, (key[channel] - zero) / scale)];
        }
    }
    for (_, row, channel) in far {
        out[row][channel] = half::f16::from_f64(keys[row][channel]).to_f64();
    }
    out
}

/// Root mean square difference.
#[test]
fn keys_before_their_embedding_are_what_the_paper_says() {
    for (dims, pairing) in [
        (DIM, Pairing::Halves),
        (DIM, Pairing::Neighbours),
        (32, Pairing::Halves),
    ] {
        for bits in [2, 3, 4] {
            let out = served(
                &format!(
                    r#"{{"quantize": {{"method": "kvquant", "k_bits": {bits}, "v_bits": 16, "residual": 16}}}}"#
                ),
                dims,
                pairing,
            );
            let plain: Vec<Vec<f64>> = (0..ROWS).map(plain).collect();
            let packed = quantized(
                &plain[PACKED],
                bits,
                (256.0 * DIM as f64 * 0.01_f64).round() as usize,
            );
            // Those that are not packed are in f16.
            let key = |token: usize, served: bool| match token.checked_sub(PACKED.start) {
                Some(row) if served && row < PACKED.len() => {
                    turned(&packed[row], token as f64, dims, pairing)
                }
                _ => {
                    let key = turned(&plain[token], token as f64, dims, pairing);
                    let near = |x: f64| half::f16::from_f64(x).to_f64();
                    key.into_iter()
                        .map(|x| if served { near(x) } else { x })
                        .collect()
                }
            };
            let keys =
                |served: bool| -> Vec<Vec<f64>> { (0..ROWS).map(|token| key(token, served)).collect() };
            let (right, exact) = (oracle(&keys(true)), oracle(&keys(false)));
            let narrow: Vec<f32> = right.iter().map(|x| *x as f32).collect();
            let (own, codec) = (distance(&out, &right), distance(&narrow, &exact));
            // Of sixteen levels that differ by hundredths of a step, some values take another one, which is no farther off.
            let share = if bits == 4 { 0.8 } else { 0.33 };
            assert!(
                own < share * codec + 2e-4,
                "{bits} bits, {dims} {pairing:?}: {own:e} beside {codec:e}"
            );
            let off = distance(&out, &exact);
            assert!(
                off < 1.1 * codec + 2e-4,
                "{bits} bits, {dims} {pairing:?}: {off:e} off, not {codec:e}"
            );
        }
    }
}

/// A channel that is large throughout is spread over two, in turns, by the embedding.
#[test]
fn channels_keep_their_ranges_before_the_embedding() {
    for bits in [2, 3, 4] {
        let of = |rope: &str| {
            let json = format!(
                r#"{{"quantize": {{"method": "kvquant", "k_bits": {bits}, "v_bits": 16, "residual": 16, "rope": "{rope}"}}}}"#
            );
            let keys: Vec<Vec<f64>> = (0..ROWS)
                .map(|token| turned(&plain(token), token as f64, DIM, Pairing::Halves))
                .collect();
            distance(&served(&json, DIM, Pairing::Halves), &oracle(&keys))
        };
        let (before, after) = (of("before"), of("after"));
        assert!(
            before < after / 1.5,
            "{bits} bits: {before:e} before, {after:e} after"
        );
    }
}

/// What a decoded token's output is off by after a life with evictions, a fork, a truncation and a retune, each of which
/// writes blocks of other rows than they were packed of.
fn lived(rope: &str) -> f64 {
    let of = |bits: u32| {
        policy(&format!(
            r#"{{"select": {{"method": "h2o", "budget": 0.7, "recent": 16, "interval": 8}},
                "quantize": {{"method": "kvquant", "k_bits": {bits}, "v_bits": 16, "residual": 16, "rope": "{rope}"}}}}"#
        ))
    };
    let plugin = plugin(of(4));
    let mut seq = [open(&plugin, &SMALL, 1, 7)];
    step(&plugin, &SMALL, &mut seq, 240);
    for _ in 0..44 {
        step(&plugin, &SMALL, &mut seq, 1);
    }
    let mut fork = [Seq {
        cache: seq[0].cache.fork(ForkRole::Sequence).unwrap(),
        ..seq[0].clone()
    }];
    let back = fork[0].cache.reachable_from().max(fork[0].seen - 3);
    fork[0].cache.truncate(back).unwrap();
    fork[0].seen = back;
    for _ in 0..40 {
        step(&plugin, &SMALL, &mut fork, 1);
        step(&plugin, &SMALL, &mut seq, 1);
    }
    plugin.retune(1, None, of(3)).unwrap();
    let mut sum = 0.0;
    for mut seq in [seq, fork] {
        step(&plugin, &SMALL, &mut seq, 1);
        let layers = check_invariants(&plugin, &seq[0]);
        let outs = step(&plugin, &SMALL, &mut seq, 1);
        for (layer, out) in outs.iter().enumerate() {
            for (head, own) in out.chunks(SMALL.v_dim).enumerate() {
                let mut positions = layers[layer].heads[head / SMALL.group].positions.clone();
                let token = seq[0].seen - 1;
                positions.push(token as u32);
                let right = attention(&SMALL, 7, layer, head, token, &positions);
                sum += distance(own, &right).powi(2);
            }
        }
    }
    sum.sqrt()
}

#[test]
fn evicted_gaps_stay_gaps() {
    let (before, after) = (lived("before"), lived("after"));
    assert!(before < 1.3 * after, "{before:e} before, {after:e} after");
}

/// Only few bits less of what was packed on one side become those of the other side.
#[test]
fn rows_cross_their_embedding_when_they_lose_bits() {
    let of = |bits: u32, rope: &str| {
        policy(&format!(
            r#"{{"quantize": {{"method": "kvquant", "k_bits": {bits}, "v_bits": 16, "residual": 16, "rope": "{rope}"}}}}"#
        ))
    };
    let error = |first: &str, second: &str| {
        let plugin = plugin(of(4, first));
        let mut seq = [open(&plugin, &SMALL, 1, 7)];
        step(&plugin, &SMALL, &mut seq, 200);
        plugin.retune(1, None, of(2, second)).unwrap();
        step(&plugin, &SMALL, &mut seq, 1);
        let blocks = plugin.inspect(&*seq[0].cache).unwrap()[0].heads[0].blocks.clone();
        let packed = blocks.iter().filter(|block| block.k != block.v);
        assert!(packed.clone().count() > 0);
        assert!(
            packed
                .clone()
                .all(|block| block.before_rope == (second == "before"))
        );
        let out = step(&plugin, &SMALL, &mut seq, 1);
        against_full(&SMALL, &seq, 1, 0, &out[0])
    };
    let same = error("after", "after");
    for (first, second) in [("before", "after"), ("after", "before"), ("before", "before")] {
        let own = error(first, second);
        assert!(
            own < 1.5 * same,
            "{first}, then {second}: {own:e} beside {same:e}"
        );
    }
    // As many bits: what is packed stays as it is.
    let plugin = plugin(of(4, "before"));
    let mut seq = [open(&plugin, &SMALL, 1, 7)];
    step(&plugin, &SMALL, &mut seq, 200);
    plugin.retune(1, None, of(4, "after")).unwrap();
    step(&plugin, &SMALL, &mut seq, 1);
    let blocks = &plugin.inspect(&*seq[0].cache).unwrap()[0].heads[0].blocks;
    assert!(blocks.iter().any(|block| block.before_rope));
}

const KVQUANT: &str = r#"{"quantize": {"method": "kvquant", "k_bits": 4, "v_bits": 4}}"#;

#[test]
fn where_the_embedding_is_not_known_the_policy_is_refused() {
    let refused =
        |plugin: &Plugin, model: &Model| plugin.open(&model.info(1, 1, 10)).err().unwrap().to_string();
    let plugin = plugin(policy(KVQUANT));
    for (layers, reason) in [
        (RotaryLayers::Unknown("it is longrope".into()), "it is longrope"),
        (
            alike(66, Pairing::Halves),
            "66 dimensions are said to turn, keys have 64",
        ),
        (
            RotaryLayers::Each(vec![Rotary::none(); 3]),
            "3 layers are described, 1 are managed",
        ),
        (
            RotaryLayers::Alike(Rotary::new(0.0, 8, Pairing::Halves)),
            "a rotary frequency is not finite",
        ),
    ] {
        plugin.set_rotary(layers);
        assert_eq!(
            refused(&plugin, &ONE),
            format!(
                "policy of request 1: quantize.rope: given before, allowed after, with this model: {reason}"
            )
        );
    }
    // Keys that stay in full precision, or are packed as they are, need nothing to be known.
    for json in [
        r#"{"quantize": {"method": "kvquant", "k_bits": 4, "v_bits": 4, "rope": "after"}}"#,
        r#"{"quantize": {"method": "kvquant", "k_bits": 4, "v_bits": 4, "layers": {"0": {"k_bits": 16}}}}"#,
        r#"{"quantize": {"method": "kivi", "k_bits": 4, "v_bits": 4}}"#,
    ] {
        plugin.set_default(assignment(policy(json))).unwrap();
        plugin.open(&ONE.info(2, 2, 10)).unwrap();
    }
    // Now that the model is known, before anything is sent to it.
    let late = plugin.assign(3, assignment(policy(KVQUANT))).unwrap_err();
    assert!(
        late.to_string().starts_with("quantize.rope: given before"),
        "{late}"
    );
    // Nobody said anything.
    let silent = Plugin::new(settings(), assignment(policy(KVQUANT))).unwrap();
    assert!(refused(&silent, &ONE).contains("the engine has not said"));
    // Layers whose keys do not turn have nothing to be turned back.
    plugin.set_rotary(RotaryLayers::Each(vec![Rotary::none()]));
    plugin.assign(4, assignment(policy(KVQUANT))).unwrap();
}

#[test]
fn bases_are_of_keys_as_they_are_cached() {
    let json = |rope: &str| {
        format!(
            r#"{{"project": {{"method": "think", "k_rank": 32}},
                "quantize": {{"method": "kvquant", "k_bits": 4, "v_bits": 4{rope}}}}}"#
        )
    };
    let of = |rope: &str| {
        serde_json::from_str::<cinch_protocol::Policy>(&json(rope))
            .unwrap()
            .validate()
    };
    assert_eq!(
        of("").unwrap_err().to_string(),
        "quantize.rope: given before, allowed after, with project think: its bases are of keys as they are cached"
    );
    assert_eq!(of(r#", "rope": "after""#), Ok(()));
}

/// A prompt of one token, whose keys turn as `truth` says, under what `said` says.
fn checked(
    said: RotaryLayers,
    dims: usize,
    pairing: Pairing,
) -> (std::sync::Arc<Plugin>, Result<f64, String>) {
    let plugin = plugin(policy("{}"));
    plugin.set_rotary(said);
    let seq = open(&plugin, &ONE, 1, 1);
    let row = with_keys(|token| turned(&plain(0), token as f64, dims, pairing));
    plugin.check_rotary(1);
    attend(&plugin, &seq, 0, 64, &row);
    attend(&plugin, &seq, 64, 65, &row);
    let checked = plugin.rotary_checked();
    (plugin, checked)
}

#[test]
fn what_is_said_of_the_embedding_is_held_against_keys() {
    for (dims, pairing) in [
        (DIM, Pairing::Halves),
        (DIM, Pairing::Neighbours),
        (32, Pairing::Halves),
    ] {
        let (plugin, off) = checked(alike(dims, pairing), dims, pairing);
        assert!(off.unwrap() < 1e-5);
        plugin.assign(2, assignment(policy(KVQUANT))).unwrap();
    }
    for said in [
        alike(DIM, Pairing::Neighbours),
        alike(32, Pairing::Halves),
        RotaryLayers::Alike(Rotary::none()),
        RotaryLayers::Alike(Rotary::new(1_000_000.0, DIM, Pairing::Halves)),
    ] {
        let (plugin, off) = checked(said, DIM, Pairing::Halves);
        let reason = off.unwrap_err();
        assert!(
            reason.starts_with("keys of layer 0 do not turn as its description says"),
            "{reason}"
        );
        let refused = plugin
            .assign(2, assignment(policy(KVQUANT)))
            .unwrap_err()
            .to_string();
        assert!(refused.contains(&reason), "{refused}");
    }
    // A request that never came.
    let plugin = plugin(policy("{}"));
    drop(open(&plugin, &ONE, 1, 1));
    plugin.check_rotary(9);
    assert_eq!(
        plugin.rotary_checked().unwrap_err(),
        "keys of 0 layers of 1 could be compared"
    );
}

/// What a second reading puts behind a prompt of one token is other tokens.
#[test]
fn a_second_reading_is_not_held_against_the_prompt() {
    let plugin = plugin(policy(r#"{"select": {"method": "kvzip", "budget": 0.5}}"#));
    plugin.set_rotary(alike(DIM, Pairing::Halves));
    let cache = plugin.open(&ONE.info(1, 1, 64)).unwrap();
    let seq = Seq {
        cache,
        text: 1,
        seen: 0,
    };
    let row = with_keys(|token| {
        let key = plain(token.saturating_sub(63));
        turned(&key, token as f64, DIM, Pairing::Halves)
    });
    plugin.check_rotary(1);
    attend(&plugin, &seq, 0, 64, &row);
    assert!(seq.cache.begin_part().unwrap());
    attend(&plugin, &seq, 64, 96, &row);
    seq.cache.end_pass().unwrap();
    assert!(plugin.rotary_checked().unwrap() < 1e-5);
}
