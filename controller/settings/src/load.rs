//! Merging the sources, and decoding what they come to.

use std::ffi::OsString;
use std::path::Path;

use config::{Config, Environment, File, FileFormat};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::ConfigError;
use crate::fields::{FieldFault, decode};

const SEPARATOR: &str = "__";

/// How a program's settings are given.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Environment variables begin with it and `__`.
    pub prefix: &'static str,
    /// How a `--set` looks, for help texts and messages.
    pub example: &'static str,
}

/// All sources, merged.
#[derive(Debug, Clone)]
pub struct Merged {
    /// Field by field, the last source's value.
    pub value: Value,
    /// Keys that the command line set.
    pub set: Vec<String>,
    origin: String,
    prefix: &'static str,
}

impl Program {
    /// Reads a settings file; its name is its path.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read(path: &Path) -> Result<String, ConfigError> {
        std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })
    }

    /// Merges `text`, then `PREFIX__SECTION__FIELD` variables, then `overrides` (`key=value`, TOML values). `origin`
    /// names the text in messages.
    ///
    /// # Errors
    /// The first source that is no TOML.
    pub fn merge(self, text: &str, origin: &str, overrides: &[String]) -> Result<Merged, ConfigError> {
        let mut builder = Config::builder()
            .add_source(toml_source(text, origin)?)
            .add_source(
                Environment::with_prefix(self.prefix)
                    .prefix_separator(SEPARATOR)
                    .separator(SEPARATOR)
                    .try_parsing(true),
            );
        for source in self.lists(std::env::vars_os())? {
            builder = builder.add_source(source);
        }
        let mut set = Vec::new();
        for given in overrides {
            let (key, source) = self.override_source(given)?;
            builder = builder.add_source(source);
            set.push(key);
        }
        let syntax = |err: config::ConfigError| ConfigError::Syntax {
            origin: origin.to_owned(),
            reason: one_line(&err.to_string()),
        };
        let value = builder
            .build()
            .map_err(syntax)?
            .try_deserialize()
            .map_err(syntax)?;
        Ok(Merged {
            value,
            set,
            origin: origin.to_owned(),
            prefix: self.prefix,
        })
    }

    /// Variables that hold a whole list or table, as TOML writes it: the config crate takes them for text.
    fn lists(
        self,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> Result<Vec<File<config::FileSourceString, FileFormat>>, ConfigError> {
        let mut sources = Vec::new();
        for (name, value) in variables {
            let (Ok(name), Ok(value)) = (name.into_string(), value.into_string()) else {
                continue;
            };
            let key = name
                .strip_prefix(self.prefix)
                .and_then(|rest| rest.strip_prefix(SEPARATOR));
            if let Some(key) = key
                && value.trim_start().starts_with(['[', '{'])
            {
                let line = format!("{} = {value}", key.to_lowercase().replace(SEPARATOR, "."));
                sources.push(toml_source(&line, &format!("environment variable {name}"))?);
            }
        }
        Ok(sources)
    }

    fn override_source(
        self,
        given: &str,
    ) -> Result<(String, File<config::FileSourceString, FileFormat>), ConfigError> {
        let bad = || ConfigError::Override {
            given: given.to_owned(),
            example: self.example,
        };
        let (key, value) = given.split_once('=').ok_or_else(bad)?;
        let key = key.trim();
        let is_part = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        };
        if !key.split('.').all(is_part) {
            return Err(bad());
        }
        // A bare word need not be quoted on the command line.
        let line = format!("{key} = {value}");
        let line = match toml::from_str::<toml::Table>(&line) {
            Ok(table) if table.len() == 1 => line,
            _ => format!("{key} = {}", toml::Value::String(value.to_owned())),
        };
        let source = toml_source(&line, &format!("--set {key}"))?;
        Ok((key.to_owned(), source))
    }
}

impl Merged {
    /// The settings, if they pass `check`.
    ///
    /// # Errors
    /// The first field that does not fit, with the source it came from.
    pub fn settings<T: DeserializeOwned>(
        &self,
        check: impl FnOnce(&T) -> Result<(), FieldFault>,
    ) -> Result<T, ConfigError> {
        let checked = decode::<T>(&self.value, "").and_then(|settings| check(&settings).map(|()| settings));
        checked.map_err(|fault| ConfigError::Field {
            origin: self.source_of(&fault.field),
            fault,
        })
    }

    /// Which source the value at `field` came from: a later one has replaced an earlier one's.
    fn source_of(&self, field: &str) -> String {
        let covers = |key: &str| {
            let rest = field.strip_prefix(key);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        if let Some(key) = self.set.iter().rev().find(|key| covers(key)) {
            return format!("--set {key}");
        }
        let variable = std::env::vars_os()
            .filter_map(|(name, _)| name.into_string().ok())
            .find(|name| {
                name.strip_prefix(self.prefix)
                    .and_then(|rest| rest.strip_prefix(SEPARATOR))
                    .is_some_and(|rest| covers(&rest.to_lowercase().replace(SEPARATOR, ".")))
            });
        variable.map_or_else(
            || self.origin.clone(),
            |name| format!("environment variable {name}"),
        )
    }
}

/// The config crate's own parser would hide where the mistake is: parse first for the message.
fn toml_source(text: &str, origin: &str) -> Result<File<config::FileSourceString, FileFormat>, ConfigError> {
    toml::from_str::<toml::Table>(text).map_err(|err| {
        let line = err
            .span()
            .map(|span| text[..span.start.min(text.len())].lines().count().max(1));
        let at = line.map(|line| format!("line {line}: ")).unwrap_or_default();
        ConfigError::Syntax {
            origin: origin.to_owned(),
            reason: format!("{at}{}", one_line(err.message())),
        }
    })?;
    Ok(File::from_str(text, FileFormat::Toml))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const PROGRAM: Program = Program {
        prefix: "X",
        example: "--set a=1",
    };

    fn lists(variables: &[(&str, &str)]) -> Result<Value, ConfigError> {
        let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
        let mut builder = Config::builder();
        for source in PROGRAM.lists(variables)? {
            builder = builder.add_source(source);
        }
        Ok(builder.build().unwrap().try_deserialize().unwrap())
    }

    #[test]
    fn a_variable_may_hold_a_list_or_a_table() {
        let variables = [
            ("X__ENGINE", "[{ name = \"a\" }, { name = \"b\" }]"),
            ("X__CLASS__BATCH", "{ level = 2 }"),
            ("X__MODE", "live"),
            ("Y__ENGINE", "[1]"),
        ];
        assert_eq!(
            lists(&variables).unwrap(),
            json!({"engine": [{"name": "a"}, {"name": "b"}], "class": {"batch": {"level": 2}}})
        );
        let err = lists(&[("X__ENGINE", "[{ token = \"secret\" ]")])
            .unwrap_err()
            .to_string();
        assert!(
            err.starts_with("environment variable X__ENGINE: not valid TOML") && !err.contains("secret"),
            "{err}"
        );
    }
}
