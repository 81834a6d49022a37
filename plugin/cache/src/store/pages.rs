//! What each page of a head's keys spans, so that a query can tell which pages may matter without reading them.
//!
//! A page is a run of rows of one block that begins at a cut, so that it can be attended to by itself: 16 rows, or a tile
//! where tiles are longer, and what is left at the block's end. Invariant: where there are bounds of a block they are those
//! of its keys as they are stored; blocks that change lose theirs until they are next asked for.

use std::ops::Range;
use std::sync::Arc;

use cinch_hooks::HookError;

use super::ledger::{Charge, Ledger};
use super::{Block, Column, Head};

/// Rows of a page, as in Quest (arXiv 2406.10774, section 4.1).
pub(crate) const PAGE: usize = 16;

/// What the allocator holds for a block's bounds besides them: the struct and its two reference counts.
pub(crate) const BOUNDS_HEADER: usize = size_of::<Bounds>() + 2 * size_of::<usize>();

/// Bounds of a block's pages, shared with forks as the block is.
#[derive(Debug)]
pub(crate) struct Bounds {
    /// Rows that they are of, from the block's first one on.
    rows: usize,
    /// A page's smallest value of each channel, then its largest ones.
    values: Column<f32>,
    header: Charge,
}

impl Bounds {
    /// Of the keys of a block's first rows, `dim` channels each.
    fn of(ledger: &Arc<Ledger>, k: &[f32], dim: usize, page: usize) -> Self {
        let mut values = Vec::with_capacity(2 * dim * k.len().div_ceil(page * dim));
        for page in k.chunks(page * dim) {
            for pick in [f32::min, f32::max] {
                let at = values.len();
                values.extend_from_slice(&page[..dim]);
                for row in page.chunks_exact(dim) {
                    values[at..]
                        .iter_mut()
                        .zip(row)
                        .for_each(|(bound, x)| *bound = pick(*bound, *x));
                }
            }
        }
        Self {
            rows: k.len() / dim,
            values: Column::from_vec(ledger, values),
            header: Charge::new(ledger, BOUNDS_HEADER),
        }
    }

    fn bytes(&self) -> usize {
        self.values.bytes() + self.header.bytes()
    }
}

/// Bounds of a head's blocks, as many as were made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pages(Vec<Option<Arc<Bounds>>>);

impl Pages {
    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().flatten().map(|bounds| bounds.bytes()).sum()
    }

    /// Of the block `index`, which goes on as it is.
    pub(super) fn of_block(&self, index: usize) -> Option<Arc<Bounds>> {
        self.0.get(index).cloned().flatten()
    }

    pub(super) fn push(&mut self, bounds: Option<Arc<Bounds>>) {
        self.0.push(bounds);
    }

    /// Forgets those of the block `index`, which changed.
    pub(super) fn forget(&mut self, index: usize) {
        if let Some(bounds) = self.0.get_mut(index) {
            *bounds = None;
        }
    }

    pub(super) fn truncate(&mut self, blocks: usize) {
        self.0.truncate(blocks);
    }
}

/// A page: its rows, and its bounds where there are any.
pub(crate) struct Page<'a> {
    pub(crate) rows: Range<usize>,
    /// The smallest value of each channel, and the largest ones.
    pub(crate) bounds: Option<(&'a [f32], &'a [f32])>,
}

impl Head {
    /// Makes the bounds that are missing. Of the last block, which more rows may come to, those of whole pages.
    pub(crate) fn bound_pages(&mut self) -> Result<(), HookError> {
        let mut pages = self.pages.take().unwrap_or_default();
        pages.0.resize(self.blocks.len(), None);
        let last = self.blocks.len().wrapping_sub(1);
        let (mut k, mut end) = (Vec::new(), 0);
        for (index, (block, bounds)) in self.blocks.iter().zip(&mut pages.0).enumerate() {
            let start = end;
            end += block.rows();
            let rows = if index == last {
                block.rows() / page(block) * page(block)
            } else {
                block.rows()
            };
            if bounds.as_ref().is_some_and(|bounds| bounds.rows == rows) {
                continue;
            }
            k.clear();
            k.resize(block.rows() * self.dims.k, 0.0);
            self.unpack_block_keys(block, start, &mut k)?;
            let k = &k[..rows * self.dims.k];
            *bounds = Some(Arc::new(Bounds::of(&self.ledger, k, self.dims.k, page(block))));
        }
        self.pages = Some(pages);
        Ok(())
    }

    /// All pages in order.
    pub(crate) fn pages(&self) -> impl Iterator<Item = Page<'_>> {
        let all = self.pages.as_ref().map_or(&[][..], |pages| &pages.0[..]);
        let mut start = 0;
        self.blocks.iter().enumerate().flat_map(move |(index, block)| {
            let (from, rows, size) = (start, block.rows(), page(block));
            start += rows;
            let bounds = all.get(index).and_then(Option::as_deref);
            let dim = self.dims.k;
            (0..rows).step_by(size).enumerate().map(move |(page, row)| {
                let end = rows.min(row + size);
                let bounds = bounds
                    .filter(|bounds| end <= bounds.rows)
                    .map(|bounds| bounds.values.as_slice()[2 * page * dim..][..2 * dim].split_at(dim));
                Page {
                    rows: from + row..from + end,
                    bounds,
                }
            })
        })
    }
}

/// Rows of a block's pages.
fn page(block: &Block) -> usize {
    PAGE.max(block.step())
}
