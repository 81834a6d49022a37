//! Settings: every field has a range and a reason, documented in `configs/controller.toml`, and a value that passed
//! [`Settings::load`] is in its range.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::path::Path;

use cinch_settings::{ConfigError, FieldFault, Program};
use serde::{Deserialize, Serialize};

use crate::law::{ClassBounds, LawConfig};

const PROGRAM: Program = Program {
    prefix: "CINCH_CONTROLLER",
    example: "--set mode=live",
};

/// Everything configurable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What decisions do.
    #[serde(default)]
    pub mode: Mode,
    /// Where status, decisions and metrics are served.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Seconds between two decisions, 0.1 ..= 300.
    #[serde(default = "default_tick")]
    pub tick_seconds: f64,
    /// Seconds between two scrapes of an engine, 0.1 ..= `tick_seconds`.
    #[serde(default = "default_scrape")]
    pub scrape_seconds: f64,
    /// The engines.
    pub engine: Vec<Engine>,
    /// Where latency and quality come from instead of the engines themselves.
    #[serde(default)]
    pub prometheus: Option<PrometheusSource>,
    /// How long a class's level holds without the controller.
    #[serde(default)]
    pub lease: LeaseSettings,
    /// The law's numbers.
    #[serde(default)]
    pub law: LawConfig,
    /// Bounds by class; `default` holds for classes not named.
    #[serde(default)]
    pub class: BTreeMap<String, ClassBounds>,
    /// Logs.
    #[serde(default)]
    pub log: Log,
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9190))
}

fn default_tick() -> f64 {
    5.0
}

fn default_scrape() -> f64 {
    1.0
}

/// What decisions do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Watch only: no decisions.
    Off,
    /// Decide and say so; write nothing.
    #[default]
    Recommend,
    /// Set the levels of classes: requests to come.
    NewRequests,
    /// And tighten running requests.
    Live,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Off, Self::Recommend, Self::NewRequests, Self::Live];

    /// The name in settings and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Recommend => "recommend",
            Self::NewRequests => "new_requests",
            Self::Live => "live",
        }
    }
}

/// One engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// A name for people and metrics, 1 to 64 characters.
    pub name: String,
    /// Its policy API, `http://host:port`.
    pub url: String,
    /// Its bearer token, if it has one.
    #[serde(default)]
    pub token: Option<String>,
}

/// A Prometheus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrometheusSource {
    /// `http://host:port`.
    pub url: String,
    /// The label that holds an engine's name.
    #[serde(default = "default_label")]
    pub label: String,
}

fn default_label() -> String {
    "instance".to_owned()
}

/// How long a class's level holds without the controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeaseSettings {
    /// Seconds until the engine returns to its own policy, 2 ..= 3600.
    pub ttl_seconds: u64,
    /// Seconds between renewals, 1 ..= `ttl_seconds` / 2.
    pub renew_seconds: u64,
}

impl Default for LeaseSettings {
    fn default() -> Self {
        Self {
            ttl_seconds: 60,
            renew_seconds: 15,
        }
    }
}

/// Logs, on standard error.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// For people or for machines.
    pub format: LogFormat,
    /// How much.
    pub level: LogLevel,
}

/// How a log line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures.
    Error,
    /// And what may become one.
    Warn,
    /// And every move.
    #[default]
    Info,
    /// And every tick.
    Debug,
}

impl Settings {
    /// Reads `path`, then `CINCH_CONTROLLER__SECTION__FIELD` variables, then `overrides` (`key=value`, TOML values).
    ///
    /// # Errors
    /// The first thing wrong, with its source.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Self::parse(&Program::read(path)?, &path.display().to_string(), overrides)
    }

    /// As [`load`](Self::load), from text; `origin` names it in messages.
    ///
    /// # Errors
    /// The first thing wrong, with its source.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        PROGRAM.merge(text, origin, overrides)?.settings(Self::validate)
    }

    fn validate(&self) -> Result<(), FieldFault> {
        range("tick_seconds", self.tick_seconds, 0.1, 300.0)?;
        range("scrape_seconds", self.scrape_seconds, 0.1, self.tick_seconds)?;
        range("lease.ttl_seconds", self.lease.ttl_seconds, 2, 3600)?;
        range(
            "lease.renew_seconds",
            self.lease.renew_seconds,
            1,
            self.lease.ttl_seconds / 2,
        )?;
        if !self.listen.ip().is_loopback() {
            let allowed = "a loopback address: there is no authentication; put a proxy in front";
            return Err(FieldFault::new("listen", self.listen, allowed));
        }
        if self.engine.is_empty() {
            return Err(FieldFault::new("engine", "no engines", "at least one"));
        }
        for (index, engine) in self.engine.iter().enumerate() {
            let field = |name: &str| format!("engine[{index}].{name}");
            if !(1..=64).contains(&engine.name.len()) {
                let given = format_args!("{} characters", engine.name.len());
                return Err(FieldFault::new(field("name"), given, "1 to 64 characters"));
            }
            if self.engine[..index].iter().any(|other| other.name == engine.name) {
                return Err(FieldFault::new(
                    field("name"),
                    &engine.name,
                    "a name no other engine has",
                ));
            }
            url(&field("url"), &engine.url)?;
        }
        if let Some(prometheus) = &self.prometheus {
            url("prometheus.url", &prometheus.url)?;
            let label = &prometheus.label;
            if label.is_empty() || !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return Err(FieldFault::new("prometheus.label", label, "a label's name"));
            }
        }
        self.law.validate().map_err(|fault| fault.within("law"))?;
        for (name, bounds) in &self.class {
            bounds
                .validate()
                .map_err(|fault| fault.within(&format!("class.{name}")))?;
        }
        Ok(())
    }
}

fn url(field: &str, given: &str) -> Result<(), FieldFault> {
    let rest = given.strip_prefix("http://").unwrap_or_default();
    let host = rest.trim_end_matches('/');
    if host.is_empty() || host.contains(['/', ' ', '@', '?', '#']) {
        return Err(FieldFault::new(field, given, "http://host:port"));
    }
    Ok(())
}

fn range<T: PartialOrd + Display>(field: &str, given: T, low: T, high: T) -> Result<(), FieldFault> {
    if given >= low && given <= high {
        Ok(())
    } else {
        Err(FieldFault::new(field, given, format!("{low} to {high}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = include_str!("../../configs/controller.toml");

    fn fails(change: &str) -> String {
        Settings::parse(FILE, "controller.toml", &[change.to_owned()])
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_file_says_what_the_defaults_are() {
        let settings = Settings::parse(FILE, "controller.toml", &[]).unwrap();
        assert_eq!(settings.law, LawConfig::default());
        assert_eq!(
            (settings.mode, settings.lease),
            (Mode::Recommend, LeaseSettings::default())
        );
        assert_eq!((settings.tick_seconds, settings.scrape_seconds), (5.0, 1.0));
    }

    #[test]
    fn bad_settings_are_named() {
        for (change, words) in [
            (
                "mode=full",
                "field `mode`: given \"full\", allowed `off`, `recommend`, `new_requests`, `live`",
            ),
            ("law.up=2", "field `law.up`: given 2, allowed 0.1 to 1"),
            ("law.ups=2", "field `law.ups`: given an unknown field"),
            (
                "scrape_seconds=9",
                "field `scrape_seconds`: given 9, allowed 0.1 to 5",
            ),
            (
                "lease.renew_seconds=40",
                "field `lease.renew_seconds`: given 40, allowed 1 to 30",
            ),
            ("engine=[]", "field `engine`: given no engines"),
            (
                "engine=[{name=\"a\",url=\"ftp://x\"}]",
                "field `engine[0].url`: given ftp://x, allowed http://host:port",
            ),
            (
                "listen=0.0.0.0:9190",
                "field `listen`: given 0.0.0.0:9190, allowed a loopback address",
            ),
            ("class.batch.min_level=-1", "field `class.batch.min_level`"),
            (
                "class.batch={min_level=3,max_level=1}",
                "field `class.batch.max_level`: given 1, allowed 3",
            ),
            (
                "class.x.error_floor=0",
                "field `class.x.error_floor`: given 0, allowed 0.0001 to 10",
            ),
        ] {
            let said = fails(change);
            assert!(said.contains(words), "{change}: {said}");
        }
    }
}
