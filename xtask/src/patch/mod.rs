//! The patch format: lines of ours, anchored by line number and by hashes of upstream's lines.
//!
//! Invariant: a patch holds no upstream text. What it replaces or stands before is recognised by
//! SHA-256, so a difference upstream is noticed and named, never papered over by fuzz.

mod apply;
mod refresh;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

pub(crate) use apply::{apply, hunk_hash};
pub(crate) use refresh::refresh;

/// What we change in one published crate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Patch {
    /// Files edited.
    pub(crate) files: Vec<FilePatch>,
    /// Files added: path in the crate, and content.
    pub(crate) new: BTreeMap<String, Vec<u8>>,
}

/// One patch file as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(rename = "crate")]
    name: String,
    version: String,
    #[serde(default)]
    file: Vec<FilePatch>,
    #[serde(default)]
    new: Vec<NewFile>,
}

/// Edits of one file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FilePatch {
    /// Where, inside the crate.
    pub(crate) path: String,
    /// Of the whole pristine file.
    pub(crate) sha256: String,
    #[serde(default, rename = "hunk")]
    pub(crate) hunks: Vec<Hunk>,
}

/// Lines of ours at one place.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hunk {
    /// Shown in errors.
    pub(crate) name: String,
    /// 1-based line of the pristine file. One past the last line appends.
    pub(crate) line: usize,
    /// Of the `max(replace, 1)` pristine lines from `line`, each trimmed, joined by LF.
    pub(crate) sha256: String,
    /// Pristine lines removed, from `line` on. 0: insert before `line`.
    #[serde(default)]
    pub(crate) replace: usize,
    /// Ours.
    #[serde(default)]
    pub(crate) insert: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewFile {
    path: String,
    source: PathBuf,
}

/// What is wrong with a patch, or with what it is applied to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PatchError {
    #[error("{}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}", path.display())]
    Toml {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{}", path.display())]
    Edit {
        path: PathBuf,
        source: Box<toml_edit::TomlError>,
    },
    #[error("{}: crate: given {given:?}, allowed: {}", path.display(), allowed.join(", "))]
    UnknownCrate {
        path: PathBuf,
        given: String,
        allowed: Vec<String>,
    },
    #[error("{}: version: given {given:?}, expected {expected:?}", path.display())]
    Version {
        path: PathBuf,
        given: String,
        expected: String,
    },
    #[error("{}: path: given {given:?}, allowed: a relative path without `..`", path.display())]
    UnsafePath { path: PathBuf, given: String },
    #[error("{krate}: {path} is patched twice")]
    Duplicate { krate: String, path: String },
    #[error("{krate}: {path}: upstream has no such file")]
    NoSuchFile { krate: String, path: String },
    #[error("{krate}: {path}: a new file of ours, but upstream has one of that name")]
    Exists { krate: String, path: String },
    #[error("{krate}: {path}: not UTF-8")]
    NotText { krate: String, path: String },
    #[error("{krate}: {path}: sha256 is empty; run `cargo xtask patch refresh`")]
    Unhashed { krate: String, path: String },
    #[error(
        "{krate}: {path}: hunk {hunk:?}: lines {line}..{end} are outside of the file, which has {lines} lines"
    )]
    OutOfFile {
        krate: String,
        path: String,
        hunk: String,
        line: usize,
        end: usize,
        lines: usize,
    },
    #[error("{krate}: {path}: hunks {first:?} and {second:?} overlap at line {line}")]
    Overlap {
        krate: String,
        path: String,
        first: String,
        second: String,
        line: usize,
    },
    #[error(
        "{at}: expected sha256 {expected}, given {given} (the file itself is the expected one: the hunk is wrong)"
    )]
    Hunk {
        at: Box<At>,
        expected: String,
        given: String,
    },
    #[error(
        "{krate}: {path}: upstream differs: expected sha256 {expected}, given {given}{}",
        findings.iter().map(|finding| format!("\n  {finding}")).collect::<String>()
    )]
    UpstreamDiffers {
        krate: String,
        path: String,
        expected: String,
        given: String,
        findings: Vec<Finding>,
    },
}

/// Where a hunk belongs.
#[derive(Debug, thiserror::Error)]
#[error("{krate}: {path}: hunk {hunk:?} at line {line}")]
pub(crate) struct At {
    krate: String,
    path: String,
    hunk: String,
    line: usize,
}

/// How one hunk fares in a file that is not the one it was written for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Finding {
    /// Its lines are where they were.
    Matches { hunk: String, line: usize },
    /// Its lines are elsewhere; every place is listed.
    Moved {
        hunk: String,
        line: usize,
        found: Vec<usize>,
    },
    /// Its lines are nowhere.
    Failed {
        hunk: String,
        line: usize,
        expected: String,
    },
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Matches { hunk, line } => write!(f, "ok      {hunk:?} still matches at line {line}"),
            Self::Moved { hunk, line, found } => {
                let found: Vec<_> = found.iter().map(ToString::to_string).collect();
                write!(f, "moved   {hunk:?} from line {line} to {}", found.join(" or "))
            }
            Self::Failed { hunk, line, expected } => {
                write!(
                    f,
                    "FAILED  {hunk:?} at line {line}: no lines with sha256 {expected}"
                )
            }
        }
    }
}

impl PatchError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        |source| Self::Io { path, source }
    }
}

/// The patch files of a folder, in name order. A missing folder holds none.
pub(crate) fn patch_files(dir: &Path) -> Result<Vec<PathBuf>, PatchError> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(PatchError::io(dir))? {
        let path = entry.map_err(PatchError::io(dir))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads every patch of a folder. `versions` names the crates that can be patched; several files
/// may patch one crate, each its own files.
pub(crate) fn load(dir: &Path, versions: &[(&str, &str)]) -> Result<BTreeMap<String, Patch>, PatchError> {
    let mut patches: BTreeMap<String, Patch> = BTreeMap::new();
    for path in patch_files(dir)? {
        let text = fs::read_to_string(&path).map_err(PatchError::io(&path))?;
        let document: Document = toml::from_str(&text).map_err(|source| PatchError::Toml {
            path: path.clone(),
            source: Box::new(source),
        })?;
        check_target(&path, &document, versions)?;
        let patch = patches.entry(document.name.clone()).or_default();
        for file in document.file {
            check_relative(&path, Path::new(&file.path))?;
            if patch.files.iter().any(|other| other.path == file.path) {
                return Err(PatchError::Duplicate {
                    krate: document.name,
                    path: file.path,
                });
            }
            patch.files.push(file);
        }
        for new in document.new {
            check_relative(&path, Path::new(&new.path))?;
            check_relative(&path, &new.source)?;
            let source = dir.join(&new.source);
            let content = fs::read(&source).map_err(PatchError::io(&source))?;
            if patch.new.insert(new.path.clone(), content).is_some() {
                return Err(PatchError::Duplicate {
                    krate: document.name,
                    path: new.path,
                });
            }
        }
    }
    Ok(patches)
}

fn check_target(path: &Path, document: &Document, versions: &[(&str, &str)]) -> Result<(), PatchError> {
    let Some((_, expected)) = versions.iter().find(|(name, _)| *name == document.name) else {
        return Err(PatchError::UnknownCrate {
            path: path.to_path_buf(),
            given: document.name.clone(),
            allowed: versions.iter().map(|(name, _)| (*name).to_owned()).collect(),
        });
    };
    if *expected != document.version {
        return Err(PatchError::Version {
            path: path.to_path_buf(),
            given: document.version.clone(),
            expected: (*expected).to_owned(),
        });
    }
    Ok(())
}

fn check_relative(document: &Path, given: &Path) -> Result<(), PatchError> {
    if given
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Ok(());
    }
    Err(PatchError::UnsafePath {
        path: document.to_path_buf(),
        given: given.display().to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSIONS: &[(&str, &str)] = &[("host", "1.2.3")];

    fn load_text(text: &str) -> Result<BTreeMap<String, Patch>, PatchError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("host.toml"), text).unwrap();
        fs::write(dir.path().join("ours.rs"), "ours\n").unwrap();
        load(dir.path(), VERSIONS)
    }

    #[test]
    fn a_missing_or_empty_folder_is_no_patch() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), VERSIONS).unwrap().is_empty());
        assert!(load(&dir.path().join("none"), VERSIONS).unwrap().is_empty());
    }

    #[test]
    fn new_files_come_from_beside_the_patch() {
        let patches = load_text(
            "crate = \"host\"\nversion = \"1.2.3\"\n[[new]]\npath = \"src/a.rs\"\nsource = \"ours.rs\"\n",
        )
        .unwrap();
        assert_eq!(patches["host"].new["src/a.rs"], b"ours\n");
    }

    #[test]
    fn wrong_targets_and_paths_are_named() {
        let message = |text| load_text(text).unwrap_err().to_string();
        assert!(
            message("crate = \"other\"\nversion = \"1.2.3\"\n").ends_with("given \"other\", allowed: host")
        );
        assert!(
            message("crate = \"host\"\nversion = \"1.2.4\"\n")
                .ends_with("given \"1.2.4\", expected \"1.2.3\"")
        );
        let outside = "crate = \"host\"\nversion = \"1.2.3\"\n[[file]]\npath = \"../x\"\nsha256 = \"\"\n";
        assert!(message(outside).contains("given \"../x\""));
        let typo = "crate = \"host\"\nversion = \"1.2.3\"\n[[file]]\npath = \"x\"\nsha = \"\"\n";
        let PatchError::Toml { source, .. } = load_text(typo).unwrap_err() else {
            panic!("a typo was accepted")
        };
        assert!(source.message().contains("unknown field `sha`"), "{source}");
    }

    #[test]
    fn a_file_is_patched_by_one_entry_only() {
        let twice = "crate = \"host\"\nversion = \"1.2.3\"\n\
             [[file]]\npath = \"x\"\nsha256 = \"\"\n[[file]]\npath = \"x\"\nsha256 = \"\"\n";
        assert!(matches!(
            load_text(twice).unwrap_err(),
            PatchError::Duplicate { .. }
        ));
    }
}
