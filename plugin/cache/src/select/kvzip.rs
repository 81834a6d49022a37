//! `KVzip`: what the prompt can be told from. <https://arxiv.org/abs/2505.23416>, section 3.
//!
//! When a prompt has been read, the model is asked to repeat it, and given it again as what it answers, in parts of about
//! two thousand tokens (section 3.4). A row's score is the largest attention weight that any query of this second reading
//! gives it, over the query heads that share its KV head (section 3.2, equation 2). Only then do rows go. No question is part of
//! this, so what stays is there for any.
//!
//! What differs from the paper: weights are shares of everything a query attends to, the prompt's other parts included, where
//! the paper leaves those out of a part's softmax; and all parts' queries count, not only those of a row's own part. The
//! prompt is repeated as it is, its chat template included, with the instruction as plain text behind it and no turn of its own.
//! The paper lets the heads of all layers compete (section 4.1), which is `heads = "adaptive"` with `layers = "adaptive"`: when
//! the second reading is over, layers are given what their rows are worth, and keep that share of the budget until the next
//! turn. Decoded tokens, which the paper keeps, compete with the prompt's: their score, and from then on
//! everyone's, is raised by the weight that a decoded token gives, of every eighth one. A later turn's prompt is read again as a
//! whole: what is still there of earlier turns is ranked anew.
//!
//! When not to use it: where the time to the first token counts, since the second reading takes more than the first; and
//! with even heads, or layers: what this ranks by is found in few heads, and a quarter of each head's rows leaves
//! `SmolLM2` four times as far from its full cache as a quarter of all (tests/kvpress/README.md).

use std::borrow::Cow;

use cinch_hooks::ExtraPass;

use super::{Method, Rows, Statistics};

pub(super) struct KvZip;

impl Method for KvZip {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn largest(&self) -> bool {
        true
    }

    fn rereads(&self) -> Option<ExtraPass> {
        Some(ExtraPass {
            first: "\n\nRepeat the previous context:",
            further: "\n\nRepeat the previous context, from here on:",
            overlap: 8,
            tokens: 2048,
        })
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        Cow::Borrowed(rows.scores)
    }
}
