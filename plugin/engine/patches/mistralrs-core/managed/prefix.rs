//! Prefix reuse of managed sequences, bounded in bytes. Upstream never evicts entries on CPU.

use std::collections::VecDeque;

use cinch_hooks::{ForkRole, SequenceInfo};

use super::{handle, Handle};
use crate::prefix_cacher::MatchingCache;
use crate::sequence::Sequence;

struct Entry {
    tokens: Vec<u32>,
    handle: Handle,
}

impl Entry {
    fn bytes(&self) -> usize {
        self.handle.cache.bytes() + self.handle.windows.bytes()
    }

    /// The shortest prefix of it that can be gone on from.
    fn reachable_from(&self) -> usize {
        self.handle.cache.reachable_from().max(self.handle.windows.reachable_from())
    }
}

/// Finished sequences' caches, least recently used first.
#[derive(Default)]
pub(crate) struct ManagedPrefixes {
    entries: VecDeque<Entry>,
}

impl ManagedPrefixes {
    /// Keeps what a finished sequence leaves. False if the sequence is not managed.
    pub(crate) fn add(&mut self, seq: &mut Sequence) -> bool {
        let (Some(policy), Some(handle)) = (cinch_hooks::installed(), handle(seq)) else {
            return false;
        };
        // The last sampled token was never fed back: its K and V do not exist.
        let seen = handle.cache.seen(0).min(seq.get_toks().len());
        let text_only = !(seq.has_images() || seq.has_audios() || seq.has_videos());
        if seen > 0 && text_only && policy.prefix_cache_limit() > 0 {
            if let Some(handle) = fork(&handle, ForkRole::Prefix) {
                let tokens = seq.get_toks()[..seen].to_vec();
                self.entries.retain(|entry| entry.tokens != tokens);
                self.entries.push_back(Entry { tokens, handle });
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
        let mut bytes: usize = self.entries.iter().map(Entry::bytes).sum();
        while bytes > policy.prefix_cache_limit() {
            let Some(oldest) = self.entries.pop_front() else {
                break;
            };
            bytes = bytes.saturating_sub(oldest.bytes());
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
            .filter(|(shared, index)| *shared > 0 && *shared >= self.entries[*index].reachable_from())
            .collect();
        candidates.sort_unstable_by(|a, b| b.cmp(a));
        let hit = candidates.into_iter().find_map(|(shared, index)| {
            let handle = continue_from(&self.entries[index].handle, shared, sequence)?;
            Some((shared, index, handle))
        });
        let found = hit.map(|(shared, index, handle)| {
            if let Some(entry) = self.entries.remove(index) {
                self.entries.push_back(entry);
            }
            MatchingCache::Normal {
                normal: handle.layers(),
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

/// A fork of a sequence's caches; `None` where the plugin refuses.
fn fork(handle: &Handle, role: ForkRole) -> Option<Handle> {
    Some(Handle {
        cache: handle.cache.fork(role).ok()?,
        windows: handle.windows.fork().ok()?,
        places: handle.places.clone(),
    })
}

/// A fork at `seen` tokens for `sequence`; `None` where the plugin refuses: then it is a miss.
fn continue_from(handle: &Handle, seen: usize, sequence: &SequenceInfo) -> Option<Handle> {
    let policy = cinch_hooks::installed()?;
    let mut fork = fork(handle, ForkRole::Sequence)?;
    if fork.cache.seen(0) != seen {
        fork.cache.truncate(seen).ok()?;
        fork.windows.truncate(seen).ok()?;
    }
    fork.cache = policy.adopt(fork.cache, sequence).ok()?;
    Some(fork)
}
