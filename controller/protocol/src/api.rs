//! What the policy API says on the wire. Byte counts are measured, never computed from bit widths.

use serde::{Deserialize, Serialize};

use crate::{Given, Policy, PolicyError};

/// Body of `PUT /v1/policies/{class}` and `PATCH /v1/requests/{id}`: exactly one of `policy`, `level` and `ratio`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyChange {
    /// A policy spelled out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// A level of the configured ladder; 0 is uncompressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<u32>,
    /// How many times fewer bytes than level 0 holds it is to take, 1 or more: a level of the ladder is picked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// Who writes, where a program does: writes of a lower epoch than the engine has seen are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<Fence>,
    /// Seconds until the class returns to its configured policy unless the write is repeated. 1 ..= 3600;
    /// with `fence`, and only for a class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
}

impl PolicyChange {
    /// What is to be served.
    ///
    /// # Errors
    /// None or more than one of `policy`, `level` and `ratio`.
    pub fn given(&self) -> Result<Given<'_>, PolicyError> {
        Given::one_of(self.policy.as_ref(), self.level, self.ratio)
    }
}

/// Who writes. Of two writers, the one with the higher epoch counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fence {
    /// The writer's name, 1 to 128 characters.
    pub holder: String,
    /// Higher for each writer that takes over; one writer an epoch.
    pub epoch: u64,
}

/// A write that ends by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// Who wrote.
    pub holder: String,
    /// Its epoch.
    pub epoch: u64,
    /// Seconds left.
    pub expires_in_seconds: f64,
}

/// Where a class's policy comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The engine's configuration.
    Config,
    /// A `PUT` of this API without a lease: a person's. Gone after a `DELETE` or a restart; until then,
    /// leased writes are refused.
    Api,
    /// A leased `PUT`: a controller's. Gone when the lease ends.
    Lease,
}

/// What requests of a class are served with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassPolicy {
    /// The class's name.
    pub class: String,
    /// The ladder level the policy is, if it was given as one or as a ratio.
    pub level: Option<u32>,
    /// The policy.
    pub policy: Policy,
    /// Who set it.
    pub origin: Origin,
    /// The level that the configuration gives it, by its number or as a ratio; absent: neither.
    pub configured_level: Option<u32>,
    /// What `If-Match` names it by.
    pub etag: String,
    /// The lease it is held under, for `origin` lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
}

/// Answer of `GET /v1/policies`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassPolicies {
    /// One entry a class, by name.
    pub classes: Vec<ClassPolicy>,
    /// The highest epoch a write was fenced with; 0 before the first.
    pub epoch: u64,
}

/// Where a request is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestState {
    /// Accepted; no token of it is processed yet.
    Queued,
    /// Being processed.
    Running,
    /// Answered or given up; its cache is gone.
    Finished,
}

/// A stretch of a request that was served with one policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Served {
    /// The policy's ladder level, if it was given as one or as a ratio.
    pub level: Option<u32>,
    /// The policy.
    pub policy: Policy,
    /// Tokens seen when it took over.
    pub from_seen: u64,
}

/// One request, live or recently finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestView {
    /// The engine's id of it, as in the header `x-cinch-request`.
    pub id: u64,
    /// Where it is in its life.
    pub state: RequestState,
    /// Its class.
    pub class: String,
    /// Whether its client asked for this policy, level or ratio: nobody but a person should change it.
    #[serde(default)]
    pub own: bool,
    /// Its present level, if the policy was given as one or as a ratio.
    pub level: Option<u32>,
    /// Its present policy.
    pub policy: Policy,
    /// Sequences (choices) it runs as.
    pub sequences: u64,
    /// Tokens of its prompt.
    pub prompt_tokens: u64,
    /// Tokens processed, over its sequences.
    pub seen: u64,
    /// Rows its caches hold, mean over layers and heads, over its sequences.
    pub kept: f64,
    /// Bytes its caches hold.
    pub bytes: u64,
    /// Bytes the same tokens would take in f16, nothing evicted.
    pub uncompressed_bytes: u64,
    /// Mean relative error of attention output measured at its compressions; none before the first.
    pub attention_error: Option<f64>,
    /// Whether every layer has taken up the present policy.
    pub applied: bool,
    /// What it was served with, in order.
    pub served: Vec<Served>,
}

/// Answer of `GET /v1/requests`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestViews {
    /// The live requests.
    pub requests: Vec<RequestView>,
}

/// Answer of `PATCH /v1/requests/{id}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetuneReport {
    /// The request.
    pub id: u64,
    /// Its state when this was written.
    pub state: RequestState,
    /// The level now asked for, if given as one or as a ratio.
    pub level: Option<u32>,
    /// The policy now asked for.
    pub policy: Policy,
    /// Counts the retunes of this request.
    pub epoch: u64,
    /// Whether every layer had taken it up in time; if not, it is taken up layer by layer at the next step.
    pub applied: bool,
    /// Bytes held before.
    pub bytes_before: u64,
    /// Bytes held when this was written.
    pub bytes_after: u64,
    /// What could not be undone, and which method or statistics stood in.
    pub notes: Vec<String>,
}

/// KV memory of one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassCapacity {
    /// The class.
    pub class: String,
    /// Requests being processed.
    pub running: u64,
    /// Requests accepted and not begun.
    pub waiting: u64,
    /// Bytes its live requests hold.
    pub used_bytes: u64,
    /// Bytes the prompts of its waiting requests would take in f16.
    pub queued_bytes: u64,
    /// Bytes its live requests would hold in f16, nothing evicted.
    pub uncompressed_bytes: u64,
}

/// Answer of `GET /v1/capacity`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// The configured KV capacity.
    pub capacity_bytes: u64,
    /// Bytes live requests hold.
    pub used_bytes: u64,
    /// Bytes admitted requests hold or may grow to; never more than the capacity.
    pub reserved_bytes: u64,
    /// Bytes the prompts of waiting requests would take in f16.
    pub queued_bytes: u64,
    /// `used_bytes + queued_bytes`.
    pub demanded_bytes: u64,
    /// Bytes the live requests would hold in f16, nothing evicted.
    pub uncompressed_bytes: u64,
    /// Bytes of all blocks there are, prefix cache included; a block that several share counts once.
    pub allocated_bytes: u64,
    /// The most `allocated_bytes` ever was.
    pub peak_bytes: u64,
    /// Bytes finished prefixes hold for reuse, beside `used_bytes`.
    pub prefix_cache_bytes: u64,
    /// Most the prefix cache may hold.
    pub prefix_cache_capacity_bytes: u64,
    /// One entry a class, by name.
    pub classes: Vec<ClassCapacity>,
}

/// The `cinch` object of a completion: what its cache was served with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServedWith {
    /// The engine's id of the request.
    pub request: u64,
    /// Its class.
    pub class: String,
    /// Whether the plugin manages the cache; if not, nothing but class and id is known.
    pub managed: bool,
    /// What the cache looked like at the end.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub cache: Option<ServedCache>,
}

/// The measured part of [`ServedWith`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServedCache {
    /// The last level, if the policy was given as one or as a ratio.
    pub level: Option<u32>,
    /// The last policy.
    pub policy: Policy,
    /// Everything it was served with, in order.
    pub served: Vec<Served>,
    /// Tokens processed.
    pub seen: u64,
    /// Rows held at the end, mean over layers and heads.
    pub kept: f64,
    /// Bytes held at the end.
    pub bytes: u64,
    /// Bytes the same tokens take in f16, nothing evicted.
    pub uncompressed_bytes: u64,
    /// Mean relative error of attention output at its compressions; none if it was never compressed.
    pub attention_error: Option<f64>,
}

/// A problem document (RFC 9457). Bad input is named by `field`, `given` and `allowed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A URN of the kind of problem.
    #[serde(rename = "type")]
    pub kind: String,
    /// What the kind means.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// This occurrence.
    pub detail: String,
    /// Dotted path of the offending field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given: Option<String>,
    /// What is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
    /// The numbers behind `overloaded`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overload: Option<Overload>,
}

/// Why there is no room for a request, in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overload {
    /// Requests that wait.
    pub queue_length: u64,
    /// Most that may.
    pub max_queue: u64,
    /// Bytes this request may come to hold.
    pub need_bytes: u64,
    /// Bytes admitted requests hold or may grow to.
    pub reserved_bytes: u64,
    /// That, and what the waiting ones may come to hold.
    pub demanded_bytes: u64,
    /// The configured KV capacity.
    pub capacity_bytes: u64,
    /// Seconds after which to try again, from how fast requests have ended; as in `Retry-After`.
    pub retry_after_seconds: u64,
}
