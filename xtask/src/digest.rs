//! SHA-256 of bytes, files and whole source trees, as lower-case hex.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// The digest of some bytes.
pub(crate) fn bytes(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

/// The digest of a file's content, read in pieces.
pub(crate) fn file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..read]);
    }
}

/// The digest of a set of named contents: over `path NUL digest LF`, in path order.
pub(crate) fn tree<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut lines: Vec<_> = files
        .into_iter()
        .map(|(path, data)| (path, bytes(data)))
        .collect();
    lines.sort();
    let mut hasher = Sha256::new();
    for (path, digest) in lines {
        hasher.update(path);
        hasher.update([0]);
        hasher.update(digest);
        hasher.update(b"\n");
    }
    hex(&hasher.finalize())
}

/// Every file below `root`, relative, `/`-separated, sorted. Links are not followed.
pub(crate) fn walk(root: &Path) -> io::Result<Vec<String>> {
    fn descend(dir: &Path, prefix: &str, out: &mut Vec<String>) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                descend(&entry.path(), &format!("{name}/"), out)?;
            } else {
                out.push(name);
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    descend(root, "", &mut out)?;
    out.sort();
    Ok(out)
}

/// Puts `data` at `path` so that a reader sees the old file or the new one, never half of one.
pub(crate) fn write_atomically(path: &Path, data: &[u8]) -> io::Result<()> {
    let dir = path.parent().map(PathBuf::from).unwrap_or_default();
    fs::create_dir_all(&dir)?;
    let mut temporary = temporary_in(&dir)?;
    io::Write::write_all(&mut temporary, data)?;
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|err| err.error)?;
    Ok(())
}

/// A temporary file that may be renamed into place: readable by others, as any other file is.
pub(crate) fn temporary_in(dir: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644));
    builder.tempfile_in(dir)
}

pub(crate) fn hex(digest: &[u8]) -> String {
    use std::fmt::Write;
    digest.iter().fold(String::with_capacity(64), |mut out, byte| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer() {
        assert_eq!(
            bytes(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn file_and_bytes_agree_past_one_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
        write_atomically(&dir.path().join("deep/er/x"), &data).unwrap();
        assert_eq!(file(&dir.path().join("deep/er/x")).unwrap(), bytes(&data));
        assert_eq!(walk(dir.path()).unwrap(), ["deep/er/x"]);
    }

    #[test]
    fn tree_depends_on_names_and_contents_not_on_order() {
        let base = tree([("a", &b"1"[..]), ("b", b"2")]);
        assert_eq!(base, tree([("b", &b"2"[..]), ("a", b"1")]));
        assert_ne!(base, tree([("a", &b"2"[..]), ("b", b"1")]));
        assert_ne!(base, tree([("a", &b"1"[..])]));
    }
}
