//! The requests of the load while they run, as their clients see them.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use cinch_tests::load::Event;

/// What is known of all of them at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Tally {
    pub(super) finished: usize,
    pub(super) given_up: usize,
    pub(super) lost: usize,
    /// 503s, each counted.
    pub(super) refused: usize,
    pub(super) retried: usize,
    /// Tokens that arrived.
    pub(super) tokens: usize,
    /// Seconds to the first token, of those that have one.
    pub(super) first_tokens: Vec<f64>,
    /// Seconds between tokens.
    pub(super) gaps: Vec<f64>,
}

#[derive(Debug)]
struct Inner {
    tally: Tally,
    last: Vec<Option<Instant>>,
}

/// Written by clients, read by whoever draws.
#[derive(Debug)]
pub(super) struct Board {
    sent: Instant,
    inner: Mutex<Inner>,
}

impl Board {
    /// Of so many requests, sent now.
    pub(super) fn new(requests: usize) -> Self {
        Self {
            sent: Instant::now(),
            inner: Mutex::new(Inner {
                tally: Tally::default(),
                last: vec![None; requests],
            }),
        }
    }

    pub(super) fn sent(&self) -> Instant {
        self.sent
    }

    /// Something happened to request `i`.
    pub(super) fn note(&self, i: usize, event: Event) {
        let now = Instant::now();
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Inner { tally, last } = &mut *inner;
        match event {
            Event::Refused => tally.refused += 1,
            Event::Retried => tally.retried += 1,
            Event::Finished => tally.finished += 1,
            Event::GivenUp => tally.given_up += 1,
            Event::Lost => tally.lost += 1,
            Event::Token => {
                tally.tokens += 1;
                if let Some(last) = last.get_mut(i) {
                    match last {
                        None => tally.first_tokens.push((now - self.sent).as_secs_f64()),
                        Some(last) => tally.gaps.push((now - *last).as_secs_f64()),
                    }
                    *last = Some(now);
                }
            }
        }
    }

    pub(super) fn tally(&self) -> Tally {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .tally
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_counted_once() {
        let board = Board::new(2);
        for (i, event) in [
            (0, Event::Refused),
            (0, Event::Retried),
            (0, Event::Token),
            (1, Event::Token),
            (0, Event::Token),
            (0, Event::Finished),
            (1, Event::Lost),
        ] {
            board.note(i, event);
        }
        let tally = board.tally();
        assert_eq!((tally.finished, tally.lost, tally.given_up), (1, 1, 0));
        assert_eq!((tally.refused, tally.retried, tally.tokens), (1, 1, 3));
        assert_eq!((tally.first_tokens.len(), tally.gaps.len()), (2, 1));
    }
}
