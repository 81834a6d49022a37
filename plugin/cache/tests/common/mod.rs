//! A stand-in for the engine: tokens with reproducible q, k and v, random ones or a model's own, steps through the seam's
//! traits, and an attention oracle in f64 that shares nothing with the crate.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]
#![allow(dead_code, reason = "every test file uses a part of it")]

pub(crate) mod captured;
pub(crate) mod matrix;
pub(crate) mod single;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use cinch_cache::{
    Assignment, ErrorSample, LayerView, Pairing, Plugin, PluginSettings, Rotary, RotaryLayers,
};
use cinch_hooks::{AttendParams, CachePolicy, LayerShape, Qkv, SequenceCache, SequenceInfo};
use cinch_protocol::Policy;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A small model's geometry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    pub(crate) k_dim: usize,
    pub(crate) v_dim: usize,
}

pub(crate) const SMALL: Model = Model {
    layers: 2,
    kv_heads: 2,
    group: 3,
    k_dim: 32,
    v_dim: 64,
};

impl Model {
    pub(crate) fn q_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    pub(crate) fn info(&self, request: usize, sequence: usize, prompt_tokens: usize) -> SequenceInfo {
        let shape = LayerShape {
            kv_heads: self.kv_heads,
            k_dim: self.k_dim,
            v_dim: self.v_dim,
        };
        SequenceInfo {
            request,
            sequence,
            choice: 0,
            prompt_tokens,
            context: 8192,
            layers: vec![shape; self.layers],
            dtype: DType::F32,
            device: Device::Cpu,
        }
    }

    pub(crate) fn params(&self) -> AttendParams {
        AttendParams {
            scale: 1.0 / (self.k_dim as f32).sqrt(),
            softcap: None,
        }
    }
}

/// A model and the text that it reads: where rows come from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    pub(crate) model: Model,
    pub(crate) text: u64,
}

impl Source {
    pub(crate) fn random(model: Model, text: u64) -> Self {
        Self { model, text }
    }

    /// The first so many layers that were captured of a real model.
    pub(crate) fn captured(layers: usize) -> Self {
        Self {
            model: Model {
                layers,
                ..captured::REAL
            },
            text: captured::CAPTURED,
        }
    }

    pub(crate) fn is_captured(&self) -> bool {
        self.text == captured::CAPTURED
    }

    pub(crate) fn vector(&self, layer: usize, what: What, head: usize, token: usize) -> Vec<f32> {
        let dim = match what {
            What::Q | What::K => self.model.k_dim,
            What::V => self.model.v_dim,
        };
        vector(self.text, layer, what, head, token, dim)
    }
}

/// Which projection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum What {
    Q,
    K,
    V,
}

/// The projection of one token: a function of its place and the text it is part of, nothing else. Of the text
/// [`captured::CAPTURED`] it is what a model made of it.
pub(crate) fn vector(text: u64, layer: usize, what: What, head: usize, token: usize, dim: usize) -> Vec<f32> {
    if text == captured::CAPTURED {
        return captured::vector(layer, what, head, token, dim);
    }
    let seed = [text, layer as u64, what as u64, head as u64, token as u64]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, part| {
            (hash ^ part).wrapping_mul(0x0100_0000_01b3).rotate_left(17)
        });
    let mut rng = StdRng::seed_from_u64(seed);
    let gain = if matches!(what, What::Q) { 2.0 } else { 1.0 };
    (0..dim)
        .map(|_| gain * (rng.random::<f32>() + rng.random::<f32>() - 1.0))
        .collect()
}

/// A sequence under test: its cache and the text it reads.
#[derive(Clone)]
pub(crate) struct Seq {
    pub(crate) cache: Arc<dyn SequenceCache>,
    pub(crate) text: u64,
    pub(crate) seen: usize,
}

pub(crate) fn plugin_with(policy: Policy, settings: PluginSettings) -> Arc<Plugin> {
    let plugin = Plugin::new(settings, assignment(policy)).unwrap();
    plugin.set_rotary(RotaryLayers::Alike(Rotary::new(
        10_000.0,
        24,
        Pairing::Neighbours,
    )));
    plugin
}

/// Every layer and head is sampled, so that each compression is measured.
pub(crate) fn settings() -> PluginSettings {
    PluginSettings {
        error_sample: ErrorSample {
            every_layer: 1,
            heads: 8,
        },
        ..PluginSettings::default()
    }
}

pub(crate) fn plugin(policy: Policy) -> Arc<Plugin> {
    plugin_with(policy, settings())
}

pub(crate) fn assignment(policy: Policy) -> Assignment {
    Assignment {
        class: "default".into(),
        level: None,
        policy,
        own: false,
    }
}

pub(crate) fn policy(json: &str) -> Policy {
    let policy: Policy = serde_json::from_str(json).unwrap();
    policy.validate().unwrap();
    policy
}

pub(crate) fn open(plugin: &Plugin, model: &Model, request: usize, text: u64) -> Seq {
    let cache = plugin.open(&model.info(request, request, 0)).unwrap();
    Seq { cache, text, seen: 0 }
}

/// (batch, heads, fresh, dim) as a projection leaves it: a transposed view, not contiguous.
pub(crate) fn tensor(
    rows: &[Seq],
    layer: usize,
    what: What,
    heads: usize,
    fresh: usize,
    dim: usize,
) -> Tensor {
    let mut data = Vec::with_capacity(rows.len() * heads * fresh * dim);
    for row in rows {
        for token in row.seen..row.seen + fresh {
            for head in 0..heads {
                data.extend(vector(row.text, layer, what, head, token, dim));
            }
        }
    }
    Tensor::from_vec(data, (rows.len(), fresh, heads, dim), &Device::Cpu)
        .unwrap()
        .transpose(1, 2)
        .unwrap()
}

/// Stands in for the engine's own attention: causal, by tensor operations.
pub(crate) fn dense(
    params: AttendParams,
) -> impl Fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor> {
    move |q, k, v| {
        let (_, q_heads, fresh, _) = q.dims4()?;
        let (_, kv_heads, total, _) = k.dims4()?;
        let group = q_heads / kv_heads;
        let mask: Vec<f32> = (0..fresh)
            .flat_map(|i| {
                (0..total).map(move |j| {
                    if j <= total - fresh + i {
                        0.0
                    } else {
                        f32::NEG_INFINITY
                    }
                })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (fresh, total), &Device::Cpu)?;
        let mut out = Vec::new();
        for head in 0..q_heads {
            let one = |t: &Tensor, head: usize| {
                t.narrow(1, head, 1)?
                    .squeeze(1)?
                    .squeeze(0)?
                    .to_dtype(DType::F32)?
                    .contiguous()
            };
            let mut scores = (one(q, head)?.matmul(&one(k, head / group)?.t()?)? * f64::from(params.scale))?;
            if let Some(cap) = params.softcap {
                scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
            }
            let scores = (scores + &mask)?;
            let weights = scores.broadcast_sub(&scores.max_keepdim(1)?)?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
            out.push(weights.matmul(&one(v, head / group)?)?);
        }
        Tensor::stack(&out, 0)?.unsqueeze(0)?.to_dtype(q.dtype())
    }
}

/// One forward pass of a batch. Answers with each layer's output, (batch, query heads, fresh, v_dim).
pub(crate) fn step(plugin: &Plugin, model: &Model, rows: &mut [Seq], fresh: usize) -> Vec<Vec<f32>> {
    let handles: Vec<_> = rows.iter().map(|row| row.cache.clone()).collect();
    let mut outs = Vec::with_capacity(model.layers);
    for layer in 0..model.layers {
        let q = tensor(rows, layer, What::Q, model.q_heads(), fresh, model.k_dim);
        let k = tensor(rows, layer, What::K, model.kv_heads, fresh, model.k_dim);
        let v = tensor(rows, layer, What::V, model.kv_heads, fresh, model.v_dim);
        let out = plugin
            .attend(
                layer,
                &handles,
                Qkv { q: &q, k: &k, v: &v },
                &model.params(),
                &dense(model.params()),
            )
            .unwrap();
        assert_eq!(out.dims(), [rows.len(), model.q_heads(), fresh, model.v_dim]);
        let out = out.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(
            out.iter().all(|x| x.is_finite()),
            "layer {layer}: output is not finite"
        );
        outs.push(out);
    }
    for row in rows {
        row.seen += fresh;
        for layer in 0..model.layers {
            assert_eq!(row.cache.seen(layer), row.seen);
        }
    }
    outs
}

/// Softmax weights in f64 of one query over the keys at `positions`.
pub(crate) fn weights(
    model: &Model,
    text: u64,
    layer: usize,
    q_head: usize,
    token: usize,
    positions: &[u32],
) -> Vec<f64> {
    let scale = 1.0 / f64::from(model.k_dim as u32).sqrt();
    let q = vector(text, layer, What::Q, q_head, token, model.k_dim);
    let scores: Vec<f64> = positions
        .iter()
        .map(|position| {
            let k = vector(
                text,
                layer,
                What::K,
                q_head / model.group,
                *position as usize,
                model.k_dim,
            );
            scale
                * q.iter()
                    .zip(&k)
                    .map(|(a, b)| f64::from(*a) * f64::from(*b))
                    .sum::<f64>()
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

/// Attention output in f64 of one query over the rows at `positions`.
pub(crate) fn attention(
    model: &Model,
    text: u64,
    layer: usize,
    q_head: usize,
    token: usize,
    positions: &[u32],
) -> Vec<f64> {
    let mut out = vec![0.0; model.v_dim];
    let weights = weights(model, text, layer, q_head, token, positions);
    for (weight, position) in weights.iter().zip(positions) {
        let v = vector(
            text,
            layer,
            What::V,
            q_head / model.group,
            *position as usize,
            model.v_dim,
        );
        for (out, v) in out.iter_mut().zip(v) {
            *out += weight * f64::from(v);
        }
    }
    out
}

/// Largest absolute difference between one layer's outputs of a step and full attention in f64.
pub(crate) fn against_full(model: &Model, rows: &[Seq], fresh: usize, layer: usize, out: &[f32]) -> f64 {
    let mut worst = 0.0_f64;
    let mut out = out.chunks_exact(model.v_dim);
    for row in rows {
        for head in 0..model.q_heads() {
            for token in row.seen - fresh..row.seen {
                let positions: Vec<u32> = (0..=token as u32).collect();
                let exact = attention(model, row.text, layer, head, token, &positions);
                for (a, b) in exact.iter().zip(out.next().unwrap()) {
                    worst = worst.max((a - f64::from(*b)).abs());
                }
            }
        }
    }
    worst
}

/// What must hold of a sequence at any time, under whatever policies it lived.
pub(crate) fn check_invariants(plugin: &Plugin, seq: &Seq) -> Vec<LayerView> {
    let layers = plugin.inspect(&*seq.cache).unwrap();
    let mut bytes = 0;
    for layer in &layers {
        assert_eq!(layer.seen, seq.seen);
        let mut layer_bytes = layer.scores.as_ref().map_or(0, |scores| {
            assert_eq!(
                scores.len(),
                layer.heads[0].positions.len(),
                "layer scores follow their rows"
            );
            assert!(
                layer
                    .heads
                    .iter()
                    .all(|head| head.positions == layer.heads[0].positions)
            );
            0
        });
        for head in &layer.heads {
            let kept = head.positions.len();
            assert!(
                head.positions.windows(2).all(|pair| pair[0] < pair[1]),
                "positions strictly increase"
            );
            assert!(
                head.positions
                    .last()
                    .is_none_or(|last| (*last as usize) < seq.seen)
            );
            assert!(seq.seen == 0 || head.positions.last() == Some(&(seq.seen as u32 - 1)));
            assert_eq!(head.blocks.iter().map(|block| block.rows).sum::<usize>(), kept);
            assert!(head.blocks.iter().all(|block| block.rows <= block.capacity));
            assert_eq!(layer.scores.is_none(), head.scores.is_some());
            let scores = head.scores.as_deref().or(layer.scores.as_deref()).unwrap();
            assert_eq!(scores.len(), kept, "scores follow their rows");
            assert!(scores.iter().all(|score| score.is_finite() && *score >= 0.0));
            assert!(
                layer.reachable_from > 0 || kept == seq.seen,
                "nothing is missing before an eviction"
            );
            layer_bytes += head.bytes;
        }
        assert!(layer.bytes >= layer_bytes);
        bytes += layer.bytes;
    }
    assert_eq!(seq.cache.bytes(), bytes, "bytes() is the sum of what is held");
    layers
}
