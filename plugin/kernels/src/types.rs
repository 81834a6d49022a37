//! What the kernels take: views of rows, packed or strided, and what the heads have in common.

use crate::{Codec, Layout};

/// A run of rows of one KV head, in one pair of codecs.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Codec of the keys.
    pub k_codec: Codec,
    /// Codec of the values.
    pub v_codec: Codec,
    /// How the keys lie: [`Layout::Rows`], [`Layout::KeyTiles`] or [`Layout::KeyChannels`].
    pub k_layout: Layout,
    /// How the values lie: [`Layout::Rows`] or [`Layout::ValueTiles`].
    pub v_layout: Layout,
    /// Keys are stored as [`crate::Kernels::rotate`] left them; queries are then rotated too.
    pub k_rotated: bool,
    /// Number of rows; 0 is allowed.
    pub rows: usize,
    /// Keys: a run of `rows` rows; or of more, as far as the last row's tile goes.
    pub k: &'a [u8],
    /// Values, likewise.
    pub v: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Some of the rows, from a cut that both layouts allow ([`Layout::step`]).
    ///
    /// # Panics
    /// If the range does not lie in `0..rows` or begins elsewhere, or lengths do not fit (which every kernel refuses).
    #[must_use]
    pub fn slice(&self, heads: &Heads, rows: std::ops::Range<usize>) -> Self {
        assert!(
            rows.start
                .is_multiple_of(self.k_layout.step().max(self.v_layout.step()))
        );
        Self {
            rows: rows.len(),
            k: self.keys(heads, rows.start, rows.len()),
            v: self.values(heads, rows.start, rows.len()),
            ..*self
        }
    }

    /// The keys of `n` rows from a cut on, and what else is in their tiles.
    pub(crate) fn keys(&self, heads: &Heads, from: usize, n: usize) -> &'a [u8] {
        part(
            self.k,
            self.k_layout,
            self.k_codec.row_bytes(heads.k_dim),
            from,
            n,
        )
    }

    /// The values, likewise.
    pub(crate) fn values(&self, heads: &Heads, from: usize, n: usize) -> &'a [u8] {
        part(
            self.v,
            self.v_layout,
            self.v_codec.row_bytes(heads.v_dim),
            from,
            n,
        )
    }
}

fn part(bytes: &[u8], layout: Layout, row: usize, from: usize, n: usize) -> &[u8] {
    let span = layout.span(bytes.len() / row, from, n);
    &bytes[span.start * row..span.end * row]
}

/// One KV head and the query heads that share it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads that share this KV head: 1 for multi-head attention, more for GQA and MQA.
    pub q_heads: usize,
    /// Values in a key, and in a query.
    pub k_dim: usize,
    /// Values in a value row, and in an output row.
    pub v_dim: usize,
    /// Factor on `q · k`, usually `1 / √k_dim`.
    pub scale: f32,
    /// Logit cap `c`: a scaled score `s` becomes `c · tanh(s / c)` (Gemma 2, arXiv 2408.00118, section 2).
    pub softcap: Option<f32>,
}

/// Strided f32 rows, read straight out of a tensor: row `i` is `data[i · stride..][..dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// From the first row's first value to the last row's last, or longer.
    pub data: &'a [f32],
    /// Elements from a row's start to the next one's. Rows that are only read may overlap.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
    /// Values in a row.
    pub dim: usize,
}

impl<'a> Rows<'a> {
    /// Rows that lie close together.
    #[must_use]
    pub fn packed(data: &'a [f32], dim: usize) -> Self {
        Self {
            data,
            stride: dim,
            rows: data.len().checked_div(dim).unwrap_or(0),
            dim,
        }
    }

    #[inline]
    pub(crate) fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.dim]
    }
}

/// Strided f32 rows to write to, as [`Rows`], but with a stride of at least `dim`.
#[derive(Debug)]
pub struct RowsMut<'a> {
    /// From the first row's first value to the last row's last, or longer.
    pub data: &'a mut [f32],
    /// Elements from a row's start to the next one's.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
    /// Values in a row.
    pub dim: usize,
}

impl<'a> RowsMut<'a> {
    /// Rows that lie close together.
    #[must_use]
    pub fn packed(data: &'a mut [f32], dim: usize) -> Self {
        let rows = data.len().checked_div(dim).unwrap_or(0);
        Self {
            data,
            stride: dim,
            rows,
            dim,
        }
    }

    #[inline]
    pub(crate) fn row(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.stride..][..self.dim]
    }
}

/// Where prefill adds up how much attention each key got, or keeps the most that a query gave it.
#[derive(Debug)]
pub struct ColumnSums<'a> {
    /// Whether a key gets the largest of its weights, over queries and query heads, instead of their sum.
    pub largest: bool,
    /// How many of the given queries count, from the last back; more than there are means all of them.
    pub last_queries: usize,
    /// One value a key, past rows first, then all fresh ones: added to, or raised, not overwritten.
    pub out: &'a mut [f32],
}

/// What prefill reads.
#[derive(Clone, Copy)]
pub(crate) struct Prefill<'a> {
    pub(crate) heads: &'a Heads,
    pub(crate) past: &'a [Segment<'a>],
    pub(crate) fresh_k: Rows<'a>,
    pub(crate) fresh_v: Rows<'a>,
    pub(crate) first_query: usize,
    pub(crate) q: &'a [Rows<'a>],
}

impl Prefill<'_> {
    /// Queries of each head.
    pub(crate) fn queries(&self) -> usize {
        self.q.first().map_or(0, |q| q.rows)
    }
}

/// Buffers that kernels reuse from call to call. Their size does not depend on the product of lengths: tiles of rows,
/// rotated queries, two numbers a query, and one a block in which a maximum rose; where a prefill adds up the weights of all of
/// its queries, up to 8 MiB of weights.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(crate) queries: Vec<f32>,
    pub(crate) prepared: [Vec<i32>; 2],
    pub(crate) tile: Vec<f32>,
    /// A tile's packed rows.
    pub(crate) rows: Vec<u8>,
    pub(crate) keys: Vec<f32>,
    pub(crate) scores: Vec<f32>,
    pub(crate) max: Vec<f32>,
    pub(crate) sum: Vec<f32>,
    pub(crate) rises: Vec<Rise>,
    /// Weights, the maxima they were made under, and what a tile's are multiplied by.
    pub(crate) kept: (Vec<f32>, Vec<f32>, Vec<f32>),
}

/// A block at whose first row a head's maximum rose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rise {
    pub(crate) head: usize,
    pub(crate) row: usize,
    /// What it was before.
    pub(crate) before: f32,
}
