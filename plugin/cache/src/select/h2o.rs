//! H2O: heavy hitters by accumulated attention, and the most recent tokens.
//! <https://arxiv.org/abs/2306.14048>, section 4, algorithm 1.
//!
//! Half of the budget are heavy hitters and half are recent, as in the paper's experiments (section 5): a sum favours rows
//! that were there for more queries, and without recent ones to match, those that the next token needs would go.
//!
//! The score of a row is the attention weight it received, summed over all queries so far and over the
//! query heads that share its KV head. Ties go to the later position, so the answer is deterministic.
//!
//! When not to use it: where prefill time matters most (it needs the weights of every prompt query).

use std::borrow::Cow;

use super::{Method, Rows, Statistics};

pub(super) struct H2o;

impl Method for H2o {
    fn statistics(&self) -> Statistics {
        Statistics::Every
    }

    fn recent_percent(&self) -> usize {
        50
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }
}
