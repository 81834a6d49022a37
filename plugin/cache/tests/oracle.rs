//! Kept sets against an oracle in f64, written from the papers: it replays every step over plain lists
//! and shares nothing with the crate.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use cinch_protocol::{Policy, SelectMethod};
use common::*;

/// One KV head's kept tokens: position and attention received, as its method counts it.
struct Oracle {
    text: u64,
    layer: usize,
    kv: usize,
    seen: usize,
    since: usize,
    rows: Vec<(u32, f64)>,
}

impl Oracle {
    /// Every query attends to the past kept and to fresh tokens up to its own; then the head evicts.
    fn step(&mut self, policy: &Policy, fresh: usize) {
        let select = policy.select.as_ref().unwrap();
        let past = self.rows.len();
        self.rows
            .extend((self.seen..self.seen + fresh).map(|p| (p as u32, 0.0)));
        // Steps until the next eviction.
        let left = (select.interval as usize).saturating_sub(self.since + 1);
        // How often a query counts, and whether what was counted before it is forgotten.
        let last = |n: usize, query: usize| f64::from(u8::from(query + n >= fresh));
        let (times, forget): (Vec<f64>, bool) = match (select.method, fresh) {
            (SelectMethod::H2o, _) => (vec![1.0; fresh], false),
            (SelectMethod::Snapkv, 1) => (vec![f64::from(u8::from(left < 32))], false),
            (SelectMethod::Snapkv, _) => ((0..fresh).map(|q| last(64, q)).collect(), true),
            (SelectMethod::Tova, 1) => (vec![f64::from(u8::from(left == 0))], left == 0),
            (SelectMethod::Tova, _) => ((0..fresh).map(|q| last(1, q)).collect(), true),
            (_, 1) => (vec![if self.seen.is_multiple_of(8) { 8.0 } else { 0.0 }], false),
            _ => ((0..fresh).map(|q| last(64, q)).collect(), false),
        };
        if forget {
            self.rows.iter_mut().for_each(|row| row.1 = 0.0);
        }
        let heads = match select.method {
            SelectMethod::Tova => 0..SMALL.q_heads(),
            _ => self.kv * SMALL.group..(self.kv + 1) * SMALL.group,
        };
        for (query, times) in times.into_iter().enumerate().filter(|(_, times)| *times > 0.0) {
            let visible: Vec<u32> = self.rows[..=past + query].iter().map(|row| row.0).collect();
            for head in heads.clone() {
                let weights = weights(&SMALL, self.text, self.layer, head, self.seen + query, &visible);
                for (row, weight) in self.rows.iter_mut().zip(weights) {
                    row.1 += times * weight;
                }
            }
        }
        self.seen += fresh;
        self.since += fresh;
        if fresh > 1 || self.since >= select.interval as usize {
            self.since = 0;
            self.evict(policy);
            if select.method == SelectMethod::Snapkv && fresh == 1 {
                self.rows.iter_mut().for_each(|row| row.1 = 0.0);
            }
        }
    }

    fn evict(&mut self, policy: &Policy) {
        let select = policy.select.as_ref().unwrap();
        let (seen, recent) = (self.seen as u32, select.recent);
        // In integers, so that no rounding can move it: budgets here are whole percents.
        let percent = (select.budget * 100.0).round() as usize;
        let share = (percent * self.seen).div_ceil(100);
        let total = share.max((select.sinks + recent) as usize).min(self.seen);
        let protected = |p: u32| p < select.sinks || p + recent >= seen;
        let mut ranks = self.ranks(select.method, select.sinks);
        while self.rows.len() > total {
            // The lowest goes first; of equals the earlier.
            let loser = (0..self.rows.len())
                .filter(|row| !protected(self.rows[*row].0))
                .min_by(|a, b| ranks[*a].total_cmp(&ranks[*b]).then(a.cmp(b)))
                .unwrap();
            self.rows.remove(loser);
            ranks.remove(loser);
        }
    }

    fn ranks(&self, method: SelectMethod, sinks: u32) -> Vec<f64> {
        let n = self.rows.len();
        match method {
            SelectMethod::Streaming => vec![0.0; n],
            SelectMethod::H2o | SelectMethod::Tova => self.rows.iter().map(|row| row.1).collect(),
            SelectMethod::Snapkv => (0..n as isize)
                .map(|row| {
                    let near = (row - 2..=row + 2).filter(|i| (0..n as isize).contains(i));
                    near.map(|i| self.rows[i as usize].1).sum::<f64>() / 5.0
                })
                .collect(),
            SelectMethod::KeyNorm => self.vectors(What::K).iter().map(|k| -norm(k)).collect(),
            SelectMethod::Keydiff => {
                let unit: Vec<Vec<f64>> = self
                    .vectors(What::K)
                    .iter()
                    .map(|k| k.iter().map(|x| x / norm(k)).collect())
                    .collect();
                let mean: Vec<f64> = (0..SMALL.k_dim)
                    .map(|c| unit.iter().map(|k| k[c]).sum::<f64>() / n as f64)
                    .collect();
                let cosine =
                    |k: &Vec<f64>| k.iter().zip(&mean).map(|(a, b)| a * b).sum::<f64>() / norm(&mean);
                unit.iter().map(|k| -cosine(k)).collect()
            }
            SelectMethod::Lagkv => self.lag(sinks),
        }
    }

    /// Equations 4 to 8 of the paper, with partitions of 128.
    fn lag(&self, sinks: u32) -> Vec<f64> {
        let n = self.rows.len();
        let first = self.rows.iter().filter(|row| row.0 < sinks).count();
        let whole = (n - first) / 128;
        if whole < 2 {
            return (0..n).map(|row| row as f64).collect();
        }
        let mut ranks = vec![1.0; n];
        let (k, v) = (self.vectors(What::K), self.vectors(What::V));
        for at in (0..whole - 1).map(|p| first + 128 * p) {
            let score = |x: &[Vec<f64>]| -> Vec<f64> {
                let (own, next) = (&x[at..at + 128], &x[at + 128..at + 256]);
                let channel = |c: usize| next.iter().map(move |row| row[c]);
                let exponential = own.iter().map(|row| {
                    let scaled: Vec<f64> = (0..row.len())
                        .map(|c| {
                            let min = channel(c).fold(f64::INFINITY, f64::min);
                            let max = channel(c).fold(f64::NEG_INFINITY, f64::max);
                            (row[c] - min) / (max - min)
                        })
                        .collect();
                    let mean = scaled.iter().sum::<f64>() / scaled.len() as f64;
                    let squares: f64 = scaled.iter().map(|x| (x - mean).powi(2)).sum();
                    (squares / (scaled.len() as f64 - 1.0)).sqrt().exp()
                });
                let exponential: Vec<f64> = exponential.collect();
                let sum: f64 = exponential.iter().sum();
                exponential.iter().map(|x| x / sum).collect()
            };
            let both: Vec<f64> = score(&k)
                .iter()
                .zip(score(&v))
                .map(|(a, b)| (a + b) / 2.0)
                .collect();
            for row in 0..128 {
                let below = both.iter().filter(|other| **other < both[row]).count();
                ranks[at + row] = below as f64 / 128.0;
            }
        }
        ranks
    }

    fn vectors(&self, what: What) -> Vec<Vec<f64>> {
        let dim = if matches!(what, What::K) {
            SMALL.k_dim
        } else {
            SMALL.v_dim
        };
        let rows = self.rows.iter();
        rows.map(|row| {
            let x = vector(self.text, self.layer, what, self.kv, row.0 as usize, dim);
            x.iter().map(|x| f64::from(*x)).collect()
        })
        .collect()
    }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn replay(json: &str, steps: &[usize], text: u64) {
    let policy = policy(json);
    let plugin = plugin(policy.clone());
    let mut seq = [open(&plugin, &SMALL, 1, text)];
    let mut oracles: Vec<Oracle> = (0..SMALL.layers)
        .flat_map(|layer| (0..SMALL.kv_heads).map(move |kv| (layer, kv)))
        .map(|(layer, kv)| Oracle {
            text,
            layer,
            kv,
            seen: 0,
            since: 0,
            rows: Vec::new(),
        })
        .collect();
    for fresh in steps {
        step(&plugin, &SMALL, &mut seq, *fresh);
        let layers = check_invariants(&plugin, &seq[0]);
        for (oracle, head) in oracles
            .iter_mut()
            .zip(layers.iter().flat_map(|layer| &layer.heads))
        {
            oracle.step(&policy, *fresh);
            let expected: Vec<u32> = oracle.rows.iter().map(|row| row.0).collect();
            assert_eq!(head.positions, expected, "{json} after {} tokens", oracle.seen);
            if let Some(scores) = &head.scores {
                for (score, row) in scores.iter().zip(&oracle.rows) {
                    assert!(
                        (f64::from(*score) - row.1).abs() < 1e-4 * (1.0 + row.1),
                        "score of {}",
                        row.0
                    );
                }
            }
        }
    }
}

fn steps(prefill: &[usize], decode: usize) -> Vec<usize> {
    prefill
        .iter()
        .copied()
        .chain(std::iter::repeat_n(1, decode))
        .collect()
}

#[test]
fn h2o_keeps_what_the_oracle_keeps() {
    let h2o = |rest: &str| format!(r#"{{"store": "exact", "select": {{"method": "h2o", {rest}}}}}"#);
    for text in 0..3 {
        replay(
            &h2o(r#""budget": 0.4, "recent": 16, "interval": 8"#),
            &steps(&[110], 40),
            text,
        );
        replay(
            &h2o(r#""budget": 0.07, "sinks": 0, "recent": 16, "interval": 1"#),
            &steps(&[100], 12),
            text,
        );
        replay(
            &h2o(r#""budget": 0.75, "sinks": 9, "recent": 20, "interval": 16"#),
            &steps(&[40, 30, 2], 40),
            text,
        );
    }
}

#[test]
fn every_method_keeps_what_the_oracle_keeps() {
    for method in SelectMethod::ALL {
        let select = |rest: &str| {
            format!(
                r#"{{"store": "exact", "select": {{"method": "{}", {rest}}}}}"#,
                method.name()
            )
        };
        // A prompt at once, one in chunks, and decoding with intervals shorter and longer than a window.
        replay(
            &select(r#""budget": 0.5, "recent": 16, "interval": 8"#),
            &steps(&[130], 40),
            20,
        );
        replay(
            &select(r#""budget": 0.25, "sinks": 2, "recent": 20, "interval": 40"#),
            &steps(&[70, 1, 64, 33], 90),
            21,
        );
        replay(
            &select(r#""budget": 0.6, "recent": 32, "interval": 16"#),
            &steps(&[300, 280], 20),
            22,
        );
    }
}

#[test]
fn streaming_keeps_what_the_oracle_keeps() {
    let streaming = |rest: &str| format!(r#"{{"select": {{"method": "streaming", {rest}}}}}"#);
    replay(
        &streaming(r#""budget": 0.3, "recent": 16, "interval": 4"#),
        &steps(&[90], 30),
        1,
    );
    replay(
        &streaming(r#""budget": 0.02, "sinks": 0, "recent": 16, "interval": 1"#),
        &steps(&[1, 50, 25], 20),
        2,
    );
    replay(
        &streaming(r#""budget": 1.0, "sinks": 4, "recent": 16, "interval": 4"#),
        &steps(&[20], 20),
        3,
    );
}

/// A layer's scores are the mean over query heads, of the last 64 prompt queries and every eighth decoded token,
/// which stands for eight.
#[test]
fn layer_statistics_match_the_oracle() {
    let plugin = plugin(policy(r#"{"store": "exact"}"#));
    let mut seq = [open(&plugin, &SMALL, 1, 4)];
    step(&plugin, &SMALL, &mut seq, 104);
    for _ in 104..113 {
        step(&plugin, &SMALL, &mut seq, 1);
    }
    let counted = (40..104)
        .map(|token| (token, 1.0))
        .chain([(104, 8.0), (112, 8.0)]);
    for (layer, view) in check_invariants(&plugin, &seq[0]).iter().enumerate() {
        let mut expected = vec![0.0; 113];
        for (token, times) in counted.clone() {
            let visible: Vec<u32> = (0..=token as u32).collect();
            for head in 0..SMALL.q_heads() {
                for (sum, weight) in expected
                    .iter_mut()
                    .zip(weights(&SMALL, 4, layer, head, token, &visible))
                {
                    *sum += times * weight / SMALL.q_heads() as f64;
                }
            }
        }
        for (score, expected) in view.scores.as_ref().unwrap().iter().zip(expected) {
            assert!((f64::from(*score) - expected).abs() < 1e-4);
        }
    }
}

/// After a retune to H2O every head ranks by its layer's mean.
#[test]
fn retune_to_h2o_starts_from_layer_statistics() {
    let plugin = plugin(policy("{}"));
    let mut seq = [open(&plugin, &SMALL, 1, 12)];
    step(&plugin, &SMALL, &mut seq, 120);
    step(&plugin, &SMALL, &mut seq, 1);
    let scores: Vec<Vec<f32>> = plugin
        .inspect(&*seq[0].cache)
        .unwrap()
        .into_iter()
        .map(|layer| layer.scores.unwrap())
        .collect();
    let h2o = policy(r#"{"select": {"method": "h2o", "budget": 0.5, "recent": 16}}"#);
    plugin.retune(1, None, h2o).unwrap();
    step(&plugin, &SMALL, &mut seq, 1);
    for (layer, scores) in check_invariants(&plugin, &seq[0]).iter().zip(scores) {
        // The step's own weights count too, so only clear cases must agree: the top and bottom fifth.
        let mut middle: Vec<usize> = (4..106).collect();
        middle.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        for head in &layer.heads {
            assert_eq!(head.positions.len(), 61);
            assert!(middle[..8].iter().all(|p| head.positions.contains(&(*p as u32))));
            assert!(
                middle[90..]
                    .iter()
                    .all(|p| !head.positions.contains(&(*p as u32)))
            );
        }
    }
}

/// The measured error is the one an independent computation finds.
#[test]
fn attention_error_is_what_eviction_did() {
    let policy = policy(
        r#"{"store": "exact", "select": {"method": "streaming", "budget": 0.3, "recent": 16, "interval": 64}}"#,
    );
    let plugin = plugin(policy);
    let mut seq = [open(&plugin, &SMALL, 1, 9)];
    assert_eq!(
        plugin.request(1).unwrap().attention_error,
        None,
        "nothing is reported before it is measured"
    );
    step(&plugin, &SMALL, &mut seq, 100);
    let mut errors = Vec::new();
    for (layer, view) in check_invariants(&plugin, &seq[0]).iter().enumerate() {
        for (kv, head) in view.heads.iter().enumerate() {
            let (mut wrong, mut norm) = (0.0, 0.0);
            for token in 92..100 {
                let all: Vec<u32> = (0..=token as u32).collect();
                let kept: Vec<u32> = head
                    .positions
                    .iter()
                    .copied()
                    .filter(|p| *p as usize <= token)
                    .collect();
                for q_head in kv * SMALL.group..(kv + 1) * SMALL.group {
                    let exact = attention(&SMALL, 9, layer, q_head, token, &all);
                    let compressed = attention(&SMALL, 9, layer, q_head, token, &kept);
                    for (a, b) in exact.iter().zip(compressed) {
                        wrong += (a - b).powi(2);
                        norm += a.powi(2);
                    }
                }
            }
            errors.push((wrong / norm).sqrt());
        }
    }
    let expected = errors.iter().sum::<f64>() / errors.len() as f64;
    let measured = plugin.request(1).unwrap().attention_error.unwrap();
    assert!(
        (measured - expected).abs() < 1e-4,
        "measured {measured}, expected {expected}"
    );
    let class = plugin.totals().classes["default"];
    assert_eq!(class.attention_error_count, errors.len() as u64);
    assert!((class.attention_error_sum - errors.iter().sum::<f64>()).abs() < 1e-3);
}
