//! The matrix: every policy, and what must hold of a sequence that lived under one.

use cinch_cache::{BlockView, LayerView, Plugin};
use cinch_kernels::Codec;
use cinch_protocol::{Bits, Heads, Layers, Policy, Quantize, QuantizeMethod, SelectMethod};

use super::*;

/// Every policy of the matrix. A new method is one more line here.
pub(crate) fn policies() -> Vec<(&'static str, Policy)> {
    [
        ("exact", r#"{"store": "exact"}"#),
        ("full", r#"{}"#),
        ("int8", r#"{"quantize": {"k_bits": 8, "v_bits": 8}}"#),
        ("int4", r#"{"quantize": {"k_bits": 4, "v_bits": 4}}"#),
        (
            "k4v8",
            r#"{"quantize": {"k_bits": 4, "v_bits": 8, "residual": 16}}"#,
        ),
        (
            "k8v4",
            r#"{"quantize": {"k_bits": 8, "v_bits": 4, "residual": 48}}"#,
        ),
        ("k16v4", r#"{"quantize": {"k_bits": 16, "v_bits": 4}}"#),
        ("k3v2", r#"{"quantize": {"k_bits": 3, "v_bits": 2}}"#),
        (
            "k4v4 rotated",
            r#"{"quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true}}"#,
        ),
        (
            "streaming",
            r#"{"select": {"method": "streaming", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "h2o",
            r#"{"select": {"method": "h2o", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "tova",
            r#"{"select": {"method": "tova", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "snapkv",
            r#"{"select": {"method": "snapkv", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "key_norm",
            r#"{"select": {"method": "key_norm", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "keydiff×k8v4",
            r#"{"select": {"method": "keydiff", "budget": 0.4, "recent": 16, "interval": 8},
                "quantize": {"k_bits": 8, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "lagkv",
            r#"{"select": {"method": "lagkv", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "fastgen×int8",
            r#"{"select": {"method": "fastgen", "budget": 0.6, "recover": 0.7, "recent": 16, "interval": 8},
                "quantize": {"k_bits": 8, "v_bits": 8, "residual": 16}}"#,
        ),
        (
            "quest",
            r#"{"select": {"method": "quest", "budget": 0.4, "recent": 16, "skip_layers": 0}}"#,
        ),
        (
            "quest×lowrank×k4v4 rotated",
            r#"{"select": {"method": "quest", "budget": 0.3, "recent": 16, "skip_layers": 0},
                "project": {"method": "lowrank", "k_rank": 24, "v_rank": 40},
                "quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true, "residual": 16}}"#,
        ),
        (
            "quest×kivi k4v4",
            r#"{"select": {"method": "quest", "budget": 0.3, "recent": 16, "skip_layers": 1},
                "quantize": {"method": "kivi", "k_bits": 4, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "kvzip",
            r#"{"select": {"method": "kvzip", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "kvzip all-adaptive",
            r#"{"select": {"method": "kvzip", "budget": 0.4, "recent": 16, "interval": 8, "heads": "adaptive",
                "layers": "adaptive"}}"#,
        ),
        (
            "kvzip adaptive×k8v4",
            r#"{"select": {"method": "kvzip", "budget": 0.4, "recent": 16, "interval": 8, "heads": "adaptive"},
                "quantize": {"k_bits": 8, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "scissorhands",
            r#"{"select": {"method": "scissorhands", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "keyformer×k8v8",
            r#"{"select": {"method": "keyformer", "budget": 0.4, "recent": 16, "interval": 8},
                "quantize": {"k_bits": 8, "v_bits": 8}}"#,
        ),
        (
            "expected_attention",
            r#"{"select": {"method": "expected_attention", "budget": 0.4, "recent": 16, "interval": 8}}"#,
        ),
        (
            "snapkv pyramid",
            r#"{"select": {"method": "snapkv", "budget": 0.4, "recent": 16, "interval": 8, "layers": "pyramid"}}"#,
        ),
        (
            "expected_attention adaptive×k4v4 rotated",
            r#"{"select": {"method": "expected_attention", "budget": 0.4, "recent": 16, "interval": 8,
                           "heads": "adaptive"},
                "quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true, "residual": 16}}"#,
        ),
        (
            "h2o pyramid adaptive d2o×int8",
            r#"{"select": {"method": "h2o", "budget": 0.5, "recent": 16, "interval": 8, "layers": "pyramid",
                           "heads": "adaptive", "floor": 0.1, "merge": "d2o"},
                "quantize": {"k_bits": 8, "v_bits": 8}}"#,
        ),
        (
            "h2o adaptive cam",
            r#"{"select": {"method": "h2o", "budget": 0.4, "recent": 16, "interval": 8, "heads": "adaptive", "merge": "cam"}}"#,
        ),
        (
            "tova cam×kivi k4v4",
            r#"{"select": {"method": "tova", "budget": 0.6, "recent": 16, "interval": 8, "merge": "cam", "seed": 3},
                "quantize": {"method": "kivi", "k_bits": 4, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "h2o×int4",
            r#"{"select": {"method": "h2o", "budget": 0.5, "sinks": 2, "recent": 24, "interval": 16},
                "quantize": {"k_bits": 4, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "h2o×k2v2 rotated",
            r#"{"select": {"method": "h2o", "budget": 0.5, "sinks": 2, "recent": 24, "interval": 16},
                "quantize": {"k_bits": 2, "v_bits": 2, "rotate_k": true, "residual": 16}}"#,
        ),
        (
            "k4v4 but k8 and v16 below",
            r#"{"quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true, "layers": {"0": {"k_bits": 8, "v_bits": 16}}}}"#,
        ),
        (
            "lowrank",
            r#"{"project": {"method": "lowrank", "k_rank": 24, "v_rank": 40}}"#,
        ),
        (
            "lowrank k×kivi k4v4",
            r#"{"project": {"method": "lowrank", "k_rank": 32}, "quantize": {"method": "kivi", "k_bits": 4, "v_bits": 4}}"#,
        ),
        (
            "snapkv adaptive d2o×lowrank×k4v8 rotated",
            r#"{"select": {"method": "snapkv", "budget": 0.8, "recent": 16, "interval": 8, "heads": "adaptive",
                           "merge": "d2o"},
                "project": {"method": "lowrank", "k_rank": 16, "v_rank": 32},
                "quantize": {"k_bits": 4, "v_bits": 8, "rotate_k": true, "residual": 16}}"#,
        ),
        (
            "h2o×think×int4",
            r#"{"select": {"method": "h2o", "budget": 0.8, "recent": 16, "interval": 8},
                "project": {"method": "think", "k_rank": 20}, "quantize": {"k_bits": 4, "v_bits": 4}}"#,
        ),
        (
            "kivi k2v2",
            r#"{"quantize": {"method": "kivi", "k_bits": 2, "v_bits": 2}}"#,
        ),
        (
            "snapkv×kivi k4v4",
            r#"{"select": {"method": "snapkv", "budget": 0.5, "sinks": 2, "recent": 24, "interval": 16},
                "quantize": {"method": "kivi", "k_bits": 4, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "snapkv adaptive d2o×kivi k3v8 rotated",
            r#"{"select": {"method": "snapkv", "budget": 0.5, "recent": 16, "interval": 8, "heads": "adaptive",
                           "merge": "d2o"},
                "quantize": {"method": "kivi", "k_bits": 3, "v_bits": 8, "rotate_k": true, "residual": 16}}"#,
        ),
        (
            "minicache",
            r#"{"project": {"method": "minicache", "first_layer": 0}}"#,
        ),
        (
            "minicache×k4v4 rotated",
            r#"{"project": {"method": "minicache", "first_layer": 0, "retained": 0.2},
                "quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true, "residual": 16}}"#,
        ),
        (
            "streaming d2o×minicache×kivi k4v8",
            r#"{"select": {"method": "streaming", "budget": 0.7, "recent": 16, "interval": 8, "merge": "d2o"},
                "project": {"method": "minicache", "first_layer": 0},
                "quantize": {"method": "kivi", "k_bits": 4, "v_bits": 8, "residual": 16}}"#,
        ),
        (
            "merge_heads",
            r#"{"project": {"method": "merge_heads", "similarity": 0.0, "retained": 0.1}}"#,
        ),
        (
            "tova×merge_heads×int8",
            r#"{"select": {"method": "tova", "budget": 0.7, "recent": 16, "interval": 8},
                "project": {"method": "merge_heads", "similarity": 0.0}, "quantize": {"k_bits": 8, "v_bits": 8}}"#,
        ),
        (
            "fp8",
            r#"{"quantize": {"method": "fp8", "k_bits": 8, "v_bits": 8}}"#,
        ),
        (
            "h2o×fp8",
            r#"{"select": {"method": "h2o", "budget": 0.5, "recent": 16, "interval": 8},
                "quantize": {"method": "fp8", "k_bits": 16, "v_bits": 8, "residual": 16}}"#,
        ),
        (
            "kvquant k3v3",
            r#"{"quantize": {"method": "kvquant", "k_bits": 3, "v_bits": 3}}"#,
        ),
        (
            "kvquant k3v3 after rope",
            r#"{"quantize": {"method": "kvquant", "k_bits": 3, "v_bits": 3, "rope": "after"}}"#,
        ),
        (
            "quest×kvquant k4v4",
            r#"{"select": {"method": "quest", "budget": 0.3, "recent": 16, "skip_layers": 0},
                "quantize": {"method": "kvquant", "k_bits": 4, "v_bits": 4, "residual": 16}}"#,
        ),
        (
            "snapkv adaptive d2o×kvquant k2v4",
            r#"{"select": {"method": "snapkv", "budget": 0.5, "recent": 16, "interval": 8, "heads": "adaptive",
                           "merge": "d2o"},
                "quantize": {"method": "kvquant", "k_bits": 2, "v_bits": 4, "outliers": 0.02, "residual": 16}}"#,
        ),
        (
            "gear k2v2",
            r#"{"quantize": {"method": "gear", "k_bits": 2, "v_bits": 2}}"#,
        ),
        (
            "keydiff×lowrank×gear k4v16",
            r#"{"select": {"method": "keydiff", "budget": 0.8, "recent": 16, "interval": 8},
                "project": {"method": "lowrank", "k_rank": 32, "v_rank": 40},
                "quantize": {"method": "gear", "k_bits": 4, "v_bits": 16, "rank": 3, "outliers": 0.0, "residual": 16}}"#,
        ),
        (
            "zipcache k4v4",
            r#"{"quantize": {"method": "zipcache", "k_bits": 4, "v_bits": 4}}"#,
        ),
        (
            "tova×zipcache k8v4",
            r#"{"select": {"method": "tova", "budget": 0.6, "recent": 16, "interval": 8},
                "quantize": {"method": "zipcache", "k_bits": 8, "v_bits": 4, "salient": 0.3, "low_bits": 3, "residual": 16}}"#,
        ),
        (
            "h2o d2o×zipcache k4v16",
            r#"{"select": {"method": "h2o", "budget": 0.6, "recent": 16, "interval": 8, "merge": "d2o"},
                "quantize": {"method": "zipcache", "k_bits": 4, "v_bits": 16, "residual": 16}}"#,
        ),
        (
            "streaming×int8",
            r#"{"select": {"method": "streaming", "budget": 0.3, "sinks": 0, "recent": 16, "interval": 8},
                "quantize": {"k_bits": 8, "v_bits": 8}}"#,
        ),
    ]
    .map(|(name, json)| (name, policy(json)))
    .to_vec()
}

pub(crate) fn each(f: impl Fn(&str, &Policy)) {
    for (name, policy) in policies() {
        println!("{name}");
        f(name, &policy);
    }
}

pub(crate) fn total(policy: &Policy, seen: usize) -> usize {
    policy
        .select
        .as_ref()
        .filter(|_| evicts(policy))
        .map_or(seen, |select| {
            let share = (select.budget * seen as f64 - 1e-9).ceil() as usize;
            share.max((select.sinks + select.recent) as usize).min(seen)
        })
}

/// Whether rows go under it.
pub(crate) fn evicts(policy: &Policy) -> bool {
    policy
        .select
        .as_ref()
        .is_some_and(|select| select.method.evicts())
}

/// What must hold of a sequence that lived under one policy; `at` is `seen` at its last eviction.
pub(crate) fn check(plugin: &Plugin, policy: &Policy, seq: &Seq, at: usize) -> Vec<LayerView> {
    let layers = check_invariants(plugin, seq);
    check_budget(policy, &layers, total(policy, at), seq.seen - at);
    let heads = layers.iter().enumerate();
    for (layer, head) in heads.flat_map(|(i, layer)| layer.heads.iter().map(move |head| (i, head))) {
        let kept = head.positions.len();
        if let Some(select) = &policy.select {
            let sinks = (select.sinks as usize).min(seq.seen);
            assert!(
                (0..sinks).all(|p| head.positions.contains(&(p as u32))),
                "sinks stay"
            );
            let recent = (select.recent as usize).min(seq.seen);
            assert!(
                (seq.seen - recent..seq.seen).all(|p| head.positions.contains(&(p as u32))),
                "recent stay"
            );
        }
        check_codecs(policy, layer, &head.blocks, kept);
    }
    layers
}

/// The budget is met exactly: by every head, or by a layer's together where they compete, or by all layers of a pyramid. Where
/// heads are profiled it is met at most.
pub(crate) fn check_budget(policy: &Policy, layers: &[LayerView], total: usize, since: usize) {
    let kept: Vec<Vec<usize>> = layers
        .iter()
        .map(|layer| layer.heads.iter().map(|head| head.positions.len()).collect())
        .collect();
    let select = policy.select.as_ref();
    let heads = kept[0].len();
    if select.is_some_and(|select| select.method == SelectMethod::Fastgen) {
        assert!(
            kept.iter().flatten().all(|kept| *kept <= total + since),
            "{kept:?}, at most {total} + {since}"
        );
        return;
    }
    let floor = select
        .filter(|select| select.heads == Heads::Adaptive)
        .map(|select| select.floor.unwrap_or(0.2));
    if select.is_some_and(|select| select.layers == Layers::Pyramid) {
        let all: usize = kept.iter().flatten().sum();
        assert_eq!(all, layers.len() * heads * (total + since), "{kept:?}");
        let sums: Vec<usize> = kept.iter().map(|heads| heads.iter().sum()).collect();
        assert!(sums.is_sorted_by(|a, b| a >= b), "{kept:?}");
        return;
    }
    if select.is_some_and(|select| select.layers == Layers::Adaptive) {
        // A head's share of what its layer won is rounded down.
        let (all, most): (usize, usize) = (
            kept.iter().flatten().sum(),
            layers.len() * heads * (total + since),
        );
        assert!(
            all <= most && all + layers.len() * heads >= most,
            "{kept:?}, not {total} + {since}"
        );
        return;
    }
    for kept in kept {
        match floor {
            None => assert!(
                kept.iter().all(|kept| *kept == total + since),
                "{kept:?}, not {total} + {since}"
            ),
            Some(floor) => {
                assert_eq!(kept.iter().sum::<usize>(), heads * (total + since), "{kept:?}");
                let least = (floor * total as f64) as usize + since;
                assert!(
                    kept.iter().all(|kept| *kept >= least),
                    "{kept:?}, at least {least}"
                );
            }
        }
    }
}

/// Whether rows of two heads become one.
pub(crate) fn merges(policy: &Policy) -> bool {
    let project = policy.project.as_ref();
    project.is_some_and(|project| project.method.fields().contains(&"retained"))
}

/// Whether 32 tokens share a channel's scale.
pub(crate) fn by_channel(quantize: &Quantize) -> bool {
    match quantize.method {
        QuantizeMethod::Kivi | QuantizeMethod::Kvquant | QuantizeMethod::Gear => true,
        QuantizeMethod::Rtn | QuantizeMethod::Zipcache | QuantizeMethod::Fp8 => false,
    }
}

fn codec(method: QuantizeMethod, bits: Bits) -> Codec {
    match bits {
        Bits::B2 => Codec::Int2,
        Bits::B3 => Codec::Int3,
        Bits::B4 => Codec::Int4,
        Bits::B8 if method == QuantizeMethod::Fp8 => Codec::Fp8,
        Bits::B8 => Codec::Int8,
        Bits::B16 => Codec::F16,
    }
}

/// What a policy's rows are packed as, of layers without bits of their own.
pub(crate) fn codecs(quantize: &Quantize) -> (Codec, Codec) {
    let of = |bits| codec(quantize.method, bits);
    (of(quantize.k_bits), of(quantize.v_bits))
}

pub(crate) fn check_codecs(policy: &Policy, layer: usize, blocks: &[BlockView], kept: usize) {
    let rows: Vec<(Codec, Codec)> = blocks
        .iter()
        .flat_map(|block| std::iter::repeat_n((block.k, block.v), block.rows))
        .collect();
    let store = if policy.store == cinch_protocol::Store::Exact {
        Codec::F32
    } else {
        Codec::F16
    };
    let Some(quantize) = &policy.quantize else {
        assert!(rows.iter().all(|row| *row == (store, store)));
        return;
    };
    let own = quantize
        .layers
        .iter()
        .find(|(range, _)| (range.first..=range.last).contains(&(layer as u32)))
        .map_or((None, None), |(_, own)| (own.k_bits, own.v_bits));
    let packed = (
        codec(quantize.method, own.0.unwrap_or(quantize.k_bits)),
        codec(quantize.method, own.1.unwrap_or(quantize.v_bits)),
    );
    for block in blocks {
        let packs = block.k != store;
        assert_eq!(block.rotated, quantize.rotate_k && packs, "{block:?}");
        assert_eq!(block.before_rope, quantize.before_rope() && packs, "{block:?}");
        assert_eq!(block.channels, by_channel(quantize) && packs, "{block:?}");
        let packs = packs || block.v != store;
        let beside = match quantize.method {
            QuantizeMethod::Kvquant => Some("levels"),
            QuantizeMethod::Gear => Some("error"),
            QuantizeMethod::Zipcache => Some("salient"),
            QuantizeMethod::Rtn | QuantizeMethod::Kivi | QuantizeMethod::Fp8 => None,
        };
        let merged = merges(policy);
        let beside = if merged { Some("shared") } else { beside };
        // Rows that wait to be merged are in blocks of their own, whatever their codecs.
        if !merged || packs {
            assert_eq!(block.beside, beside.filter(|_| packs), "{block:?}");
        }
    }
    let sinks = policy
        .select
        .as_ref()
        .map_or(4, |select| select.sinks as usize)
        .min(kept);
    let residual = quantize.residual as usize;
    // Keys that share a scale are packed 32 at a time.
    let tile = if by_channel(quantize) { 32 } else { 1 };
    // What goes beside codes is worth it for a block of 64.
    let least = if merges(policy) || !quantize.method.codes_alone() {
        64
    } else {
        16
    };
    let batch = (residual / 4).max(least).next_multiple_of(tile) + tile - 1;
    assert!(
        rows[..sinks].iter().all(|row| *row == (store, store)),
        "sinks are in full precision"
    );
    let window = rows
        .iter()
        .rev()
        .take_while(|row| **row == (store, store))
        .count()
        .min(kept - sinks);
    assert!(
        window >= residual.min(kept - sinks) && window < residual + batch,
        "recent window of {window}"
    );
    assert!(
        rows[sinks..kept - window].iter().all(|row| *row == packed),
        "the rest is packed"
    );
}
