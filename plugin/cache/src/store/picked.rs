//! Which rows of a block stay.

use std::ops::Range;

/// Rows of a block that stay.
#[derive(Debug, Clone)]
pub(crate) enum Picked<'a> {
    /// A contiguous run.
    Run(Range<usize>),
    /// Row numbers, strictly increasing, each less `offset`.
    Some {
        /// Row numbers in the whole store.
        rows: &'a [u32],
        /// The block's first row in the whole store.
        offset: usize,
    },
}

impl Picked<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Run(run) => run.len(),
            Self::Some { rows, .. } => rows.len(),
        }
    }

    /// The first `at` rows (at most all) and the rest.
    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::Run(run) => {
                let at = run.end.min(run.start.saturating_add(at));
                (Self::Run(run.start..at), Self::Run(at..run.end))
            }
            Self::Some { rows, offset } => {
                let (first, rest) = rows.split_at(at.min(rows.len()));
                (
                    Self::Some { rows: first, offset },
                    Self::Some { rows: rest, offset },
                )
            }
        }
    }

    /// Calls `f(rows already done, run of source rows)` for each maximal contiguous run.
    pub(crate) fn for_runs(&self, mut f: impl FnMut(usize, Range<usize>)) {
        match self {
            Self::Run(run) => f(0, run.clone()),
            Self::Some { rows, offset } => {
                let mut done = 0;
                while done < rows.len() {
                    let start = rows[done] as usize;
                    let mut end = done + 1;
                    while end < rows.len() && rows[end] as usize == start + (end - done) {
                        end += 1;
                    }
                    f(done, start - offset..start - offset + (end - done));
                    done = end;
                }
            }
        }
    }
}
