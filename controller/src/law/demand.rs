//! Demand as if at level 0, and what it comes to at given levels. Independent of the levels, so that stepping
//! down cannot raise it: thresholds on bytes held would swing.

use std::collections::BTreeMap;

use super::types::{KvMemory, ProcessMemory, Reading};

/// What the measured byte ratios may be off by; the gap between `up` and `down` bears as much.
const RATIO_ERROR: f64 = 0.21;

/// Fresh KV memory, checked.
#[derive(Debug, Clone)]
pub(super) struct Demand<'a> {
    memory: &'a KvMemory,
    ratios: &'a [f64],
}

impl<'a> Demand<'a> {
    /// Of a reading that may be acted on: fresh, finite, nothing negative.
    pub(super) fn of(reading: &'a Reading<KvMemory>, ratios: &'a [f64]) -> Option<Self> {
        let Reading::Fresh { value: memory, .. } = reading else {
            return None;
        };
        let sound = |value: f64| value.is_finite() && value >= 0.0;
        let all = memory.classes.values().all(|class| {
            [class.used, class.uncompressed, class.queued, class.waiting]
                .into_iter()
                .all(sound)
        });
        (memory.capacity.is_finite() && memory.capacity > 0.0 && all).then_some(Self { memory, ratios })
    }

    fn ratio(&self, level: u32) -> f64 {
        let last = self.ratios.last().copied().unwrap_or(1.0);
        self.ratios.get(level as usize).copied().unwrap_or(last)
    }

    /// Demand as if everything were at level 0, of capacity.
    pub(super) fn total(&self) -> f64 {
        let all = self.memory.classes.values();
        all.map(|class| class.uncompressed + class.queued).sum::<f64>() / self.memory.capacity
    }

    /// Demand with each class at its level, of capacity. A class that has none counts with what it holds.
    pub(super) fn at(&self, levels: &BTreeMap<String, u32>) -> f64 {
        let all = self.memory.classes.iter();
        let bytes = all.map(|(name, class)| match levels.get(name) {
            Some(level) => (class.uncompressed + class.queued) * self.ratio(*level),
            None => class.used + class.queued,
        });
        bytes.sum::<f64>() / self.memory.capacity
    }

    /// Bytes held, of capacity.
    pub(super) fn usage(&self) -> f64 {
        self.memory.classes.values().map(|class| class.used).sum::<f64>() / self.memory.capacity
    }

    /// Whether what is held is what the levels make of it. Requests that have not followed their class yet, or are not
    /// to, hold more; a further level would not change that.
    pub(super) fn follows(&self, levels: &BTreeMap<String, u32>) -> bool {
        let all = self.memory.classes.iter();
        let bytes = all.map(|(name, class)| match levels.get(name) {
            Some(level) => class.uncompressed * self.ratio(*level),
            None => class.used,
        });
        self.usage() <= bytes.sum::<f64>() / self.memory.capacity * (1.0 + RATIO_ERROR)
    }

    /// Whether a class asks for anything.
    pub(super) fn asks(&self, class: &str) -> bool {
        self.memory
            .classes
            .get(class)
            .is_some_and(|class| class.uncompressed + class.queued > 0.0)
    }

    /// Requests that wait, in all or of one class.
    pub(super) fn waiting(&self, class: Option<&str>) -> f64 {
        let all = self.memory.classes.iter();
        all.filter(|(name, _)| class.is_none_or(|class| class == *name))
            .map(|(_, class)| class.waiting)
            .sum()
    }

    /// The loosest level of `class` at which demand would be at most `most`, the others as they are.
    pub(super) fn recommended(&self, levels: &BTreeMap<String, u32>, class: &str, most: f64) -> u32 {
        let last = u32::try_from(self.ratios.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let mut levels = levels.clone();
        for level in 0..last {
            levels.insert(class.to_owned(), level);
            if self.at(&levels) <= most {
                return level;
            }
        }
        last
    }
}

/// Process memory over its limit, of a reading that may be acted on.
pub(super) fn process(reading: &Reading<ProcessMemory>) -> Option<f64> {
    let Reading::Fresh { value, .. } = reading else {
        return None;
    };
    let sound =
        value.resident.is_finite() && value.resident >= 0.0 && value.limit.is_finite() && value.limit > 0.0;
    sound.then(|| value.resident / value.limit)
}
