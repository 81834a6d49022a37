//! `cinch eval` on the real engine: its report fits the published schema, two runs agree, an ended one goes on where it was,
//! and the engine serves the ladder it makes with that model only.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use cinch_tests::schema;
use common::eval::{GRID, done, eval, report};
use common::{cinch, root, said};
use serde_json::Value;

/// The points in a folder, with when each was written.
fn points(dir: &Path, out: &str) -> BTreeMap<String, SystemTime> {
    let Ok(entries) = fs::read_dir(dir.join(out).join("points")) else {
        return BTreeMap::new();
    };
    entries
        .map(Result::unwrap)
        .filter(|entry| entry.path().extension().is_some_and(|ending| ending == "json"))
        .map(|entry| {
            let written = entry.metadata().unwrap().modified().unwrap();
            (entry.file_name().to_string_lossy().into_owned(), written)
        })
        .collect()
}

/// All but speed, which no two runs agree on.
fn without_speed(mut report: Value) -> Value {
    for point in report["points"].as_array_mut().unwrap() {
        point["speed"].take();
    }
    report
}

#[test]
fn a_grid_is_measured_once_and_becomes_a_ladder() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let output = done(eval(dir, "a", &[]));
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{table}");
    let first = report(dir, "a");
    let published: Value =
        serde_json::from_slice(&fs::read(root().join("docs/eval-report.schema.json")).unwrap()).unwrap();
    let misfits = schema::misfits(&published, &first);
    assert!(misfits.is_empty(), "{misfits:?}");

    let names: Vec<&str> = first["points"]
        .as_array()
        .unwrap()
        .iter()
        .map(|point| point["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["full", "k8-v8", "k2-v8", "streaming-0.5"]);
    let number = |point: usize, path: &str| {
        let value = first["points"][point].pointer(path);
        value
            .and_then(Value::as_f64)
            .unwrap_or_else(|| panic!("{path}: {first}"))
    };
    let kl = |point| number(point, "/quality/kl_mean/value");
    assert_eq!((kl(0), number(0, "/bytes/ratio")), (0.0, 1.0));
    assert!(0.0 < kl(1) && kl(1) < 0.05, "8 bits change little: {}", kl(1));
    assert!(10.0 * kl(1) < kl(2), "2 bits of K without rotation break it");
    assert!(kl(1) < kl(3), "what is evicted is missed");
    assert_eq!(number(0, "/quality/tokens"), 64.0);
    let ratio = |point| number(point, "/bytes/ratio");
    assert!((0.5..0.75).contains(&ratio(1)) && ratio(2) < ratio(1), "{table}");
    assert!(
        (0.45..0.6).contains(&ratio(3)) && number(3, "/bytes/kept") < 0.65,
        "{table}"
    );
    for point in 0..4 {
        assert!(number(point, "/speed/decode_tps") > 0.0, "{table}");
        assert_eq!(
            first["points"][point]["tasks"].as_array().unwrap().len(),
            5,
            "{table}"
        );
    }
    let page = fs::read_to_string(dir.join("a/report.html")).unwrap();
    assert!(
        page.contains("class=\"mark\"") && page.contains("streaming-0.5"),
        "{page}"
    );

    // The same command measures nothing again.
    let before = points(dir, "a");
    done(eval(dir, "a", &[]));
    assert_eq!(points(dir, "a"), before);
    assert_eq!(report(dir, "a"), first);

    // An ended one goes on where it was, and comes to the same figures.
    let mut ended = eval(dir, "b", &[]).stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while points(dir, "b").len() < 3 {
        assert!(start.elapsed() < Duration::from_secs(120), "no points");
        assert_eq!(
            ended.try_wait().unwrap(),
            None,
            "it was to be ended in the middle"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    ended.kill().unwrap();
    ended.wait().unwrap();
    let kept = points(dir, "b");
    assert!(kept.len() < before.len());
    done(eval(dir, "b", &[]));
    let after = points(dir, "b");
    let first_of_job = |name: &String| after[name] == kept[name];
    // Of the job it was ended in, level 0 runs again.
    assert!(
        kept.keys().filter(|name| !first_of_job(name)).count() <= 1,
        "{kept:?} {after:?}"
    );
    assert_eq!(without_speed(report(dir, "b")), without_speed(first));

    serves_its_own_model_only(&dir.join("a/ladder.toml"));
}

fn serves_its_own_model_only(ladder: &Path) {
    let check = |ladder: &Path, more: &[&str]| {
        let file = format!("ladder.file={}", ladder.display());
        let batch = "class.batch.level=0";
        cinch("check-config", &[&[file.as_str(), batch], more].concat())
            .output()
            .unwrap()
    };
    let own = check(ladder, &[]);
    assert!(own.status.success(), "{}", said(&own));
    let text = fs::read_to_string(ladder).unwrap();
    let at = text.find("sha256:").unwrap() + 7;
    let other = ladder.with_file_name("other.toml");
    let mut bytes = text.into_bytes();
    bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
    fs::write(&other, bytes).unwrap();
    let refused = check(&other, &[]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    for part in ["field `ladder.file`", "SmolLM2", "ladder.allow_other_model=true"] {
        assert!(said(&refused).contains(part), "{part}: {}", said(&refused));
    }
    let allowed = check(&other, &["ladder.allow_other_model=true"]);
    assert!(allowed.status.success(), "{}", said(&allowed));
}

#[test]
fn options_that_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (more, wanted) in [
        (["--max-kl", "-1"].as_slice(), "unexpected argument"),
        (&["--max-kl=-1"], "field `--max-kl`: given -1, allowed 0 or more"),
        (
            &["--set", "ladder.file=ladders/smollm2-135m-instruct.toml"],
            "field `--set`: given ladder.file=ladders/",
        ),
        (&["--set", "kv.plugin=off"], "field `--set`: given kv.plugin=off"),
        (&["--quick", "--full"], "cannot be used with"),
    ] {
        let output = eval(dir, "a", more).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{more:?}: {}", said(&output));
        assert!(said(&output).contains(wanted), "{more:?}: {}", said(&output));
    }
    let grid = |change: (&str, &str)| {
        let command = eval(dir, "a", &[]);
        fs::write(dir.join("grid.toml"), GRID.replacen(change.0, change.1, 1)).unwrap();
        let output = { command }.output().unwrap();
        fs::write(dir.join("grid.toml"), GRID).unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        said(&output)
    };
    let said = grid(("k_bits = [8, 2]", "k_bits = [8, 5]"));
    assert!(
        said.contains("grid.toml: field `grid[0].policy.quantize.k_bits`: given 5"),
        "{said}"
    );
    let said = grid(("context = 192", "context = 9000"));
    assert!(said.contains("field `--text`: given a text of "), "{said}");
}
