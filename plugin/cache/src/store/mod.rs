//! One KV head's rows: full-precision sinks, packed blocks, a full-precision recent window. Invariants:
//! rows are in order of position, positions strictly increase, closed blocks never change.

mod attend;
mod bases;
pub(crate) mod block;
mod extra;
pub(crate) mod ledger;
mod pages;
mod pair;
mod picked;
mod rebuild;
mod replace;
mod salient;
mod side;
mod targets;
pub(crate) mod twin;

use std::ops::Range;
use std::slice;
use std::sync::Arc;

use cinch_hooks::HookError;
use cinch_kernels::Segment;
use smallvec::SmallVec;

use crate::project::{self, Bases};
use crate::rotary::{Positions, Turns, Way};
use crate::select::Profile;

pub(crate) use attend::whole;
pub(crate) use block::{Block, HEADER, LINE};
pub(crate) use extra::most_bytes as extra_bytes;
pub(crate) use ledger::{Column, GROW as COLUMN_ROWS, Ledger};
pub(crate) use pages::{BOUNDS_HEADER, PAGE, Pages};
pub(crate) use pair::{Dims, Pair};
pub(crate) use rebuild::Rebuilt;
pub(crate) use side::MOST_DIM;
pub(crate) use targets::Targets;

/// Rows of a closed block at most. A header is then well under 1 % of a packed block's bytes, and a block
/// rewritten by an eviction is small.
pub(crate) const BLOCK_ROWS: usize = 256;

/// A run of rows as the kernels take it: of few blocks as a rule, so that a step allocates nothing for it.
pub(crate) type Segments<'a> = SmallVec<[Segment<'a>; 12]>;

/// The rows of one KV head at one layer.
#[derive(Debug)]
pub(crate) struct Head {
    dims: Dims,
    /// How its keys turn with their positions, where that is known.
    rotary: Option<Arc<Turns>>,
    ledger: Arc<Ledger>,
    blocks: Vec<Arc<Block>>,
    kept: usize,
    /// `None` until the first eviction: row `i` is at position `i`.
    positions: Option<Column<u32>>,
    /// Accumulated attention of each row, where this head has scores of its own.
    pub(crate) scores: Option<Column<f32>>,
    /// Of the queries that attended to this head, where its method asks for them.
    pub(crate) moments: Option<Column<f32>>,
    /// What projected rows are coordinates in, once there are some.
    pub(crate) bases: Option<Arc<Bases>>,
    /// The cosine from which on evicted rows are merged into kept ones; `None` before the first merge.
    pub(crate) threshold: Option<f32>,
    /// What its attention to the prompt showed, where its method asks for that.
    pub(crate) profile: Option<Profile>,
    /// What its pages of keys span, where its method chooses among them.
    pub(crate) pages: Option<Pages>,
}

impl Head {
    pub(crate) fn new(ledger: &Arc<Ledger>, dims: Dims, rotary: Option<Arc<Turns>>) -> Self {
        Self {
            dims,
            rotary,
            ledger: ledger.clone(),
            blocks: Vec::new(),
            kept: 0,
            positions: None,
            scores: None,
            moments: None,
            bases: None,
            threshold: None,
            profile: None,
            pages: None,
        }
    }

    pub(crate) fn dims(&self) -> Dims {
        self.dims
    }

    pub(crate) fn kept(&self) -> usize {
        self.kept
    }

    pub(crate) fn positions(&self) -> Option<&[u32]> {
        self.positions.as_ref().map(Column::as_slice)
    }

    pub(crate) fn blocks(&self) -> &[Arc<Block>] {
        &self.blocks
    }

    /// Bytes allocated for this head; blocks shared with a fork count in both.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.bytes()).sum::<usize>()
            + self.positions.as_ref().map_or(0, Column::bytes)
            + self.scores.as_ref().map_or(0, Column::bytes)
            + self.moments.as_ref().map_or(0, Column::bytes)
            + self.bases.as_ref().map_or(0, |bases| bases.bytes())
            + self.pages.as_ref().map_or(0, Pages::bytes)
    }

    /// The first row of each block.
    fn starts(&self) -> Vec<usize> {
        let mut start = 0;
        let blocks = self.blocks.iter();
        blocks
            .map(|block| {
                start += block.rows();
                start - block.rows()
            })
            .collect()
    }

    /// Whether the kernels can take all rows as they are stored, in whole dimensions.
    pub(crate) fn is_plain(&self) -> bool {
        self.bases.is_none() && self.blocks.iter().all(|block| block.is_plain())
    }

    /// The last row at or before `row` from which on rows can be attended to.
    pub(crate) fn cut(&self, row: usize) -> usize {
        let mut start = 0;
        for block in &self.blocks {
            if row < start + block.rows() {
                return start + block.cut(row - start);
            }
            start += block.rows();
        }
        row
    }

    /// Rows `from..to` as the kernels take them, from a cut on.
    pub(crate) fn segments(&self, from: usize, to: usize) -> Segments<'_> {
        self.segments_of(slice::from_ref(&(from..to)))
    }

    /// The same of several runs, in order.
    pub(crate) fn segments_of(&self, runs: &[Range<usize>]) -> Segments<'_> {
        let (mut start, mut next) = (0, 0);
        let mut segments = Segments::new();
        for block in &self.blocks {
            let end = start + block.rows();
            while let Some(run) = runs.get(next) {
                let (first, last) = (run.start.max(start), run.end.min(end));
                if first < last {
                    segments.push(block.segment(first - start..last - start));
                }
                if run.end > end {
                    break;
                }
                next += 1;
            }
            start = end;
        }
        segments
    }

    /// Rows at positions less than `position`.
    pub(crate) fn rows_before(&self, position: usize) -> usize {
        match self.positions() {
            None => position.min(self.kept),
            Some(positions) => positions.partition_point(|p| (*p as usize) < position),
        }
    }

    /// All rows in f32, K and V.
    pub(crate) fn unpack(&self) -> Result<(Vec<f32>, Vec<f32>), HookError> {
        Ok((self.unpack_keys()?, self.unpack_values()?))
    }

    /// K of all rows in f32, in its own basis.
    pub(crate) fn unpack_keys(&self) -> Result<Vec<f32>, HookError> {
        let mut k = vec![0.0; self.kept * self.dims.k];
        let (mut rest, mut start) = (&mut k[..], 0);
        for block in &self.blocks {
            let rows = rest
                .split_off_mut(..block.rows() * self.dims.k)
                .unwrap_or_default();
            self.unpack_block_keys(block, start, rows)?;
            start += block.rows();
        }
        Ok(k)
    }

    /// K of a block of its own, whose first row is `start`, in f32, in its own basis.
    fn unpack_block_keys(&self, block: &Block, start: usize, rows: &mut [f32]) -> Result<(), HookError> {
        let (basis, _) = self.bases_of(block.pair());
        bases::whole(basis, rows, |rows| block.unpack_keys(rows))?;
        self.turn(block.pair(), Way::Forth, start, rows);
        Ok(())
    }

    /// Where the rows from `start` on are.
    fn positions_from(&self, start: usize) -> Positions<'_> {
        match self.positions() {
            None => Positions::From(start),
            Some(positions) => Positions::Each(&positions[start..]),
        }
    }

    /// Turns keys that are, or are to be, in a block of this pair, the first of which is row `start`.
    fn turn(&self, pair: Pair, way: Way, start: usize, rows: &mut [f32]) {
        if let Some(rotary) = self.rotary.as_ref().filter(|_| pair.before_rope) {
            rotary.turn(way, self.positions_from(start), self.dims.k, rows);
        }
    }

    /// V of all rows in f32.
    pub(crate) fn unpack_values(&self) -> Result<Vec<f32>, HookError> {
        let mut v = vec![0.0; self.kept * self.dims.v];
        let mut rest = &mut v[..];
        for block in &self.blocks {
            let rows = rest
                .split_off_mut(..block.rows() * self.dims.v)
                .unwrap_or_default();
            let (_, basis) = self.bases_of(block.pair());
            bases::whole(basis, rows, |rows| block.unpack_values(rows))?;
        }
        Ok(v)
    }

    /// Appends contiguous rows at positions `seen..`, in the store's own codec. On an error (a value that
    /// is not finite) nothing is appended.
    pub(crate) fn append(
        &mut self,
        targets: &Targets,
        seen: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), HookError> {
        let dims = self.dims;
        let (k_dim, v_dim) = (dims.k, dims.v);
        let fresh = k.len() / k_dim;
        let mut done = 0;
        while done < fresh {
            let left = fresh - done;
            let tail = self.tail(targets, left);
            let rows = tail.room().min(left);
            let pushed = tail.push(
                &k[done * k_dim..(done + rows) * k_dim],
                &v[done * v_dim..(done + rows) * v_dim],
                rows,
            );
            if let Err(error) = pushed {
                let kept = self.kept;
                self.kept += done;
                self.truncate(kept);
                self.blocks.retain(|block| block.rows() > 0);
                return Err(error);
            }
            done += rows;
        }
        self.kept += fresh;
        if let Some(positions) = &mut self.positions {
            positions.extend(
                (seen..seen + fresh)
                    .map(|p| p as u32)
                    .collect::<Vec<_>>()
                    .into_iter(),
            );
        }
        Ok(())
    }

    /// A block of our own with room for at least one row in the store's codec.
    fn tail(&mut self, targets: &Targets, fresh: usize) -> &mut Block {
        let own = Pair::both(targets.store);
        let usable = self
            .blocks
            .last()
            .is_some_and(|block| block.pair() == own && block.room() > 0);
        if !usable {
            // Many rows get blocks of their exact size; a few get room for those that follow.
            let capacity = fresh.min(BLOCK_ROWS);
            let capacity = if capacity < targets::TAIL_ROWS {
                targets.tail_capacity()
            } else {
                capacity
            };
            self.blocks
                .push(Arc::new(Block::new(&self.ledger, self.dims, own, capacity)));
        }
        let last = self.blocks.len() - 1;
        let block = &mut self.blocks[last];
        if Arc::get_mut(block).is_none() {
            *block = Arc::new(block.duplicate());
        }
        Arc::get_mut(block).expect("a block just made has one owner")
    }

    /// Puts other values in the place of `rows` (strictly increasing), `k` (`None`: keys stay) and `v` having as many, each in
    /// its row's codec.
    pub(crate) fn replace(&mut self, rows: &[usize], k: Option<&[f32]>, v: &[f32]) -> Result<(), HookError> {
        let dims = self.dims;
        let (mut index, mut start) = (0, 0);
        for (i, (row, v)) in rows.iter().zip(v.chunks_exact(dims.v)).enumerate() {
            let k = k.map(|k| &k[i * dims.k..(i + 1) * dims.k]);
            while index < self.blocks.len() && *row >= start + self.blocks[index].rows() {
                start += self.blocks[index].rows();
                index += 1;
            }
            let Some(pair) = self.blocks.get(index).map(|block| block.pair()) else {
                return Ok(());
            };
            let (k_basis, v_basis) = self.bases_of(pair);
            let k = k.map(|k| {
                let mut k = bases::coordinates(k_basis, k).into_owned();
                self.turn(pair, Way::Back, *row, &mut k);
                k
            });
            let v = bases::coordinates(v_basis, v).into_owned();
            if let Some(pages) = &mut self.pages {
                pages.forget(index);
            }
            let block = &mut self.blocks[index];
            if Arc::get_mut(block).is_none() {
                *block = Arc::new(block.duplicate());
            }
            if let Some(block) = Arc::get_mut(block) {
                block.replace(row - start, k.as_deref(), &v)?;
            }
        }
        Ok(())
    }

    /// Drops all but the first `rows` rows.
    pub(crate) fn truncate(&mut self, rows: usize) {
        if rows >= self.kept {
            return;
        }
        let mut left = rows;
        let mut whole = 0;
        if let Some(pages) = &mut self.pages {
            // The one that is cut, if any, and those behind it.
            let mut end = 0;
            let untouched = self.blocks.iter().take_while(|block| {
                end += block.rows();
                end <= rows
            });
            pages.truncate(untouched.count());
        }
        while whole < self.blocks.len() && self.blocks[whole].rows() <= left {
            left -= self.blocks[whole].rows();
            whole += 1;
        }
        if left > 0 {
            let block = &mut self.blocks[whole];
            if Arc::get_mut(block).is_none() {
                *block = Arc::new(block.duplicate());
            }
            if let Some(block) = Arc::get_mut(block) {
                block.truncate(left);
            }
            whole += 1;
        }
        self.blocks.truncate(whole);
        self.kept = rows;
        if let Some(positions) = &mut self.positions {
            positions.truncate(rows);
        }
        if let Some(scores) = &mut self.scores {
            scores.truncate(rows);
        }
    }

    /// Whether the recent window has grown by a batch that should be packed.
    pub(crate) fn pack_due(&self, targets: &Targets) -> bool {
        let few = self.kept < project::rows_needed(self.dims.k.max(self.dims.v));
        if !targets.packs() || (!self.reachable(targets).packs() && few) {
            return false;
        }
        let own = Pair::both(targets.store);
        let window: usize = self
            .blocks
            .iter()
            .rev()
            .take_while(|block| block.pair() == own)
            .map(|block| block.rows())
            .sum();
        let sinks = self.rows_before(targets.sinks);
        window.min(self.kept - sinks) >= targets.residual + targets.batch()
    }

    /// An independent continuation that shares the blocks.
    pub(crate) fn fork(&self) -> Self {
        Self {
            dims: self.dims,
            rotary: self.rotary.clone(),
            ledger: self.ledger.clone(),
            blocks: self.blocks.clone(),
            kept: self.kept,
            positions: self.positions.as_ref().map(Column::duplicate),
            scores: self.scores.as_ref().map(Column::duplicate),
            moments: self.moments.as_ref().map(Column::duplicate),
            bases: self.bases.clone(),
            threshold: self.threshold,
            profile: self.profile,
            pages: self.pages.clone(),
        }
    }
}
