//! What the plugin reports, as it goes out: totals, requests, refusals.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use cinch_cache::{RequestSnapshot, RequestState as PluginState, Totals};
use cinch_protocol::{RequestState, RequestView, Served};

use crate::fields::FieldFault;
use crate::http::Refusal;

/// The plugin's totals, in the units of the wire.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct KvTotals {
    /// Bytes of all blocks there are, prefix cache included, shared ones once.
    pub allocated_bytes: u64,
    /// The most `allocated_bytes` ever was.
    pub peak_bytes: u64,
    /// Bytes finished prefixes hold.
    pub prefix_bytes: u64,
    /// Finished prefixes held.
    pub prefix_entries: u64,
    /// Requests that found a prefix.
    pub prefix_hits: u64,
    /// Requests that found none.
    pub prefix_misses: u64,
    /// By class.
    pub classes: BTreeMap<String, ClassTotals>,
}

/// One class's totals.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClassTotals {
    /// Requests being processed.
    pub running: u64,
    /// Requests accepted and not begun.
    pub queued: u64,
    /// Tokens processed, of live requests.
    pub seen: u64,
    /// Rows held for them, mean over layers and heads.
    pub kept: f64,
    /// Bytes held.
    pub bytes: u64,
    /// Bytes in f16, nothing evicted.
    pub uncompressed_bytes: u64,
    /// Bytes the prompts of queued requests would take in f16.
    pub queued_bytes: u64,
    /// Compressions since the start.
    pub compression_events: u64,
    /// Tokens evicted since the start, mean over layers and heads.
    pub evicted_tokens: f64,
    /// Retunes since the start.
    pub retunes: u64,
}

pub(super) fn totals(totals: Totals, bytes_per_token: u64) -> KvTotals {
    let classes = totals.classes.into_iter().map(|(name, class)| {
        let class = ClassTotals {
            running: class.running as u64,
            queued: class.queued as u64,
            seen: class.seen as u64,
            kept: class.kept,
            bytes: class.bytes as u64,
            uncompressed_bytes: class.uncompressed_bytes as u64,
            queued_bytes: class.queued_prompt_tokens as u64 * bytes_per_token,
            compression_events: class.compressions,
            evicted_tokens: class.evicted_tokens,
            retunes: class.retunes,
        };
        (name, class)
    });
    KvTotals {
        allocated_bytes: totals.live_bytes as u64,
        peak_bytes: totals.peak_bytes as u64,
        prefix_bytes: totals.prefix_bytes as u64,
        prefix_entries: totals.prefix_entries as u64,
        prefix_hits: totals.prefix_hits,
        prefix_misses: totals.prefix_misses,
        classes: classes.collect(),
    }
}

pub(super) fn unknown(id: usize) -> Refusal {
    let fault = FieldFault::new(
        "id",
        id,
        "the id of a live or recently finished request, as GET /v1/requests lists",
    );
    Refusal::new(
        StatusCode::NOT_FOUND,
        "unknown-request",
        "No such request",
        fault.to_string(),
    )
    .naming(fault)
}

pub(super) fn finished(id: usize) -> Refusal {
    let fault = FieldFault::new("id", id, "the id of a queued or running request");
    let detail = format!("request {id} has finished: only a queued or running request can be retuned");
    Refusal::new(
        StatusCode::CONFLICT,
        "finished",
        "The request has finished",
        detail,
    )
    .naming(fault)
}

/// A request as the API shows it.
pub(super) fn view(snapshot: RequestSnapshot) -> RequestView {
    RequestView {
        id: snapshot.request as u64,
        state: match snapshot.state {
            PluginState::Queued => RequestState::Queued,
            PluginState::Running => RequestState::Running,
            PluginState::Finished => RequestState::Finished,
        },
        class: snapshot.class,
        own: snapshot.own,
        level: snapshot.level,
        policy: snapshot.policy,
        sequences: snapshot.sequences as u64,
        prompt_tokens: snapshot.prompt_tokens as u64,
        seen: snapshot.seen as u64,
        kept: snapshot.kept,
        bytes: snapshot.bytes as u64,
        uncompressed_bytes: snapshot.uncompressed_bytes as u64,
        attention_error: snapshot.attention_error,
        applied: snapshot.applied,
        served: snapshot
            .served
            .into_iter()
            .map(|served| Served {
                level: served.level,
                policy: served.policy,
                from_seen: served.from_seen as u64,
            })
            .collect(),
    }
}
