//! GEAR (arXiv 2403.05527, section 3): X ≈ D + L + S. S are outliers, kept as they are; D is what KIVI's codes make of the
//! rest, keys per channel and values per token; L is the error that is left, in low rank, by power iteration. A head's error
//! has a few directions that all of its rows share, since its rows share channels.
//!
//! When not to use it: where speed counts, since blocks are unpacked at every step; with small heads, whose 64 values pay as
//! much for a rank as those of 128 do.

use half::f16;

/// The paper's fraction of outliers.
pub(super) const OUTLIERS: f64 = 0.02;

/// Half of the paper's 4: a rank costs 2 bytes a row, which weighs twice as much in a head of 64 values as in one of 128.
pub(super) const RANK: u32 = 2;

/// Power iterations. The paper has 2; an error's leading directions are close together.
const STEPS: usize = 4;

/// A matrix as the product of two: rows × rank, rank × dim.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    rows: Box<[f16]>,
    directions: Box<[f16]>,
    rank: usize,
}

impl LowRank {
    /// The part of `rows` (of `dim` values each) in the `rank` directions that hold most of it.
    pub(crate) fn of(rows: &[f32], dim: usize, rank: usize) -> Self {
        let rank = rank.min(dim).min(rows.len() / dim);
        let mut directions = start(rank, dim);
        let mut coordinates = Vec::new();
        for step in 0..=STEPS {
            orthonormalize(&mut directions, dim);
            coordinates.clear();
            for row in rows.chunks_exact(dim) {
                coordinates.extend(directions.chunks_exact(dim).map(|u| dot(u, row)));
            }
            if step < STEPS {
                directions.fill(0.0);
                for (row, x) in rows.chunks_exact(dim).zip(coordinates.chunks_exact(rank.max(1))) {
                    add(x, row, &mut directions);
                }
            }
        }
        let halves = |values: &[f32]| values.iter().map(|x| f16::from_f32(*x)).collect();
        Self {
            rows: halves(&coordinates),
            directions: halves(&directions),
            rank,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of_val(&*self.rows) + size_of_val(&*self.directions)
    }

    /// Adds it to the first rows.
    pub(crate) fn add_to(&self, rows: &mut [f32], dim: usize) {
        if self.rank == 0 {
            return;
        }
        let directions: Vec<f32> = self.directions.iter().map(|x| x.to_f32()).collect();
        for (row, x) in rows.chunks_exact_mut(dim).zip(self.rows.chunks_exact(self.rank)) {
            for (x, u) in x.iter().zip(directions.chunks_exact(dim)) {
                let x = x.to_f32();
                row.iter_mut().zip(u).for_each(|(to, u)| *to += x * u);
            }
        }
    }
}

/// Adds each coordinate times the row to its direction.
fn add(x: &[f32], row: &[f32], directions: &mut [f32]) {
    for (x, direction) in x.iter().zip(directions.chunks_exact_mut(row.len())) {
        direction
            .iter_mut()
            .zip(row)
            .for_each(|(to, from)| *to += x * from);
    }
}

/// Directions that no matrix is likely to be orthogonal to, the same ones each time.
fn start(rank: usize, dim: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..rank * dim)
        .map(|_| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

/// Gram-Schmidt, twice over each direction; one that is nothing but the others becomes 0.
fn orthonormalize(directions: &mut [f32], dim: usize) {
    for k in 0..directions.len() / dim {
        let (done, rest) = directions.split_at_mut(k * dim);
        let own = &mut rest[..dim];
        let before = dot(own, own).sqrt();
        for _ in 0..2 {
            for other in done.chunks_exact(dim) {
                let along = dot(own, other);
                own.iter_mut().zip(other).for_each(|(x, u)| *x -= along * u);
            }
        }
        let length = dot(own, own).sqrt();
        let scale = if length > 1e-6 * before {
            length.recip()
        } else {
            0.0
        };
        own.iter_mut().for_each(|x| *x *= scale);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
