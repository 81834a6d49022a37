//! TOVA, token omission via attention: what the last query attends to most.
//! <https://arxiv.org/abs/2401.06104>, section 3.2.
//!
//! The weights are the mean over all heads of a layer, and all heads keep the same rows. A request that came here
//! from a method whose heads chose for themselves goes on head by head: their rows differ.
//!
//! When not to use it: with a long `interval`, as one query speaks for all that come until the next eviction.

use std::borrow::Cow;

use super::{Method, Rows, Statistics};

pub(super) struct Tova;

impl Method for Tova {
    fn statistics(&self) -> Statistics {
        Statistics::Window(1)
    }

    fn per_head(&self) -> bool {
        false
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }
}
