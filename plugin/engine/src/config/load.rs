//! From file, environment and `--set` to [`Settings`]: a later source wins, and an error names the source
//! the offending value came from.

use std::path::Path;

use config::{Config, Environment, File, FileFormat};
use serde_json::Value;

use super::error::ConfigError;
use super::types::Settings;
use super::validate::validate;
use crate::fields::{FieldFault, decode};

const ENV_PREFIX: &str = "CINCH";
const SEPARATOR: &str = "__";
/// How a `--set` looks, for help texts and messages.
pub const OVERRIDE_EXAMPLE: &str = "--set kv.capacity_bytes=536870912";

impl Settings {
    /// Reads `path`, then `CINCH__SECTION__FIELD` variables, then `overrides` (`key=value`, TOML values).
    ///
    /// # Errors
    /// The first thing wrong, with its source.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, &path.display().to_string(), overrides)
    }

    /// As [`load`](Self::load), from text; `origin` names it in messages.
    ///
    /// # Errors
    /// The first thing wrong, with its source.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut builder = Config::builder()
            .add_source(toml_source(text, origin)?)
            .add_source(
                Environment::with_prefix(ENV_PREFIX)
                    .prefix_separator(SEPARATOR)
                    .separator(SEPARATOR)
                    .try_parsing(true),
            );
        let mut set = Vec::new();
        for given in overrides {
            let (key, source) = override_source(given)?;
            builder = builder.add_source(source);
            set.push(key);
        }
        let syntax = |err: config::ConfigError| ConfigError::Syntax {
            origin: origin.to_owned(),
            reason: one_line(&err.to_string()),
        };
        let mut value: Value = builder
            .build()
            .map_err(syntax)?
            .try_deserialize()
            .map_err(syntax)?;
        one_way_a_class(&mut value, text, &set);
        let check = || -> Result<Self, FieldFault> {
            let settings: Self = decode(&value, "")?;
            validate(&settings)?;
            Ok(settings)
        };
        check().map_err(|fault| ConfigError::Field {
            origin: source_of(&fault.field, &set, origin),
            fault,
        })
    }
}

/// A class has a level or a policy. Sources are merged field by field, so where a later source gives a
/// class the other of the two, the file's is taken away; within one source both are an error.
fn one_way_a_class(value: &mut Value, file: &str, set: &[String]) {
    let file: toml::Table = toml::from_str(file).unwrap_or_default();
    let Some(classes) = value.get_mut("class").and_then(Value::as_object_mut) else {
        return;
    };
    for (name, class) in classes {
        let Some(class) = class
            .as_object_mut()
            .filter(|class| class.contains_key("level") && class.contains_key("policy"))
        else {
            continue;
        };
        let in_file = |key: &str| {
            let found = file.get("class").and_then(|classes| classes.get(name)?.get(key));
            found.is_some() && !set.contains(&format!("class.{name}.{key}"))
        };
        match (in_file("level"), in_file("policy")) {
            (true, false) => class.remove("level"),
            (false, true) => class.remove("policy"),
            _ => None,
        };
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

fn override_source(given: &str) -> Result<(String, File<config::FileSourceString, FileFormat>), ConfigError> {
    let bad = || ConfigError::Override {
        given: given.to_owned(),
        example: OVERRIDE_EXAMPLE,
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

/// Which source the value at `field` came from: a later one has replaced an earlier one's.
fn source_of(field: &str, set: &[String], origin: &str) -> String {
    let covers = |key: &str| {
        let rest = field.strip_prefix(key);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    if let Some(key) = set.iter().rev().find(|key| covers(key)) {
        return format!("--set {key}");
    }
    let variable = std::env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .find(|name| {
            name.strip_prefix(ENV_PREFIX)
                .and_then(|rest| rest.strip_prefix(SEPARATOR))
                .is_some_and(|rest| covers(&rest.to_lowercase().replace(SEPARATOR, ".")))
        });
    variable.map_or_else(
        || origin.to_owned(),
        |name| format!("environment variable {name}"),
    )
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
