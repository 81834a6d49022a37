//! What was measured so far, kept in a folder as it comes: a file a point, named by a fingerprint of all that its figures
//! depend on. A later run with everything the same finds it; one with a changed model, text, policy or program does not: a
//! method that was changed is measured again though its policy and the program's version are what they were.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tracing::warn;

/// The folder of points.
#[derive(Debug)]
pub(super) struct Points {
    dir: PathBuf,
    /// What all points depend on, as JSON.
    common: String,
    /// Whether the folder had points when this began, and none of them was of any use yet.
    unfamiliar: AtomicBool,
}

impl Points {
    /// In `out`; all points depend on `common` and on this program.
    pub(super) fn open(out: &Path, common: &impl Serialize) -> Result<Self> {
        let dir = out.join("points");
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let program = std::env::current_exe().context("finding this program")?;
        let program = fs::File::open(&program).and_then(|mut file| {
            let mut hasher = Sha256::new();
            std::io::copy(&mut file, &mut hasher)?;
            Ok(hex(&hasher.finalize()))
        });
        let program = program.context("reading this program")?;
        let before = fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some());
        Ok(Self {
            dir,
            unfamiliar: AtomicBool::new(before),
            common: serde_json::to_string(&(program, common))?,
        })
    }

    /// Whether the folder had points of other settings only when this began. Says so once.
    pub(super) fn others(&self) -> bool {
        self.unfamiliar.swap(false, Ordering::Relaxed)
    }

    /// Whether points can be written.
    pub(super) fn try_out(&self) -> Result<()> {
        let probe = self.dir.join("probe");
        write(&probe, &[])?;
        Ok(fs::remove_file(&probe)?)
    }

    /// The name of the point that depends on `what`.
    pub(super) fn key(&self, what: &impl Serialize) -> Result<String> {
        let mut hasher = Sha256::new();
        hasher.update(&self.common);
        hasher.update([0]);
        hasher.update(serde_json::to_string(what)?);
        Ok(hex(&hasher.finalize()[..16]))
    }

    /// The point of this name, if it was measured. One that can't be read is measured again.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        let path = self.path(key);
        let text = fs::read(&path).ok()?;
        match serde_json::from_slice(&text) {
            Ok(point) => {
                self.unfamiliar.store(false, Ordering::Relaxed);
                Some(point)
            }
            Err(err) => {
                warn!("{}: {err}; it is measured again", path.display());
                None
            }
        }
    }

    /// Keeps a point and returns it as a later run will read it: to the last bit, which writing a float can change. What was
    /// there stays whole, whenever the program is ended.
    pub(super) fn put<T: Serialize + DeserializeOwned>(&self, key: &str, point: &T) -> Result<T> {
        let text = serde_json::to_vec(point)?;
        write(&self.path(key), &text)?;
        Ok(serde_json::from_slice(&text)?)
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}.json"))
    }
}

/// Writes a file as a whole: a reader finds the old content or the new.
pub(super) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    let written = fs::write(&part, content).and_then(|()| fs::rename(&part, path));
    written.with_context(|| format!("writing {}", path.display()))
}

/// SHA-256 of a text, as hexadecimal digits.
pub(super) fn sha256(text: &[u8]) -> String {
    hex(&Sha256::digest(text))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_found_again_by_what_they_depend_on() {
        let out = std::env::temp_dir().join(format!("cinch-points-{}", std::process::id()));
        let points = Points::open(&out, &("model", "auto")).unwrap();
        let key = points.key(&("policy", [1, 2])).unwrap();
        assert_eq!(points.get::<u32>(&key), None);
        assert_eq!(points.put(&key, &5_u32).unwrap(), 5);
        assert_eq!(points.get::<u32>(&key), Some(5));
        assert_ne!(key, points.key(&("policy", [1, 3])).unwrap());
        let other = Points::open(&out, &("other model", "auto")).unwrap();
        let other_key = other.key(&("policy", [1, 2])).unwrap();
        assert_ne!(key, other_key);
        assert_eq!(other.get::<u32>(&other_key), None);
        assert!(other.others() && !other.others(), "once");
        let again = Points::open(&out, &("model", "auto")).unwrap();
        assert_eq!(key, again.key(&("policy", [1, 2])).unwrap());
        assert_eq!(again.get::<u32>(&key), Some(5));
        assert!(!again.others() && !points.others());
        points.try_out().unwrap();
        // Cut off in the middle, as by a full disk.
        fs::write(points.path(&key), "[1, 2").unwrap();
        assert_eq!(points.get::<u32>(&key), None);
        fs::remove_dir_all(&out).unwrap();
    }
}
