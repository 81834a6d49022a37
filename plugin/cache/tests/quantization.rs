//! Quantized keys against oracles in f64. Rotated ones as QuaRot has it (arXiv 2404.00456, section 4.2): a key k is stored
//! as codes of Hk, with H the normalized Hadamard matrix of the head dim, and scored with Hq. Ones by channel as KIVI has it
//! (arXiv 2402.02750, section 4): 32 tokens share a channel's scale and zero.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use cinch_cache::BlockView;
use cinch_hooks::CachePolicy;
use common::single::*;
use common::*;

const ROWS: usize = 300;

/// Keys with a channel that is twenty times the others, as real ones have.
fn key(token: usize) -> Vec<f32> {
    let mut key = random(What::K, 0, token);
    key[5] += 20.0;
    key
}

/// H x with H = H₂ ⊗ … ⊗ H₂ / √n: entry (i, j) is −1 to the number of ones that i and j share.
fn hadamard(x: &[f64]) -> Vec<f64> {
    let n = x.len();
    (0..n)
        .map(|i| {
            let sign = |j: usize| {
                if (i & j).count_ones().is_multiple_of(2) {
                    1.0
                } else {
                    -1.0
                }
            };
            (0..n).map(|j| sign(j) * x[j]).sum::<f64>() / (n as f64).sqrt()
        })
        .collect()
}

/// What groups of 32 become in so many bits: nearest of evenly spread levels over their range, parameters in f16, the zero
/// rounded down and the scale up.
fn rounded(x: &[f64], bits: u32) -> Vec<f64> {
    let levels = f64::from((1 << bits) - 1);
    let nudged = |x: f64, up: bool| {
        let near = half::f16::from_f64(x);
        let wrong = if up { near.to_f64() < x } else { near.to_f64() > x };
        let step = |by: i32| {
            let bits = i32::from(near.to_bits());
            let away = (near.to_f64() > 0.0) == (by > 0);
            half::f16::from_bits((bits + if away { 1 } else { -1 }) as u16)
        };
        if wrong {
            step(if up { 1 } else { -1 }).to_f64()
        } else {
            near.to_f64()
        }
    };
    x.chunks(32)
        .flat_map(|group| {
            let min = group.iter().copied().fold(f64::INFINITY, f64::min);
            let max = group.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let zero = nudged(min, false);
            let scale = nudged((max - zero) / levels, true);
            let code = move |x: f64| ((x - zero) / scale).round_ties_even().clamp(0.0, levels);
            group
                .iter()
                .map(move |x| zero + scale * code(*x))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The output of one decoded token over `ROWS` keys, all but sinks and recent ones packed; and its query heads.
fn served(json: &str) -> (Vec<f32>, Vec<Vec<f64>>) {
    let plugin = plugin(policy(json));
    let seq = open(&plugin, &ONE, 1, 1);
    let row = |what, head, token| match what {
        What::K => key(token),
        What::Q | What::V => random(what, head, token),
    };
    attend(&plugin, &seq, 0, ROWS - 1, &row);
    let out = attend(&plugin, &seq, ROWS - 1, ROWS, &row);
    let blocks = &plugin.inspect(&*seq.cache).unwrap()[0].heads[0].blocks;
    let wants = json.contains("rotate_k");
    let packed: Vec<_> = blocks.iter().filter(|block| block.k != block.v).collect();
    let by_channel = ["kivi", "kvquant", "gear"]
        .iter()
        .any(|method| json.contains(method));
    let right = |block: &&&BlockView| (block.rotated, block.channels) == (wants, by_channel);
    assert!(!packed.is_empty() && packed.iter().filter(right).count() == packed.len());
    let queries = (0..ONE.group)
        .map(|head| wide(&random(What::Q, head, ROWS - 1)))
        .collect();
    (out, queries)
}

/// The same in f64, with keys as `stored` says.
fn oracle(queries: &[Vec<f64>], stored: impl Fn(usize, &[f64]) -> Vec<f64>) -> Vec<f64> {
    let keys: Vec<_> = (0..ROWS).map(|token| stored(token, &wide(&key(token)))).collect();
    let values: Vec<_> = (0..ROWS).map(|token| wide(&random(What::V, 0, token))).collect();
    attended(queries, &keys, &values)
}

/// Rows the store leaves in full precision: four sinks and what the prompt's end left in the recent window.
fn is_packed(token: usize) -> bool {
    (4..ROWS - 1 - 16).contains(&token)
}

#[test]
fn rotated_keys_are_what_the_paper_says() {
    for bits in [2, 3, 4, 8] {
        let json = format!(
            r#"{{"quantize": {{"k_bits": {bits}, "v_bits": 16, "rotate_k": true, "residual": 16}}}}"#
        );
        let (out, queries) = served(&json);
        let exact = oracle(&queries, |_, k| k.to_vec());
        let right = oracle(&queries, |token, k| {
            if is_packed(token) {
                hadamard(&rounded(&hadamard(k), bits))
            } else {
                k.to_vec()
            }
        });
        // What the kernels and f16 add is far below what the codec itself costs.
        let (own, codec) = (distance(&out, &right), distance(&right, &exact));
        assert!(own < codec / 4.0 + 2e-4, "{bits} bits: {own:e} beside {codec:e}");
    }
}

/// What the output is off by, K of so many bits, against f64 attention over all keys as they are.
fn error(quantize: &str, bits: u32) -> f64 {
    let json = format!(r#"{{"quantize": {{{quantize}, "k_bits": {bits}, "v_bits": 16, "residual": 16}}}}"#);
    let (out, queries) = served(&json);
    distance(&out, &oracle(&queries, |_, k| k.to_vec()))
}

/// Each of what these methods add is worth it by itself, on keys with values far off in some channels.
#[test]
fn what_is_beside_codes_makes_keys_better() {
    for bits in [2, 3, 4] {
        let kivi = error(r#""method": "kivi""#, bits);
        for better in [
            r#""method": "kvquant", "outliers": 0.0, "rope": "after""#,
            r#""method": "gear", "outliers": 0.0, "rank": 8"#,
            r#""method": "gear", "outliers": 0.05, "rank": 1"#,
        ] {
            let own = error(better, bits);
            assert!(own < 0.97 * kivi, "{bits} bits, {better}: {own:e}, kivi {kivi:e}");
        }
    }
}

/// Salient rows have the error of their bits, the others that of fewer: of a share that rises, less and less.
#[test]
fn salient_keys_have_more_bits() {
    let of = |salient: f64| error(&format!(r#""method": "zipcache", "salient": {salient}"#), 8);
    let shares: Vec<f64> = [0.05, 0.4, 0.95].map(of).to_vec();
    assert!(shares.is_sorted_by(|a, b| a > b), "{shares:?}");
}

/// Keys and values that a head of this format holds exactly come back exactly.
#[test]
fn fp8_keys_are_the_nearest_of_the_format() {
    let (out, queries) =
        served(r#"{"quantize": {"method": "fp8", "k_bits": 8, "v_bits": 16, "residual": 16}}"#);
    let nearest = |x: &f64| {
        // 2^e times 8 to 15 eighths, from 2^-6 on; below, steps of 2^-9.
        let step = 2f64.powi((x.abs().max(2f64.powi(-6)).log2().floor() as i32) - 3);
        ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
    };
    let right = oracle(&queries, |token, k| {
        if is_packed(token) {
            k.iter().map(nearest).collect()
        } else {
            k.to_vec()
        }
    });
    assert!(distance(&out, &right) < 1e-4, "{:e}", distance(&out, &right));
}

/// Where KIVI's last tile of 32 ends, in a store of `ROWS` rows whose last one was decoded.
const TILED: std::ops::Range<usize> = 4..4 + (ROWS - 1 - 16 - 4) / 32 * 32;

/// All of them at once, as `rounded` takes them.
fn tiles(bits: u32) -> Vec<Vec<f64>> {
    let mut out: Vec<Vec<f64>> = TILED.map(|token| wide(&key(token))).collect();
    for tile in out.chunks_mut(32) {
        for channel in 0..DIM {
            let column: Vec<f64> = tile.iter().map(|key| key[channel]).collect();
            for (key, x) in tile.iter_mut().zip(rounded(&column, bits)) {
                key[channel] = x;
            }
        }
    }
    out
}

#[test]
fn keys_by_channel_are_what_the_paper_says() {
    for bits in [2, 3, 4, 8] {
        let json = format!(
            r#"{{"quantize": {{"method": "kivi", "k_bits": {bits}, "v_bits": 16, "residual": 16}}}}"#
        );
        let (out, queries) = served(&json);
        let (exact, tiles) = (oracle(&queries, |_, k| k.to_vec()), tiles(bits));
        let right = oracle(&queries, |token, k| match token.checked_sub(TILED.start) {
            Some(at) if TILED.contains(&token) => tiles[at].clone(),
            _ => k.to_vec(),
        });
        let (own, codec) = (distance(&out, &right), distance(&right, &exact));
        assert!(own < codec / 4.0 + 2e-4, "{bits} bits: {own:e} beside {codec:e}");
    }
}

#[test]
fn channels_of_their_own_help_keys_with_an_outlier_channel() {
    for bits in [2, 3, 4] {
        let error = |method: &str| {
            let (out, queries) = served(&format!(
                r#"{{"quantize": {{"method": "{method}", "k_bits": {bits}, "v_bits": 16, "residual": 16}}}}"#
            ));
            distance(&out, &oracle(&queries, |_, k| k.to_vec()))
        };
        let (by_token, by_channel) = (error("rtn"), error("kivi"));
        assert!(
            by_channel < by_token / 2.0,
            "{bits} bits: {by_channel:e} by channel, {by_token:e} by token"
        );
    }
}

#[test]
fn a_model_of_other_dimensions_is_told() {
    let plugin = plugin(policy(
        r#"{"quantize": {"method": "kivi", "k_bits": 4, "v_bits": 4}}"#,
    ));
    let odd = Model { k_dim: 80, ..ONE };
    let refused = plugin.open(&odd.info(1, 1, 10)).err().unwrap().to_string();
    assert_eq!(
        refused,
        "policy of request 1: quantize.method: given kivi, allowed rtn: kivi needs keys of a multiple of 32 values, \
         these have 80"
    );
    // Now that the model is known, before anything is sent to it.
    let late = plugin.assign(
        2,
        assignment(policy(
            r#"{"quantize": {"method": "kivi", "k_bits": 4, "v_bits": 4}}"#,
        )),
    );
    assert!(late.unwrap_err().to_string().contains("these have 80"));
}

#[test]
fn rotation_helps_keys_with_an_outlier_channel() {
    // With four levels only, it is as well that the outlier's group alone is lost.
    for bits in [3, 4] {
        let json = |rotate: &str| {
            format!(r#"{{"quantize": {{"k_bits": {bits}, "v_bits": 16, "residual": 16{rotate}}}}}"#)
        };
        let error = |json: &str| {
            let (out, queries) = served(json);
            distance(&out, &oracle(&queries, |_, k| k.to_vec()))
        };
        let (plain, rotated) = (error(&json("")), error(&json(r#", "rotate_k": true"#)));
        assert!(
            rotated < plain / 1.5,
            "{bits} bits: {rotated:e} and {plain:e} without"
        );
    }
}
