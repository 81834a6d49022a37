//! Whatever a method does, with room for everything it is attention over all rows; and over packed rows, it is attention
//! over what they come back as.

use cinch_protocol::{Policy, SelectMethod};

use crate::codec::half;
use crate::common::*;
use crate::matrix::{Rows, dot};
use crate::{EVEN, Served};

/// How far off an output may be, relative to the largest value.
const OFF: f64 = 2e-5;

const STEPS: [usize; 12] = [200, 50, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];

/// Softmax attention of a query.
fn attention(q: &[f64], k: &Rows, v: &Rows) -> Vec<f64> {
    let logits: Vec<f64> = k.iter().map(|k| dot(q, k) / (q.len() as f64).sqrt()).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let mut out = vec![0.0; v[0].len()];
    for (logit, v) in logits.iter().zip(v) {
        let weight = (logit - max).exp() / sum;
        out.iter_mut().zip(v).for_each(|(out, v)| *out += weight * v);
    }
    out
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Of each step and layer, the last query's outputs, all query heads one after another; past rows are in f16 where the store
/// is, fresh ones of a chunk as they came.
fn dense(source: Source, in_f16: bool) -> Vec<Vec<Vec<f64>>> {
    let (model, mut seen) = (source.model, 0);
    let steps = STEPS.iter().map(|fresh| {
        let past = if *fresh > 1 { seen } else { seen + 1 };
        seen += fresh;
        let layer = |layer: usize| -> Vec<f64> {
            let rows = |what: What, kv: usize| -> Rows {
                let row = |token: usize| {
                    let row = wide(&source.vector(layer, what, kv, token));
                    if in_f16 && token < past {
                        row.into_iter().map(half).collect()
                    } else {
                        row
                    }
                };
                (0..seen).map(row).collect()
            };
            let heads = (0..model.kv_heads).map(|kv| (rows(What::K, kv), rows(What::V, kv)));
            let heads: Vec<(Rows, Rows)> = heads.collect();
            (0..model.q_heads())
                .flat_map(|head| {
                    let (k, v) = &heads[head / model.group];
                    attention(&wide(&source.vector(layer, What::Q, head, seen - 1)), k, v)
                })
                .collect()
        };
        (0..model.layers).map(layer).collect()
    });
    steps.collect()
}

/// Policies that change nothing, and whether rows are in f16.
fn identities(k_dim: usize, v_dim: usize) -> Vec<(String, bool)> {
    let mut all = vec![
        (r#"{"store": "exact"}"#.to_owned(), false),
        ("{}".to_owned(), true),
    ];
    for method in SelectMethod::ALL {
        let name = method.name();
        for rest in [
            "",
            r#", "layers": "pyramid""#,
            r#", "heads": "adaptive""#,
            r#", "merge": "d2o""#,
            r#", "merge": "cam""#,
        ] {
            let select = format!(
                r#""select": {{"method": "{name}", "budget": 1.0, "recent": 16, "interval": 4, "recover": 1.0{rest}}}"#
            );
            // Only FastGen keeps less than it may.
            let select = match method {
                SelectMethod::Fastgen => select,
                _ => select.replace(r#", "recover": 1.0"#, ""),
            };
            all.push((format!(r#"{{"store": "exact", {select}}}"#), false));
            all.push((format!("{{{select}}}"), true));
        }
    }
    for method in ["rtn", "zipcache", "fp8"] {
        all.push((
            format!(r#"{{"quantize": {{"method": "{method}", "k_bits": 16, "v_bits": 16}}}}"#),
            true,
        ));
    }
    for rest in [
        format!(r#""method": "lowrank", "k_rank": {k_dim}, "v_rank": {v_dim}"#),
        format!(r#""method": "think", "k_rank": {k_dim}"#),
        // Rows of two heads that are all alike.
        r#""method": "merge_heads", "similarity": 1.0"#.to_owned(),
    ] {
        all.push((format!(r#"{{"project": {{{rest}}}}}"#), true));
    }
    // Of fields that not every method has.
    all.retain(|(json, _)| {
        let policy: Policy = serde_json::from_str(json).unwrap();
        policy.validate().is_ok()
    });
    all
}

fn everything_kept_is_dense_attention(source: Source) {
    let model = source.model;
    let right = [false, true].map(|in_f16| dense(source, in_f16));
    let identities = identities(model.k_dim, model.v_dim);
    for method in SelectMethod::ALL {
        let name = format!(r#""method": "{}""#, method.name());
        assert!(identities.iter().filter(|(json, _)| json.contains(&name)).count() >= 2);
    }
    assert!(identities.len() > 2 * SelectMethod::ALL.len() + 6);
    let mut worst = [0.0_f64; 2];
    for (json, in_f16) in &identities {
        let plugin = plugin(policy(json));
        let mut seq = [open(&plugin, &model, 1, source.text)];
        for (fresh, right) in STEPS.iter().zip(&right[usize::from(*in_f16)]) {
            let outs = step(&plugin, &model, &mut seq, *fresh);
            for (layer, (out, right)) in outs.iter().zip(right).enumerate() {
                let largest = right.iter().map(|x| x.abs()).fold(0.0, f64::max);
                for (head, right) in right.chunks_exact(model.v_dim).enumerate() {
                    let last = ((head + 1) * fresh - 1) * model.v_dim;
                    for (x, right) in out[last..].iter().zip(right) {
                        let off = (f64::from(*x) - right).abs() / largest;
                        worst[usize::from(*in_f16)] = worst[usize::from(*in_f16)].max(off);
                        assert!(
                            off <= OFF,
                            "{json}, layer {layer}, head {head}, {} seen: {x}, not {right}",
                            seq[0].seen
                        );
                    }
                }
            }
        }
    }
    println!(
        "{} policies: outputs are off by up to {:e} with exact rows, {:e} in f16",
        identities.len(),
        worst[0],
        worst[1]
    );
}

/// Kernels attend to packed rows without unpacking them: what they add to a codec's own error is a fraction of it.
fn packed_rows_are_attended_to_as_they_come_back(source: Source) {
    let model = source.model;
    let residual = r#""residual": 16"#;
    for (json, most) in [
        (r#"{"quantize": {"k_bits": 8, "v_bits": 8, R}}"#, 2.0),
        (r#"{"quantize": {"k_bits": 4, "v_bits": 4, R}}"#, 0.25),
        (
            r#"{"quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true, R}}"#,
            0.25,
        ),
        (
            r#"{"quantize": {"k_bits": 2, "v_bits": 2, "rotate_k": true, R}}"#,
            0.25,
        ),
        (
            r#"{"quantize": {"method": "kivi", "k_bits": 2, "v_bits": 2, R}}"#,
            0.25,
        ),
        (
            r#"{"quantize": {"method": "kvquant", "k_bits": 2, "v_bits": 2, "rope": "after", R}}"#,
            0.25,
        ),
        (
            r#"{"quantize": {"method": "gear", "k_bits": 2, "v_bits": 2, R}}"#,
            0.25,
        ),
        (
            r#"{"quantize": {"method": "zipcache", "k_bits": 4, "v_bits": 4, R}}"#,
            0.25,
        ),
        (
            r#"{"quantize": {"method": "fp8", "k_bits": 8, "v_bits": 8, R}}"#,
            0.25,
        ),
        (
            r#"{"project": {"method": "lowrank", "k_rank": 32, "v_rank": 32}}"#,
            0.25,
        ),
        (r#"{"project": {"method": "think", "k_rank": 32}}"#, 0.25),
        (r#"{"project": {"method": "minicache", "first_layer": 1}}"#, 0.25),
        (
            r#"{"project": {"method": "merge_heads", "similarity": 0.0}}"#,
            0.25,
        ),
    ] {
        let json = json.replace('R', residual);
        let mut served = Served::new(source, &json, &[400]);
        let token = served.seq[0].seen;
        let outs = step(&served.plugin, &model, &mut served.seq, 1);
        served.layers = check_invariants(&served.plugin, &served.seq[0]);
        let (mut own, mut codec, mut n) = (0.0, 0.0, 0.0);
        for head in served.heads() {
            let rows = [What::K, What::V].map(|what| (head.back(what), head.all_given(what)));
            for q_head in head.kv * model.group..(head.kv + 1) * model.group {
                let q = wide(&source.vector(head.layer, What::Q, q_head, token));
                let [(k, given_k), (v, given_v)] = &rows;
                let (back, given) = (attention(&q, k, v), attention(&q, given_k, given_v));
                for ((x, back), given) in outs[head.layer][q_head * model.v_dim..]
                    .iter()
                    .zip(back)
                    .zip(given)
                {
                    own += (f64::from(*x) - back).powi(2);
                    codec += (back - given).powi(2);
                    n += 1.0;
                }
            }
        }
        let (own, codec) = ((own / n).sqrt(), (codec / n).sqrt());
        println!("{json}: kernels add {own:e} to {codec:e}");
        assert!(codec > 0.0, "{json}: nothing is packed");
        assert!(own <= most * codec + 2e-4, "{json}: {own:e} beside {codec:e}");
    }
}

mod random {
    use super::*;

    fn source() -> Source {
        Source::random(EVEN, 52)
    }

    #[test]
    fn everything_kept_is_dense_attention() {
        super::everything_kept_is_dense_attention(source());
    }

    #[test]
    fn packed_rows_are_attended_to_as_they_come_back() {
        super::packed_rows_are_attended_to_as_they_come_back(source());
    }
}

/// On rows of a real model.
#[cfg(feature = "captured")]
mod real {
    use super::*;

    #[test]
    fn everything_kept_is_dense_attention() {
        super::everything_kept_is_dense_attention(Source::captured(4));
    }

    #[test]
    fn packed_rows_are_attended_to_as_they_come_back() {
        super::packed_rows_are_attended_to_as_they_come_back(Source::captured(4));
    }
}
