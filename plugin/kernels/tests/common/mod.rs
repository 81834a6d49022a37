//! What the tests share: seeded inputs, and attention in f64 written from its definition
//! (Vaswani et al., arXiv 1706.03762, section 3.2.1), independent of the crate's own oracle.
#![allow(dead_code, reason = "each test file uses its part")]

use cinch_kernels::{Codec, Heads, KernelError, Kernels, Layout, Partial, Scratch, Segment, merge};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Row widths on either side of every chunk and group size in use.
pub(crate) const DIMS: [usize; 13] = [1, 2, 31, 32, 33, 48, 63, 64, 65, 80, 96, 128, 256];
/// Row counts on either side of every tile.
pub(crate) const ROWS: [usize; 8] = [0, 1, 2, 7, 8, 63, 64, 65];

pub(crate) fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Roughly normal values with the given spread: sums of uniform ones.
pub(crate) fn random(rng: &mut StdRng, n: usize, spread: f32) -> Vec<f32> {
    (0..n)
        .map(|_| (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.87 * spread)
        .collect()
}

/// Rows packed in one pair of codecs and layouts, with the values they unpack to and those they came from.
pub(crate) struct Packed {
    pub(crate) codecs: (Codec, Codec),
    pub(crate) layouts: (Layout, Layout),
    pub(crate) rotated: bool,
    pub(crate) rows: usize,
    pub(crate) k: Vec<u8>,
    pub(crate) v: Vec<u8>,
    pub(crate) stored_k: Vec<f32>,
    pub(crate) stored_v: Vec<f32>,
    pub(crate) exact_k: Vec<f32>,
    pub(crate) exact_v: Vec<f32>,
}

impl Packed {
    pub(crate) fn random(
        rng: &mut StdRng,
        codecs: (Codec, Codec),
        rows: usize,
        k_dim: usize,
        v_dim: usize,
    ) -> Self {
        let (exact_k, exact_v) = (random(rng, rows * k_dim, 1.0), random(rng, rows * v_dim, 1.0));
        let store = |layout: Layout, codec: Codec, dim: usize, values: &[f32]| {
            let mut bytes = vec![0; layout.stored_rows(rows) * codec.row_bytes(dim)];
            let mut stored = vec![0.0; rows * dim];
            oracle().pack_run(layout, codec, dim, values, &mut bytes).unwrap();
            oracle()
                .unpack_run(layout, codec, dim, &bytes, &mut stored)
                .unwrap();
            (bytes, stored)
        };
        // Any layout that these rows can lie in.
        let mut pick = |of: &[Layout], codec: Codec, dim: usize| {
            let fit: Vec<_> = of.iter().filter(|layout| layout.fits(codec, dim)).collect();
            *fit[rng.random_range(0..fit.len())]
        };
        let layouts = (
            pick(
                &[Layout::Rows, Layout::KeyTiles, Layout::KeyChannels],
                codecs.0,
                k_dim,
            ),
            pick(&[Layout::Rows, Layout::ValueTiles], codecs.1, v_dim),
        );
        // Every other run of rows is rotated before it is packed, and back to compare.
        let rotated = rng.random();
        let mut keys = exact_k.clone();
        if rotated {
            oracle().rotate(k_dim, &mut keys).unwrap();
        }
        let ((k, mut stored_k), (v, stored_v)) = (
            store(layouts.0, codecs.0, k_dim, &keys),
            store(layouts.1, codecs.1, v_dim, &exact_v),
        );
        if rotated {
            oracle().rotate(k_dim, &mut stored_k).unwrap();
        }
        Self {
            codecs,
            layouts,
            rotated,
            rows,
            k,
            v,
            stored_k,
            stored_v,
            exact_k,
            exact_v,
        }
    }

    pub(crate) fn segment(&self) -> Segment<'_> {
        let (k_codec, v_codec) = self.codecs;
        Segment {
            k_codec,
            v_codec,
            k_layout: self.layouts.0,
            v_layout: self.layouts.1,
            k_rotated: self.rotated,
            rows: self.rows,
            k: &self.k,
            v: &self.v,
        }
    }
}

/// How far outputs and weights may be from the oracle's, for values of about normal(0, 1) and logits of that size.
///
/// f32 sums of up to 256 products put about 1e-6 on a logit, and through it on an output. On integer rows
/// implementations may round queries and weights too: on int8 to 16 bits, of which half a step times a range of 6 is
/// 9e-5 for one row and grows with the root of the rows that weigh as much as the heaviest of their block; on fewer
/// bits to 8, where a separate test holds the error against what the codes themselves cost.
pub(crate) fn bound(codecs: impl IntoIterator<Item = Codec>) -> f64 {
    let one = |codec| match codec {
        Codec::F32 | Codec::F16 | Codec::Bf16 | Codec::Fp8 => 1e-5,
        Codec::Int8 => 5e-4,
        Codec::Int4 | Codec::Int3 | Codec::Int2 => 0.05,
    };
    codecs.into_iter().map(one).fold(0.0, f64::max)
}

pub(crate) fn oracle() -> Kernels {
    Kernels::forced("scalar").unwrap()
}

/// Everything but the oracle that this CPU can run.
pub(crate) fn fast() -> Vec<Kernels> {
    let fast: Vec<_> = Kernels::available()
        .into_iter()
        .filter(|k| *k != oracle())
        .collect();
    let names: Vec<_> = fast.iter().map(|k| k.name()).collect();
    println!("implementations under test: {}", names.join(", "));
    fast
}

/// Output and softmax weights of decode attention in one part.
pub(crate) fn decode(
    kernels: Kernels,
    heads: &Heads,
    segments: &[Segment<'_>],
    q: &[f32],
) -> Result<(Vec<f32>, Vec<f32>), KernelError> {
    let rows: usize = segments.iter().map(|s| s.rows).sum();
    let mut partial = Partial::default();
    let mut weights = vec![f32::NAN; heads.q_heads * rows];
    let mut out = vec![f32::NAN; heads.q_heads * heads.v_dim];
    let scratch = &mut Scratch::default();
    kernels.attend_decode(heads, segments, q, &mut partial, Some(&mut weights), scratch)?;
    merge(heads, [&partial], &mut out)?;
    for (weights, stat) in weights.chunks_exact_mut(rows).zip(partial.stats()) {
        weights.iter_mut().for_each(|w| *w *= stat.factor(*stat));
    }
    Ok((out, weights))
}

pub(crate) fn joined<'a>(parts: impl IntoIterator<Item = &'a [f32]>) -> Vec<f32> {
    parts.into_iter().flatten().copied().collect()
}

/// The f64 attention of one query: returns its weights and its output.
pub(crate) fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    v_dim: usize,
    scale: f32,
    cap: Option<f32>,
) -> (Vec<f64>, Vec<f64>) {
    let mut weights = Vec::new();
    for key in k.chunks(q.len()) {
        let mut logit = 0.0f64;
        for d in 0..q.len() {
            logit += q[d] as f64 * key[d] as f64;
        }
        logit *= scale as f64;
        if let Some(cap) = cap {
            logit = cap as f64 * (logit / cap as f64).tanh();
        }
        weights.push(logit);
    }
    let top = weights.iter().cloned().fold(f64::MIN, f64::max);
    weights.iter_mut().for_each(|w| *w = (*w - top).exp());
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= total);
    let mut out = vec![0.0; v_dim];
    for (w, value) in weights.iter().zip(v.chunks(v_dim)) {
        for d in 0..v_dim {
            out[d] += w * value[d] as f64;
        }
    }
    (weights, out)
}

/// The largest difference.
pub(crate) fn error(given: &[f32], right: &[f64]) -> f64 {
    assert_eq!(given.len(), right.len());
    // Not `max`, which would pass over a NaN.
    given
        .iter()
        .zip(right)
        .map(|(g, r)| (*g as f64 - r).abs())
        .fold(0.0, |m, e| if e <= m { m } else { e })
}
