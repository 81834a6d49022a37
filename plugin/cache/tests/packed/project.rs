//! Rows of fewer dimensions, and rows of two heads that are one direction and two lengths.

use cinch_cache::BlockView;

use crate::common::*;
use crate::matrix::{Rows, cholesky, dot, eigen, moments, norm, times, transposed};
use crate::{Block, EVEN, Served};

const PROMPT: usize = 400;

/// Half of an f16's last place, twice: a coordinate and what it is multiplied with, or a direction and a length.
const HALVES: f64 = 1.0 / 1024.0;

/// `rows` less what is not in the span of the `rank` leading eigenvectors of a symmetric matrix.
fn in_leading(matrix: Rows, rank: usize, rows: &Rows) -> Rows {
    let leading: Rows = eigen(matrix).into_iter().take(rank).map(|(_, u)| u).collect();
    let back = transposed(&leading);
    rows.iter()
        .map(|row| times(&back, &times(&leading, row)))
        .collect()
}

/// V in the subspace that holds most of it (Palu, arXiv 2407.21118, section 3); K in the one where Σ (q·(k − k̂))² is least
/// (what Eigen Attention, arXiv 2408.05646, section 4, comes near): with Σ q·qᵀ = L·Lᵀ, Lᵀk in the one that holds most of
/// the rows Lᵀk.
fn low_rank(source: Source) {
    for (k_rank, v_rank) in [(16, 8), (48, 40)] {
        let json =
            format!(r#"{{"project": {{"method": "lowrank", "k_rank": {k_rank}, "v_rank": {v_rank}}}}}"#);
        let served = Served::new(source, &json, &[PROMPT]);
        let (model, mut worst) = (source.model, [0.0_f64; 2]);
        for head in served.heads() {
            let queries: Rows = (0..PROMPT)
                .flat_map(|token| {
                    let group = head.kv * model.group..(head.kv + 1) * model.group;
                    group.map(move |q_head| (token, q_head))
                })
                .map(|(token, q_head)| {
                    let q = source.vector(head.layer, What::Q, q_head, token);
                    q.into_iter().map(f64::from).collect()
                })
                .collect();
            let mut c = moments(&queries);
            let mean = (0..model.k_dim).map(|i| c[i][i]).sum::<f64>() / model.k_dim as f64;
            // Directions that nobody has asked for count by a thousandth.
            (0..model.k_dim).for_each(|i| c[i][i] += 1e-3 * mean);
            let lower = transposed(&cholesky(&c));
            let turned = |rows: &Rows| -> Rows { rows.iter().map(|row| times(&lower, row)).collect() };
            for (side, what) in [What::K, What::V].into_iter().enumerate() {
                let basis = |rows: &Rows| if side == 0 { turned(rows) } else { rows.clone() };
                let all = basis(&head.all_given(what));
                for block in head.packed(what, |block| block.projected) {
                    let given = basis(&block.given);
                    let right = in_leading(moments(&all), [k_rank, v_rank][side], &given);
                    for ((back, right), given) in basis(&block.back).iter().zip(&right).zip(&given) {
                        let off: Vec<f64> = back.iter().zip(right).map(|(a, b)| a - b).collect();
                        let off = norm(&off) / norm(given);
                        worst[side] = worst[side].max(off);
                        assert!(
                            off <= HALVES,
                            "{json}, {what:?}, layer {}, head {}: {off}",
                            head.layer,
                            head.kv
                        );
                    }
                }
            }
        }
        println!("{json}: K is off by up to {:e}, V by {:e}", worst[0], worst[1]);
    }
}

/// The channels of K with the largest ‖Q_c‖·‖K_c‖, of the last 64 queries of the group (ThinK, arXiv 2407.21018, section 3.2).
fn channels(source: Source) {
    let rank = 40;
    let json = format!(r#"{{"project": {{"method": "think", "k_rank": {rank}}}}}"#);
    let served = Served::new(source, &json, &[PROMPT]);
    let model = source.model;
    for head in served.heads() {
        let keys = head.all_given(What::K);
        let score = |c: usize| {
            let of_queries: f64 = (PROMPT - 64..PROMPT)
                .flat_map(|token| (0..model.group).map(move |i| (token, i)))
                .map(|(token, i)| {
                    let q = source.vector(head.layer, What::Q, head.kv * model.group + i, token);
                    f64::from(q[c]).powi(2)
                })
                .sum();
            let of_keys: f64 = keys.iter().map(|k| k[c].powi(2)).sum();
            of_queries.sqrt() * of_keys.sqrt()
        };
        let scores: Vec<f64> = (0..model.k_dim).map(score).collect();
        let mut order: Vec<usize> = (0..model.k_dim).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        for block in head.packed(What::K, |block| block.projected) {
            for (back, given) in block.back.iter().zip(&block.given) {
                let right: Vec<f64> = (0..model.k_dim)
                    .map(|c| if order[..rank].contains(&c) { given[c] } else { 0.0 })
                    .collect();
                assert_eq!(*back, right);
            }
        }
        for block in head.packed(What::V, |block| block.projected) {
            assert_eq!(block.back, block.given, "values keep all channels");
        }
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    dot(a, b) / norm(a) / norm(b)
}

/// Checks two blocks' rows: each its own length, in the direction 0.6 of the way from the first to the second along the
/// arc; those that are farthest apart are as they were (`MiniCache`, arXiv 2405.14366, section 4).
fn check_twins(a: &Block, b: &Block, retained: f64) {
    let rows = a.given.len();
    assert_eq!(b.given.len(), rows);
    let angle = |row: usize| cosine(&a.given[row], &b.given[row]).clamp(-1.0, 1.0).acos();
    let mut order: Vec<usize> = (0..rows).collect();
    order.sort_by(|x, y| angle(*y).total_cmp(&angle(*x)));
    let count = (retained * rows as f64).round() as usize;
    let cut = angle(order[count.saturating_sub(1)]);
    for (rank, row) in order.into_iter().enumerate() {
        let own = [(&a.given[row], &a.back[row]), (&b.given[row], &b.back[row])];
        let kept = own.iter().all(|(given, back)| given == back);
        assert!(
            kept == (rank < count) || (angle(row) - cut).abs() <= 1e-5 * cut,
            "row {row}, {} apart, is kept: {kept}; the cut is at {cut}",
            angle(row)
        );
        if kept {
            continue;
        }
        let whole = angle(row);
        let (of_a, of_b) = (
            (0.4 * whole).sin() / whole.sin(),
            (0.6 * whole).sin() / whole.sin(),
        );
        let (x, y) = (&a.given[row], &b.given[row]);
        for (given, back) in own {
            let off = (0..given.len()).map(|c| {
                let direction = of_a * x[c] / norm(x) + of_b * y[c] / norm(y);
                (back[c] - norm(given) * direction).powi(2)
            });
            let off = off.sum::<f64>().sqrt() / norm(given);
            assert!(off <= HALVES, "row {row}: {off}");
        }
    }
}

fn is_shared(block: &BlockView) -> bool {
    block.beside == Some("shared")
}

/// Of the second and the third layer; the first one's rows are as they were.
fn adjacent_layers(source: Source) {
    let json = r#"{"project": {"method": "minicache", "first_layer": 1, "retained": 0.1}}"#;
    let served = Served::new(source, json, &[vec![300, 90], vec![1; 100]].concat());
    let heads: Vec<_> = served.heads().collect();
    for a in heads.iter().filter(|head| head.layer == 1) {
        let find = |head: &&crate::Head<'_>| (head.layer, head.kv) == (2, a.kv);
        let b = heads.iter().find(find).unwrap();
        for what in [What::K, What::V] {
            let (of_a, of_b) = (a.packed(what, is_shared), b.packed(what, is_shared));
            assert_eq!(of_a.len(), of_b.len());
            for (a, b) in of_a.iter().zip(&of_b) {
                assert_eq!(a.start, b.start);
                check_twins(a, b, 0.1);
            }
        }
    }
    for head in heads.iter().filter(|head| head.layer == 0) {
        assert_eq!(head.back(What::K), head.all_given(What::K));
        assert_eq!(head.back(What::V), head.all_given(What::V));
    }
}

/// Of the two heads of a layer whose rows are most alike, by the mean cosine of their first block's keys and values, if
/// it is not negative; the third head's rows are as they were.
fn alike_heads(source: Source) {
    let json = r#"{"project": {"method": "merge_heads", "similarity": 0.0}}"#;
    let served = Served::new(source, json, &[300]);
    let heads: Vec<_> = served.heads().collect();
    let mut pairs = 0;
    for layer in heads.chunks(source.model.kv_heads) {
        let sides = [What::K, What::V].map(|what| {
            let of = |head: &crate::Head<'_>| head.packed(what, is_shared);
            layer.iter().map(of).collect::<Vec<_>>()
        });
        let similarity = |a: usize, b: usize| {
            let mean = |heads: &Vec<Vec<Block>>| {
                let (a, b) = (&heads[a][0].given, &heads[b][0].given);
                a.iter().zip(b).map(|(a, b)| cosine(a, b)).sum::<f64>() / a.len() as f64
            };
            f64::midpoint(mean(&sides[0]), mean(&sides[1]))
        };
        let all = [(0, 1), (0, 2), (1, 2)].map(|(a, b)| (similarity(a, b), a, b));
        let best = all.into_iter().max_by(|x, y| x.0.total_cmp(&y.0)).unwrap();
        let (a, b) = if best.0 >= 0.0 {
            pairs += 1;
            (best.1, best.2)
        } else {
            (usize::MAX, usize::MAX)
        };
        for (head, view) in layer.iter().enumerate() {
            if head != a && head != b {
                assert_eq!(view.back(What::K), view.all_given(What::K), "{all:?}");
                assert_eq!(view.back(What::V), view.all_given(What::V));
            }
        }
        if a < b {
            for side in &sides {
                for (a, b) in side[a].iter().zip(&side[b]) {
                    check_twins(a, b, 0.05);
                }
            }
        }
    }
    assert!(pairs > 0);
}

mod random {
    use super::*;

    fn source() -> Source {
        Source::random(EVEN, 51)
    }

    #[test]
    fn low_rank() {
        super::low_rank(source());
    }

    #[test]
    fn channels() {
        super::channels(source());
    }

    #[test]
    fn adjacent_layers() {
        super::adjacent_layers(source());
    }

    #[test]
    fn alike_heads() {
        super::alike_heads(source());
    }
}

/// On rows of a real model.
#[cfg(feature = "captured")]
mod real {
    use super::*;

    #[test]
    fn low_rank() {
        super::low_rank(Source::captured(4));
    }

    #[test]
    fn channels() {
        super::channels(Source::captured(4));
    }

    /// Layers 14 and 15 of the model.
    #[test]
    fn adjacent_layers() {
        super::adjacent_layers(Source::captured(3));
    }

    #[test]
    fn alike_heads() {
        super::alike_heads(Source::captured(4));
    }
}
