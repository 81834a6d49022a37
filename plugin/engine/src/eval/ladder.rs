//! The ladder file: the frontier's policies with what was measured of each, in the format that the configuration reads.

use std::fmt::Write;

use anyhow::Result;
use cinch_protocol::{LevelFigures, Policy};

use super::report::{Point, Report};

/// The ladder of a report's levels.
pub(super) fn render(report: &Report) -> Result<String> {
    let text = &report.about.text;
    let mut out = format!(
        "# A ladder that `cinch eval --{}` measured with cinch {}: levels that compress harder one after another; a level's\n\
         # number is its place here. Quality is against level 0, on {} forced tokens of {} (SHA-256 {}…), after prompts of\n\
         # {} tokens; bytes are those at the end of these prompts. Speed is of one request alone with {} prompt tokens, on\n\
         # {}, {} threads. KL divergences are in nats. Fields of a policy: docs/policy-fields.md.\n",
        report.about.mode.name(),
        report.about.cinch,
        report.sizes.windows * report.sizes.steps,
        text.name,
        text.sha256.get(..16).unwrap_or_default(),
        report.sizes.context,
        report.sizes.speed_context,
        report.about.machine.cpu,
        report.about.machine.threads,
    );
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "\nmodel = {}\nfingerprint = {}\nmeasured = {}\nprompt_tokens = {}\n",
        quoted(&report.about.model.name)?,
        quoted(&report.about.model.fingerprint)?,
        quoted(&report.about.date)?,
        report.sizes.context
    );
    for point in report.levels() {
        let _ = write!(
            out,
            "\n[[level]]\nname = {}\npolicy = {}\nbytes_ratio = {}\n",
            quoted(&point.name)?,
            inline(&point.policy)?,
            float(point.bytes.ratio)
        );
        let _ = writeln!(out, "[level.figures]\n{}", figures(point).trim_end());
    }
    Ok(out)
}

/// What a level says of itself.
pub(super) fn figures_of(point: &Point) -> LevelFigures {
    let (quality, speed) = (&point.quality, point.speed.as_ref());
    LevelFigures {
        kl_mean: quality.kl_mean.value,
        kl_p95: quality.kl_p95.value,
        kl_p99: quality.kl_p99.value,
        perplexity_ratio: quality.perplexity_ratio.value,
        top1_agreement: quality.top1_agreement.value,
        rms_delta_p: quality.rms_delta_p.value,
        attention_error: point.attention_error,
        prefill_tps: speed.map(|speed| speed.prefill_tps),
        decode_tps: speed.and_then(|speed| speed.decode_tps),
        ttft_ms: speed.map(|speed| speed.ttft_ms),
        peak_rss_bytes: speed.and_then(|speed| speed.run_peak_rss_bytes),
    }
}

fn figures(point: &Point) -> String {
    let figures = figures_of(point);
    let mut out = String::new();
    let mut line = |name: &str, value: Option<f64>| {
        if let Some(value) = value {
            let _ = writeln!(out, "{name} = {}", float(value));
        }
    };
    line("kl_mean", Some(figures.kl_mean));
    line("kl_p95", Some(figures.kl_p95));
    line("kl_p99", Some(figures.kl_p99));
    line("perplexity_ratio", Some(figures.perplexity_ratio));
    line("top1_agreement", Some(figures.top1_agreement));
    line("rms_delta_p", Some(figures.rms_delta_p));
    line("attention_error", figures.attention_error);
    line("prefill_tps", figures.prefill_tps);
    line("decode_tps", figures.decode_tps);
    line("ttft_ms", figures.ttft_ms);
    if let Some(bytes) = figures.peak_rss_bytes {
        let _ = writeln!(out, "peak_rss_bytes = {bytes}");
    }
    out
}

/// Four digits that count; a TOML float has a point.
fn float(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return "0.0".to_owned();
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    let text = format!("{value:.*}", usize::try_from(digits).unwrap_or(1).max(1));
    let text = text.trim_end_matches('0');
    let end = if text.ends_with('.') { "0" } else { "" };
    format!("{text}{end}")
}

fn quoted(text: &str) -> Result<String> {
    // JSON's escapes are TOML's.
    Ok(serde_json::to_string(text)?)
}

/// A policy as an inline table, its fields in the order they are declared.
///
/// # Errors
/// None in practice: a policy has only names, numbers and tables.
pub(super) fn inline(policy: &Policy) -> Result<String> {
    let json = serde_json::to_string(policy)?;
    let mut out = String::new();
    let mut rest = json.as_str();
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '{' => out += "{ ",
            '}' => out += " }",
            ',' => out += ", ",
            ':' => out += " = ",
            '"' => {
                // Names of methods and fields have nothing to escape.
                let (text, after) = rest.split_once('"').unwrap_or((rest, ""));
                rest = after;
                if rest.starts_with(':') {
                    out += text;
                } else {
                    let _ = write!(out, "\"{text}\"");
                }
            }
            other => out.push(other),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;
    use crate::config::parse_ladder;

    #[test]
    fn the_engine_reads_what_is_written() {
        let report = report();
        let text = render(&report).unwrap();
        let ladder = parse_ladder(&text, "ladder.toml").unwrap_or_else(|err| panic!("{err}\n{text}"));
        assert_eq!(ladder.model, report.about.model.name);
        assert_eq!(
            ladder.fingerprint.as_deref(),
            Some(report.about.model.fingerprint.as_str())
        );
        assert_eq!(
            (ladder.measured.as_str(), ladder.prompt_tokens),
            ("2026-11-25", Some(1024))
        );
        let levels: Vec<&Point> = report.levels().collect();
        assert_eq!(ladder.level.len(), levels.len());
        for (level, point) in ladder.level.iter().zip(levels) {
            assert_eq!((&level.name, &level.policy), (&point.name, &point.policy));
            assert!((level.bytes_ratio / point.bytes.ratio - 1.0).abs() < 1e-3);
            let figures = level.figures.unwrap();
            assert!((figures.kl_mean - point.quality.kl_mean.value).abs() <= 1e-3 * figures.kl_mean);
            assert_eq!(figures.decode_tps.is_some(), point.speed.is_some());
        }
    }

    #[test]
    fn policies_survive_as_inline_tables() {
        let text = r#"{"select": {"method": "snapkv", "budget": 0.25, "heads": "adaptive"},
            "quantize": {"k_bits": 4, "v_bits": 4, "rotate_k": true}}"#;
        let policy: Policy = serde_json::from_str(text).unwrap();
        let inline = inline(&policy).unwrap();
        assert!(
            inline.starts_with("{ store = \"full\", select = { method = \"snapkv\", budget = 0.25, "),
            "{inline}"
        );
        let table: serde_json::Value = toml::from_str(&format!("policy = {inline}")).unwrap();
        assert_eq!(
            serde_json::from_value::<Policy>(table["policy"].clone()).unwrap(),
            policy
        );
        assert_eq!(super::inline(&Policy::default()).unwrap(), "{ store = \"full\" }");
    }

    #[test]
    fn numbers_have_four_digits() {
        for (value, wanted) in [
            (1.0, "1.0"),
            (0.0, "0.0"),
            (0.123_456, "0.1235"),
            (0.000_123_456, "0.0001235"),
            (1.002_34, "1.002"),
            (512.345, "512.3"),
            (2048.4, "2048.4"),
        ] {
            assert_eq!(float(value), wanted);
        }
    }
}
