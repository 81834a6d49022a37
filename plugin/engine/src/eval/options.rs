//! The command line of `cinch eval`, checked: what is wrong is said before a model is loaded.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::grid::{self, Grid};
use crate::config::{Settings, Switch};
use crate::fields::FieldFault;
use crate::run::RunError;

/// Most bytes of text that are read: more than any window needs, and little to tokenize.
const TEXT_BYTES: u64 = 16 << 20;

/// What `cinch eval` is told.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The text to measure on, like what will be served: a file, or a folder whose .txt and .md files are taken in
    /// order of their names.
    #[arg(long, value_name = "FILE|DIR")]
    pub text: PathBuf,
    /// The folder for report.json, report.html, ladder.toml and the points measured so far; made if it is not there. The
    /// same command goes on where an earlier one was ended.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The quick part of the grid on little text (the default).
    #[arg(long, conflicts_with = "full")]
    pub quick: bool,
    /// All of the grid, on more text.
    #[arg(long)]
    pub full: bool,
    /// The grid: which policies, on how much. Default: configs/eval.toml as it was when this program was built.
    #[arg(long, value_name = "FILE")]
    pub grid: Option<PathBuf>,
    /// Levels of the ladder diverge from the full cache by at most so many nats, in the mean over tokens.
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
    /// Levels of the ladder raise perplexity by at most so many percent.
    #[arg(long, value_name = "PERCENT")]
    pub max_perplexity: Option<f64>,
    /// Levels of the ladder agree with the full cache on the likeliest token at least so often, 0 to 1.
    #[arg(long, value_name = "SHARE")]
    pub min_top1: Option<f64>,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mode {
    /// The quick part of the grid, little text.
    Quick,
    /// All of it.
    Full,
}

impl Mode {
    /// As the command line calls it.
    #[must_use]
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }
}

/// What a level of the ladder has to meet. Absent: anything will do.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Floors {
    /// Most nats of mean KL divergence.
    pub(super) max_kl: Option<f64>,
    /// Most percent that perplexity rises by.
    pub(super) max_perplexity_percent: Option<f64>,
    /// Least share of likeliest tokens that are the full cache's.
    pub(super) min_top1: Option<f64>,
}

/// The checked options.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) mode: Mode,
    pub(super) grid: Grid,
    pub(super) floors: Floors,
    pub(super) text: String,
    /// The text's name, for people.
    pub(super) text_name: String,
}

/// Settings that a measurement makes itself.
const OWN: [&str; 4] = ["class.default", "kv.plugin", "engine.prefix_cache", "ladder"];

/// Checks `options` against a configuration that was made with `overrides`.
pub(super) fn check(
    options: &Options,
    settings: &Settings,
    overrides: &[String],
) -> Result<Checked, RunError> {
    configuration(settings, overrides, "cinch eval")?;
    let mode = if options.full { Mode::Full } else { Mode::Quick };
    let grid = match &options.grid {
        None => grid::parse(grid::DEFAULT, "configs/eval.toml", mode)?,
        Some(path) => {
            let text = fs::read_to_string(path).map_err(|err| {
                let given = format!("{} ({err})", path.display());
                FieldFault::new("--grid", given, "a grid file that can be read")
            })?;
            grid::parse(&text, &path.display().to_string(), mode)?
        }
    };
    let floors = Floors {
        max_kl: at_least_zero("--max-kl", options.max_kl)?,
        max_perplexity_percent: at_least_zero("--max-perplexity", options.max_perplexity)?,
        min_top1: options.min_top1,
    };
    if let Some(given) = floors.min_top1.filter(|given| !(0.0..=1.0).contains(given)) {
        return Err(FieldFault::new("--min-top1", given, "0 to 1").into());
    }
    let text = text(&options.text)?;
    Ok(Checked {
        mode,
        grid,
        floors,
        text,
        text_name: name(&options.text),
    })
}

/// Refuses a configuration that `command` cannot measure with.
pub(super) fn configuration(
    settings: &Settings,
    overrides: &[String],
    command: &str,
) -> Result<(), FieldFault> {
    for given in overrides {
        let key = given.split('=').next().unwrap_or(given).trim();
        let own = |own: &&str| key == *own || key.starts_with(&format!("{own}."));
        if OWN.iter().any(own) {
            let allowed = format!("other fields: `{command}` sets {} itself", OWN.join(", "));
            return Err(FieldFault::new("--set", given, allowed));
        }
    }
    if settings.kv.plugin == Switch::Off {
        let allowed = format!("on, for `{command}`");
        return Err(FieldFault::new("kv.plugin", "off", allowed));
    }
    Ok(())
}

fn at_least_zero(field: &str, given: Option<f64>) -> Result<Option<f64>, FieldFault> {
    match given {
        Some(given) if given.is_nan() || given < 0.0 => Err(FieldFault::new(field, given, "0 or more")),
        _ => Ok(given),
    }
}

/// What people call a text.
pub(super) fn name(text: &Path) -> String {
    let name = text.file_name().unwrap_or(text.as_os_str());
    name.to_string_lossy().into_owned()
}

/// The text of a file, or of a folder's files with a blank line between two.
pub(super) fn text(path: &Path) -> Result<String, FieldFault> {
    let allowed = "a text file in UTF-8, or a folder with .txt or .md files";
    let fault =
        |path: &Path, why: &str| FieldFault::new("--text", format!("{} ({why})", path.display()), allowed);
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |err: std::io::Error| fault(&path, &err.to_string())
    };
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        files = fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(unreadable(path))?;
        files.retain(|file| {
            let ending = file.extension().and_then(|ending| ending.to_str());
            file.is_file() && matches!(ending, Some("txt" | "md"))
        });
        files.sort();
    }
    let mut texts = Vec::new();
    let mut room = TEXT_BYTES;
    for file in &files {
        let bytes = fs::metadata(file).map_err(unreadable(file))?.len();
        if bytes > room {
            let allowed = format!("{} MiB of text at most", TEXT_BYTES >> 20);
            let given = format!("{} with more", path.display());
            return Err(FieldFault::new("--text", given, allowed));
        }
        room -= bytes;
        texts.push(fs::read_to_string(file).map_err(unreadable(file))?);
    }
    let text = texts.join("\n\n");
    if text.trim().is_empty() {
        return Err(fault(path, "nothing in it"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml");

    /// A folder with texts; removed at the end.
    struct Texts(PathBuf);

    impl Texts {
        fn new(name: &str, files: &[(&str, &[u8])]) -> Self {
            let dir = std::env::temp_dir().join(format!("cinch-eval-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            for (name, text) in files {
                fs::write(dir.join(name), text).unwrap();
            }
            Self(dir)
        }

        fn options(&self, file: &str) -> Options {
            Options {
                text: self.0.join(file),
                out: self.0.join("out"),
                quick: false,
                full: false,
                grid: None,
                max_kl: None,
                max_perplexity: None,
                min_top1: None,
            }
        }
    }

    impl Drop for Texts {
        fn drop(&mut self) {
            let _gone = fs::remove_dir_all(&self.0);
        }
    }

    fn settings() -> Settings {
        Settings::load(CONFIG.as_ref(), &[]).unwrap()
    }

    #[test]
    fn a_folder_is_its_texts_in_order() {
        let texts = Texts::new(
            "order",
            &[("b.md", b"two"), ("a.txt", b"one"), ("c.bin", b"\xff")],
        );
        let checked = check(&texts.options(""), &settings(), &[]).unwrap();
        assert_eq!(checked.text, "one\n\ntwo");
        assert_eq!(checked.mode, Mode::Quick);
        let checked = check(&texts.options("a.txt"), &settings(), &["log.level=warn".into()]).unwrap();
        assert_eq!(
            (checked.text.as_str(), checked.text_name.as_str()),
            ("one", "a.txt")
        );
    }

    #[test]
    fn refusals_name_the_field() {
        let texts = Texts::new(
            "refused",
            &[("a.txt", b"one"), ("c.bin", b"\xff"), ("d.txt", b" ")],
        );
        type Change = fn(&mut Options);
        let cases: [(Change, &str); 8] = [
            (|o| o.text.push("none"), "field `--text`: given "),
            (
                |o| o.text.set_file_name("c.bin"),
                "c.bin (stream did not contain valid UTF-8), allowed a text file",
            ),
            (|o| o.text.set_file_name("d.txt"), "d.txt (nothing in it)"),
            (
                |o| o.grid = Some("no-such-grid".into()),
                "field `--grid`: given no-such-grid (No such file",
            ),
            (
                |o| o.max_kl = Some(-1.0),
                "field `--max-kl`: given -1, allowed 0 or more",
            ),
            (
                |o| o.max_kl = Some(f64::NAN),
                "field `--max-kl`: given NaN, allowed 0 or more",
            ),
            (
                |o| o.max_perplexity = Some(-0.5),
                "field `--max-perplexity`: given -0.5",
            ),
            (
                |o| o.min_top1 = Some(95.0),
                "field `--min-top1`: given 95, allowed 0 to 1",
            ),
        ];
        for (change, wanted) in cases {
            let mut options = texts.options("a.txt");
            change(&mut options);
            let said = check(&options, &settings(), &[]).unwrap_err().to_string();
            assert!(said.contains(wanted), "{said}\n  wanted {wanted}");
        }
        for set in ["ladder.file=x", "class.default.level=1", "kv.plugin=off"] {
            let said = check(&texts.options("a.txt"), &settings(), &[set.into()]).unwrap_err();
            assert!(
                said.to_string()
                    .starts_with(&format!("field `--set`: given {set}")),
                "{said}"
            );
        }
        let mut off = settings();
        off.kv.plugin = Switch::Off;
        let said = check(&texts.options("a.txt"), &off, &[]).unwrap_err();
        assert!(
            said.to_string().starts_with("field `kv.plugin`: given off"),
            "{said}"
        );
    }
}
