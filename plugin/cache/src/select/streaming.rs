//! StreamingLLM: attention sinks and the most recent tokens.
//! <https://arxiv.org/abs/2309.17453>, section 3.2.
//!
//! When not to use it: whenever an answer needs something from the middle of the context. It is the
//! cheapest method and the quality floor of its family.

use std::borrow::Cow;

use super::{Method, Rows, Statistics};

pub(super) struct Streaming;

impl Method for Streaming {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn per_head(&self) -> bool {
        false
    }

    /// All alike: of equals, the later stay.
    fn rank<'a>(&self, _: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(&[])
    }
}
