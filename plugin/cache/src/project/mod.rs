//! Attention compression: rows keep fewer dimensions. A basis is an orthonormal set of directions, a head's own, made once
//! of what the head holds when it first packs rows; a row x is stored as its coordinates Uᵀx, which stand for U·Uᵀx.
//!
//! Invariant: a head has one basis of K and one of V for as long as it lives, so that its projected rows are always of one
//! kind; scores need Uᵀq, and a weighted sum of coordinates is expanded once a step, not once a row. One method a file.

mod lowrank;
mod think;

use std::sync::Arc;

use cinch_protocol::{Project, ProjectMethod};

use crate::store::{Column, Ledger};

/// Rows of a head from which a basis can be made, for each dimension of it: fewer would say more of themselves than of what
/// is to come.
const ROWS_PER_DIM: usize = 2;

/// Directions of one side: `rank` rows of `dim` values, orthonormal.
#[derive(Debug)]
pub(crate) struct Basis {
    rank: usize,
    dim: usize,
    rows: Column<f32>,
}

/// A head's bases; `None`: all dimensions stay.
#[derive(Debug)]
pub(crate) struct Bases {
    pub(crate) k: Option<Basis>,
    pub(crate) v: Option<Basis>,
}

/// What bases are made of: a head's rows in f32.
pub(crate) struct Source<'a> {
    pub(crate) k: &'a [f32],
    pub(crate) k_dim: usize,
    pub(crate) v: &'a [f32],
    pub(crate) v_dim: usize,
    /// Σ q² of the latest queries of the head's group, channel by channel.
    pub(crate) q_squares: &'a [f64],
}

impl Basis {
    fn new(ledger: &Arc<Ledger>, dim: usize, rows: Vec<f32>) -> Self {
        Self {
            rank: rows.len() / dim,
            dim,
            rows: Column::from_vec(ledger, rows),
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// The directions, row by row.
    pub(crate) fn directions(&self) -> &[f32] {
        self.rows.as_slice()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.rows.bytes()
    }

    /// Appends the coordinates of rows.
    pub(crate) fn project(&self, rows: &[f32], to: &mut Vec<f32>) {
        for row in rows.chunks_exact(self.dim) {
            let directions = self.directions().chunks_exact(self.dim);
            to.extend(directions.map(|u| u.iter().zip(row).map(|(u, x)| u * x).sum::<f32>()));
        }
    }

    /// What coordinates stand for; `to` is overwritten.
    pub(crate) fn expand(&self, coordinates: &[f32], to: &mut [f32]) {
        let rows = coordinates.chunks_exact(self.rank);
        for (x, to) in rows.zip(to.chunks_exact_mut(self.dim)) {
            to.fill(0.0);
            for (x, u) in x.iter().zip(self.directions().chunks_exact(self.dim)) {
                for (to, u) in to.iter_mut().zip(u) {
                    *to += x * u;
                }
            }
        }
    }
}

impl Bases {
    /// Bases as a policy has them, of what a head holds; `None` if that is too little.
    pub(crate) fn of(ledger: &Arc<Ledger>, project: &Project, source: &Source<'_>) -> Option<Self> {
        let rows = source.k.len() / source.k_dim;
        if rows < rows_needed(source.k_dim.max(source.v_dim)) {
            return None;
        }
        let rank = |rank: Option<u32>, dim: usize| rank.map(|rank| rank as usize).filter(|rank| *rank < dim);
        let (k_rank, v_rank) = (
            rank(project.k_rank, source.k_dim),
            rank(project.v_rank, source.v_dim),
        );
        let (k, v) = match project.method {
            ProjectMethod::Lowrank => (
                k_rank.map(|rank| lowrank::basis(source.k, source.k_dim, rank)),
                v_rank.map(|rank| lowrank::basis(source.v, source.v_dim, rank)),
            ),
            ProjectMethod::Think => (
                k_rank.map(|rank| think::basis(source.k, source.k_dim, source.q_squares, rank)),
                None,
            ),
        };
        Some(Self {
            k: k.map(|rows| Basis::new(ledger, source.k_dim, rows)),
            v: v.map(|rows| Basis::new(ledger, source.v_dim, rows)),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        [&self.k, &self.v].into_iter().flatten().map(Basis::bytes).sum()
    }
}

/// Rows that a head must hold before it has a basis.
pub(crate) fn rows_needed(dim: usize) -> usize {
    ROWS_PER_DIM * dim
}

/// Bytes of a head's bases.
pub(crate) fn most_bytes(project: &Project, k_dim: usize, v_dim: usize) -> usize {
    let side = |rank: Option<u32>, dim: usize| rank.map_or(0, |rank| rank as usize * dim * size_of::<f32>());
    side(project.k_rank, k_dim) + side(project.v_rank, v_dim)
}
