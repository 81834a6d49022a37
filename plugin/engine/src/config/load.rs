//! From file, environment and `--set` to [`Settings`].

use std::path::{Path, PathBuf};

use cinch_protocol::{Given, Ladder};
use cinch_settings::{ConfigError, FieldFault, Program};
use serde_json::Value;

use super::ladder;
use super::types::Settings;
use super::validate::{validate, validate_classes};

const PROGRAM: Program = Program {
    prefix: "CINCH",
    example: "--set kv.capacity_bytes=536870912",
};

impl Settings {
    /// Reads `path`, then `CINCH__SECTION__FIELD` variables, then `overrides` (`key=value`, TOML values).
    ///
    /// # Errors
    /// The first thing wrong, with its source.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Self::parse(&Program::read(path)?, path, overrides)
    }

    /// As [`load`](Self::load), from text; `path` names it in messages, and the ladder is looked for beside it.
    ///
    /// # Errors
    /// The first thing wrong, with its source.
    pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut merged = PROGRAM.merge(text, &path.display().to_string(), overrides)?;
        one_way_a_class(&mut merged.value, text, &merged.set);
        let (mut file, mut ladder) = (PathBuf::new(), String::new());
        let mut settings: Self = merged.settings(|settings: &Self| {
            validate(settings)?;
            file = path.parent().unwrap_or(Path::new("")).join(&settings.ladder.file);
            ladder = std::fs::read_to_string(&file).map_err(|err| {
                let given = format!("{} ({err})", file.display());
                FieldFault::new("ladder.file", given, "a file that can be read")
            })?;
            Ok(())
        })?;
        settings.ladder.content = ladder::parse(&ladder, &file.display().to_string())?;
        // Only now is it known what levels a class can ask for.
        let ladder = Ladder::from(&settings.ladder.content);
        merged.settings(|again: &Self| validate_classes(again, &ladder))?;
        Ok(settings)
    }
}

/// A class has a policy, a level or a ratio. Sources are merged field by field, so where a later source gives a
/// class another of them, the file's is taken away; within one source several are an error.
fn one_way_a_class(value: &mut Value, file: &str, set: &[String]) {
    let file: toml::Table = toml::from_str(file).unwrap_or_default();
    let Some(classes) = value.get_mut("class").and_then(Value::as_object_mut) else {
        return;
    };
    for (name, class) in classes {
        let Some(class) = class.as_object_mut() else {
            continue;
        };
        let in_file = |key: &str| {
            let found = file.get("class").and_then(|classes| classes.get(name)?.get(key));
            found.is_some() && !set.contains(&format!("class.{name}.{key}"))
        };
        let given = Given::FIELDS.into_iter().filter(|key| class.contains_key(*key));
        let (from_file, later): (Vec<&str>, Vec<&str>) = given.partition(|key| in_file(key));
        if !later.is_empty() {
            for key in from_file {
                class.remove(key);
            }
        }
    }
}
