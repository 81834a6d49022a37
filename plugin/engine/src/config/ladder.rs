//! A ladder file, checked by itself: it says the same whatever configuration names it.

use cinch_protocol::{Ladder, LadderLevel, LevelFigures, Policy};
use cinch_settings::ConfigError;
use serde_json::Value;

use super::types::{LadderFile, Level};
use crate::fields::{FieldFault, decode};

impl From<&LadderFile> for Ladder {
    fn from(file: &LadderFile) -> Self {
        let level = |(level, measured): (u32, &Level)| LadderLevel {
            level,
            name: measured.name.clone(),
            policy: measured.policy.clone(),
            bytes_ratio: measured.bytes_ratio,
            figures: measured.figures,
        };
        Self {
            model: file.model.clone(),
            fingerprint: file.fingerprint.clone(),
            measured: file.measured.clone(),
            levels: (0..).zip(&file.level).map(level).collect(),
        }
    }
}

/// Checks the ladder in `text`; `origin` names it in messages.
///
/// # Errors
/// The first thing wrong.
pub(crate) fn parse(text: &str, origin: &str) -> Result<LadderFile, ConfigError> {
    let value: Value = toml::from_str(text).map_err(|err| {
        let reason = err.message().split_whitespace().collect::<Vec<_>>().join(" ");
        let line = err
            .span()
            .map(|span| text[..span.start.min(text.len())].lines().count().max(1));
        ConfigError::Syntax {
            origin: origin.to_owned(),
            reason: line.map_or_else(|| reason.clone(), |line| format!("line {line}: {reason}")),
        }
    })?;
    let checked = decode::<LadderFile>(&value, "").and_then(|ladder| check(&ladder).map(|()| ladder));
    checked.map_err(|fault| ConfigError::Field {
        origin: origin.to_owned(),
        fault,
    })
}

fn check(ladder: &LadderFile) -> Result<(), FieldFault> {
    text("model", &ladder.model, 128)?;
    if !is_date(&ladder.measured) {
        return Err(FieldFault::new(
            "measured",
            &ladder.measured,
            "a date as YYYY-MM-DD",
        ));
    }
    if let Some(given) = ladder
        .fingerprint
        .as_deref()
        .filter(|given| !is_fingerprint(given))
    {
        return Err(FieldFault::new(
            "fingerprint",
            given,
            "sha256: and 64 hexadecimal digits, as `cinch eval` writes it",
        ));
    }
    let Some(first) = ladder.level.first() else {
        return Err(FieldFault::new("level", "no levels", "at least level 0"));
    };
    let mut before: Option<f64> = None;
    for (index, level) in ladder.level.iter().enumerate() {
        let field = |name: &str| format!("level[{index}].{name}");
        text(&field("name"), &level.name, 64)?;
        level
            .policy
            .validate()
            .map_err(|err| FieldFault::from(err).within(&field("policy")))?;
        // Written so that NaN is out of range.
        let given = level.bytes_ratio;
        let allowed = match before {
            None if given == 1.0 => None,
            None => Some("1: the others are ratios to level 0".to_owned()),
            Some(before) if given > 0.0 && given < before => None,
            Some(before) => Some(format!("over 0 and under {before}, that of the level before")),
        };
        if let Some(allowed) = allowed {
            return Err(FieldFault::new(field("bytes_ratio"), given, allowed));
        }
        before = Some(given);
        if let Some(figures) = &level.figures {
            self::figures(figures).map_err(|fault| fault.within(&field("figures")))?;
        }
    }
    if first.policy != Policy::default() {
        let allowed = "{ store = \"full\" }: level 0 is uncompressed";
        return Err(FieldFault::new("level[0].policy", &first.policy, allowed));
    }
    Ok(())
}

/// Figures that no measurement can have are a mistake of who wrote the file.
fn figures(figures: &LevelFigures) -> Result<(), FieldFault> {
    let LevelFigures {
        kl_mean,
        kl_p95,
        kl_p99,
        perplexity_ratio,
        top1_agreement,
        rms_delta_p,
        attention_error,
        prefill_tps,
        decode_tps,
        ttft_ms,
        peak_rss_bytes: _,
    } = *figures;
    let most = f64::MAX;
    let all = [
        ("kl_mean", Some(kl_mean), most),
        ("kl_p95", Some(kl_p95), most),
        ("kl_p99", Some(kl_p99), most),
        ("perplexity_ratio", Some(perplexity_ratio), most),
        ("top1_agreement", Some(top1_agreement), 1.0),
        ("rms_delta_p", Some(rms_delta_p), 1.0),
        ("attention_error", attention_error, most),
        ("prefill_tps", prefill_tps, most),
        ("decode_tps", decode_tps, most),
        ("ttft_ms", ttft_ms, most),
    ];
    for (name, given, most) in all {
        if let Some(given) = given.filter(|given| !(0.0..=most).contains(given)) {
            let allowed = if most > 1.0 {
                "0 or more, and finite"
            } else {
                "0 to 1"
            };
            return Err(FieldFault::new(name, given, allowed));
        }
    }
    Ok(())
}

fn is_fingerprint(text: &str) -> bool {
    let digits = text.strip_prefix("sha256:").unwrap_or_default();
    digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn text(field: &str, given: &str, most: usize) -> Result<(), FieldFault> {
    let characters = given.chars().count();
    if (1..=most).contains(&characters) {
        return Ok(());
    }
    let allowed = format!("1 to {most} characters");
    Err(FieldFault::new(
        field,
        format_args!("{characters} characters"),
        allowed,
    ))
}

fn is_date(text: &str) -> bool {
    let parts: Vec<Option<u32>> = text.split('-').map(|part| part.parse().ok()).collect();
    text.len() == 10 && matches!(parts[..], [Some(_), Some(1..=12), Some(1..=31)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
model = "SmolLM2-135M-Instruct"
measured = "2026-11-24"

[[level]]
name = "full"
policy = { store = "full" }
bytes_ratio = 1.0

[[level]]
name = "int8"
policy = { quantize = { k_bits = 8, v_bits = 8 } }
bytes_ratio = 0.573

[[level]]
name = "h2o-half-int4"
policy = { select = { method = "h2o", budget = 0.5 }, quantize = { k_bits = 4, v_bits = 4 } }
bytes_ratio = 0.182
"#;

    fn refused(from: &str, to: &str) -> String {
        assert!(FILE.contains(from), "{from}");
        let err = parse(&FILE.replacen(from, to, 1), "x.toml")
            .unwrap_err()
            .to_string();
        assert!(!err.contains('\n'), "more than one line: {err}");
        err
    }

    #[test]
    fn the_file_is_right() {
        let ladder = parse(FILE, "x.toml").unwrap();
        assert_eq!(ladder.level.len(), 3);
        assert_eq!(ladder.level[0].bytes_ratio, 1.0);
        // What comes with the program: levels that are worth controlling with, of measured figures.
        for demo in [
            include_str!("../../../../configs/ladders/smollm2-135m-instruct.toml"),
            include_str!("../../../../configs/ladders/smollm2-135m-instruct.kvzip.toml"),
        ] {
            let demo = parse(demo, "x.toml").unwrap();
            assert!((5..=9).contains(&demo.level.len()));
            assert!(demo.fingerprint.is_some() && demo.prompt_tokens.is_some());
            assert!(demo.level.iter().all(|level| level.figures.is_some()));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (
                "k_bits = 8, v_bits = 8",
                "k_bits = 5, v_bits = 8",
                "field `level[1].policy.quantize.k_bits`: given 5, allowed 2, 3, 4, 8 or 16",
            ),
            (
                "store = \"full\" }",
                "store = \"exact\" }",
                "field `level[0].policy`: given exact, allowed { store",
            ),
            (
                "bytes_ratio = 1.0",
                "bytes_ratio = 0.9",
                "field `level[0].bytes_ratio`: given 0.9, allowed 1:",
            ),
            (
                "bytes_ratio = 0.573",
                "bytes_ratio = 1.0",
                "field `level[1].bytes_ratio`: given 1, allowed over 0 and under 1,",
            ),
            (
                "bytes_ratio = 0.182\n",
                "bytes_ratio = nan\n",
                "field `level[2].bytes_ratio`: given ",
            ),
            (
                "bytes_ratio = 0.182\n",
                "bytes_ratio = 0.0\n",
                "field `level[2].bytes_ratio`: given 0, allowed over 0 and under ",
            ),
            (
                "bytes_ratio = 0.573",
                "ratio = 0.566",
                "field `level[1].ratio`: given an unknown field, allowed",
            ),
            (
                "bytes_ratio = 0.573",
                "",
                "field `level[1].bytes_ratio`: given nothing, allowed a value",
            ),
            (
                "\"2026-11-24\"",
                "\"today\"",
                "field `measured`: given today, allowed a date",
            ),
            (
                "\"SmolLM2-135M-Instruct\"",
                "\"\"",
                "field `model`: given 0 characters, allowed 1 to 128",
            ),
            (
                "name = \"int8\"",
                "name = \"\"",
                "field `level[1].name`: given 0 characters, allowed 1 to 64",
            ),
            ("measured = ", "measured ", "not valid TOML: line "),
        ];
        for (from, to, wanted) in cases {
            let said = refused(from, to);
            assert!(said.starts_with("x.toml: "), "{said}");
            assert!(said.contains(wanted), "{to}\n  says   {said}\n  wanted {wanted}");
        }
        let empty = parse("model = \"m\"\nmeasured = \"2026-01-01\"\nlevel = []\n", "x.toml").unwrap_err();
        assert!(
            empty.to_string().contains("field `level`: given no levels"),
            "{empty}"
        );
    }
}
