//! The command line of `cinch calibrate`, checked: what is wrong is said before a model is loaded.

use std::path::PathBuf;

use cinch_protocol::QuantizeMethod;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::super::options::{self, Mode};
use crate::config::Settings;
use crate::fields::FieldFault;

/// What `cinch calibrate` is told.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The text, like what will be served: a file, or a folder whose .txt and .md files are taken in order of their names.
    /// Its first part is calibrated on, its last one verified on.
    #[arg(long, value_name = "FILE|DIR")]
    pub text: PathBuf,
    /// The folder for calibration.json, grid.toml and the points measured so far; made if it is not there. The same command
    /// goes on where an earlier one was ended.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Little text, and five layers together: minutes instead of tens of them, and figures to match.
    #[arg(long)]
    pub quick: bool,
    /// How values map to codes: rtn (its keys rotated) or kivi.
    #[arg(long, value_name = "NAME", default_value = "rtn")]
    pub method: String,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sizes {
    /// Stretches of the text that are calibrated on.
    pub(super) calibration_windows: usize,
    /// Later ones that are verified on.
    pub(super) verification_windows: usize,
    /// Prompt tokens of each.
    pub(super) context: usize,
    /// Tokens that are then forced.
    pub(super) steps: usize,
    /// Layers that follow one another and are measured together.
    pub(super) layers_together: usize,
}

impl Sizes {
    pub(super) fn of(mode: Mode) -> Self {
        match mode {
            Mode::Quick => Self {
                calibration_windows: 1,
                verification_windows: 1,
                context: 192,
                steps: 32,
                layers_together: 5,
            },
            Mode::Full => Self {
                calibration_windows: 2,
                verification_windows: 4,
                context: 1024,
                steps: 128,
                layers_together: 1,
            },
        }
    }
}

/// The checked options.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) mode: Mode,
    pub(super) sizes: Sizes,
    pub(super) method: QuantizeMethod,
    pub(super) text: String,
    /// The text's name, for people.
    pub(super) text_name: String,
}

/// Checks `options` against a configuration that was made with `overrides`.
pub(super) fn check(
    options: &Options,
    settings: &Settings,
    overrides: &[String],
) -> Result<Checked, FieldFault> {
    options::configuration(settings, overrides, "cinch calibrate")?;
    let method = QuantizeMethod::ALL
        .iter()
        .find(|method| method.name() == options.method);
    let method = match method {
        Some(method @ (QuantizeMethod::Rtn | QuantizeMethod::Kivi)) => *method,
        _ => {
            let allowed = "rtn or kivi, which pack keys and values each in 2, 3, 4 or 8 bits";
            return Err(FieldFault::new("--method", &options.method, allowed));
        }
    };
    let mode = if options.quick { Mode::Quick } else { Mode::Full };
    Ok(Checked {
        mode,
        sizes: Sizes::of(mode),
        method,
        text: options::text(&options.text)?,
        text_name: options::name(&options.text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml");

    fn options(text: &str) -> Options {
        Options {
            text: text.into(),
            out: "out".into(),
            quick: true,
            method: "rtn".into(),
        }
    }

    #[test]
    fn what_can_be() {
        let settings = Settings::load(CONFIG.as_ref(), &[]).unwrap();
        let checked = check(&options(CONFIG), &settings, &["log.level=warn".into()]).unwrap();
        assert_eq!((checked.mode, checked.method), (Mode::Quick, QuantizeMethod::Rtn));
        assert_eq!(checked.sizes, Sizes::of(Mode::Quick));
        assert_eq!(checked.text_name, "engine.toml");
        let mut other = options(CONFIG);
        (other.quick, other.method) = (false, "kivi".into());
        let checked = check(&other, &settings, &[]).unwrap();
        assert_eq!((checked.mode, checked.method), (Mode::Full, QuantizeMethod::Kivi));
    }

    #[test]
    fn every_other_method_is_refused() {
        let settings = Settings::load(CONFIG.as_ref(), &[]).unwrap();
        let names = QuantizeMethod::ALL.iter().map(|method| method.name());
        for name in names
            .filter(|name| !["rtn", "kivi"].contains(name))
            .chain(["int4", ""])
        {
            let mut options = options(CONFIG);
            name.clone_into(&mut options.method);
            let said = check(&options, &settings, &[]).unwrap_err().to_string();
            let wanted = format!("field `--method`: given {name}, allowed rtn or kivi, ");
            assert!(said.starts_with(&wanted), "{said}");
        }
    }
}
