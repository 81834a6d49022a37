//! Records of benchmarks: a file for each day, CPU and commit, read again by a test. Figures of one commit gather in
//! it; where a day has several commits, files from the second on are numbered.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use cinch_protocol::bench::Record;

use crate::workspace::Workspace;
use crate::{digest, process};

/// The commit that is checked out; it ends in `-dirty` where the sources are not that commit's.
pub(super) fn commit(workspace: &Workspace) -> anyhow::Result<String> {
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        let output = process::capture(command.arg("-C").arg(&workspace.root).args(args))?;
        Ok::<_, process::ProcessError>(String::from_utf8_lossy(&output).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"]).context("asking git for the commit")?;
    let changed = git(&["status", "--porcelain", "--", "plugin", "controller/protocol"])
        .context("asking git for changes")?;
    let dirty = if changed.is_empty() { "" } else { "-dirty" };
    Ok(format!("{commit}{dirty}"))
}

/// Writes `record` into `dir`, with the rows that the same day's record of the same commit has and this one has
/// not measured again. Its path.
pub(super) fn keep(dir: &Path, record: Record) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let stem = stem(&record);
    let mut number = 1;
    let (path, record) = loop {
        let path = dir.join(file_name(&stem, number));
        if !path.is_file() {
            break (path, record);
        }
        let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let before: Record =
            serde_json::from_slice(&text).with_context(|| format!("parsing {}", path.display()))?;
        if before.commit == record.commit {
            break (path, merged(before, record));
        }
        number += 1;
    };
    let mut text = serde_json::to_vec_pretty(&record)?;
    text.push(b'\n');
    digest::write_atomically(&path, &text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

fn stem(record: &Record) -> String {
    format!("{}-{}", record.date, record.cpu)
}

fn file_name(stem: &str, number: u32) -> String {
    match number {
        1 => format!("{stem}.json"),
        _ => format!("{stem}-{number}.json"),
    }
}

fn merged(before: Record, mut now: Record) -> Record {
    for row in before.rows {
        let same = |other: &cinch_protocol::bench::RecordRow| {
            (&other.system, &other.kv, other.context, other.concurrency)
                == (&row.system, &row.kv, row.context, row.concurrency)
        };
        if !now.rows.iter().any(same) {
            now.rows.push(row);
        }
    }
    if now.kernel.is_empty() {
        now.kernel = before.kernel;
    }
    now
}

#[cfg(test)]
mod tests {
    use super::*;
    use cinch_protocol::bench::{KernelRow, RecordRow};
    use serde_json::Value;

    const ROW: [&str; 11] = [
        "system",
        "kv",
        "context",
        "concurrency",
        "prefill_tps",
        "decode_tps",
        "total_tps",
        "itl_p50_ms",
        "itl_p99_ms",
        "peak_rss_bytes",
        "kv_bytes",
    ];

    fn row(kv: &str, decode_tps: f64) -> RecordRow {
        RecordRow {
            system: "cinch".into(),
            kv: kv.into(),
            context: 64,
            concurrency: 1,
            prefill_tps: 300.0,
            decode_tps: Some(decode_tps),
            total_tps: 100.0,
            itl_p50_ms: 12.0,
            itl_p99_ms: 14.0,
            peak_rss_bytes: Some(400_000_000),
            kv_bytes: Some(1_000_000),
        }
    }

    fn record(commit: &str, rows: Vec<RecordRow>) -> Record {
        Record {
            date: "2026-11-25".into(),
            cpu: "some-cpu".into(),
            commit: commit.into(),
            rows,
            kernel: Vec::new(),
        }
    }

    /// What is wrong with a record's text in a file of that name.
    fn check(name: &str, text: &str) -> Result<(), String> {
        let record: Record = serde_json::from_str(text).map_err(|err| err.to_string())?;
        let stem = stem(&record);
        if !(1..100).any(|number| file_name(&stem, number) == name) {
            return Err(format!("date and cpu would be {stem}"));
        }
        if record.rows.is_empty() || record.commit.is_empty() {
            return Err("no rows or no commit".into());
        }
        // A field that may be null must still be there.
        let value: Value = serde_json::from_str(text).map_err(|err| err.to_string())?;
        for (row, value) in record
            .rows
            .iter()
            .zip(value["rows"].as_array().into_iter().flatten())
        {
            if let Some(missing) = ROW.iter().find(|field| value.get(field).is_none()) {
                return Err(format!("a row without {missing}"));
            }
            if !["cinch", "mistralrs", "llama.cpp"].contains(&row.system.as_str()) {
                return Err(format!("system {}", row.system));
            }
            let rates = [row.prefill_tps, row.decode_tps.unwrap_or(1.0), row.total_tps];
            let ordered = 0.0 < row.itl_p50_ms && row.itl_p50_ms <= row.itl_p99_ms;
            if !rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) || !ordered {
                return Err(format!(
                    "figures of {} {}, context {}",
                    row.system, row.kv, row.context
                ));
            }
            if row.kv_bytes.is_some() != (row.system == "cinch" && row.kv != "off") {
                return Err(format!(
                    "KV bytes of {} {}: only the plugin counts them",
                    row.system, row.kv
                ));
            }
        }
        let counted = |row: &KernelRow| row.gb_s > 0.0 && row.roofline_gb_s > 0.0;
        if !record.kernel.iter().all(counted) {
            return Err("figures of the kernel".into());
        }
        Ok(())
    }

    #[test]
    fn committed_records_are_whole() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/records");
        let entries = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        for path in entries.filter(|path| path.extension().is_some_and(|ext| ext == "json")) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            check(&name, &fs::read_to_string(&path).unwrap()).unwrap_or_else(|err| panic!("{name}: {err}"));
        }
    }

    #[test]
    fn a_record_that_is_not_whole_is_told() {
        let name = "2026-11-25-some-cpu.json";
        let whole = serde_json::to_string(&record("c", vec![row("int4", 70.0)])).unwrap();
        check(name, &whole).unwrap();
        check("2026-11-25-some-cpu-2.json", &whole).unwrap();
        assert!(check("2026-11-24-some-cpu.json", &whole).is_err());
        assert!(check("2026-11-25-some-cpu-b.json", &whole).is_err());
        for (from, to) in [
            ("\"kv_bytes\":1000000", "\"kv_bytes\":null"),
            (",\"kv_bytes\":1000000", ""),
            ("\"kernel\"", "\"kernels\""),
            ("300.0", "0.0"),
            ("\"itl_p99_ms\":14.0", "\"itl_p99_ms\":11.0"),
            ("\"system\":\"cinch\"", "\"system\":\"other\""),
        ] {
            let broken = whole.replace(from, to);
            assert_ne!(broken, whole, "{from}");
            assert!(check(name, &broken).is_err(), "{to}");
        }
    }

    #[test]
    fn rows_of_one_commit_gather() {
        let dir = tempfile::tempdir().unwrap();
        let kept = |record, name: &str| {
            let path = keep(dir.path(), record).unwrap();
            assert_eq!(path.file_name().unwrap(), name);
            serde_json::from_slice::<Record>(&fs::read(path).unwrap())
                .unwrap()
                .rows
        };
        let (first, second) = ("2026-11-25-some-cpu.json", "2026-11-25-some-cpu-2.json");
        kept(record("a", vec![row("int4", 70.0), row("int8", 60.0)]), first);
        let rows = kept(record("a", vec![row("int4", 71.0)]), first);
        assert_eq!(rows, [row("int4", 71.0), row("int8", 60.0)]);
        // Those of another commit are not lost, nor mixed with these.
        let full = [row("full", 50.0)];
        assert_eq!(kept(record("b", full.to_vec()), second), full);
        let rows = kept(record("a", full.to_vec()), first);
        assert_eq!(rows, [row("full", 50.0), row("int4", 71.0), row("int8", 60.0)]);
    }
}
