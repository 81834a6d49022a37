//! The prepared folder: compared by content, changed file by file, stamped when it is whole.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fmt, fs, io};

use serde::{Deserialize, Serialize};

use crate::digest;

/// A crate's files by path.
pub(super) type Files = BTreeMap<String, Vec<u8>>;

const STAMP: &str = "stamp.toml";
const STAGING: &str = ".staging";

/// What a finished preparation leaves: what it was made from and what it made.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stamp {
    inputs: String,
    /// Crate to the digest of its prepared folder.
    trees: BTreeMap<String, String>,
}

/// What [`write()`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) unchanged: usize,
    pub(super) written: usize,
    pub(super) removed: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            unchanged,
            written,
            removed,
        } = self;
        write!(
            f,
            "{written} files written, {removed} removed, {unchanged} were right already"
        )
    }
}

/// Whether `dir` holds, whole and unedited, what was prepared from `inputs`.
pub(super) fn is_current(dir: &Path, inputs: &str) -> io::Result<bool> {
    let stamp: Stamp = match fs::read_to_string(dir.join(STAMP)) {
        Ok(text) => toml::from_str(&text).unwrap_or_default(),
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(err) => return Err(err),
    };
    if stamp.inputs != inputs {
        return Ok(false);
    }
    for (name, tree) in &stamp.trees {
        let root = dir.join(name);
        if !root.is_dir() || digest_of(&read(&root)?) != *tree {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Makes `dir` hold exactly `trees`, and stamps it. All that changes is first written beside, then
/// renamed into place; files that are right keep their time stamps, by which cargo decides what to
/// rebuild. Without a stamp, which goes first and comes back last, the next run starts over.
pub(super) fn write(dir: &Path, inputs: &str, trees: &BTreeMap<String, Files>) -> io::Result<Report> {
    let staging = dir.join(STAGING);
    remove(fs::remove_dir_all(&staging))?;
    fs::create_dir_all(&staging)?;
    let mut report = Report::default();
    let mut swaps = Vec::new();
    let mut surplus = Vec::new();
    for (name, files) in trees {
        let root = dir.join(name);
        let present = if root.is_dir() { read(&root)? } else { Files::new() };
        for (path, content) in files {
            if present.get(path) == Some(content) {
                report.unchanged += 1;
                continue;
            }
            let staged = staging.join(swaps.len().to_string());
            fs::write(&staged, content)?;
            swaps.push((staged, root.join(path)));
        }
        surplus.extend(
            present
                .keys()
                .filter(|path| !files.contains_key(*path))
                .map(|path| root.join(path)),
        );
    }
    let stamp = Stamp {
        inputs: inputs.to_owned(),
        trees: trees
            .iter()
            .map(|(name, files)| (name.clone(), digest_of(files)))
            .collect(),
    };
    if !swaps.is_empty() || !surplus.is_empty() {
        remove(fs::remove_file(dir.join(STAMP)))?;
    }
    for path in &surplus {
        fs::remove_file(path)?;
        report.removed += 1;
    }
    for (staged, path) in &swaps {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::rename(staged, path)?;
        report.written += 1;
    }
    fs::remove_dir_all(&staging)?;
    let text = toml::to_string(&stamp).map_err(io::Error::other)?;
    digest::write_atomically(&dir.join(STAMP), text.as_bytes())?;
    Ok(report)
}

fn read(root: &Path) -> io::Result<Files> {
    digest::walk(root)?
        .into_iter()
        .map(|path| fs::read(root.join(&path)).map(|content| (path, content)))
        .collect()
}

fn digest_of(files: &Files) -> String {
    digest::tree(
        files
            .iter()
            .map(|(path, content)| (path.as_str(), content.as_slice())),
    )
}

fn remove(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn trees() -> BTreeMap<String, Files> {
        let files = [("src/a.rs", "a"), ("src/deep/b.rs", "b"), ("Cargo.toml", "c")];
        let files = files
            .into_iter()
            .map(|(path, content)| (path.to_owned(), content.into()))
            .collect();
        BTreeMap::from([("host".to_owned(), files)])
    }

    fn age(path: &Path) {
        let past = SystemTime::now() - Duration::from_secs(3600);
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(past)
            .unwrap();
    }

    fn fresh(path: &Path) -> bool {
        fs::metadata(path).unwrap().modified().unwrap().elapsed().unwrap() < Duration::from_secs(1800)
    }

    #[test]
    fn the_second_run_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let all = trees();
        assert!(!is_current(dir.path(), "1").unwrap());
        assert_eq!(
            write(dir.path(), "1", &all).unwrap(),
            Report {
                written: 3,
                ..Report::default()
            }
        );
        assert!(is_current(dir.path(), "1").unwrap());
        for path in all["host"].keys() {
            age(&dir.path().join("host").join(path));
        }
        assert_eq!(
            write(dir.path(), "1", &all).unwrap(),
            Report {
                unchanged: 3,
                ..Report::default()
            }
        );
        assert!(
            all["host"]
                .keys()
                .all(|path| !fresh(&dir.path().join("host").join(path)))
        );
    }

    #[test]
    fn other_inputs_are_noticed_and_only_what_changed_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut all = trees();
        write(dir.path(), "1", &all).unwrap();
        assert!(!is_current(dir.path(), "2").unwrap());
        let files = all.get_mut("host").unwrap();
        files.insert("src/a.rs".into(), b"new".to_vec());
        files.remove("src/deep/b.rs");
        let (kept, changed) = (
            dir.path().join("host/Cargo.toml"),
            dir.path().join("host/src/a.rs"),
        );
        age(&kept);
        age(&changed);
        let report = write(dir.path(), "2", &all).unwrap();
        assert_eq!(
            report,
            Report {
                unchanged: 1,
                written: 1,
                removed: 1
            }
        );
        assert!(fresh(&changed) && !fresh(&kept));
        assert!(is_current(dir.path(), "2").unwrap());
    }

    #[test]
    fn edited_missing_and_surplus_files_are_put_right() {
        let dir = tempfile::tempdir().unwrap();
        let all = trees();
        write(dir.path(), "1", &all).unwrap();
        fs::write(dir.path().join("host/src/a.rs"), "edited by hand").unwrap();
        assert!(!is_current(dir.path(), "1").unwrap());
        fs::remove_file(dir.path().join("host/src/deep/b.rs")).unwrap();
        fs::write(dir.path().join("host/src/extra.rs"), "extra").unwrap();
        let report = write(dir.path(), "1", &all).unwrap();
        assert_eq!(
            report,
            Report {
                unchanged: 1,
                written: 2,
                removed: 1
            }
        );
        assert!(is_current(dir.path(), "1").unwrap());
    }

    #[test]
    fn a_tree_left_half_prepared_is_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let all = trees();
        write(dir.path(), "1", &all).unwrap();
        // As a crash between the swaps leaves it: no stamp, one file swapped, a staged one beside.
        fs::remove_file(dir.path().join(STAMP)).unwrap();
        fs::remove_file(dir.path().join("host/Cargo.toml")).unwrap();
        fs::create_dir(dir.path().join(STAGING)).unwrap();
        fs::write(dir.path().join(STAGING).join("0"), "half").unwrap();
        assert!(!is_current(dir.path(), "1").unwrap());
        assert_eq!(
            write(dir.path(), "1", &all).unwrap(),
            Report {
                unchanged: 2,
                written: 1,
                removed: 0
            }
        );
        assert!(is_current(dir.path(), "1").unwrap());
        assert!(!dir.path().join(STAGING).exists());
        // A stamp that cannot be read is no stamp.
        fs::write(dir.path().join(STAMP), "inputs = ").unwrap();
        assert!(!is_current(dir.path(), "1").unwrap());
    }
}
