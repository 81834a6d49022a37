//! Quality before memory: a class whose attention error breaks its floor goes back, and the level that did it is
//! barred for a while.

use super::state::Bar;
use super::tick::Tick;
use super::types::{Quality, Reading, Rule};

impl Tick<'_> {
    /// Soft (two windows of three over the floor: one level back) and hard (far over it: the loosest level).
    pub(super) fn quality(&mut self) {
        for class in self.names() {
            let Some(floor) = self.bounds(&class).error_floor else {
                continue;
            };
            let Some(value) = self.error(&class) else { continue };
            let (now, config) = (self.now, self.config);
            let (level, least) = (self.levels[&class], self.bounds(&class).min_level);
            let figures = format!("attention error {:.4}, floor {floor}", value.error);
            if value.error > floor * config.quality_hard {
                if level > least {
                    self.bar(&class, least + 1);
                    self.go(&class, least, Rule::QualityHard, figures);
                }
                continue;
            }
            let state = self.class(&class);
            if state
                .quality_at
                .is_some_and(|at| now - at < config.quality_window)
            {
                continue;
            }
            state.quality_at = Some(now);
            if state.quality.add(value.error > floor) && level > least {
                self.bar(&class, level);
                self.go(&class, level - 1, Rule::QualitySoft, figures);
            }
        }
    }

    /// A fresh error with enough samples.
    fn error(&self, class: &str) -> Option<Quality> {
        match self.inputs.quality.get(class) {
            Some(Reading::Fresh { value, .. }) => Some(*value).filter(|value| {
                value.error.is_finite() && value.error >= 0.0 && value.samples >= self.config.quality_samples
            }),
            _ => None,
        }
    }

    /// Bars `level` and all above it; twice as long as the last time.
    fn bar(&mut self, class: &str, level: u32) {
        let (now, first, most, window) = (
            self.now,
            self.config.bar,
            self.config.bar_most,
            self.config.quality_window,
        );
        let state = self.class(class);
        let length = state
            .bar
            .as_ref()
            .map_or(first, |bar| (bar.length * 2.0).min(most));
        state.bar = Some(Bar {
            level,
            until: now + length,
            length,
        });
        // What the level that is left did must not count against the next one.
        state.quality.clear();
        state.quality_at = Some(now + window);
    }
}
