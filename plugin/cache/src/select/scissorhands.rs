//! Scissorhands: tokens that matter go on mattering. <https://arxiv.org/abs/2305.17118>, section 4, its two algorithms.
//!
//! A query that gives a row less than the mean weight (1 of the number of rows that it sees) votes against it. Rows go
//! that most of the last 64 queries (`window`) vote against. Here the other votes are counted, which is the same
//! order. The query heads that share a KV head vote as one, by their mean weight. The paper's history window is a
//! whole number of decoded tokens; here it fades, so that it goes on from one eviction to the next.
//!
//! When not to use it: in short contexts, where few distinct counts rank many rows and age decides between equals.

use std::borrow::Cow;

use cinch_protocol::Select;

use super::{Method, Query, Rows, Statistics};

pub(super) struct Scissorhands {
    window: usize,
}

impl Scissorhands {
    pub(super) fn new(select: &Select) -> Self {
        Self {
            window: select.window.unwrap_or(64) as usize,
        }
    }
}

impl Method for Scissorhands {
    fn statistics(&self) -> Statistics {
        Statistics::Window(self.window)
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }

    fn credits(&self) -> bool {
        true
    }

    fn credit(&self, _: &Query<'_>, weights: &mut [f32]) {
        let mean = 1.0 / weights.len() as f32;
        for weight in weights {
            *weight = f32::from(u8::from(*weight >= mean));
        }
    }
}
