//! Lets cargo fetch the published crates, through a manifest outside of both workspaces: where
//! `[patch]` names a path, cargo no longer downloads the registry's copy.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, bail};
use serde::Deserialize;

use super::{Upstream, tree};
use crate::step::Step;
use crate::workspace::Workspace;
use crate::{digest, process};

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    manifest_path: PathBuf,
}

/// The folders of the pristine crates, by name.
pub(super) fn pristine(
    workspace: &Workspace,
    upstream: &[Upstream],
) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let dir = workspace.home.join("upstream");
    let text = manifest(upstream);
    let path = dir.join("Cargo.toml");
    if fs::read_to_string(&path).ok().as_deref() != Some(&text) {
        digest::write_atomically(&path, text.as_bytes())
            .and_then(|()| digest::write_atomically(&dir.join("src/lib.rs"), b""))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    // No need to ask the registry for what an earlier run has fetched.
    if let Some(dirs) = folders(workspace, &dir, upstream, true)? {
        return Ok(dirs);
    }
    let step = Step::start("Fetching the published mistral.rs crates with cargo");
    let mut fetch = process::cargo(workspace, &dir);
    process::run(fetch.args(["fetch", "--target", &host(workspace)?]))?;
    step.done("fetched");
    match folders(workspace, &dir, upstream, false)? {
        Some(dirs) => Ok(dirs),
        None => bail!("cargo fetched, but does not know the folders of the mistral.rs crates"),
    }
}

/// Every file of a pristine crate. `.cargo-ok` is cargo's own mark, not part of what is published.
pub(super) fn read(dir: &Path) -> io::Result<tree::Files> {
    digest::walk(dir)?
        .into_iter()
        .filter(|path| path != ".cargo-ok")
        .map(|path| fs::read(dir.join(&path)).map(|content| (path, content)))
        .collect()
}

fn folders(
    workspace: &Workspace,
    dir: &Path,
    upstream: &[Upstream],
    quiet: bool,
) -> anyhow::Result<Option<BTreeMap<String, PathBuf>>> {
    let mut command = process::cargo(workspace, dir);
    command.args([
        "metadata",
        "--format-version",
        "1",
        "--offline",
        "--filter-platform",
        &host(workspace)?,
    ]);
    let output = command.output().context("cargo metadata")?;
    if !output.status.success() {
        if quiet {
            return Ok(None);
        }
        bail!(
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let dirs: BTreeMap<_, _> = metadata
        .packages
        .into_iter()
        .filter(|package| {
            upstream
                .iter()
                .any(|source| source.name == package.name && source.version == package.version)
        })
        .filter_map(|package| Some((package.name, package.manifest_path.parent()?.to_path_buf())))
        .collect();
    Ok((dirs.len() == upstream.len()).then_some(dirs))
}

fn host(workspace: &Workspace) -> anyhow::Result<String> {
    let mut rustc = std::process::Command::new("rustc");
    let output = process::capture(rustc.current_dir(&workspace.root).arg("-vV"))?;
    let text = String::from_utf8_lossy(&output).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("`rustc -vV` names no host")
}

fn manifest(upstream: &[Upstream]) -> String {
    let mut text = String::from(
        "# Made by `cargo xtask engine`: lets cargo fetch the crates that the engine patches.\n\
         [package]\nname = \"fetch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[workspace]\n\n[dependencies]\n",
    );
    for source in upstream {
        text += &format!(
            "{} = {{ version = \"={}\", default-features = false }}\n",
            source.name, source.version
        );
    }
    text
}
