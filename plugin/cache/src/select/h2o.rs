//! H2O: heavy hitters by accumulated attention, and the most recent tokens.
//! <https://arxiv.org/abs/2306.14048>, section 4, algorithm 1.
//!
//! The score of a row is the attention weight it received, summed over all queries so far and over the
//! query heads that share its KV head. Ties go to the later position, so the answer is deterministic.
//!
//! When not to use it: where old tokens must not outweigh new ones by their age alone (the sum favours
//! rows that were there for more queries), or where prefill time matters most (it needs the weights of
//! every prompt query).

use std::borrow::Cow;

use super::{Method, Rows, Statistics};

pub(super) struct H2o;

impl Method for H2o {
    fn statistics(&self) -> Statistics {
        Statistics::Every
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }
}
