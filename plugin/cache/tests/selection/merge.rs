//! D2O's and CaM's merging, written from the papers: one evicted row after another.

use crate::ranks::{dot, norm, uniform};
use crate::replay::{Head, Row};

/// `left` are the rows of `before` that stay, which `head` has.
pub(crate) fn d2o(head: &mut Head, before: &[Row], left: &[usize], sinks: u32) {
    let evicted: Vec<&Row> = (0..before.len())
        .filter(|row| !left.contains(row))
        .map(|row| &before[row])
        .collect();
    if evicted.is_empty() {
        return;
    }
    let kept: Vec<Row> = head.rows.clone();
    // Each evicted row's most similar kept one.
    let nearest: Vec<(usize, f64)> = evicted
        .iter()
        .map(|row| {
            let cosine = |other: &Row| dot(&row.k, &other.k) / norm(&row.k) / norm(&other.k);
            (0..kept.len())
                .filter(|index| kept[*index].position >= sinks)
                .map(|index| (index, cosine(&kept[index])))
                .max_by(|a, b| a.1.total_cmp(&b.1))
                .unwrap()
        })
        .collect();
    let mean = nearest.iter().map(|(_, cosine)| cosine).sum::<f64>() / nearest.len() as f64;
    let threshold = head.threshold.map_or(mean, |old| 0.7 * mean + 0.3 * old);
    head.threshold = Some(threshold);
    for (index, row) in head.rows.iter_mut().enumerate() {
        let merged: Vec<(&&Row, f64)> = evicted
            .iter()
            .zip(&nearest)
            .filter(|(_, (to, cosine))| *to == index && *cosine >= threshold)
            .map(|(row, (_, cosine))| (row, cosine.exp()))
            .collect();
        let total = 1_f64.exp() + merged.iter().map(|(_, weight)| weight).sum::<f64>();
        let blend = |own: &[f64], of: fn(&Row) -> &[f64]| -> Vec<f64> {
            let others = |c: usize| {
                merged
                    .iter()
                    .map(|(row, weight)| weight * of(row)[c])
                    .sum::<f64>()
            };
            (0..own.len())
                .map(|c| (own[c] * 1_f64.exp() + others(c)) / total)
                .collect()
        };
        if !merged.is_empty() {
            row.k = blend(&kept[index].k, |row| &row.k);
            row.v = blend(&kept[index].v, |row| &row.v);
        }
    }
}

/// `left` are the rows of `before` that stay, which `head` has.
pub(crate) fn cam(head: &mut Head, before: &[Row], left: &[usize], seed: u32) {
    for evicted in (0..before.len()).filter(|row| !left.contains(row)) {
        let gone = &before[evicted];
        let next: Vec<usize> = (0..left.len())
            .filter(|index| left[*index] > evicted)
            .take(32)
            .collect();
        let mean = next.iter().map(|index| before[left[*index]].score).sum::<f64>() / next.len() as f64;
        let odds = if gone.score > 0.0 {
            (gone.score / mean).min(1.0)
        } else {
            0.0
        };
        if uniform(seed, head.layer, head.kv, &[u64::from(gone.position)]) < odds {
            for index in &next {
                let value = &mut head.rows[*index].v;
                value
                    .iter_mut()
                    .zip(&gone.v)
                    .for_each(|(v, x)| *v += x / next.len() as f64);
            }
        }
    }
}
