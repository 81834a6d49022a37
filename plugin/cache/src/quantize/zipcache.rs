//! `ZipCache` (arXiv 2405.14256) and `MiKV` (arXiv 2402.18096): tokens that matter keep more bits, and the others few instead
//! of none. Which ones matter is told by the attention they received from the queries that could see them (`ZipCache`'s
//! normalized score, section 4.2). Keys are quantized by channel, salient ones and others apart; values are divided by the
//! root of their channel's largest magnitude before tokens are quantized, and multiplied again after (its
//! channel-separable tokenwise quantization, section 4.1). A key's channel has a scale for 32 tokens of its kind in a block,
//! not one for all of the prompt.
//!
//! Tokens are sorted out when they are packed, and once more when an eviction rewrites their block; one that has lost its
//! bits does not get them back.
//!
//! When not to use it: where speed counts, since blocks are unpacked at every step; where an equal number of bytes as plain
//! 3 bits does as well, which the ladder tells.

use half::f16;

use super::Fraction;

/// Of the paper's choices, from 20 % to 60 %, one in the middle.
pub(super) const SALIENT: f64 = 0.4;

/// Rows a block may have at most, to be marked.
const ROWS: usize = 256;

/// Which rows of a block are salient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Marks([u64; ROWS / 64]);

impl Marks {
    /// Marks a share of the rows, those of the highest scores and none that is `low` already.
    pub(crate) fn of(scores: &[f32], low: &[bool], share: Fraction) -> Self {
        let mut order: Vec<usize> = (0..scores.len()).filter(|row| !low[*row]).collect();
        // Of equals, the later one.
        order.sort_unstable_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a)));
        let mut marks = Self::default();
        for row in order.into_iter().take(share.of(scores.len())) {
            marks.0[row / 64] |= 1 << (row % 64);
        }
        marks
    }

    pub(crate) fn has(&self, row: usize) -> bool {
        self.0[row / 64] >> (row % 64) & 1 == 1
    }

    /// Rows of `dim` values: salient ones, and the others.
    pub(crate) fn split(&self, rows: &[f32], dim: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut high, mut low) = (Vec::new(), Vec::new());
        for (row, values) in rows.chunks_exact(dim).enumerate() {
            let to = if self.has(row) { &mut high } else { &mut low };
            to.extend_from_slice(values);
        }
        (high, low)
    }

    /// The first rows of both, in order again.
    pub(crate) fn join(&self, high: &[f32], low: &[f32], dim: usize, to: &mut [f32]) {
        let (mut high, mut low) = (high.chunks_exact(dim), low.chunks_exact(dim));
        for (row, to) in to.chunks_exact_mut(dim).enumerate() {
            let from = if self.has(row) { high.next() } else { low.next() };
            to.copy_from_slice(from.unwrap_or_default());
        }
    }

    /// How many rows are salient.
    pub(crate) fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
}

/// What each row counts for: the attention it received, by how many queries could give it some where each one counted. Where
/// the last ones counted, all rows before them had the same.
pub(crate) fn salience(scores: &[f32], positions: Option<&[u32]>, seen: usize, every: bool) -> Vec<f32> {
    let position = |row: usize| positions.map_or(row, |positions| positions[row] as usize);
    let normalized = scores.iter().enumerate().map(|(row, score)| {
        let queries = if every {
            seen.saturating_sub(position(row)).max(1)
        } else {
            1
        };
        score / queries as f32
    });
    normalized.collect()
}

/// Divides each column by the root of its largest magnitude. Answers with the roots.
pub(crate) fn separate(values: &mut [f32], dim: usize) -> Box<[f16]> {
    let mut largest = vec![0.0_f32; dim];
    for row in values.chunks_exact(dim) {
        largest
            .iter_mut()
            .zip(row)
            .for_each(|(most, x)| *most = most.max(x.abs()));
    }
    let roots: Box<[f16]> = largest
        .into_iter()
        .map(|most| {
            if most > 0.0 {
                f16::from_f32(most.sqrt())
            } else {
                f16::ONE
            }
        })
        // A root too small for f16 is none.
        .map(|root| if root > f16::ZERO { root } else { f16::ONE })
        .collect();
    for row in values.chunks_exact_mut(dim) {
        row.iter_mut()
            .zip(&roots)
            .for_each(|(x, root)| *x /= root.to_f32());
    }
    roots
}

/// The other way round.
pub(crate) fn join(values: &mut [f32], dim: usize, roots: &[f16]) {
    for row in values.chunks_exact_mut(dim) {
        row.iter_mut()
            .zip(roots)
            .for_each(|(x, root)| *x *= root.to_f32());
    }
}
