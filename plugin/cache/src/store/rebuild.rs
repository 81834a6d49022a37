//! Compaction of one head: rows that stay are regrouped in blocks, each row in the codec its place asks
//! for. Whole blocks that need no change are kept as they are, so a fork goes on sharing them; K and V of
//! rows already stored never gain bits, nor dimensions.

use std::sync::Arc;

use cinch_hooks::HookError;

use super::block::Taken;
use super::picked::Picked;
use super::side::Buffers;
use super::{BLOCK_ROWS, Block, Column, Head, Pages, Pair, Targets};
use crate::quantize::Beside;

/// Rows of one block that go to one place in one codec pair.
struct Piece<'a> {
    source: usize,
    rows: Picked<'a>,
    pair: Pair,
    window: bool,
}

/// Pieces that become one block.
struct Group<'a> {
    pair: Pair,
    window: bool,
    rows: usize,
    /// It is a block that needs no change.
    intact: bool,
    pieces: Vec<Piece<'a>>,
}

/// What a compaction did to one head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rebuilt {
    /// Rows dropped.
    pub(crate) evicted: usize,
    /// Rows written in a codec of fewer bits.
    pub(crate) transcoded: usize,
}

impl Head {
    /// Keeps the rows at `keep` (strictly increasing; `None`: all) and packs what lies between sinks and
    /// recent window. On an error nothing has changed.
    /// `salience` is what each row counts for, where the targets have salient rows.
    pub(crate) fn compact(
        &mut self,
        keep: Option<&[u32]>,
        targets: &Targets,
        salience: &[f32],
    ) -> Result<Rebuilt, HookError> {
        let targets = &self.reachable(targets);
        let groups = self.groups(keep, targets);
        let rows: usize = groups.iter().map(|group| group.rows).sum();
        let mut rebuilt = Rebuilt {
            evicted: self.kept - rows,
            transcoded: 0,
        };
        let last = groups.len().wrapping_sub(1);
        let own = Pair::both(targets.store);
        let mut buffers = Buffers::default();
        let starts = self.starts();
        let mut blocks = Vec::with_capacity(groups.len());
        let mut pages = self.pages.as_ref().map(|_| Pages::default());
        for (index, group) in groups.iter().enumerate() {
            rebuilt.transcoded += group
                .pieces
                .iter()
                .filter(|piece| self.blocks[piece.source].pair() != piece.pair)
                .map(|piece| piece.rows.len())
                .sum::<usize>();
            let open = targets.packs() && group.window && group.pair == own && index == last;
            let capacity = if open {
                targets.tail_capacity().max(group.rows)
            } else {
                group.rows
            };
            if let [piece] = &group.pieces[..] {
                let source = &self.blocks[piece.source];
                let whole = piece.rows.len() == source.rows() && source.pair() == piece.pair;
                if whole && (source.capacity() == capacity || index == last) {
                    blocks.push(source.clone());
                    if let (Some(pages), Some(before)) = (&mut pages, &self.pages) {
                        pages.push(before.of_block(piece.source));
                    }
                    continue;
                }
            }
            let pieces = group.pieces.iter().map(|piece| Taken {
                block: &self.blocks[piece.source],
                positions: self.positions_from(starts[piece.source]),
                rows: &piece.rows,
            });
            let block = Block::gather(
                &self.ledger,
                self.block_dims(group.pair),
                (self.bases.as_deref(), self.rotary.as_deref()),
                group.pair,
                capacity,
                pieces,
                &group.salience(&starts, salience),
                &mut buffers,
            )?;
            blocks.push(Arc::new(block));
            if let Some(pages) = &mut pages {
                pages.push(None);
            }
        }
        drop(groups);
        self.blocks = blocks;
        self.pages = pages;
        self.kept = rows;
        if let Some(keep) = keep.filter(|_| rebuilt.evicted > 0) {
            match &mut self.positions {
                Some(positions) => positions.gather(keep),
                None => self.positions = Some(Column::from_vec(&self.ledger, keep.to_vec())),
            }
            if let Some(scores) = &mut self.scores {
                scores.gather(keep);
            }
        }
        Ok(rebuilt)
    }

    fn groups<'a>(&self, keep: Option<&'a [u32]>, targets: &Targets) -> Vec<Group<'a>> {
        let total = keep.map_or(self.kept, <[u32]>::len);
        let sinks = match keep {
            None => self.rows_before(targets.sinks),
            Some(keep) => {
                let before = self.rows_before(targets.sinks);
                keep.partition_point(|row| (*row as usize) < before)
            }
        };
        let window = if targets.packs() {
            targets.window(sinks, total)
        } else {
            total
        };
        let mut groups: Vec<Group<'a>> = Vec::new();
        let (mut offset, mut done) = (0, 0);
        for (source, block) in self.blocks.iter().enumerate() {
            let mut rows = match keep {
                None => Picked::Run(0..block.rows()),
                Some(keep) => {
                    let end = keep.partition_point(|row| (*row as usize) < offset + block.rows());
                    Picked::Some {
                        rows: &keep[done..end],
                        offset,
                    }
                }
            };
            offset += block.rows();
            while rows.len() > 0 {
                let (edge, protected) = match done {
                    at if at < sinks => (sinks, true),
                    at if at < window => (window, false),
                    _ => (total, true),
                };
                let limit = if done >= window { usize::MAX } else { BLOCK_ROWS };
                let (part, rest) = rows.split_at((edge - done).min(limit));
                rows = rest;
                let wanted = if protected {
                    Pair::both(targets.store)
                } else {
                    targets.packed
                };
                let pair = block.pair().lowered(wanted);
                let piece = Piece {
                    source,
                    rows: part,
                    pair,
                    window: done >= window,
                };
                done += piece.rows.len();
                let intact = piece.rows.len() == block.rows() && pair == block.pair();
                place(&mut groups, piece, intact);
            }
        }
        groups
    }
}

impl Group<'_> {
    /// What its rows count for, `starts` being the first rows of the head's blocks.
    fn salience(&self, starts: &[usize], salience: &[f32]) -> Vec<f32> {
        let mut own = Vec::new();
        if let Beside::Salient { .. } = self.pair.beside {
            for piece in &self.pieces {
                let start = starts[piece.source];
                piece.rows.for_runs(|_, run| {
                    own.extend(run.map(|row| salience.get(start + row).copied().unwrap_or(0.0)));
                });
            }
        }
        own
    }
}

/// Puts a piece behind the last group where it fits in, else in a group of its own. A piece that is
/// rewritten anyway fills the last group up first; an intact block is never cut, and one with something beside its codes
/// never rewritten: each time would cost it.
fn place<'a>(groups: &mut Vec<Group<'a>>, piece: Piece<'a>, intact: bool) {
    let Piece {
        source,
        rows,
        pair,
        window,
    } = piece;
    let room = groups.last().map_or(0, |group| match () {
        () if group.pair != pair || group.window != window => 0,
        () if pair.beside != Beside::Nothing && (intact || group.intact) => 0,
        () if window => usize::MAX,
        () => BLOCK_ROWS.saturating_sub(group.rows),
    });
    let fits = if intact && rows.len() > room { 0 } else { room };
    let (first, rest) = rows.split_at(fits);
    if let Some(group) = groups.last_mut()
        && first.len() > 0
    {
        group.rows += first.len();
        group.intact = false;
        group.pieces.push(Piece {
            source,
            rows: first,
            pair,
            window,
        });
    }
    if rest.len() > 0 {
        let rows = rest.len();
        groups.push(Group {
            pair,
            window,
            rows,
            intact,
            pieces: vec![Piece {
                source,
                rows: rest,
                pair,
                window,
            }],
        });
    }
}
