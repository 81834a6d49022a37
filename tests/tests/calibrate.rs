//! `cinch calibrate` on the real engine: every layer has figures, what it proposes holds no more than uniform policies and
//! can be given to `cinch eval`, and the same command measures nothing twice.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Instant, SystemTime};

use common::{cinch, said, text};
use serde_json::Value;

const LAYERS: usize = 30;

/// `cinch calibrate` of the demo model on the text of `dir`.
fn calibrate(dir: &Path, out: &str, more: &[&str]) -> Command {
    let mut command = cinch("calibrate", &["log.level=warn"]);
    command.args(["--quick", "--text"]).arg(dir.join("text.txt"));
    command.arg("--out").arg(dir.join(out)).args(more);
    command
}

fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    output
}

fn points(dir: &Path) -> BTreeMap<String, SystemTime> {
    let entries = fs::read_dir(dir.join("points")).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let written = entry.metadata().unwrap().modified().unwrap();
            (entry.file_name().to_string_lossy().into_owned(), written)
        })
        .collect()
}

#[test]
fn a_calibration() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let novel = text();
    // The novel itself, and as little of it as is needed.
    let middle = novel.char_indices().nth(200_000).unwrap().0;
    let end = novel.char_indices().nth(204_000).unwrap().0;
    fs::write(dir.join("text.txt"), &novel[middle..end]).unwrap();

    let start = Instant::now();
    let table = said(&done(calibrate(dir, "a", &[])));
    println!("{table}\n{:.0} s", start.elapsed().as_secs_f64());
    let out = dir.join("a");
    let report: Value = serde_json::from_slice(&fs::read(out.join("calibration.json")).unwrap()).unwrap();
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {report}"));

    let layers = report["layers"].as_array().unwrap();
    assert_eq!(layers.len(), LAYERS);
    for (index, layer) in layers.iter().enumerate() {
        assert_eq!(layer["layer"], index);
        for side in ["k", "v"] {
            let part = &layer[side];
            assert!(number(&part["kl"]["value"]) > 0.0, "{layer}");
            assert!(number(&part["damage"]) > 0.0, "{layer}");
            assert!(number(&part["saved_bytes"]) > 0.0, "{layer}");
            assert!(number(&part["attention_error"]) > 0.0, "{layer}");
        }
        assert_eq!(
            layer["k"]["saved_bytes"], layer["v"]["saved_bytes"],
            "keys are as long as values"
        );
        assert!(table.contains(&format!("\n| {index} | ")), "{table}");
    }

    let levels = report["levels"].as_array().unwrap();
    let bits: Vec<f64> = levels.iter().map(|level| number(&level["bits"])).collect();
    assert_eq!(bits, [4.0, 3.0, 2.5]);
    let mut better = 0;
    for level in levels {
        let own = &level["calibrated"];
        let uniform = level["uniform"].as_array().unwrap();
        for other in uniform {
            assert!(number(&own["bytes"]) <= number(&other["bytes"]), "{level}");
            assert!(
                number(&own["predicted_kl"]) <= number(&other["predicted_kl"]),
                "{level}"
            );
        }
        let kl = |measured: &Value| number(&measured["kl"]["value"]);
        let best = uniform.iter().map(kl).min_by(f64::total_cmp).unwrap();
        let change = &level["change"];
        assert!(
            (number(&change["value"]) - (kl(own) - best)).abs() < 1e-9,
            "{level}"
        );
        let wanted = match (number(&change["low"]), number(&change["high"])) {
            (_, high) if high < 0.0 => "better",
            (low, _) if low > 0.0 => "worse",
            _ => "no_difference",
        };
        assert_eq!(level["verdict"], wanted);
        better += usize::from(wanted == "better");
    }
    assert_eq!(out.join("grid.toml").exists(), better > 0);
    assert_eq!(table.contains("is not shown to pay"), better == 0, "{table}");

    // The same command measures nothing again.
    let before = points(&out);
    done(calibrate(dir, "a", &[]));
    assert_eq!(points(&out), before);
    let again: Value = serde_json::from_slice(&fs::read(out.join("calibration.json")).unwrap()).unwrap();
    assert_eq!(again["levels"], report["levels"]);

    // The fingerprint is the one that ladders have, and a proposal is a policy that they may have.
    let ladder = dir.join("ladder.toml");
    let check = |fingerprint: &str| {
        let own = &levels[1]["calibrated"];
        let text = format!(
            "model = \"demo\"\nfingerprint = \"{fingerprint}\"\nmeasured = {}\n[[level]]\nname = \"full\"\npolicy = {{}}\n\
             bytes_ratio = 1.0\n[[level]]\nname = {}\npolicy = {}\nbytes_ratio = {}\n",
            report["date"],
            own["name"],
            inline(&own["policy"]),
            own["bytes_ratio"]
        );
        fs::write(&ladder, text).unwrap();
        let file = format!("ladder.file={}", ladder.display());
        let output = cinch("check-config", &[file.as_str(), "class.batch.level=1"])
            .output()
            .unwrap();
        (output.status.code(), said(&output))
    };
    let fingerprint = report["model"]["fingerprint"].as_str().unwrap();
    assert_eq!(check(fingerprint).0, Some(0), "{}", check(fingerprint).1);
    let other = format!("sha256:{}", "0".repeat(64));
    assert!(
        check(&other).1.contains("field `ladder.file`"),
        "{}",
        check(&other).1
    );
}

/// A policy of names, numbers and tables as a TOML inline table.
fn inline(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let fields: Vec<String> = fields
                .iter()
                .map(|(name, value)| format!("{name} = {}", inline(value)))
                .collect();
            format!("{{ {} }}", fields.join(", "))
        }
        other => other.to_string(),
    }
}

#[test]
fn a_text_that_is_too_short() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("text.txt"), "Call me Ishmael.").unwrap();
    let output = calibrate(dir.path(), "a", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    let said = said(&output);
    assert!(
        said.contains("field `--text`: given a text of ")
            && said.contains(" tokens, allowed at least 448: 2 windows of 224"),
        "{said}"
    );
}
