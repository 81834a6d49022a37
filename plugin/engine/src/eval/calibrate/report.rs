//! What `cinch calibrate` found, as it is written to calibration.json and printed; and the grid in which `cinch eval` measures
//! what it proposes.

use std::fmt::Write;

use anyhow::Result;
use cinch_protocol::{Bits, Policy, QuantizeMethod};
use serde::{Deserialize, Serialize};

use super::super::about::About;
use super::super::figures::Estimate;
use super::super::grid;
use super::super::ladder::inline;
use super::options::Sizes;
use super::sensitivity::Sensitivity;

/// Raised when a field changes its meaning or goes.
pub(super) const FORMAT: u32 = 1;

/// A calibration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// What was measured with what.
    #[serde(flatten)]
    pub(super) about: About,
    /// How much of it.
    pub(super) sizes: Sizes,
    /// How values map to codes.
    pub(super) method: QuantizeMethod,
    /// Bits that a part of a layer may get.
    pub(super) bits: Vec<Bits>,
    /// KL divergence that the least change of a layer makes, nats.
    pub(super) floors: Vec<Floor>,
    /// Each layer, in order.
    pub(super) layers: Vec<Layer>,
    /// Spearman's rank correlation, over the parts, of attention error with KL divergence.
    pub(super) error_kl_correlation: Option<f64>,
    /// Bits spread, beside the same bits everywhere.
    pub(super) levels: Vec<Level>,
}

/// A layer's floor: it alone in 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Floor {
    /// Counted from 0, as `quantize.layers` does.
    pub(super) layer: usize,
    /// Mean KL divergence from level 0.
    pub(super) kl: Estimate,
}

/// A layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Layer {
    /// Counted from 0.
    pub(super) layer: usize,
    /// Its keys alone in 2 bits.
    pub(super) k: Sensitivity,
    /// Its values.
    pub(super) v: Sensitivity,
}

/// A number of bits a value, in two ways.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Level {
    /// Mean of K and V.
    pub(super) bits: f64,
    /// The same in all layers, in every way to have so many bits.
    pub(super) uniform: Vec<Measured>,
    /// By layer.
    pub(super) calibrated: Measured,
    /// The best of the uniform ones.
    pub(super) against: String,
    /// Mean KL divergence of the calibrated one less that of the best uniform one, on the same tokens.
    pub(super) change: Estimate,
    /// What that says.
    pub(super) verdict: Verdict,
}

/// A policy, on the text that was not calibrated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// For people.
    pub(super) name: String,
    /// The policy.
    pub(super) policy: Policy,
    /// Bytes of a request at the end of its prompt, mean.
    pub(super) bytes: u64,
    /// Those over level 0's.
    pub(super) bytes_ratio: f64,
    /// Mean KL divergence from level 0, nats.
    pub(super) kl: Estimate,
    /// What the damages of its parts add up to, and the floor.
    pub(super) predicted_kl: f64,
}

/// Calibrated beside uniform, by the interval of 95 % of the change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// All of it is below zero.
    Better,
    /// Zero is in it.
    NoDifference,
    /// All of it is above zero.
    Worse,
}

impl Verdict {
    pub(super) fn of(change: Estimate) -> Self {
        if change.high < 0.0 {
            Self::Better
        } else if change.low > 0.0 {
            Self::Worse
        } else {
            Self::NoDifference
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Better => "better than",
            Self::NoDifference => "not shown to differ from",
            Self::Worse => "worse than",
        }
    }
}

impl Report {
    /// The calibrated policies that were shown to be better than uniform ones.
    fn better(&self) -> impl Iterator<Item = &Level> {
        self.levels
            .iter()
            .filter(|level| level.verdict == Verdict::Better)
    }
}

/// A grid for `cinch eval`: the one it has anyway, and the policies that were shown to be better. `None` where none was.
pub(super) fn grid(report: &Report) -> Result<Option<String>> {
    if report.better().next().is_none() {
        return Ok(None);
    }
    let mut out = format!(
        "{}\n# Bits by layer, as `cinch calibrate` spread them over {} ({}) on {}.\n",
        grid::DEFAULT.trim_end(),
        report.about.model.name,
        report.about.date,
        report.about.text.name,
    );
    for level in report.better() {
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "\n[[grid]]\nquick = true\npolicy = {}\n",
            inline(&level.calibrated.policy)?
        );
    }
    Ok(Some(out))
}

/// For people in a terminal: Markdown.
pub(super) fn table(report: &Report) -> String {
    let sizes = &report.sizes;
    let mut out = format!(
        "{}, activations {}, kernels {}, method {}: {} windows of {} calibrated on, {} others verified on; {} prompt and {} \
         forced tokens each\n\nKL in nats of keys or values alone in 2 bits, layers measured {} at a time, with 95 % \
         intervals, and bits that K and V get\n\n\
         | layer | K | V |",
        report.about.model.name,
        report.about.model.dtype,
        report.about.machine.kernels,
        report.method.name(),
        sizes.calibration_windows,
        report.about.text.name,
        sizes.verification_windows,
        sizes.context,
        sizes.steps,
        sizes.layers_together,
    );
    for level in &report.levels {
        let _ = write!(out, " {} bits |", level.bits);
    }
    out.push_str("\n| --- | --- | --- |");
    out.push_str(&" --- |".repeat(report.levels.len()));
    out.push('\n');
    for layer in &report.layers {
        let _ = write!(
            out,
            "| {} | {} | {} |",
            layer.layer,
            layer.k.kl.show(4),
            layer.v.kl.show(4)
        );
        for level in &report.levels {
            let quantize = level.calibrated.policy.quantize.as_ref();
            if let Some((k, v)) = quantize.map(|quantize| quantize.bits(layer.layer)) {
                let _ = write!(out, " {k} {v} |");
            }
        }
        out.push('\n');
    }
    if let Some(correlation) = report.error_kl_correlation {
        let _ = writeln!(
            out,
            "\nRank correlation of attention error with KL: {correlation:.2}"
        );
    }
    out.push_str(
        "\nOn text that was not calibrated on\n\n| bits | policy | bytes of full | KL mean, nats | predicted |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for level in &report.levels {
        for measured in level.uniform.iter().chain([&level.calibrated]) {
            let _ = writeln!(
                out,
                "| {} | {} | {:.4} | {} | {:.4} |",
                level.bits,
                measured.name,
                measured.bytes_ratio,
                measured.kl.show(4),
                measured.predicted_kl,
            );
        }
    }
    out.push('\n');
    for level in &report.levels {
        let _ = writeln!(
            out,
            "{} bits: {} {} ({} nats).",
            level.bits,
            level.verdict.text(),
            level.against,
            level.change.show(4),
        );
    }
    if report.better().next().is_none() {
        out.push_str(
            "Spreading bits by layer is not shown to pay on this model and text: keep the uniform levels.\n",
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::super::about::tests::about;
    use super::super::super::options::Mode;
    use super::super::family;
    use super::*;

    fn report(verdict: Verdict) -> Report {
        let method = QuantizeMethod::Rtn;
        let estimate = |value| Estimate {
            value,
            low: value - 0.01,
            high: value + 0.01,
        };
        let part = |kl| Sensitivity {
            kl: estimate(kl),
            damage: kl,
            saved_bytes: 1000,
            attention_error: Some(kl),
        };
        let measured = |name: &str, policy, kl| Measured {
            name: name.to_owned(),
            policy,
            bytes: 2000,
            bytes_ratio: 0.25,
            kl: estimate(kl),
            predicted_kl: kl,
        };
        let (low, high) = ((Bits::B2, Bits::B3), (Bits::B4, Bits::B3));
        let uniform = family::uniform(method, (Bits::B3, Bits::B3));
        let by_layer = family::by_layer(method, &[high, low, high, low, high, low, high, low, low]);
        Report {
            about: about(FORMAT, "2026-11-28"),
            sizes: Sizes::of(Mode::Quick),
            method,
            bits: family::BITS.to_vec(),
            floors: Vec::new(),
            layers: (0..9)
                .map(|layer| Layer {
                    layer,
                    k: part(0.5),
                    v: part(0.25),
                })
                .collect(),
            error_kl_correlation: Some(0.5),
            levels: vec![Level {
                bits: 3.0,
                calibrated: measured(&grid::name(&by_layer), by_layer.clone(), 0.2),
                uniform: vec![measured("k3-rotated-v3", uniform, 0.3)],
                against: "k3-rotated-v3".to_owned(),
                change: estimate(-0.1),
                verdict,
            }],
        }
    }

    #[test]
    fn zero_within_the_interval_is_no_difference() {
        let of = |low, high| {
            Verdict::of(Estimate {
                value: (low + high) / 2.0,
                low,
                high,
            })
        };
        assert_eq!(of(-0.2, -0.1), Verdict::Better);
        assert_eq!(of(-0.2, 0.1), Verdict::NoDifference);
        assert_eq!(of(0.1, 0.2), Verdict::Worse);
        assert_eq!(of(0.0, 0.0), Verdict::NoDifference);
    }

    #[test]
    fn the_grid_has_what_is_better_and_reads() {
        let better = report(Verdict::Better);
        let text = grid(&better).unwrap().unwrap();
        let before = grid::parse(grid::DEFAULT, "default", Mode::Quick).unwrap();
        let after = grid::parse(&text, "grid.toml", Mode::Quick).unwrap();
        assert_eq!(after.policies.len(), before.policies.len() + 1);
        let wanted = (
            "k2-rotated-v3-by-layer".to_owned(),
            better.levels[0].calibrated.policy.clone(),
        );
        assert_eq!(after.policies.last(), Some(&wanted));
        assert_eq!(grid(&report(Verdict::NoDifference)).unwrap(), None);
    }

    #[test]
    fn the_table_says_what_was_found() {
        let text = table(&report(Verdict::Better));
        for wanted in [
            "| layer | K | V | 3 bits |\n| --- | --- | --- | --- |\n| 0 | 0.5000 [0.4900, 0.5100] | 0.2500 [0.2400, 0.2600] | 4 3 |\n",
            "| 1 | 0.5000 [0.4900, 0.5100] | 0.2500 [0.2400, 0.2600] | 2 3 |\n",
            "\n| 3 | k3-rotated-v3 | 0.2500 | 0.3000 [0.2900, 0.3100] | 0.3000 |\n",
            "\n3 bits: better than k3-rotated-v3 (-0.1000 [-0.1100, -0.0900] nats).\n",
        ] {
            assert!(text.contains(wanted), "{text}");
        }
        let text = table(&report(Verdict::Worse));
        assert!(
            text.ends_with("is not shown to pay on this model and text: keep the uniform levels.\n"),
            "{text}"
        );
    }

    #[test]
    fn what_is_written_reads_back() {
        let report = report(Verdict::Worse);
        let text = serde_json::to_string(&report).unwrap();
        let read: Report = serde_json::from_str(&text).unwrap();
        // Reading a float can change its last bit.
        assert_eq!(read.layers.len(), report.layers.len());
        assert_eq!(
            (read.method, read.bits, read.sizes),
            (report.method, report.bits, report.sizes)
        );
        let [read, written] = [&read.levels[0], &report.levels[0]];
        assert_eq!(read.calibrated.policy, written.calibrated.policy);
        assert_eq!(read.uniform[0].policy, written.uniform[0].policy);
        assert_eq!((&read.against, read.verdict), (&written.against, written.verdict));
        assert!((read.change.low - written.change.low).abs() < 1e-12);
    }
}
