//! Counts the bytes of live allocations. Every allocation that outlives a step is charged when it is
//! made and discharged when it is freed, so the total is measured, and a block shared by forks counts once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes allocated by all stores of a plugin.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    live: AtomicUsize,
    peak: AtomicUsize,
}

impl Ledger {
    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    pub(crate) fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        let live = self.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(live, Ordering::Relaxed);
    }

    fn sub(&self, bytes: usize) {
        self.live.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// An allocation's entry in the ledger, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Charge {
    ledger: Arc<Ledger>,
    bytes: usize,
}

impl Charge {
    pub(crate) fn new(ledger: &Arc<Ledger>, bytes: usize) -> Self {
        ledger.add(bytes);
        Self {
            ledger: ledger.clone(),
            bytes,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    pub(crate) fn set(&mut self, bytes: usize) {
        if bytes > self.bytes {
            self.ledger.add(bytes - self.bytes);
        } else {
            self.ledger.sub(self.bytes - bytes);
        }
        self.bytes = bytes;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.ledger.sub(self.bytes);
    }
}

/// Entries a column grows by: never by doubling, because what is reserved is what is reported.
pub(crate) const GROW: usize = 64;

/// One value a kept row (a score, a position), growing in small exact steps.
#[derive(Debug)]
pub(crate) struct Column<T> {
    data: Vec<T>,
    charge: Charge,
}

impl<T: Copy> Column<T> {
    pub(crate) fn new(ledger: &Arc<Ledger>) -> Self {
        Self {
            data: Vec::new(),
            charge: Charge::new(ledger, 0),
        }
    }

    pub(crate) fn from_vec(ledger: &Arc<Ledger>, mut data: Vec<T>) -> Self {
        data.shrink_to_fit();
        let mut column = Self {
            data,
            charge: Charge::new(ledger, 0),
        };
        column.recharge();
        column
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        &self.data
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.data
    }

    pub(crate) fn bytes(&self) -> usize {
        self.charge.bytes()
    }

    pub(crate) fn extend(&mut self, values: impl ExactSizeIterator<Item = T>) {
        let more = values.len();
        let room = self.data.capacity() - self.data.len();
        if more > room {
            self.data.reserve_exact(more.max(GROW));
        }
        self.data.extend(values);
        self.recharge();
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.data.len() {
            self.data.truncate(len);
            self.data.shrink_to(len + GROW);
            self.recharge();
        }
    }

    /// Keeps the entries at `keep` (strictly increasing), in order.
    pub(crate) fn gather(&mut self, keep: &[u32]) {
        for (to, from) in keep.iter().enumerate() {
            self.data[to] = self.data[*from as usize];
        }
        self.truncate(keep.len());
    }

    pub(crate) fn duplicate(&self) -> Self {
        Self::from_vec(self.charge.ledger(), self.data.clone())
    }

    fn recharge(&mut self) {
        self.charge.set(self.data.capacity() * size_of::<T>());
    }
}
