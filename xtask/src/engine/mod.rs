//! The engine: published mistral.rs, on a newer candle, with our lines in it.
//!
//! Invariant: `plugin/engine/upstream` is a function of the published crates and of
//! `plugin/engine/patches`. Whatever else is found there is put right; what is right already is
//! not written again, so that cargo rebuilds nothing for it.

mod fetch;
mod manifest;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::patch::{self, Patch, PatchError};
use crate::step::Step;
use crate::workspace::Workspace;
use crate::{digest, process};

/// A published crate that the engine uses a prepared copy of.
#[derive(Debug, Clone, Copy)]
struct Upstream {
    name: &'static str,
    version: &'static str,
    /// Of the whole pristine folder ([`fetch::read`]): a registry cache somebody edited is noticed.
    tree: &'static str,
}

const UPSTREAM: [Upstream; 4] = [
    Upstream {
        name: "mistralrs-core",
        version: "0.8.1",
        tree: "a356380bd53804597d6d562421eb5464f4b63f117a0ed6a3d8b60fe4949ab0fb",
    },
    Upstream {
        name: "mistralrs-quant",
        version: "0.8.1",
        tree: "a42706b24d5fd09d393e365e9e9bb677892114388016aeaab5b66833803bb47c",
    },
    Upstream {
        name: "mistralrs-server-core",
        version: "0.8.1",
        tree: "ba0292c86f23d5d98cd09bf3be36d076bca2cac36f6bf7823c07333a45451bd1",
    },
    Upstream {
        name: "mistralrs-vision",
        version: "0.8.1",
        tree: "2a732be0434d354c62248690192ce5d490f173b9405c24170d2c3b1bd72047ae",
    },
];

/// Part of the stamp: raised whenever this program makes other trees from the same inputs.
const PATCHER: &str = "1";

/// Why the sources could not be prepared.
#[derive(Debug, thiserror::Error)]
enum EngineError {
    #[error(transparent)]
    Patch(#[from] PatchError),
    #[error(transparent)]
    Manifest(#[from] manifest::ManifestError),
    #[error(
        "{name} {version}: {} is not as published: expected tree sha256 {expected}, given {given}; \
         remove that folder and run this again", dir.display()
    )]
    NotPristine {
        name: &'static str,
        version: &'static str,
        dir: PathBuf,
        expected: String,
        given: String,
    },
}

/// Prepares `plugin/engine/upstream`.
pub(crate) fn prepare(workspace: &Workspace) -> anyhow::Result<()> {
    prepare_in(workspace, &workspace.engine().join("upstream"), &load(workspace)?)
}

/// Prepares copies in `upstream` that only raise candle: the unhooked engine.
pub(crate) fn prepare_plain(workspace: &Workspace, upstream: &Path) -> anyhow::Result<()> {
    prepare_in(workspace, upstream, &BTreeMap::new())
}

fn prepare_in(
    workspace: &Workspace,
    upstream: &Path,
    patches: &BTreeMap<String, Patch>,
) -> anyhow::Result<()> {
    let inputs = inputs(patches);
    if tree::is_current(upstream, &inputs)? {
        eprintln!("==> Engine sources are prepared");
        return Ok(());
    }
    let dirs = fetch::pristine(workspace, &UPSTREAM)?;
    let step = Step::start("Preparing the engine's sources");
    let mut trees = BTreeMap::new();
    for source in &UPSTREAM {
        let dir = &dirs[source.name];
        let pristine = fetch::read(dir).with_context(|| format!("reading {}", dir.display()))?;
        let none = Patch::default();
        let patched = patched(source, dir, pristine, patches.get(source.name).unwrap_or(&none))?;
        trees.insert(source.name.to_owned(), patched);
    }
    let report =
        tree::write(upstream, &inputs, &trees).with_context(|| format!("writing {}", upstream.display()))?;
    step.done(report.to_string());
    Ok(())
}

/// Builds the `cinch` binary from prepared sources and returns where it is.
pub(crate) fn build(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let step =
        Step::start("Building the engine in release mode (8 to 20 minutes the first time on two cores)");
    process::run(process::cargo(workspace, &workspace.engine()).args(["build", "--release"]))?;
    let binary = workspace.binary();
    if !binary.is_file() {
        bail!("the build left no {}", binary.display());
    }
    step.done(format!("built {}", binary.display()));
    Ok(binary)
}

/// Fills in empty hashes of the patches.
pub(crate) fn refresh(workspace: &Workspace) -> anyhow::Result<()> {
    let dirs = fetch::pristine(workspace, &UPSTREAM)?;
    let filled = patch::refresh(&patches_dir(workspace), |name| {
        dirs.get(name).map(PathBuf::as_path)
    })?;
    println!("{filled} hashes filled in");
    Ok(())
}

/// Prints the hash of some pristine lines, for the author of a patch.
pub(crate) fn print_hash(
    workspace: &Workspace,
    file: &Path,
    line: usize,
    replace: usize,
) -> anyhow::Result<()> {
    let path = if file.is_file() {
        file.to_path_buf()
    } else {
        in_pristine(workspace, file)?
    };
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    let Some(hash) = patch::hunk_hash(&lines, line, replace) else {
        bail!(
            "line: given {line} + {replace}, allowed: 1 ..= {} in {}",
            lines.len() + 1,
            path.display()
        );
    };
    println!("file {}\nhunk {hash}", digest::bytes(text.as_bytes()));
    Ok(())
}

fn in_pristine(workspace: &Workspace, file: &Path) -> anyhow::Result<PathBuf> {
    let mut parts = file.components();
    let name = parts
        .next()
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .unwrap_or_default();
    let dirs = fetch::pristine(workspace, &UPSTREAM)?;
    let Some(dir) = dirs.get(&name) else {
        let allowed: Vec<_> = UPSTREAM.iter().map(|source| source.name).collect();
        bail!(
            "{}: no such file, nor one in {}",
            file.display(),
            allowed.join(", ")
        );
    };
    Ok(dir.join(parts.as_path()))
}

fn patches_dir(workspace: &Workspace) -> PathBuf {
    workspace.engine().join("patches")
}

fn load(workspace: &Workspace) -> Result<BTreeMap<String, Patch>, PatchError> {
    let versions = UPSTREAM.map(|source| (source.name, source.version));
    patch::load(&patches_dir(workspace), &versions)
}

/// One digest of all that decides what the prepared sources are.
fn inputs(patches: &BTreeMap<String, Patch>) -> String {
    let mut text = format!("patcher {PATCHER}\n{:?}\n{:?}\n", UPSTREAM, manifest::RAISED);
    for (name, patch) in patches {
        text += &format!("{name} {:?}\n", patch.files);
        for (path, content) in &patch.new {
            text += &format!("{path} {}\n", digest::bytes(content));
        }
    }
    digest::bytes(text.as_bytes())
}

/// The files of a prepared copy, from those of the pristine one.
fn patched(
    source: &Upstream,
    dir: &Path,
    pristine: tree::Files,
    patch: &Patch,
) -> Result<tree::Files, EngineError> {
    let krate = || source.name.to_owned();
    // Patches first: where upstream differs, they know which hunk is concerned.
    let mut files = pristine.clone();
    for file in &patch.files {
        let content = pristine.get(&file.path).ok_or_else(|| PatchError::NoSuchFile {
            krate: krate(),
            path: file.path.clone(),
        })?;
        files.insert(
            file.path.clone(),
            patch::apply(source.name, file, content)?.into_bytes(),
        );
    }
    let given = digest::tree(
        pristine
            .iter()
            .map(|(path, content)| (path.as_str(), content.as_slice())),
    );
    if given != source.tree {
        return Err(EngineError::NotPristine {
            name: source.name,
            version: source.version,
            dir: dir.to_path_buf(),
            expected: source.tree.to_owned(),
            given,
        });
    }
    for (path, content) in &patch.new {
        if files.insert(path.clone(), content.clone()).is_some() {
            return Err(PatchError::Exists {
                krate: krate(),
                path: path.clone(),
            }
            .into());
        }
    }
    let raised = manifest::raise(source.name, files.get("Cargo.toml").map_or(&[], Vec::as_slice))?;
    files.insert("Cargo.toml".to_owned(), raised.into_bytes());
    Ok(files)
}
