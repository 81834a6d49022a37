//! Attention compression: rows keep fewer dimensions, or share them with another head's ([`twins`]). A basis is a head's own,
//! made once of what the head holds when its prompt is whole: a row x is stored as its coordinates E·x, which stand for D·E·x.
//!
//! Invariant: a head has one basis of K and one of V for as long as it lives, so that its projected rows are always of one
//! kind; scores need Dᵀq, and a weighted sum of coordinates is expanded once a step, not once a row. One method a file.

mod lowrank;
mod think;
pub(crate) mod twins;

use std::sync::Arc;

use cinch_protocol::{Project, ProjectMethod};

use crate::store::{Column, Ledger};

/// Rows of a head from which a basis can be made, for each dimension of it: fewer would say more of themselves than of what
/// is to come.
const ROWS_PER_DIM: usize = 2;

/// E and Dᵀ of one side, `rank` rows of `dim` values each.
#[derive(Debug)]
pub(crate) struct Basis {
    rank: usize,
    dim: usize,
    encode: Column<f32>,
    /// `None`: the same, as with orthonormal directions.
    decode: Option<Column<f32>>,
}

/// What a method makes of a head's rows.
struct Made {
    encode: Vec<f32>,
    decode: Option<Vec<f32>>,
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
    pub(crate) queries: &'a Queries,
}

/// A step's queries of a head's group.
#[derive(Debug)]
pub(crate) struct Queries {
    /// Σ q·qᵀ over all of them, dim × dim; zeros if they are fewer than that.
    pub(crate) moments: Vec<f64>,
    /// Σ q² over the latest, channel by channel.
    pub(crate) squares: Vec<f64>,
}

impl Basis {
    fn new(ledger: &Arc<Ledger>, dim: usize, made: Made) -> Self {
        Self {
            rank: made.encode.len() / dim,
            dim,
            encode: Column::from_vec(ledger, made.encode),
            decode: made.decode.map(|decode| Column::from_vec(ledger, decode)),
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Dimensions of a whole row.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    /// Dᵀ, row by row: what each coordinate stands for.
    pub(crate) fn directions(&self) -> &[f32] {
        self.decode.as_ref().unwrap_or(&self.encode).as_slice()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.encode.bytes() + self.decode.as_ref().map_or(0, Column::bytes)
    }

    /// Appends the coordinates of rows.
    pub(crate) fn project(&self, rows: &[f32], to: &mut Vec<f32>) {
        self.products(self.encode.as_slice(), rows, to);
    }

    /// Appends what queries are multiplied with coordinates as.
    pub(crate) fn project_queries(&self, queries: &[f32], to: &mut Vec<f32>) {
        self.products(self.directions(), queries, to);
    }

    fn products(&self, matrix: &[f32], rows: &[f32], to: &mut Vec<f32>) {
        for row in rows.chunks_exact(self.dim) {
            let directions = matrix.chunks_exact(self.dim);
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
    /// Bases as a policy has them, of what a head holds: [`rows_needed`] at least.
    pub(crate) fn of(ledger: &Arc<Ledger>, project: &Project, source: &Source<'_>) -> Self {
        let rank = |rank: Option<u32>, dim: usize| rank.map(|rank| rank as usize).filter(|rank| *rank < dim);
        let (k_rank, v_rank) = (
            rank(project.k_rank, source.k_dim),
            rank(project.v_rank, source.v_dim),
        );
        let (k, v) = match project.method {
            ProjectMethod::Lowrank => (
                k_rank.map(|rank| lowrank::keys(source.k, source.k_dim, &source.queries.moments, rank)),
                v_rank.map(|rank| lowrank::values(source.v, source.v_dim, rank)),
            ),
            // These keep all dimensions.
            ProjectMethod::Minicache | ProjectMethod::MergeHeads => (None, None),
            ProjectMethod::Think => (
                k_rank.map(|rank| think::keys(source.k, source.k_dim, &source.queries.squares, rank)),
                None,
            ),
        };
        Self {
            k: k.map(|made| Basis::new(ledger, source.k_dim, made)),
            v: v.map(|made| Basis::new(ledger, source.v_dim, made)),
        }
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
    2 * side(project.k_rank, k_dim) + side(project.v_rank, v_dim)
}
