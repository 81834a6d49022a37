//! Where things are: the repository, the cache folder, the build folder.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The folders every command works in.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    /// The repository.
    pub(crate) root: PathBuf,
    /// `CINCH_HOME`, or `~/.cache/cinch`: models, tools, fetched sources.
    pub(crate) home: PathBuf,
    /// `CARGO_TARGET_DIR`, or `target` in [`home`](Self::home): shared by both workspaces, kept
    /// between clones, since the engine takes a quarter of an hour to build on two cores.
    pub(crate) target: PathBuf,
}

/// No place for the cache.
#[derive(Debug, thiserror::Error)]
#[error("neither CINCH_HOME nor HOME is set: set one, the cache of models and builds needs a place")]
pub(crate) struct NoHome;

impl Workspace {
    /// From the environment; the repository is the one this program was built from.
    pub(crate) fn find() -> Result<Self, NoHome> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest)
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default();
        Self::at(root, |name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn at(root: PathBuf, var: impl Fn(&str) -> Option<OsString>) -> Result<Self, NoHome> {
        let home = match (var("CINCH_HOME"), var("HOME")) {
            (Some(home), _) => PathBuf::from(home),
            (None, Some(home)) => Path::new(&home).join(".cache/cinch"),
            (None, None) => return Err(NoHome),
        };
        // Children run in other folders: a relative path would mean another place there.
        let home = root.join(home);
        let target = var("CARGO_TARGET_DIR").map_or_else(|| home.join("target"), |dir| root.join(dir));
        Ok(Self { root, home, target })
    }

    /// The engine's own workspace.
    pub(crate) fn engine(&self) -> PathBuf {
        self.root.join("plugin/engine")
    }

    /// The `cinch` binary a release build leaves.
    pub(crate) fn binary(&self) -> PathBuf {
        self.target
            .join("release")
            .join(format!("cinch{}", env::consts::EXE_SUFFIX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(vars: &[(&str, &str)]) -> Result<Workspace, NoHome> {
        Workspace::at("/repo".into(), |name| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn defaults_and_overrides() {
        let plain = at(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.home, Path::new("/h/.cache/cinch"));
        assert_eq!(plain.target, Path::new("/h/.cache/cinch/target"));
        let moved = at(&[("HOME", "/h"), ("CINCH_HOME", "/c"), ("CARGO_TARGET_DIR", "out")]).unwrap();
        assert_eq!(moved.home, Path::new("/c"));
        assert_eq!(moved.target, Path::new("/repo/out"));
        assert!(at(&[]).is_err());
    }
}
