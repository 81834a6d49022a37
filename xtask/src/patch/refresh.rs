//! Fills in the hashes an author left empty. Everything else of the document stays as written.

use std::fs;
use std::path::Path;

use toml_edit::{DocumentMut, Item, Table, value};

use super::{PatchError, hunk_hash, patch_files};
use crate::digest;

/// Fills in every empty sha256 of the patches in `dir`; `pristine` gives a crate's folder.
/// Returns how many were filled in.
pub(crate) fn refresh<'a>(
    dir: &Path,
    pristine: impl Fn(&str) -> Option<&'a Path>,
) -> Result<usize, PatchError> {
    let mut total = 0;
    for path in patch_files(dir)? {
        let text = fs::read_to_string(&path).map_err(PatchError::io(&path))?;
        let mut document: DocumentMut = text.parse().map_err(|source| PatchError::Edit {
            path: path.clone(),
            source: Box::new(source),
        })?;
        let krate = string(document.as_table(), "crate");
        let root = pristine(&krate).ok_or_else(|| PatchError::UnknownCrate {
            path: path.clone(),
            given: krate.clone(),
            allowed: Vec::new(),
        })?;
        let Some(files) = document.get_mut("file").and_then(Item::as_array_of_tables_mut) else {
            continue;
        };
        let mut filled = 0;
        for file in files.iter_mut() {
            filled += fill(&krate, root, file)?;
        }
        if filled > 0 {
            digest::write_atomically(&path, document.to_string().as_bytes())
                .map_err(PatchError::io(&path))?;
        }
        total += filled;
    }
    Ok(total)
}

fn fill(krate: &str, root: &Path, file: &mut Table) -> Result<usize, PatchError> {
    let path = string(file, "path");
    let content = fs::read(root.join(&path)).map_err(|_| PatchError::NoSuchFile {
        krate: krate.to_owned(),
        path: path.clone(),
    })?;
    let text = std::str::from_utf8(&content).map_err(|_| PatchError::NotText {
        krate: krate.to_owned(),
        path: path.clone(),
    })?;
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    let mut filled = 0;
    if string(file, "sha256").is_empty() {
        file["sha256"] = value(digest::bytes(&content));
        filled += 1;
    }
    let Some(hunks) = file.get_mut("hunk").and_then(Item::as_array_of_tables_mut) else {
        return Ok(filled);
    };
    for hunk in hunks.iter_mut().filter(|hunk| string(hunk, "sha256").is_empty()) {
        let (line, replace) = (number(hunk, "line"), number(hunk, "replace"));
        let hash = hunk_hash(&lines, line, replace).ok_or_else(|| PatchError::OutOfFile {
            krate: krate.to_owned(),
            path: path.clone(),
            hunk: string(hunk, "name"),
            line,
            end: line.saturating_add(replace.max(1)),
            lines: lines.len(),
        })?;
        hunk["sha256"] = value(hash);
        filled += 1;
    }
    Ok(filled)
}

fn string(table: &Table, key: &str) -> String {
    table
        .get(key)
        .and_then(Item::as_str)
        .unwrap_or_default()
        .to_owned()
}

fn number(table: &Table, key: &str) -> usize {
    table
        .get(key)
        .and_then(Item::as_integer)
        .and_then(|n| n.try_into().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::patch::{apply, load};

    #[test]
    fn fills_empty_hashes_only_and_the_patch_then_applies() {
        let (patches, upstream) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(upstream.path().join("x.rs"), "one\ntwo\n").unwrap();
        let written = "# ours\ncrate = \"host\"\nversion = \"1.0.0\"\n\n[[file]]\npath = \"x.rs\"\nsha256 = \"\"\n\n\
            [[file.hunk]]\nname = \"a\"  # why\nline = 2\nsha256 = \"\"\nreplace = 1\ninsert = \"\"\"\nTWO \\\\\n\"\"\"\n";
        let path = patches.path().join("host.toml");
        fs::write(&path, written).unwrap();
        let pristine = |name: &str| (name == "host").then_some(upstream.path());
        assert_eq!(refresh(patches.path(), pristine).unwrap(), 2);
        let text = fs::read_to_string(&path).unwrap();
        let strip = |text: &str| -> Vec<String> {
            text.lines()
                .filter(|line| !line.starts_with("sha256"))
                .map(str::to_owned)
                .collect()
        };
        assert_eq!(strip(&text), strip(written));
        let loaded = load(patches.path(), &[("host", "1.0.0")]).unwrap();
        assert_eq!(
            apply("host", &loaded["host"].files[0], b"one\ntwo\n").unwrap(),
            "one\nTWO \\\n"
        );
        assert_eq!(refresh(patches.path(), pristine).unwrap(), 0);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}
