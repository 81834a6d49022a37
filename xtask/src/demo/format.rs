//! Figures as a person reads them, in columns that stay where they are.

use std::time::Duration;

use super::screen::{Line, Style};

/// The name at the head of a line.
pub(super) fn label(text: &str) -> Line {
    Line(vec![(Style::Dim, format!("  {text:<16}"))])
}

/// Filled and empty part. Anything held shows, and only what is full looks full.
pub(super) fn bar(share: f64, columns: usize) -> (String, String) {
    let exact = share.clamp(0.0, 1.0) * columns as f64;
    let full = if share >= 1.0 {
        columns
    } else {
        (exact as usize).max(usize::from(share > 0.0)).min(columns - 1)
    };
    ("█".repeat(full), "░".repeat(columns - full))
}

pub(super) fn heat(share: f64) -> Style {
    match share {
        share if share > 0.92 => Style::Hot,
        share if share > 0.85 => Style::Warm,
        _ => Style::Good,
    }
}

/// Right-aligned up to three digits.
pub(super) fn percent(share: f64) -> String {
    format!("{:3.0} %", share * 100.0)
}

pub(super) fn mb(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

pub(super) fn time(seconds: Option<f64>) -> String {
    match seconds {
        None => "–".into(),
        Some(seconds) if seconds < 0.9995 => format!("{:.0} ms", seconds * 1000.0),
        Some(seconds) if seconds < 100.0 => format!("{seconds:.1} s"),
        Some(seconds) => format!("{seconds:.0} s"),
    }
}

pub(super) fn clock(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!([percent(0.071), percent(3.98)], ["  7 %", "398 %"]);
        assert_eq!(mb(303_512_000), "303.5 MB");
        assert_eq!(
            [
                time(None),
                time(Some(0.0312)),
                time(Some(0.9999)),
                time(Some(123.4))
            ],
            ["–", "31 ms", "1.0 s", "123 s"]
        );
        assert_eq!(clock(Duration::from_secs(605)), "10:05");
    }

    #[test]
    fn a_bar_is_full_only_at_capacity() {
        let full = |share| bar(share, 10).0.chars().count();
        assert_eq!([full(0.0), full(0.001), full(0.55)], [0, 1, 5]);
        assert_eq!([full(0.9999), full(1.0), full(1.7)], [9, 10, 10]);
        let (a, b) = bar(0.3, 10);
        assert_eq!(a.chars().count() + b.chars().count(), 10);
    }
}
