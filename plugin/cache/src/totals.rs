//! What all requests hold and what compressing them did, for metrics.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::registry::{RequestSnapshot, RequestState, lock};

/// Everything the plugin measures, at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Totals {
    /// Bytes allocated by all stores, prefix cache included. A block shared by forks counts once.
    pub live_bytes: usize,
    /// The most `live_bytes` ever was.
    pub peak_bytes: usize,
    /// Bytes that f16 rows of all tokens seen by live requests would take.
    pub uncompressed_bytes: usize,
    /// Bytes that the prefix cache's entries hold; blocks shared with a running sequence included.
    pub prefix_bytes: usize,
    /// Entries of the prefix cache.
    pub prefix_entries: usize,
    /// Lookups that found a usable prefix.
    pub prefix_hits: u64,
    /// Lookups that did not.
    pub prefix_misses: u64,
    /// Per class; a class stays listed once it was assigned.
    pub classes: BTreeMap<String, ClassTotals>,
}

/// One class's share. Gauges are of live requests; counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ClassTotals {
    /// Requests with tokens processed.
    pub running: usize,
    /// Requests without.
    pub queued: usize,
    /// Prompt tokens of queued requests.
    pub queued_prompt_tokens: usize,
    /// Tokens seen.
    pub seen: usize,
    /// Rows kept, mean over layers and heads of each sequence.
    pub kept: f64,
    /// Bytes allocated.
    pub bytes: usize,
    /// Bytes that f16 rows of all tokens seen would take.
    pub uncompressed_bytes: usize,
    /// Counter: sum of measured attention errors.
    pub attention_error_sum: f64,
    /// Counter: attention errors measured.
    pub attention_error_count: u64,
    /// Counter: compactions that evicted or packed rows, a layer of a sequence each.
    pub compressions: u64,
    /// Counter: tokens evicted, mean over layers and heads.
    pub evicted_tokens: f64,
    /// Counter: retunes accepted.
    pub retunes: u64,
}

impl ClassTotals {
    pub(crate) fn add(&mut self, request: &RequestSnapshot) {
        match request.state {
            RequestState::Queued => {
                self.queued += 1;
                self.queued_prompt_tokens += request.prompt_tokens;
            }
            RequestState::Running | RequestState::Finished => self.running += 1,
        }
        self.seen += request.seen;
        self.kept += request.kept;
        self.bytes += request.bytes;
        self.uncompressed_bytes += request.uncompressed_bytes;
    }
}

/// A class's counters.
#[derive(Debug, Default)]
pub(crate) struct Counters(Mutex<ClassTotals>);

impl Counters {
    pub(crate) fn read(&self) -> ClassTotals {
        *lock(&self.0)
    }

    pub(crate) fn compressed(&self, events: u64, evicted_tokens: f64, errors: &[f64]) {
        let mut totals = lock(&self.0);
        totals.compressions += events;
        totals.evicted_tokens += evicted_tokens;
        totals.attention_error_sum += errors.iter().sum::<f64>();
        totals.attention_error_count += errors.len() as u64;
    }

    pub(crate) fn retuned(&self) {
        lock(&self.0).retunes += 1;
    }
}
