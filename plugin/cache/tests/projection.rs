//! Fewer dimensions against oracles in f64: low rank (Palu, arXiv 2407.21118, of V; of K the least error of logits, which Eigen
//! Attention, arXiv 2408.05646, comes near) and ThinK (arXiv 2407.21018: channels by ‖Q_c‖ · ‖K_c‖).
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use cinch_cache::Plugin;
use cinch_hooks::CachePolicy;
use common::single::*;
use common::*;

/// Tokens of the prompt, which is packed but for four sinks and the last 32.
const PROMPT: usize = 300;

/// Rows that lie near a subspace of `RANK` dimensions, as keys and values do.
const RANK: usize = 24;

fn row(what: What, token: usize) -> Vec<f32> {
    let coordinates = vector(1, 0, what, 0, token, RANK);
    let noise = vector(1, 1, what, 0, token, DIM);
    (0..DIM)
        .map(|column| {
            // A direction a coordinate, the first ones stronger.
            let x: f32 = (0..RANK)
                .map(|i| {
                    coordinates[i] * (0.37 * ((i + 1) * (column + 1)) as f32).sin() / (1.0 + i as f32 / 4.0)
                })
                .sum();
            x + 0.02 * noise[column]
        })
        .collect()
}

fn query(head: usize, token: usize) -> Vec<f32> {
    let mut q = vector(1, 0, What::Q, head, token, DIM);
    // Some channels are asked for more than others.
    for (c, q) in q.iter_mut().enumerate() {
        *q *= 1.0 + (c % 7) as f32;
    }
    q
}

/// The prompt, then one decoded token: its output, and what the store holds.
fn served(json: &str) -> (Vec<f32>, std::sync::Arc<Plugin>, Seq) {
    let plugin = plugin(policy(json));
    let seq = open(&plugin, &ONE, 1, 1);
    let rows = |what, head, token| match what {
        What::Q => query(head, token),
        What::K | What::V => row(what, token),
    };
    attend(&plugin, &seq, 0, PROMPT, &rows);
    let out = attend(&plugin, &seq, PROMPT, PROMPT + 1, &rows);
    (out, plugin, seq)
}

fn all(what: What) -> Vec<Vec<f64>> {
    (0..=PROMPT).map(|token| wide(&row(what, token))).collect()
}

fn packed(token: usize) -> bool {
    (4..PROMPT - 32).contains(&token)
}

fn products(matrix: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    matrix
        .iter()
        .map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum())
        .collect()
}

fn moments(rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut out = vec![vec![0.0; DIM]; DIM];
    for row in rows {
        for i in 0..DIM {
            for j in 0..DIM {
                out[i][j] += row[i] * row[j];
            }
        }
    }
    out
}

/// Packed rows as they are in the best subspace for products with queries of second moment C: W·Wᵀ·C·x with W the `rank`
/// leading eigenvectors of XᵀX·C, orthonormal under C, by orthogonal iteration. With C = 1, Palu's; with the queries' own,
/// the least error of logits.
fn lowrank(rows: &[Vec<f64>], rank: usize, c: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let moments = moments(&rows[..PROMPT]);
    let mut basis: Vec<Vec<f64>> = (0..rank)
        .map(|i| {
            (0..DIM)
                .map(|j| f64::from(u8::from(i == j)) + 0.01 * ((i * 7 + j * 3) as f64).cos())
                .collect()
        })
        .collect();
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(products(c, b)).map(|(a, b)| a * b).sum() };
    for _ in 0..2000 {
        let mut next: Vec<Vec<f64>> = Vec::new();
        for w in &basis {
            let mut x = products(&moments, &products(c, w));
            for done in &next {
                let part = dot(done, &x);
                x.iter_mut().zip(done).for_each(|(x, d)| *x -= part * d);
            }
            let norm = dot(&x, &x).sqrt();
            next.push(x.iter().map(|x| x / norm).collect());
        }
        basis = next;
    }
    let project = |row: &Vec<f64>| {
        let mut out = vec![0.0; DIM];
        for w in &basis {
            let part = dot(w, row);
            out.iter_mut().zip(w).for_each(|(out, w)| *out += part * w);
        }
        out
    };
    rows.iter()
        .enumerate()
        .map(|(token, row)| if packed(token) { project(row) } else { row.clone() })
        .collect()
}

fn unit() -> Vec<Vec<f64>> {
    (0..DIM)
        .map(|i| (0..DIM).map(|j| f64::from(u8::from(i == j))).collect())
        .collect()
}

/// The prompt's queries, and a thousandth of their mean for directions that none of them has.
fn asked() -> Vec<Vec<f64>> {
    let all: Vec<Vec<f64>> = (0..PROMPT)
        .flat_map(|token| (0..GROUP).map(move |head| wide(&query(head, token))))
        .collect();
    let mut out = moments(&all);
    let mean = (0..DIM).map(|i| out[i][i]).sum::<f64>() / DIM as f64;
    (0..DIM).for_each(|i| out[i][i] += 1e-3 * mean);
    out
}

/// Keys without the channels that `ThinK` drops.
fn think(rows: &[Vec<f64>], rank: usize) -> Vec<Vec<f64>> {
    let mut scores: Vec<(f64, usize)> = (0..DIM)
        .map(|c| {
            let q: f64 = (PROMPT - 64..PROMPT)
                .flat_map(|token| (0..GROUP).map(move |head| f64::from(query(head, token)[c]).powi(2)))
                .sum();
            let k: f64 = rows[..PROMPT].iter().map(|row| row[c].powi(2)).sum();
            (q.sqrt() * k.sqrt(), c)
        })
        .collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0));
    let kept: Vec<usize> = scores.iter().take(rank).map(|(_, c)| *c).collect();
    rows.iter()
        .enumerate()
        .map(|(token, row)| {
            (0..DIM)
                .map(|c| {
                    if !packed(token) || kept.contains(&c) {
                        row[c]
                    } else {
                        0.0
                    }
                })
                .collect()
        })
        .collect()
}

/// The decoded token's output over rows as given.
fn attention(k: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<f64> {
    let queries: Vec<_> = (0..GROUP).map(|head| wide(&query(head, PROMPT))).collect();
    attended(&queries, k, v)
}

#[test]
fn outputs_are_what_the_papers_say() {
    let (k, v) = (all(What::K), all(What::V));
    let exact = attention(&k, &v);
    for (json, right) in [
        (
            r#"{"project": {"method": "lowrank", "k_rank": 16}}"#,
            attention(&lowrank(&k, 16, &asked()), &v),
        ),
        (
            r#"{"project": {"method": "lowrank", "v_rank": 8}}"#,
            attention(&k, &lowrank(&v, 8, &unit())),
        ),
        (
            r#"{"project": {"method": "lowrank", "k_rank": 12, "v_rank": 32}}"#,
            attention(&lowrank(&k, 12, &asked()), &lowrank(&v, 32, &unit())),
        ),
        (
            r#"{"project": {"method": "think", "k_rank": 40}}"#,
            attention(&think(&k, 40), &v),
        ),
    ] {
        let (out, ..) = served(json);
        let (own, method) = (distance(&out, &right), distance(&right, &exact));
        // Rows are in f16; what the method leaves out is far more.
        assert!(
            own < 2e-4 && own < method / 20.0,
            "{json}: {own:e} beside {method:e}"
        );
    }
}

#[test]
fn rows_of_so_few_dimensions_lose_next_to_nothing_and_bytes_are_saved() {
    let (full, plugin, seq) = served("{}");
    let whole = seq.cache.bytes();
    drop(plugin);
    let (out, plugin, seq) = served(r#"{"project": {"method": "lowrank", "k_rank": 24, "v_rank": 24}}"#);
    let error = distance(&out, &wide(&full));
    assert!(error < 0.02, "{error}");
    let blocks = &plugin.inspect(&*seq.cache).unwrap()[0].heads[0].blocks;
    let rows: usize = blocks.iter().filter(|b| b.projected).map(|b| b.rows).sum();
    assert_eq!(rows, PROMPT - 32 - 4);
    // 24 of 64 dimensions of most rows, and the bases: two matrices of K, one of V.
    let bases = 3 * 24 * DIM * 4;
    let saved = whole - (seq.cache.bytes() - bases);
    assert!(saved > rows * 2 * 2 * (DIM - 24) * 9 / 10, "{saved} of {whole}");
}

#[test]
fn all_dimensions_are_the_identity() {
    let (full, ..) = served("{}");
    let (out, ..) = served(r#"{"project": {"method": "lowrank", "k_rank": 64, "v_rank": 64}}"#);
    // Parts are added up in another order.
    assert!(distance(&full, &wide(&out)) < 1e-7);
}

#[test]
fn what_does_not_fit_is_told() {
    for (json, told) in [
        (
            r#"{"project": {"method": "lowrank", "k_rank": 7}}"#,
            "project.k_rank: given 7, allowed 8 to 1024",
        ),
        (
            r#"{"project": {"method": "lowrank"}}"#,
            "project: given no rank, allowed k_rank, v_rank or both, with method lowrank",
        ),
        (
            r#"{"project": {"method": "think", "k_rank": 40, "v_rank": 40}}"#,
            "project.v_rank: given 40, allowed only with method lowrank",
        ),
        (
            r#"{"store": "exact", "project": {"method": "think", "k_rank": 40}}"#,
            "store: given exact, allowed full, when project drops dimensions",
        ),
    ] {
        let policy: cinch_protocol::Policy = serde_json::from_str(json).unwrap();
        assert_eq!(policy.validate().unwrap_err().to_string(), told);
    }
    let plugin = plugin(policy(r#"{"project": {"method": "lowrank", "k_rank": 80}}"#));
    let refused = plugin.open(&ONE.info(1, 1, 10)).err().unwrap().to_string();
    assert_eq!(
        refused,
        "policy of request 1: project.k_rank: given 80, allowed at most 64, what this model's heads have"
    );
}
