//! Rows that a model's attention was given, from the file that `CINCH_QKV` names: what `cinch probe` captures (its layout is
//! in `cinch_protocol::probe::Capture`).

use std::collections::HashMap;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use super::{Model, What};

/// The heads of SmolLM2-135M, and as many of its layers as are captured.
pub(crate) const REAL: Model = Model {
    layers: 4,
    kv_heads: 3,
    group: 3,
    k_dim: 64,
    v_dim: 64,
};

/// The text whose rows are captured.
pub(crate) const CAPTURED: u64 = u64::MAX;

struct Captured {
    /// Of each layer, (heads, tokens, dim) one after another: q, k and v.
    layers: Vec<[Vec<f32>; 3]>,
    steps: Vec<usize>,
}

fn file() -> &'static Captured {
    static FILE: OnceLock<Captured> = OnceLock::new();
    FILE.get_or_init(|| {
        let path = std::env::var_os("CINCH_QKV")
            .expect("CINCH_QKV is not set: run these tests with `cargo xtask test`");
        read(&candle_core::safetensors::load(path, &Device::Cpu).unwrap())
    })
}

fn read(tensors: &HashMap<String, Tensor>) -> Captured {
    let numbers = tensors.keys().filter_map(|name| name.strip_prefix("q."));
    let mut numbers: Vec<usize> = numbers.map(|number| number.parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers.len(), REAL.layers, "layers {numbers:?}");
    let steps = tensors["fresh"].to_vec1::<u32>().unwrap();
    let steps: Vec<usize> = steps.into_iter().map(|fresh| fresh as usize).collect();
    let tokens = steps.iter().sum();
    let side = |side: &str, layer: usize, heads: usize, dim: usize| {
        let tensor = &tensors[&format!("{side}.{layer}")];
        assert_eq!(tensor.dims(), [heads, tokens, dim], "{side}.{layer}");
        let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        values.to_vec1::<f32>().unwrap()
    };
    let layers = numbers.into_iter().map(|layer| {
        let scale = tensors[&format!("scale.{layer}")].to_scalar::<f32>().unwrap();
        assert_eq!(scale.to_bits(), REAL.params().scale.to_bits(), "scale.{layer}");
        assert!(!tensors.contains_key(&format!("softcap.{layer}")));
        [
            side("q", layer, REAL.q_heads(), REAL.k_dim),
            side("k", layer, REAL.kv_heads, REAL.k_dim),
            side("v", layer, REAL.kv_heads, REAL.v_dim),
        ]
    });
    Captured {
        layers: layers.collect(),
        steps,
    }
}

/// Tokens of each step that the model took.
pub(crate) fn steps() -> Vec<usize> {
    file().steps.clone()
}

/// One token's projection.
pub(crate) fn vector(layer: usize, what: What, head: usize, token: usize, dim: usize) -> Vec<f32> {
    let tokens: usize = file().steps.iter().sum();
    assert!(token < tokens, "token {token} of {tokens} captured ones");
    let rows = &file().layers[layer][what as usize];
    rows[(head * tokens + token) * dim..][..dim].to_vec()
}
