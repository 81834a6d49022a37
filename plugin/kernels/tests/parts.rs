//! Parts of the work: any split of the rows merges to the whole, any split of the queries gives their rows; and the
//! whole agrees with the oracle at every number of rows, in every pair of codecs.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which may panic")]

mod common;

use cinch_kernels::{
    Codec, ColumnSums, Heads, Kernels, Layout, Partial, Rows, RowsMut, Scratch, Segment, accumulate, merge,
    total,
};
use common::{Packed, bound, decode, error, fast, joined, oracle, random, rng};
use rand::Rng;

fn heads(q_heads: usize, k_dim: usize, v_dim: usize) -> Heads {
    Heads {
        q_heads,
        k_dim,
        v_dim,
        scale: 1.0 / (k_dim as f32).sqrt(),
        softcap: None,
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

#[test]
fn every_pair_of_codecs_at_every_tail() {
    let fast = fast();
    let mut rng = rng(20);
    for (k_dim, v_dim) in [(64, 64), (32, 96), (128, 32), (80, 64), (65, 33)] {
        for k in Codec::ALL {
            for v in Codec::ALL {
                for rows in (0..=40).chain([63, 64, 65, 127, 128, 129]) {
                    let part = Packed::random(&mut rng, (k, v), rows, k_dim, v_dim);
                    let heads = heads(1 + rows % 5, k_dim, v_dim);
                    let q = random(&mut rng, heads.q_heads * k_dim, 1.0);
                    let segments = [part.segment()];
                    if rows == 0 {
                        for kernels in &fast {
                            assert!(decode(*kernels, &heads, &segments, &q).is_err());
                        }
                        continue;
                    }
                    let (right, right_weights) = decode(oracle(), &heads, &segments, &q).unwrap();
                    for kernels in &fast {
                        let (out, weights) = decode(*kernels, &heads, &segments, &q).unwrap();
                        let worst = error(&out, &wide(&right)).max(error(&weights, &wide(&right_weights)));
                        let name = kernels.name();
                        assert!(
                            worst < bound([k, v]),
                            "{name} {k:?}/{v:?} {k_dim}/{v_dim} rows {rows}: {worst:e}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn any_split_merges_to_the_whole() {
    let mut rng = rng(21);
    for kernels in Kernels::available() {
        let mut scratch = Scratch::default();
        let mut partials = vec![Partial::default(); 6];
        for round in 0..60 {
            let heads = heads([1, 2, 3, 4, 7, 8][round % 6], [64, 80, 128][round % 3], 64);
            let parts: Vec<_> = (0..4)
                .map(|_| {
                    let codecs = (
                        Codec::ALL[rng.random_range(0..Codec::ALL.len())],
                        Codec::ALL[rng.random_range(0..Codec::ALL.len())],
                    );
                    let rows = rng.random_range(0..150);
                    Packed::random(&mut rng, codecs, rows, heads.k_dim, heads.v_dim)
                })
                .collect();
            let whole: Vec<_> = parts.iter().map(Packed::segment).collect();
            let rows: usize = whole.iter().map(|s| s.rows).sum();
            if rows == 0 {
                continue;
            }
            // Some heads see logits far apart, so that maxima of parts differ.
            let spread = [0.2, 1.0, 8.0][round % 3];
            let q = random(&mut rng, heads.q_heads * heads.k_dim, spread);
            let (right, right_weights) = decode(kernels, &heads, &whole, &q).unwrap();

            let mut cuts: Vec<usize> = (0..5).map(|_| rng.random_range(0..=rows)).collect();
            cuts.extend([0, rows]);
            cuts.sort_unstable();
            let mut weights = Vec::new();
            for (partial, cut) in partials.iter_mut().zip(cuts.windows(2)) {
                let segments = slice(&heads, &whole, cut[0], cut[1]);
                let rows: usize = segments.iter().map(|s| s.rows).sum();
                let mut w = vec![f32::NAN; heads.q_heads * rows];
                kernels
                    .attend_decode(&heads, &segments, &q, partial, Some(&mut w), &mut scratch)
                    .unwrap();
                weights.push(w);
                // Without weights, the same.
                let mut again = Partial::default();
                kernels
                    .attend_decode(&heads, &segments, &q, &mut again, None, &mut scratch)
                    .unwrap();
                assert_eq!(*partial, again);
            }
            let mut out = vec![f32::NAN; right.len()];
            merge(&heads, &partials, &mut out).unwrap();
            let mut sums = Vec::new();
            for (partial, w) in partials.iter().zip(&weights) {
                let factors: Vec<f32> = (0..heads.q_heads)
                    .map(|h| partial.stats()[h].factor(total(h, &partials)))
                    .collect();
                let mut part = vec![0.0; w.len() / heads.q_heads];
                accumulate(w, &factors, &mut part).unwrap();
                sums.extend(part);
            }
            let right_sums: Vec<f64> = (0..rows)
                .map(|r| {
                    (0..heads.q_heads)
                        .map(|h| f64::from(right_weights[h * rows + r]))
                        .sum()
                })
                .collect();
            let bound = bound(whole.iter().flat_map(|s| [s.k_codec, s.v_codec])) * f64::from(spread.max(1.0));
            let (name, worst) = (kernels.name(), error(&out, &wide(&right)));
            assert!(
                worst < bound,
                "{name} round {round} {heads:?} {cuts:?}: outputs {worst:e}"
            );
            let worst = error(&sums, &right_sums);
            assert!(
                worst < bound,
                "{name} round {round} {heads:?} {cuts:?}: weights {worst:e}"
            );
        }
    }
}

fn slice<'a>(heads: &Heads, segments: &[Segment<'a>], from: usize, to: usize) -> Vec<Segment<'a>> {
    let mut start = 0;
    let mut out = Vec::new();
    for s in segments {
        let (a, b) = (from.max(start), to.min(start + s.rows));
        if a < b {
            // A part begins where tiles do.
            let step = s.k_layout.step().max(s.v_layout.step());
            let cut = |row: usize| if row == s.rows { row } else { row / step * step };
            if cut(a - start) < cut(b - start) {
                out.push(s.slice(heads, cut(a - start)..cut(b - start)));
            }
        }
        start += s.rows;
    }
    out
}

#[test]
fn any_split_of_the_queries_gives_their_rows() {
    let mut rng = rng(22);
    for kernels in Kernels::available() {
        for round in 0..20 {
            let heads = heads([3, 1, 4][round % 3], [64, 80][round % 2], 64);
            let t = rng.random_range(1..130);
            let past: Vec<_> = (0..3)
                .map(|_| {
                    let codec = Codec::ALL[rng.random_range(0..Codec::ALL.len())];
                    let rows = rng.random_range(0..70);
                    Packed::random(&mut rng, (codec, codec), rows, heads.k_dim, heads.v_dim)
                })
                .collect();
            let past: Vec<_> = past.iter().map(Packed::segment).collect();
            let keys: usize = past.iter().map(|s| s.rows).sum::<usize>() + t;
            let (k, v) = (
                random(&mut rng, t * heads.k_dim, 1.0),
                random(&mut rng, t * heads.v_dim, 1.0),
            );
            let q = random(&mut rng, heads.q_heads * t * heads.k_dim, 1.0);
            let last = rng.random_range(0..=t + 1);
            let run = |from: usize, to: usize, sums: &mut [f32]| {
                let n = to - from;
                let rows = |h: usize| Rows {
                    data: &q[(h * t + from) * heads.k_dim..],
                    stride: heads.k_dim,
                    rows: n,
                    dim: heads.k_dim,
                };
                let q: Vec<_> = (0..heads.q_heads).map(rows).collect();
                let mut data = vec![f32::NAN; heads.q_heads * n * heads.v_dim];
                let out = data.chunks_mut(n * heads.v_dim);
                let mut out: Vec<_> = out.map(|o| RowsMut::packed(o, heads.v_dim)).collect();
                let sums = ColumnSums {
                    largest: false,
                    last_queries: last.saturating_sub(t - to),
                    out: sums,
                };
                let (k, v) = (Rows::packed(&k, heads.k_dim), Rows::packed(&v, heads.v_dim));
                let scratch = &mut Scratch::default();
                kernels
                    .attend_prefill(&heads, &past, k, v, from, &q, &mut out, Some(sums), scratch)
                    .unwrap();
                data
            };
            let (mut sums, mut right_sums) = (vec![0.0; keys], vec![0.0; keys]);
            let right = run(0, t, &mut right_sums);
            let cut = rng.random_range(1..=t);
            let mut given = vec![run(0, cut, &mut sums)];
            let mut lengths = vec![cut];
            if cut < t {
                given.push(run(cut, t, &mut sums));
                lengths.push(t - cut);
            }
            let given = joined((0..heads.q_heads).flat_map(|h| {
                let parts = given.iter().zip(&lengths);
                parts.map(move |(data, n)| &data[h * n * heads.v_dim..][..n * heads.v_dim])
            }));
            let worst = error(&given, &wide(&right)).max(error(&sums, &wide(&right_sums)));
            assert!(
                worst < 1e-4,
                "{} {heads:?} t {t} cut {cut}: {worst:e}",
                kernels.name()
            );
        }
    }
}

#[test]
fn rotation_is_orthogonal_and_its_own_inverse() {
    let mut rng = rng(23);
    for dim in [1, 2, 3, 8, 31, 32, 48, 64, 80, 96, 112, 128, 256] {
        let rows = random(&mut rng, 5 * dim, 1.0);
        let mut right = rows.clone();
        oracle().rotate(dim, &mut right).unwrap();
        for kernels in fast() {
            let mut given = rows.clone();
            kernels.rotate(dim, &mut given).unwrap();
            assert!(
                error(&given, &wide(&right)) < 2e-6,
                "{} dim {dim}",
                kernels.name()
            );
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let before = dot(&rows[..dim], &rows[dim..2 * dim]);
            let after = dot(&given[..dim], &given[dim..2 * dim]);
            assert!(
                (before - after).abs() < 1e-5 * dim as f64,
                "{dim}: {before} {after}"
            );
            kernels.rotate(dim, &mut given).unwrap();
            assert!(error(&given, &wide(&rows)) < 2e-6, "{} dim {dim}", kernels.name());
        }
    }
    // Parts are rotated by themselves, largest first: 80 is 64 and 16. A single 1 spreads over its part.
    let mut row = vec![0.0; 80];
    (row[3], row[64]) = (1.0, 1.0);
    oracle().rotate(80, &mut row).unwrap();
    assert!(row[..64].iter().all(|x| x.abs() == 0.125) && row[64..].iter().all(|x| *x == 0.25));
    assert_eq!((row[0], row[1], row[2], row[3]), (0.125, -0.125, -0.125, 0.125));
}

/// Codes at both ends, magnitudes that saturate, groups of equal values, zeros.
#[test]
fn extreme_rows_stay_finite_and_right() {
    let mut rng = rng(24);
    for kernels in fast() {
        for codec in Codec::ALL {
            for dim in [64, 96, 80] {
                let rows = 35;
                let ends: Vec<f32> = (0..rows * dim)
                    .map(|i| if i % 2 == 0 { 3.0 } else { -3.0 })
                    .collect();
                let constant = vec![0.7; rows * dim];
                let zeros = vec![0.0; rows * dim];
                let huge: Vec<f32> = random(&mut rng, rows * dim, 1e6);
                for (name, values) in [
                    ("ends", &ends),
                    ("constant", &constant),
                    ("zeros", &zeros),
                    ("huge", &huge),
                ] {
                    let mut bytes = vec![0; rows * codec.row_bytes(dim)];
                    kernels.pack(codec, dim, values, &mut bytes).unwrap();
                    let segments = [Segment {
                        k_codec: codec,
                        v_codec: codec,
                        k_layout: Layout::Rows,
                        v_layout: Layout::Rows,
                        k_rotated: false,
                        rows,
                        k: &bytes,
                        v: &bytes,
                    }];
                    // Logits of huge keys differ by thousands; equal queries make equal ones.
                    let q = vec![if name == "huge" { 0.0 } else { 0.01 }; 3 * dim];
                    let heads = heads(3, dim, dim);
                    let (right, right_weights) = decode(oracle(), &heads, &segments, &q).unwrap();
                    let (out, weights) = decode(kernels, &heads, &segments, &q).unwrap();
                    let largest = right.iter().fold(1.0f32, |m, x| m.max(x.abs()));
                    let worst = error(&out, &wide(&right)) / f64::from(largest);
                    let case = format!("{} {codec:?} dim {dim} {name}", kernels.name());
                    let bound = bound([codec]);
                    assert!(worst < bound, "{case}: {worst:e}");
                    assert!(error(&weights, &wide(&right_weights)) < bound, "{case}");
                }
            }
        }
    }
}
