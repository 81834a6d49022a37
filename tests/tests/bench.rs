//! `cinch bench` on the real engine: what it reports is what ran, and an answer's peak memory is what it should be.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use cinch_protocol::bench::{Figures, Measured, Row};
use common::{cinch, said};

fn bench(options: &[&str]) -> Measured {
    let dir = tempfile::tempdir().unwrap();
    let (json, svg) = (dir.path().join("out.json"), dir.path().join("out.svg"));
    let mut command = cinch("bench", &[]);
    command
        .args(options)
        .arg("--json")
        .arg(&json)
        .arg("--svg")
        .arg(&svg);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(std::fs::read_to_string(svg).unwrap().starts_with("<svg"));
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}

fn row<'a>(measured: &'a Measured, kv: &str, context: usize) -> &'a Figures {
    let wanted = |row: &&Row| row.kv == kv && row.context == context && row.concurrency == 1;
    &measured.rows.iter().find(wanted).unwrap().median
}

#[test]
fn rows_for_every_system_and_load() {
    let own = r#"{"system": "none", "kv": "none", "command": ["false"], "max_concurrency": 1}"#;
    let output = cinch("bench", &[])
        .args([
            "--contexts",
            "64",
            "--policies",
            "off",
            "--concurrency",
            "1",
            "--other",
            own,
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("none none: the measured process failed"),
        "{}",
        said(&output)
    );

    let common = ["--new-tokens", "4", "--rounds", "1"];
    let mut measured = bench(
        &[
            &[
                "--contexts",
                "64,300",
                "--policies",
                "off,int4",
                "--concurrency",
                "1",
            ],
            &common[..],
        ]
        .concat(),
    );
    // Off is left out here: the prompts are long, and that takes minutes.
    let at_once = bench(&[&["--policies", "int4", "--concurrency", "2"], &common[..]].concat());
    measured.rows.extend(at_once.rows);
    let rows: Vec<_> = measured
        .rows
        .iter()
        .map(|row| {
            (
                row.kv.as_str(),
                row.context,
                row.prompts.as_slice(),
                row.samples.len(),
            )
        })
        .collect();
    let wanted: [(&str, usize, &[usize], usize); 5] = [
        ("off", 64, &[64], 1),
        ("int4", 64, &[64], 1),
        ("off", 300, &[300], 1),
        ("int4", 300, &[300], 1),
        ("int4", 1536, &[2048, 1024], 1),
    ];
    assert_eq!(rows, wanted);
    for row in &measured.rows {
        let figures = &row.median;
        assert!(
            figures.prefill_tps > 0.0 && figures.total_tps > 0.0 && figures.itl_p50_ms > 0.0,
            "{row:?}"
        );
        assert!(figures.decode_tps.is_some_and(|tps| tps > 0.0), "{row:?}");
        assert!(
            figures.loaded_peak_rss_bytes >= figures.loaded_rss_bytes,
            "{row:?}"
        );
        assert_eq!(
            figures.kv_bytes.is_some(),
            row.kv == "int4",
            "only the plugin counts: {row:?}"
        );
    }
    assert!(row(&measured, "int4", 300).kv_bytes > row(&measured, "int4", 64).kv_bytes);
}

/// A long prompt is read chunk by chunk and its cache compressed on the way: what it takes at its peak is the model,
/// its compressed cache, and what one chunk takes.
#[test]
fn the_peak_of_a_long_prompt() {
    const CHUNK: usize = 512;
    let measured = bench(&[
        "--contexts",
        "512,4096",
        "--policies",
        "int4",
        "--concurrency",
        "1",
        "--new-tokens",
        "4",
        "--rounds",
        "1",
    ]);
    let (chunk, long) = (row(&measured, "int4", CHUNK), row(&measured, "int4", 4096));
    let activations = chunk.run_peak_rss_bytes.unwrap() - chunk.loaded_rss_bytes.unwrap();
    let cache = long.kv_bytes.unwrap() * 13 / 10;
    let most = long.loaded_peak_rss_bytes.unwrap() + cache + activations;
    let peak = long.run_peak_rss_bytes.unwrap();
    assert!(peak <= most, "peak {peak}, at most {most}: {chunk:?} {long:?}");
}

#[test]
fn options_that_cannot_be() {
    for (options, wanted) in [
        (
            ["--policies", "int5"],
            "field `--policies`: given int5, allowed off, int8, int4, int3, int2, a level of the ladder (full, ",
        ),
        (
            ["--contexts", "8190"],
            "field `--contexts`: given a prompt of 8190 tokens and 64 new ones, allowed together at most 8192",
        ),
        (["--text", "no-such-file"], "field `--text`: given no-such-file"),
        (
            ["--json", "no-such-folder/x.json"],
            "field `--json`: given no-such-folder, allowed a file in a folder that exists",
        ),
        (["--set", "kv.plugin=off"], "field `--set`: given kv.plugin=off"),
    ] {
        let output = cinch("bench", &[]).args(options).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}: {}", said(&output));
        assert!(said(&output).contains(wanted), "{options:?}: {}", said(&output));
    }
}
