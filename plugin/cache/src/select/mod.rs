//! Which rows stay. A method ranks rows by what is known of them, one a file, and one line of [`method`]. Invariants
//! of all: sinks and the most recent tokens stay, the budget is met exactly, and the answer is strictly increasing.

pub(crate) mod adaptive;
mod draw;
mod expected;
mod fastgen;
mod h2o;
mod key_norm;
mod keydiff;
mod keyformer;
mod kvzip;
mod lagkv;
pub(crate) mod merge;
pub(crate) mod moments;
pub(crate) mod pyramid;
pub(crate) mod quest;
mod scissorhands;
mod snapkv;
mod streaming;
#[cfg(test)]
mod tests;
mod tova;
mod vector;
#[cfg(test)]
mod worked_example;

use std::borrow::Cow;
use std::sync::Arc;

use cinch_hooks::ExtraPass;
use cinch_protocol::{Select, SelectMethod};

pub(crate) use fastgen::Profile;

/// The method that a policy asks for.
pub(crate) fn method(select: &Select) -> Arc<dyn Method> {
    match select.method {
        SelectMethod::Streaming => Arc::new(streaming::Streaming),
        SelectMethod::H2o => Arc::new(h2o::H2o),
        SelectMethod::Tova => Arc::new(tova::Tova),
        SelectMethod::Snapkv => Arc::new(snapkv::SnapKv::new(select)),
        SelectMethod::Scissorhands => Arc::new(scissorhands::Scissorhands::new(select)),
        SelectMethod::Keyformer => Arc::new(keyformer::Keyformer::new(select)),
        SelectMethod::ExpectedAttention => Arc::new(expected::Expected),
        SelectMethod::KeyNorm => Arc::new(key_norm::KeyNorm),
        SelectMethod::Keydiff => Arc::new(keydiff::KeyDiff),
        SelectMethod::Lagkv => Arc::new(lagkv::LagKv),
        SelectMethod::Fastgen => Arc::new(fastgen::FastGen::new(select)),
        SelectMethod::Quest => Arc::new(quest::Quest),
        SelectMethod::Kvzip => Arc::new(kvzip::KvZip),
    }
}

/// A way to rank rows. The lowest go first, of equals the earlier.
pub(crate) trait Method: Send + Sync {
    /// The attention weights that [`Rows::scores`] are made of.
    fn statistics(&self) -> Statistics;

    /// A value a row, the higher the rather it stays.
    fn rank<'a>(&self, rows: &Rows<'a>) -> Cow<'a, [f32]>;

    /// Whether each head keeps rows of its own choice; else all heads of a layer keep the same.
    fn per_head(&self) -> bool {
        true
    }

    /// Whether rows go; else the budget is what a decoded token attends to.
    fn evicts(&self) -> bool {
        true
    }

    /// Percent of the budget that are recent rows, where that is more than the policy's own `recent`.
    fn recent_percent(&self) -> usize {
        0
    }

    /// What it looks at of the rows themselves.
    fn reads(&self) -> Reads {
        Reads::Nothing
    }

    /// Whether it needs mean and covariance of the queries.
    fn moments(&self) -> bool {
        false
    }

    /// Whether a head's attention to its prompt says how much of the budget it keeps: see [`narrow`](Self::narrow).
    fn profiles(&self) -> bool {
        false
    }

    /// What a head keeps of the budget. `profile` is what it was found to be at the end of its prompt, and is filled in there.
    fn narrow(&self, budget: Budget, _: &Rows<'_>, _: &mut Option<Profile>) -> Budget {
        budget
    }

    /// Whether a row's score is the largest of the weights that it received, of any query head, and not their sum.
    fn largest(&self) -> bool {
        false
    }

    /// How a prompt is read once more before its rows are ranked, by what that reading attends to; `None`: it is not.
    fn rereads(&self) -> Option<ExtraPass> {
        None
    }

    /// Whether each query's weights go through [`credit`](Self::credit), instead of being summed as they are.
    fn credits(&self) -> bool {
        false
    }

    /// Turns one query's attention weights into what they add to the scores. `weights` are the mean over the
    /// query heads that share a KV head, one a row that the query sees.
    fn credit(&self, _: &Query<'_>, _: &mut [f32]) {}
}

/// Which queries' attention weights make the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Statistics {
    /// A sample of all; also what is kept for the day that a running request is retuned to a method that needs it.
    Sampled,
    /// All.
    Every,
    /// The last so many, by fading: n more queries leave 1 − n/window of what was gathered before. So a prefill of a
    /// window and more counts its last queries only, and one of fewer goes on from those before it. Of a decode, the
    /// last [`DECODE_WINDOW`] before each eviction count.
    Window(usize),
}

impl Statistics {
    /// What is left of the scores when `queries` more come.
    pub(crate) fn left(self, queries: usize) -> f32 {
        match self {
            Self::Sampled | Self::Every => 1.0,
            Self::Window(window) => 1.0 - queries.min(window) as f32 / window as f32,
        }
    }
}

/// Decode steps before an eviction that count in a [`Statistics::Window`], at most.
pub(crate) const DECODE_WINDOW: usize = 32;

/// What a method looks at of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    Nothing,
    Keys,
    KeysAndValues,
}

/// A query whose weights are credited.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    /// Positions of the rows; `None`: row `i` is at position `i`.
    pub(crate) positions: Option<&'a [u32]>,
    pub(crate) layer: usize,
    pub(crate) kv: usize,
    /// Its own position.
    pub(crate) position: usize,
    /// Tokens decoded since the last prefill.
    pub(crate) decoded: usize,
}

/// What a method may look at. Rows are in order of position.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Number of rows.
    pub(crate) kept: usize,
    /// Tokens seen.
    pub(crate) seen: usize,
    /// Positions of the rows; `None`: row `i` is at position `i`.
    pub(crate) positions: Option<&'a [u32]>,
    /// Which of them may go.
    pub(crate) edges: Edges,
    /// Attention weights that each row received.
    pub(crate) scores: &'a [f32],
    /// kept × `k_dim`; empty where the method does not read keys.
    pub(crate) k: &'a [f32],
    pub(crate) k_dim: usize,
    /// kept × `v_dim`, likewise.
    pub(crate) v: &'a [f32],
    pub(crate) v_dim: usize,
    /// Of the queries, where the method asks for them and there were any.
    pub(crate) moments: Option<moments::Moments<'a>>,
    /// What logits are scaled by.
    pub(crate) scale: f32,
}

impl Rows<'_> {
    /// Rows at positions less than `position`.
    pub(crate) fn before(&self, position: usize) -> usize {
        match self.positions {
            None => position.min(self.kept),
            Some(positions) => positions.partition_point(|p| (*p as usize) < position),
        }
    }
}

/// The rows that a method chooses among: `from..to`. Those before are sinks, those behind are recent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edges {
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// What a method must leave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// Rows to keep in all.
    pub(crate) total: usize,
    /// First positions that stay.
    pub(crate) sinks: usize,
    /// Last positions that stay.
    pub(crate) recent: usize,
}

impl Budget {
    /// The rows to choose among, of `kept`. `before` counts rows at positions less than its argument.
    pub(crate) fn edges(self, kept: usize, seen: usize, before: impl Fn(usize) -> usize) -> Edges {
        let total = self.total.min(kept);
        let from = before(self.sinks).min(total);
        let to = before(seen.saturating_sub(self.recent))
            .max(from)
            .max(kept + from - total);
        Edges { from, to }
    }
}

/// Rows kept of `kept`, strictly increasing; `min(total, kept)` of them.
pub(crate) fn keep(ranks: &[f32], kept: usize, edges: Edges, total: usize) -> Vec<u32> {
    let total = total.min(kept);
    let Edges { from, to } = edges;
    let chosen = total - from - (kept - to);
    let mut middle: Vec<u32> = (from..to).map(|row| row as u32).collect();
    if chosen < middle.len() {
        if chosen > 0 {
            let rank = |row: &u32| ranks.get(*row as usize).copied().unwrap_or(0.0);
            middle.select_nth_unstable_by(chosen - 1, |a, b| rank(b).total_cmp(&rank(a)).then(b.cmp(a)));
        }
        middle.truncate(chosen);
        middle.sort_unstable();
    }
    let mut keep: Vec<u32> = Vec::with_capacity(total);
    keep.extend((0..from).map(|row| row as u32));
    keep.append(&mut middle);
    keep.extend((to..kept).map(|row| row as u32));
    keep
}
