//! Who may hold how much, as a function of arrivals, ends and sizes: no clock, no lock, no plugin.
//!
//! Invariants: what is admitted was free before, so reservations stay within the capacity unless a measurement
//! says that a request holds more than was reserved; nobody is admitted before one that came earlier; whoever
//! leaves, leaves nothing behind.

use std::collections::{BTreeMap, VecDeque};

#[derive(Debug, Default)]
pub(super) struct Ledger {
    capacity: u64,
    max_queue: usize,
    admitted: BTreeMap<usize, u64>,
    waiting: VecDeque<usize>,
}

/// Where someone who left had been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Admitted,
    Queue,
    Nowhere,
}

impl Ledger {
    pub(super) fn new(capacity: u64, max_queue: usize) -> Self {
        Self {
            capacity,
            max_queue,
            ..Self::default()
        }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(super) fn reserved(&self) -> u64 {
        self.admitted.values().sum()
    }

    /// What is neither held nor promised.
    pub(super) fn free(&self) -> u64 {
        self.capacity.saturating_sub(self.reserved())
    }

    pub(super) fn queue(&self) -> impl ExactSizeIterator<Item = usize> {
        self.waiting.iter().copied()
    }

    pub(super) fn admitted(&self) -> impl Iterator<Item = usize> {
        self.admitted.keys().copied()
    }

    pub(super) fn reservation(&self, id: usize) -> Option<u64> {
        self.admitted.get(&id).copied()
    }

    /// Puts `id` at the end of the queue; `false`: it is full.
    pub(super) fn join(&mut self, id: usize) -> bool {
        let room = self.waiting.len() < self.max_queue;
        if room {
            self.waiting.push_back(id);
        }
        room
    }

    /// Who is next.
    pub(super) fn front(&self) -> Option<usize> {
        self.waiting.front().copied()
    }

    /// Admits who is next, if `need` is free.
    pub(super) fn admit(&mut self, need: u64) -> bool {
        let fits = need <= self.free();
        if fits && let Some(id) = self.waiting.pop_front() {
            self.admitted.insert(id, need);
        }
        fits
    }

    /// Corrects an admitted request's reservation.
    pub(super) fn set(&mut self, id: usize, bytes: u64) {
        if let Some(reserved) = self.admitted.get_mut(&id) {
            *reserved = bytes;
        }
    }

    pub(super) fn leave(&mut self, id: usize) -> Left {
        if self.admitted.remove(&id).is_some() {
            return Left::Admitted;
        }
        match self.waiting.iter().position(|other| *other == id) {
            Some(place) => {
                self.waiting.remove(place);
                Left::Queue
            }
            None => Left::Nowhere,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// xorshift64*: the same sequence everywhere.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
        }
    }

    /// Admits from the front whoever fits; answers with them in order.
    fn pump(ledger: &mut Ledger, needs: &BTreeMap<usize, u64>) -> Vec<usize> {
        let mut admitted = Vec::new();
        while let Some(id) = ledger.front() {
            if !ledger.admit(needs[&id]) {
                break;
            }
            admitted.push(id);
        }
        admitted
    }

    #[test]
    fn arrivals_ends_retunes_and_cancels_in_any_order() {
        for seed in 1..=300 {
            let mut dice = Dice(seed * 0x9e37_79b9);
            let capacity = 1000;
            let mut ledger = Ledger::new(capacity, 8);
            let mut needs = BTreeMap::new();
            let (mut next, mut last_admitted) = (0, None);
            let mut check = |ledger: &mut Ledger, needs: &BTreeMap<usize, u64>| {
                for id in pump(ledger, needs) {
                    assert!(
                        Some(id) > last_admitted,
                        "seed {seed}: {id} after {last_admitted:?}"
                    );
                    last_admitted = Some(id);
                }
                assert!(
                    ledger.reserved() <= capacity,
                    "seed {seed}: {}",
                    ledger.reserved()
                );
                assert!(ledger.queue().len() <= 8);
                if let Some(front) = ledger.front() {
                    assert!(
                        needs[&front] > ledger.free(),
                        "seed {seed}: {front} fits and waits"
                    );
                }
            };
            for _ in 0..400 {
                let pick = |ledger: &Ledger, dice: &mut Dice| {
                    let all: Vec<usize> = ledger.admitted().chain(ledger.queue()).collect();
                    (!all.is_empty()).then(|| all[dice.below(all.len() as u64) as usize])
                };
                match dice.below(4) {
                    0 | 1 => {
                        needs.insert(next, 1 + dice.below(capacity));
                        let full = ledger.queue().len() == 8;
                        assert_eq!(ledger.join(next), !full);
                        next += 1;
                    }
                    2 => {
                        // A retune: tighter for one that runs, either way for one that waits.
                        if let Some(id) = pick(&ledger, &mut dice) {
                            let reserved = ledger.reservation(id);
                            let need = 1 + dice.below(reserved.unwrap_or(capacity));
                            needs.insert(id, need);
                            ledger.set(id, need);
                        }
                    }
                    _ => {
                        if let Some(id) = pick(&ledger, &mut dice) {
                            assert_ne!(ledger.leave(id), Left::Nowhere);
                            assert_eq!(ledger.leave(id), Left::Nowhere, "left twice");
                        }
                    }
                }
                check(&mut ledger, &needs);
            }
            // Nobody starves: as those before end, everybody's turn comes.
            loop {
                let first = ledger.admitted().next();
                let Some(id) = first else { break };
                ledger.leave(id);
                check(&mut ledger, &needs);
            }
            assert_eq!(
                (ledger.reserved(), ledger.queue().len()),
                (0, 0),
                "seed {seed}: a leak"
            );
        }
    }

    #[test]
    fn a_measurement_over_the_reservation_holds_everybody_back() {
        let mut ledger = Ledger::new(100, 8);
        assert!(ledger.join(1) && ledger.admit(60));
        ledger.set(1, 130);
        assert!(ledger.join(2) && !ledger.admit(1));
        assert_eq!(ledger.free(), 0);
        ledger.set(1, 40);
        assert!(ledger.admit(60) && !ledger.admit(1));
        assert_eq!(
            (ledger.reservation(1), ledger.reservation(2)),
            (Some(40), Some(60))
        );
    }
}
