//! Prefix reuse of managed sequences, bounded in bytes. Upstream never evicts entries on CPU.

use std::collections::VecDeque;
use std::sync::Arc;

use cinch_hooks::{ForkRole, SequenceCache, SequenceInfo};

use super::{handle, layers};
use crate::prefix_cacher::MatchingCache;
use crate::sequence::Sequence;

struct Entry {
    tokens: Vec<u32>,
    cache: Arc<dyn SequenceCache>,
}

/// Finished sequences' caches, least recently used first.
#[derive(Default)]
pub(crate) struct ManagedPrefixes {
    entries: VecDeque<Entry>,
}

impl ManagedPrefixes {
    /// Keeps what a finished sequence leaves. False if the sequence is not managed.
    pub(crate) fn add(&mut self, seq: &mut Sequence) -> bool {
        let (Some(policy), Some(cache)) = (cinch_hooks::installed(), handle(seq)) else {
            return false;
        };
        // The last sampled token was never fed back: its K and V do not exist.
        let seen = cache.seen(0).min(seq.get_toks().len());
        let text_only = !(seq.has_images() || seq.has_audios() || seq.has_videos());
        if seen > 0 && text_only && policy.prefix_cache_limit() > 0 {
            if let Ok(cache) = cache.fork(ForkRole::Prefix) {
                let tokens = seq.get_toks()[..seen].to_vec();
                self.entries.retain(|entry| entry.tokens != tokens);
                self.entries.push_back(Entry { tokens, cache });
            }
        }
        self.evict(None);
        true
    }

    /// Forgets the least recently used entries until the rest fit.
    fn evict(&mut self, lookup_hit: Option<bool>) {
        let Some(policy) = cinch_hooks::installed() else {
            return;
        };
        let mut bytes: usize = self.entries.iter().map(|entry| entry.cache.bytes()).sum();
        while bytes > policy.prefix_cache_limit() {
            let Some(oldest) = self.entries.pop_front() else {
                break;
            };
            bytes = bytes.saturating_sub(oldest.cache.bytes());
        }
        policy.prefix_cache_report(self.entries.len(), bytes, lookup_hit);
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.evict(None);
    }

    /// The longest usable prefix of `tokens`. At least one token is left to compute: its logits are needed.
    pub(crate) fn search(&mut self, tokens: &[u32], sequence: &SequenceInfo) -> Option<MatchingCache> {
        let mut candidates: Vec<(usize, usize)> = self
            .entries
            .iter()
            .enumerate()
            .map(|(index, entry)| {
                let shared = entry.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
                (shared.min(tokens.len().saturating_sub(1)), index)
            })
            .filter(|(shared, index)| *shared > 0 && *shared >= self.entries[*index].cache.reachable_from())
            .collect();
        candidates.sort_unstable_by(|a, b| b.cmp(a));
        let hit = candidates.into_iter().find_map(|(shared, index)| {
            let cache = continue_from(&self.entries[index].cache, shared, sequence)?;
            Some((shared, index, cache))
        });
        let found = hit.map(|(shared, index, cache)| {
            if let Some(entry) = self.entries.remove(index) {
                self.entries.push_back(entry);
            }
            MatchingCache::Normal {
                normal: layers(&cache, sequence.layers.len()),
                recurrent_snapshots: None,
                images_to_keep: 0,
                audios_to_keep: 0,
                videos_to_keep: 0,
                toks: tokens[shared..].to_vec(),
                offset: shared,
            }
        });
        self.evict(Some(found.is_some()));
        found
    }
}

/// A fork of `cache` at `seen` tokens for `sequence`; `None` where the plugin refuses: then it is a miss.
pub(super) fn continue_from(
    cache: &Arc<dyn SequenceCache>,
    seen: usize,
    sequence: &SequenceInfo,
) -> Option<Arc<dyn SequenceCache>> {
    let policy = cinch_hooks::installed()?;
    let fork = cache.fork(ForkRole::Sequence).ok()?;
    if fork.seen(0) != seen {
        fork.truncate(seen).ok()?;
    }
    policy.adopt(fork, sequence).ok()
}
