//! What engine and controller will read of their settings that concerns who starts them: where they listen, and the
//! policy API's token. Read as they read it: the file, the environment, `--set`. The token is never shown.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;

use cinch_settings::{ConfigError, Program};
use serde::{Deserialize, Serialize};

use super::ready::reachable;

const ENGINE: Program = Program {
    prefix: "CINCH",
    example: "--set kv.plugin=off",
};
const CONTROLLER: Program = Program {
    prefix: "CINCH_CONTROLLER",
    example: "--controller-set tick_seconds=1",
};
/// The variable that replaces the controller's list of engines. A command line would show the token to every user.
const ENGINES: &str = "CINCH_CONTROLLER__ENGINE";
const ADDRESS: &str = "an address, as in 127.0.0.1:8080";

/// A secret that has no way into messages.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(crate) struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Where the engine listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Engine {
    /// OpenAI routes.
    pub(crate) openai: SocketAddr,
    /// Policy API and metrics.
    pub(crate) api: SocketAddr,
    /// What the policy API wants to be told.
    pub(crate) token: Option<Token>,
}

/// A port that can't be had.
#[derive(Debug, thiserror::Error)]
#[error("{field} {address}: {reason}; choose another with {flag}")]
pub(crate) struct Taken {
    field: &'static str,
    address: SocketAddr,
    flag: &'static str,
    reason: std::io::Error,
}

/// An address to listen on.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(try_from = "String")]
struct Address(SocketAddr);

/// Worded as settings word what is allowed.
#[derive(Debug, thiserror::Error)]
#[error("no address, allowed {ADDRESS}")]
struct NoAddress;

impl TryFrom<String> for Address {
    type Error = NoAddress;

    fn try_from(given: String) -> Result<Self, NoAddress> {
        given.parse().map(Self).map_err(|_| NoAddress)
    }
}

#[derive(Debug, Deserialize)]
struct EngineFile {
    server: Server,
    api: Api,
}

#[derive(Debug, Deserialize)]
struct Server {
    listen: Address,
}

#[derive(Debug, Deserialize)]
struct Api {
    listen: Address,
    token: Option<Token>,
}

#[derive(Debug, Deserialize)]
struct ControllerFile {
    listen: Option<Address>,
    #[serde(default)]
    mode: Mode,
}

/// Where a controller listens that is not told.
const CONTROLLER_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9190);

/// What a controller's decisions do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "snake_case")]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// It watches.
    Off,
    /// It decides and says so, and writes nothing.
    #[default]
    Recommend,
    /// It sets the levels of requests to come.
    NewRequests,
    /// And tightens running ones.
    Live,
}

impl Mode {
    /// As settings name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Recommend => "recommend",
            Self::NewRequests => "new_requests",
            Self::Live => "live",
        }
    }
}

/// A controller that is to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Controller {
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// What its decisions do.
    pub(crate) mode: Mode,
}

impl Engine {
    /// Of the settings at `path`, changed by `sets`.
    pub(crate) fn load(path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        Self::parse(&Program::read(path)?, &path.display().to_string(), sets)
    }

    fn parse(text: &str, origin: &str, sets: &[String]) -> Result<Self, ConfigError> {
        let file: EngineFile = ENGINE.merge(text, origin, sets)?.settings(|_| Ok(()))?;
        Ok(Self {
            openai: file.server.listen.0,
            api: file.api.listen.0,
            token: file.api.token,
        })
    }

    /// The base of the policy API's addresses.
    pub(crate) fn api_url(&self) -> String {
        format!("http://{}", reachable(self.api))
    }

    /// The base of the OpenAI routes' addresses.
    pub(crate) fn openai_url(&self) -> String {
        format!("http://{}", reachable(self.openai))
    }

    /// The variable that points a controller at this engine and no other.
    pub(crate) fn for_controller(&self) -> (&'static str, String) {
        let mut engine = toml::Table::new();
        engine.insert("name".into(), "local".into());
        engine.insert("url".into(), self.api_url().into());
        if let Some(Token(token)) = &self.token {
            engine.insert("token".into(), token.clone().into());
        }
        (ENGINES, toml::Value::Array(vec![engine.into()]).to_string())
    }

    /// The header that the policy API wants, if it wants one.
    pub(crate) fn authorization(&self) -> Option<String> {
        self.token.as_ref().map(|Token(token)| format!("Bearer {token}"))
    }
}

impl Controller {
    /// Of the settings at `path`, changed by `sets`.
    pub(crate) fn load(path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        let merged = CONTROLLER.merge(&Program::read(path)?, &path.display().to_string(), sets)?;
        let file: ControllerFile = merged.settings(|_| Ok(()))?;
        Ok(Self {
            listen: file.listen.map_or(CONTROLLER_LISTEN, |listen| listen.0),
            mode: file.mode,
        })
    }

    /// The base of its addresses.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", reachable(self.listen))
    }
}

/// Fails where something listens already (it, not ours, would answer that it is ready), or two want the same port.
pub(crate) fn check_free(engine: &Engine, controller: Option<&Controller>) -> Result<(), Taken> {
    let all = [
        ("server.listen", "--listen", Some(engine.openai)),
        ("api.listen", "--api-listen", Some(engine.api)),
        (
            "the controller's listen",
            "--controller-listen",
            controller.map(|controller| controller.listen),
        ),
    ];
    // Held until all are checked, so that none gets another's.
    let mut held = Vec::new();
    for (field, flag, address) in all {
        if let Some(address) = address {
            held.push(TcpListener::bind(address).map_err(|reason| Taken {
                field,
                address,
                flag,
                reason,
            })?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "[server]\nlisten = \"127.0.0.1:8080\"\n[api]\nlisten = \"127.0.0.1:9180\"\n";

    fn parse(sets: &[&str]) -> Result<Engine, ConfigError> {
        let sets: Vec<_> = sets.iter().map(|&set| set.to_owned()).collect();
        Engine::parse(CONFIG, "engine.toml", &sets)
    }

    #[test]
    fn later_settings_win() {
        let ports = |sets: &[&str]| {
            let engine = parse(sets).unwrap();
            (engine.openai.port(), engine.api.port())
        };
        assert_eq!(ports(&[]), (8080, 9180));
        let sets = [
            "api.listen=127.0.0.1:2",
            "server.listen=[::]:3",
            "api.listen=127.0.0.1:4",
        ];
        assert_eq!(ports(&sets), (3, 4));
    }

    #[test]
    fn what_is_no_address_is_named() {
        let err = parse(&["server.listen=here"]).unwrap_err().to_string();
        assert_eq!(
            err,
            format!("--set server.listen: field `server.listen`: given \"here\", allowed {ADDRESS}")
        );
        let err = Engine::parse("[server]\n", "engine.toml", &[])
            .unwrap_err()
            .to_string();
        assert!(err.contains("field `server.listen`: given nothing"), "{err}");
    }

    #[test]
    fn the_controller_follows_address_and_token_and_neither_shows() {
        let secret = "s3cret-\"quoted\"-s3cret";
        let token = format!("api.token='{secret}'");
        let engine = parse(&["api.listen=0.0.0.0:81", &token]).unwrap();
        assert!(!format!("{engine:?}").contains("s3cret"));
        assert_eq!(engine.authorization().unwrap(), format!("Bearer {secret}"));
        let (variable, value) = engine.for_controller();
        assert_eq!(variable, "CINCH_CONTROLLER__ENGINE");
        let read: toml::Table = toml::from_str(&format!("engine = {value}")).unwrap();
        let first = &read["engine"][0];
        assert_eq!(first["url"].as_str(), Some("http://127.0.0.1:81"));
        assert_eq!(first["token"].as_str(), Some(secret));
        assert!(!parse(&[]).unwrap().for_controller().1.contains("token"));
    }

    #[test]
    fn a_port_in_use_is_named_with_the_flag_that_helps() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = taken.local_addr().unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let engine = |openai, api| Engine {
            openai,
            api,
            token: None,
        };
        let said = |engine: &Engine, controller: Option<SocketAddr>| {
            let controller = controller.map(|listen| Controller {
                listen,
                mode: Mode::Off,
            });
            check_free(engine, controller.as_ref()).unwrap_err().to_string()
        };
        let err = said(&engine(any, busy), None);
        assert!(
            err.starts_with(&format!("api.listen {busy}: ")) && err.ends_with("--api-listen"),
            "{err}"
        );
        let err = said(&engine(any, any), Some(busy));
        assert!(err.ends_with("--controller-listen"), "{err}");
        drop(taken);
        let err = said(&engine(busy, any), Some(busy));
        assert!(err.ends_with("--controller-listen"), "two want the same: {err}");
        check_free(&engine(busy, any), None).unwrap();
    }
}
