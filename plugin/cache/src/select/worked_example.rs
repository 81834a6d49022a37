//! VATP: attention received, weighed by the value's length. <https://arxiv.org/abs/2406.12335>, section 3.
//!
//! A row that is attended to but has next to no value to add may go. The score is the weight that a row received,
//! times the sum of its value's magnitudes.
//!
//! When not to use it: where a retuned request has few observed queries yet, as H2O.

use std::borrow::Cow;

use super::{Method, Reads, Rows, Statistics};

pub(super) struct Vatp;

impl Method for Vatp {
    fn statistics(&self) -> Statistics {
        Statistics::Sampled
    }

    fn reads(&self) -> Reads {
        Reads::KeysAndValues
    }

    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]> {
        let values = rows.v.chunks_exact(rows.v_dim);
        let lengths = values.map(|value| value.iter().map(|x| x.abs()).sum::<f32>());
        rows.scores
            .iter()
            .zip(lengths)
            .map(|(score, length)| score * length)
            .collect()
    }
}
