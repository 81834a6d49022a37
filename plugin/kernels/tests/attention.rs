//! Decode and prefill against attention in f64, and against each other.
//!
//! Bounds are those of `common::bound`; prefill works in f32 throughout.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which may panic")]

mod common;

use cinch_kernels::{Codec, ColumnSums, Heads, Kernels, Layout, Rows, RowsMut, Scratch};
use common::{DIMS, Packed, attention, bound, decode, error, fast, joined, random, rng};
use rand::rngs::StdRng;

const BOUND: f64 = 1e-5;

fn heads(q_heads: usize, k_dim: usize, v_dim: usize, softcap: Option<f32>) -> Heads {
    Heads {
        q_heads,
        k_dim,
        v_dim,
        scale: 1.0 / (k_dim as f32).sqrt(),
        softcap,
    }
}

fn pairs() -> impl Iterator<Item = (Codec, Codec)> {
    Codec::ALL.into_iter().flat_map(|k| Codec::ALL.map(|v| (k, v)))
}

/// Largest errors of outputs and weights of every implementation, on what is stored.
fn decode_errors(heads: &Heads, parts: &[Packed], q: &[f32]) -> (f64, f64) {
    let segments: Vec<_> = parts.iter().map(Packed::segment).collect();
    let k = joined(parts.iter().map(|p| &p.stored_k[..]));
    let v = joined(parts.iter().map(|p| &p.stored_v[..]));
    let (mut right_w, mut right) = (Vec::new(), Vec::new());
    for q in q.chunks(heads.k_dim) {
        let (w, out) = attention(q, &k, &v, heads.v_dim, heads.scale, heads.softcap);
        right_w.extend(w);
        right.extend(out);
    }
    let (mut worst, mut worst_w) = (0.0f64, 0.0f64);
    for kernels in Kernels::available() {
        let (out, weights) = decode(kernels, heads, &segments, q).unwrap();
        worst = worst.max(error(&out, &right));
        worst_w = worst_w.max(error(&weights, &right_w));
        for w in weights.chunks(weights.len() / heads.q_heads) {
            let sum: f64 = w.iter().map(|w| *w as f64).sum();
            assert!((sum - 1.0).abs() < BOUND, "weights add up to {sum}");
        }
    }
    (worst, worst_w)
}

fn check_decode(rng: &mut StdRng, heads: &Heads, parts: &[Packed]) {
    let q = random(rng, heads.q_heads * heads.k_dim, 1.0);
    let (out, weights) = decode_errors(heads, parts, &q);
    let shape: Vec<_> = parts.iter().map(|p| (p.codecs, p.rows)).collect();
    let bound = bound(parts.iter().flat_map(|p| [p.codecs.0, p.codecs.1]));
    assert!(
        out < bound && weights < bound,
        "{heads:?} {shape:?}: outputs {out:e}, weights {weights:e}"
    );
}

#[test]
fn decode_every_dim_and_row_count() {
    let mut rng = rng(1);
    for (i, k_dim) in DIMS.into_iter().enumerate() {
        // Values of another width than the keys, as in some architectures.
        for v_dim in [k_dim, DIMS[(i + 4) % DIMS.len()]] {
            for rows in [1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 130] {
                for codec in Codec::ALL {
                    let part = Packed::random(&mut rng, (codec, codec), rows, k_dim, v_dim);
                    check_decode(&mut rng, &heads(1 + rows % 5, k_dim, v_dim, None), &[part]);
                }
            }
        }
    }
}

#[test]
fn decode_mixed_segments_groups_and_caps() {
    let mut rng = rng(2);
    for q_heads in [1, 3, 4, 8] {
        for softcap in [None, Some(2.0), Some(50.0)] {
            let sizes = [4usize, 0, 64, 64, 1, 33, 64];
            let parts: Vec<_> = pairs()
                .zip(sizes.into_iter().cycle())
                .map(|(codecs, rows)| Packed::random(&mut rng, codecs, rows, 64, 80))
                .collect();
            check_decode(&mut rng, &heads(q_heads, 64, 80, softcap), &parts);
        }
    }
}

/// What the arithmetic adds is at most a fifth of what the codec's rounding costs, root mean square over many outputs:
/// for flat and for peaked weights, with keys as they are and rotated, and for queries with an outlier.
#[test]
fn decode_error_is_far_below_quantization_error() {
    let mut rng = rng(3);
    let fast = fast();
    for codec in &Codec::ALL[1..] {
        for dim in [64, 128] {
            for (spread, outlier) in [(0.1, 1.0), (1.0, 1.0), (4.0, 1.0), (0.3, 20.0)] {
                let heads = heads(3, dim, dim, None);
                let mut quantization = 0.0;
                let mut kernel = vec![0.0; fast.len()];
                for _ in 0..12 {
                    let part = Packed::random(&mut rng, (*codec, *codec), 300, dim, dim);
                    let mut q = random(&mut rng, 3 * dim, spread);
                    q.iter_mut().step_by(dim).for_each(|x| *x *= outlier);
                    let square =
                        |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
                    let run = |k: &[f32], v: &[f32]| -> Vec<f64> {
                        let one = |q| attention(q, k, v, dim, heads.scale, None).1;
                        q.chunks(dim).flat_map(one).collect()
                    };
                    let stored = run(&part.stored_k, &part.stored_v);
                    quantization += square(&stored, &run(&part.exact_k, &part.exact_v));
                    for (kernel, kernels) in kernel.iter_mut().zip(&fast) {
                        let (out, _) = decode(*kernels, &heads, &[part.segment()], &q).unwrap();
                        let out: Vec<_> = out.iter().map(|x| f64::from(*x)).collect();
                        *kernel += square(&out, &stored);
                    }
                }
                for (kernel, kernels) in kernel.iter().zip(&fast) {
                    let (kernel, quantization) = (kernel.sqrt(), quantization.sqrt());
                    println!(
                        "{} {codec:?} {dim} {spread} {outlier}: {:.1}",
                        kernels.name(),
                        quantization / kernel
                    );
                    assert!(
                        5.0 * kernel <= quantization,
                        "{} {codec:?} dim {dim} spread {spread} outlier {outlier}: kernel {kernel:e}, quantization {quantization:e}",
                        kernels.name()
                    );
                }
            }
        }
    }
}

#[test]
fn decode_survives_large_logits() {
    let heads = Heads {
        q_heads: 1,
        k_dim: 1,
        v_dim: 1,
        scale: 1.0,
        softcap: None,
    };
    let part = Packed {
        codecs: (Codec::F32, Codec::F32),
        layouts: (Layout::Rows, Layout::Rows),
        rotated: false,
        rows: 3,
        k: [-3e4f32, 3e4, 1e4].iter().flat_map(|x| x.to_le_bytes()).collect(),
        v: [1.0f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect(),
        stored_k: vec![],
        stored_v: vec![],
        exact_k: vec![],
        exact_v: vec![],
    };
    for kernels in Kernels::available() {
        for (q, right) in [(1e4f32, 2.0f32), (-1e4, 1.0), (0.0, 2.0)] {
            let (out, _) = decode(kernels, &heads, &[part.segment()], &[q]).unwrap();
            assert!(
                (out[0] - right).abs() < 1e-6,
                "{} q {q}: {}",
                kernels.name(),
                out[0]
            );
        }
        // Logits of which f32 holds the first digits only.
        let (out, _) = decode(kernels, &heads, &[part.segment()], &[1.234567e28]).unwrap();
        assert!((out[0] - 2.0).abs() < 1e-6, "{}: {}", kernels.name(), out[0]);
        let (out, _) = decode(kernels, &heads, &[part.segment()], &[f32::NAN]).unwrap();
        assert!(out[0].is_nan(), "{}: {}", kernels.name(), out[0]);
    }
}

/// A prefill call's inputs, laid out as a (tokens, heads, dim) tensor: strided, with other heads between.
struct Prefill {
    heads: Heads,
    past: Vec<Packed>,
    t: usize,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

impl Prefill {
    fn random(rng: &mut StdRng, heads: Heads, past: Vec<Packed>, t: usize) -> Self {
        let (k, v) = (
            random(rng, t * 2 * heads.k_dim, 1.0),
            random(rng, t * 2 * heads.v_dim, 1.0),
        );
        let q = random(rng, t * heads.q_heads * heads.k_dim, 1.0);
        Self {
            heads,
            past,
            t,
            k,
            v,
            q,
        }
    }

    fn fresh<'a>(&self, data: &'a [f32], dim: usize) -> Rows<'a> {
        Rows {
            data,
            stride: 2 * dim,
            rows: self.t,
            dim,
        }
    }

    fn queries(&self) -> Vec<Rows<'_>> {
        let (dim, stride) = (self.heads.k_dim, self.heads.q_heads * self.heads.k_dim);
        let rows = |h: usize| Rows {
            data: self.q.get(h * dim..).unwrap_or(&[]),
            stride,
            rows: self.t,
            dim,
        };
        (0..self.heads.q_heads).map(rows).collect()
    }

    /// Checks outputs, column sums and largest weights of every implementation; what lies between output rows stays.
    fn check(&self, last_queries: usize) {
        let Heads {
            q_heads,
            k_dim,
            v_dim,
            scale,
            softcap,
        } = self.heads;
        let past_rows: usize = self.past.iter().map(|p| p.rows).sum();
        let mut k = joined(self.past.iter().map(|p| &p.stored_k[..]));
        let mut v = joined(self.past.iter().map(|p| &p.stored_v[..]));
        let mut right = vec![0.0; q_heads * self.t * v_dim];
        // What was there before is added to, or raised.
        let (mut right_sums, mut right_largest) =
            (vec![1.0; past_rows + self.t], vec![0.05; past_rows + self.t]);
        for i in 0..self.t {
            k.extend(&self.k[i * 2 * k_dim..][..k_dim]);
            v.extend(&self.v[i * 2 * v_dim..][..v_dim]);
            for h in 0..q_heads {
                let q = &self.q[(i * q_heads + h) * k_dim..][..k_dim];
                let (w, out) = attention(q, &k, &v, v_dim, scale, softcap);
                right[(h * self.t + i) * v_dim..][..v_dim].copy_from_slice(&out);
                if self.t - i <= last_queries {
                    right_sums.iter_mut().zip(&w).for_each(|(s, w)| *s += w);
                    right_largest.iter_mut().zip(w).for_each(|(s, w)| *s = w.max(*s));
                }
            }
        }

        let segments: Vec<_> = self.past.iter().map(Packed::segment).collect();
        for kernels in Kernels::available() {
            let stride = v_dim + 3;
            let mut data = vec![-7.0; q_heads * self.t * stride];
            let mut sums = vec![1.0f32; past_rows + self.t];
            let mut largest = vec![0.05f32; past_rows + self.t];
            let mut scratch = Scratch::default();
            let (fresh_k, fresh_v) = (self.fresh(&self.k, k_dim), self.fresh(&self.v, v_dim));
            for columns in [None, Some(&mut sums), Some(&mut largest)]
                .into_iter()
                .enumerate()
            {
                let mut out: Vec<_> = if self.t == 0 {
                    (0..q_heads)
                        .map(|_| RowsMut {
                            data: &mut [],
                            stride,
                            rows: 0,
                            dim: v_dim,
                        })
                        .collect()
                } else {
                    let rows = |data| RowsMut {
                        data,
                        stride,
                        rows: self.t,
                        dim: v_dim,
                    };
                    data.chunks_mut(self.t * stride).map(rows).collect()
                };
                let (index, columns) = columns;
                let sums = columns.map(|out| ColumnSums {
                    largest: index == 2,
                    last_queries,
                    out,
                });
                kernels
                    .attend_prefill(
                        &self.heads,
                        &segments,
                        fresh_k,
                        fresh_v,
                        0,
                        &self.queries(),
                        &mut out,
                        sums,
                        &mut scratch,
                    )
                    .unwrap();
                drop(out);
                let given = joined(data.chunks(stride).map(|row| &row[..v_dim]));
                let (worst, shape) = (error(&given, &right), (self.heads, past_rows, self.t));
                assert!(worst < BOUND, "{shape:?}: outputs {worst:e}");
                assert!(
                    data.chunks(stride).all(|row| row[v_dim..] == [-7.0; 3]),
                    "{shape:?}: wrote between rows"
                );
            }
            // A column adds up to as many weights as there are queries.
            let bound = BOUND * (q_heads * last_queries.min(self.t)) as f64 + BOUND;
            let worst = error(&sums, &right_sums);
            assert!(
                worst < bound,
                "{:?} past {past_rows} t {}: sums {worst:e}",
                self.heads,
                self.t
            );
            let worst = error(&largest, &right_largest);
            assert!(
                worst < BOUND,
                "{:?} past {past_rows} t {}: largest {worst:e}",
                self.heads,
                self.t
            );
        }
    }
}

#[test]
fn prefill_every_length() {
    let mut rng = rng(4);
    for t in 0..=70 {
        let heads = heads(1 + t % 3, 32, 48, None);
        Prefill::random(&mut rng, heads, vec![], t).check(t / 2);
    }
}

#[test]
fn prefill_every_dim() {
    let mut rng = rng(5);
    for (i, k_dim) in DIMS.into_iter().enumerate() {
        for v_dim in [k_dim, DIMS[(i + 5) % DIMS.len()]] {
            let past = vec![Packed::random(
                &mut rng,
                (Codec::Int8, Codec::Int4),
                37,
                k_dim,
                v_dim,
            )];
            Prefill::random(&mut rng, heads(2, k_dim, v_dim, None), past, 35).check(usize::MAX);
        }
    }
}

#[test]
fn prefill_on_packed_past_of_any_length() {
    let mut rng = rng(6);
    for past_rows in [1, 2, 31, 63, 64, 65, 127, 128, 129] {
        for t in [0, 1, 2, 15, 16, 17, 63, 64, 65] {
            let codecs = pairs().nth((past_rows + t) % 49).unwrap();
            let past = vec![Packed::random(&mut rng, codecs, past_rows, 64, 64)];
            Prefill::random(&mut rng, heads(3, 64, 64, None), past, t).check(t.min(64));
        }
    }
}

#[test]
fn prefill_mixed_segments_groups_and_caps() {
    let mut rng = rng(7);
    for q_heads in [1, 3, 4, 8] {
        for softcap in [None, Some(2.0), Some(50.0)] {
            let past: Vec<_> = pairs()
                .zip([4usize, 0, 64, 1, 33].into_iter().cycle())
                .map(|(codecs, rows)| Packed::random(&mut rng, codecs, rows, 64, 80))
                .collect();
            Prefill::random(&mut rng, heads(q_heads, 64, 80, softcap), past, 41).check(7);
        }
    }
}

/// Growing maxima: the running rescale must undo tiles that turned out small.
#[test]
fn prefill_with_keys_that_grow() {
    let mut rng = rng(8);
    let mut case = Prefill::random(&mut rng, heads(2, 64, 64, None), vec![], 300);
    for (i, row) in case.k.chunks_mut(128).enumerate() {
        row.iter_mut().for_each(|x| *x *= 0.01 * i as f32);
    }
    case.check(300);
}

/// More weights than are kept for the columns: of 1,600 queries those of twenty tiles are.
#[test]
fn prefill_on_a_past_whose_weights_have_no_room() {
    let mut rng = rng(10);
    let past = vec![Packed::random(&mut rng, (Codec::F16, Codec::Int8), 1500, 16, 16)];
    Prefill::random(&mut rng, heads(8, 16, 16, None), past, 200).check(200);
}

/// A token decoded on f32 rows gets what it would have got as the last of a prefill.
#[test]
fn decode_continues_prefill() {
    let mut rng = rng(9);
    let heads = heads(3, 64, 64, None);
    let mut part = Packed::random(&mut rng, (Codec::F32, Codec::F32), 150, 64, 64);
    while part.rotated {
        part = Packed::random(&mut rng, (Codec::F32, Codec::F32), 150, 64, 64);
    }
    let q = random(&mut rng, 3 * 150 * 64, 1.0);
    let q: Vec<_> = q.chunks(150 * 64).map(|q| Rows::packed(q, 64)).collect();
    let mut data = vec![0.0; 3 * 150 * 64];
    let (k, v) = (Rows::packed(&part.exact_k, 64), Rows::packed(&part.exact_v, 64));
    for kernels in fast() {
        let mut out: Vec<_> = data
            .chunks_mut(150 * 64)
            .map(|o| RowsMut::packed(o, 64))
            .collect();
        let mut sums = vec![0.0; 150];
        let column_sums = Some(ColumnSums {
            largest: false,
            last_queries: 1,
            out: &mut sums,
        });
        let scratch = &mut Scratch::default();
        kernels
            .attend_prefill(&heads, &[], k, v, 0, &q, &mut out, column_sums, scratch)
            .unwrap();
        let last = joined(data.chunks(150 * 64).map(|o| &o[149 * 64..]));
        let q = joined(q.iter().map(|q| &q.data[149 * 64..]));
        let (decoded, weights) = decode(kernels, &heads, &[part.segment()], &q).unwrap();
        assert!(error(&decoded, &last.iter().map(|x| *x as f64).collect::<Vec<_>>()) < BOUND);
        let by_key: Vec<f64> = (0..150)
            .map(|j| (0..3).map(|h| weights[h * 150 + j] as f64).sum())
            .collect();
        assert!(error(&sums, &by_key) < BOUND);
    }
}
