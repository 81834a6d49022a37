//! One KV head with two query heads, for oracles of what is stored: any rows, and attention over any rows.

use candle_core::{Device, Tensor};
use cinch_cache::Plugin;
use cinch_hooks::{CachePolicy, Qkv};

use super::{Model, Seq, What, dense, vector};

pub(crate) const DIM: usize = 64;
pub(crate) const GROUP: usize = 2;

pub(crate) const ONE: Model = Model {
    layers: 1,
    kv_heads: 1,
    group: GROUP,
    k_dim: DIM,
    v_dim: DIM,
};

/// Random rows of a text.
pub(crate) fn random(what: What, head: usize, token: usize) -> Vec<f32> {
    vector(1, 0, what, head, token, DIM)
}

/// A step of `plugin`'s sequence over tokens `from..to` with these rows, of what, head and token.
pub(crate) fn attend(
    plugin: &Plugin,
    seq: &Seq,
    from: usize,
    to: usize,
    row: &dyn Fn(What, usize, usize) -> Vec<f32>,
) -> Vec<f32> {
    let rows = |what: What, heads: usize| {
        let data: Vec<f32> = (0..heads)
            .flat_map(|head| (from..to).flat_map(move |token| row(what, head, token)))
            .collect();
        Tensor::from_vec(data, (1, heads, to - from, DIM), &Device::Cpu).unwrap()
    };
    let (q, k, v) = (rows(What::Q, GROUP), rows(What::K, 1), rows(What::V, 1));
    let qkv = Qkv { q: &q, k: &k, v: &v };
    let cache = [seq.cache.clone()];
    let out = plugin.attend(0, &cache, qkv, &ONE.params(), &dense(ONE.params()));
    out.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

/// Softmax attention in f64 of one query a head.
pub(crate) fn attended(queries: &[Vec<f64>], k: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<f64> {
    let mut all = Vec::new();
    for q in queries {
        let logit = |k: &Vec<f64>| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (DIM as f64).sqrt();
        let logits: Vec<f64> = k.iter().map(logit).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        let mut out = vec![0.0; DIM];
        for (v, logit) in v.iter().zip(&logits) {
            let weight = (logit - max).exp() / sum;
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight * v);
        }
        all.extend(out);
    }
    all
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Root mean square difference.
pub(crate) fn distance<A: Copy + Into<f64>>(a: &[A], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(a, b)| ((*a).into() - b).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}
