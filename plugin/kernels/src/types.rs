//! What the kernels take: views of rows, packed or strided, and what the heads have in common.

use crate::Codec;

/// A run of rows of one KV head, in one pair of codecs.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Codec of the keys.
    pub k_codec: Codec,
    /// Codec of the values.
    pub v_codec: Codec,
    /// Number of rows; 0 is allowed.
    pub rows: usize,
    /// Keys: exactly `rows · k_codec.row_bytes(k_dim)` bytes.
    pub k: &'a [u8],
    /// Values: exactly `rows · v_codec.row_bytes(v_dim)` bytes.
    pub v: &'a [u8],
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

    pub(crate) fn row(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.stride..][..self.dim]
    }
}

/// Where prefill adds up how much attention each key got.
#[derive(Debug)]
pub struct ColumnSums<'a> {
    /// How many of the last queries count; more than there are means all of them.
    pub last_queries: usize,
    /// One sum a key, past rows first, then fresh ones: added to, not overwritten.
    pub out: &'a mut [f32],
}

/// Buffers that prefill reuses from call to call. Their size does not depend on the product of lengths:
/// two tiles of rows, and two numbers a query.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(crate) tile: Vec<f32>,
    pub(crate) keys: Vec<f32>,
    pub(crate) scores: Vec<f32>,
    pub(crate) max: Vec<f32>,
    pub(crate) sum: Vec<f32>,
}
