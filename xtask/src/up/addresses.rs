//! Where the server will listen, and what to tell the user of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

/// The two listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) openai: SocketAddr,
    pub(super) api: SocketAddr,
}

/// An address that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum AddressError {
    #[error("the configuration is not TOML")]
    Toml(#[from] toml::de::Error),
    #[error("field `{field}`: missing; expected an address, as in 127.0.0.1:8080")]
    Missing { field: &'static str },
    #[error("field `{field}`: given {given:?}, expected an address, as in 127.0.0.1:8080")]
    Malformed { field: &'static str, given: String },
    #[error("{field} {address}: {reason}; choose another with {flag}")]
    Taken {
        field: &'static str,
        address: SocketAddr,
        flag: &'static str,
        reason: std::io::Error,
    },
}

impl Addresses {
    /// As the engine finds them: `--set`, then the environment, then the file.
    pub(super) fn find(
        config: &str,
        sets: &[String],
        env: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, AddressError> {
        let config: toml::Table = toml::from_str(config)?;
        let find = |field: &'static str, variable| {
            let set = sets
                .iter()
                .rev()
                .find_map(|set| Some(set.strip_prefix(field)?.strip_prefix('=')?.to_owned()));
            let file = || {
                let (section, key) = field.split_once('.')?;
                Some(config.get(section)?.get(key)?.as_str()?.to_owned())
            };
            let given = set
                .or_else(|| env(variable))
                .or_else(file)
                .ok_or(AddressError::Missing { field })?;
            given
                .parse()
                .map_err(|_| AddressError::Malformed { field, given })
        };
        Ok(Self {
            openai: find("server.listen", "CINCH__SERVER__LISTEN")?,
            api: find("api.listen", "CINCH__API__LISTEN")?,
        })
    }

    /// Fails where something listens already: it, not ours, would answer that it is ready.
    pub(super) fn check_free(&self) -> Result<(), AddressError> {
        let check = |field, flag, address| {
            TcpListener::bind(address)
                .map(drop)
                .map_err(|reason| AddressError::Taken {
                    field,
                    address,
                    flag,
                    reason,
                })
        };
        check("server.listen", "--listen", self.openai)?;
        check("api.listen", "--api-listen", self.api)
    }

    /// What to do now that it is ready.
    pub(super) fn welcome(&self) -> String {
        let (openai, api) = (reachable(self.openai), reachable(self.api));
        format!(
            r#"
  OpenAI API  http://{openai}/v1
  Policy API  http://{api}/v1        metrics: /metrics   description: /openapi.json

  Try, in another terminal:

    # a chat of the class "batch", long enough to watch
    curl -sN http://{openai}/v1/chat/completions -H 'content-type: application/json' \
      -H 'x-cinch-class: batch' -d '{{"model": "default", "stream": true, "max_tokens": 800,
      "messages": [{{"role": "user", "content": "Tell me a long story about a lighthouse."}}]}}'

    # meanwhile: which requests run, and what their caches hold
    curl -s http://{api}/v1/requests

    # squeeze a running one harder, by the id of that answer
    curl -s -X PATCH http://{api}/v1/requests/ID -H 'content-type: application/json' \
      -d '{{"policy": {{"select": {{"method": "h2o", "budget": 0.5}}, "quantize": {{"k_bits": 4, "v_bits": 4}}}}}}'

  Ctrl-C stops it.

"#
        )
    }
}

/// The address to reach a listener at: "any" is no address to connect to.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "[server]\nlisten = \"127.0.0.1:8080\"\n[api]\nlisten = \"127.0.0.1:9180\"\n";

    fn find(sets: &[&str], env: &[(&str, &str)]) -> Result<Addresses, AddressError> {
        let sets: Vec<_> = sets.iter().map(|&set| set.to_owned()).collect();
        Addresses::find(CONFIG, &sets, |name| {
            env.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn later_sources_win() {
        let ports = |sets: &[&str], env: &[(&str, &str)]| {
            let addresses = find(sets, env).unwrap();
            (addresses.openai.port(), addresses.api.port())
        };
        assert_eq!(ports(&[], &[]), (8080, 9180));
        assert_eq!(ports(&[], &[("CINCH__API__LISTEN", "0.0.0.0:1")]), (8080, 1));
        let sets = [
            "api.listen=127.0.0.1:2",
            "server.listen=[::]:3",
            "api.listen=127.0.0.1:4",
        ];
        assert_eq!(ports(&sets, &[("CINCH__API__LISTEN", "0.0.0.0:1")]), (3, 4));
    }

    #[test]
    fn what_is_no_address_is_named() {
        let err = find(&["server.listen=8080"], &[]).unwrap_err().to_string();
        assert!(err.starts_with("field `server.listen`: given \"8080\""), "{err}");
        let err = Addresses::find("[server]\n", &[], |_| None)
            .unwrap_err()
            .to_string();
        assert!(err.starts_with("field `server.listen`: missing"), "{err}");
    }

    #[test]
    fn a_port_in_use_is_named_with_the_flag_that_helps() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let api = taken.local_addr().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let openai = free.local_addr().unwrap();
        drop(free);
        let err = Addresses { openai, api }.check_free().unwrap_err().to_string();
        assert!(
            err.starts_with(&format!("api.listen {api}: ")) && err.ends_with("--api-listen"),
            "{err}"
        );
    }

    #[test]
    fn the_welcome_names_addresses_one_can_connect_to_and_valid_json() {
        let addresses = find(&["server.listen=0.0.0.0:81"], &[]).unwrap();
        let text = addresses.welcome();
        assert!(
            text.contains("http://127.0.0.1:81/v1/chat")
                && text.contains("http://127.0.0.1:9180/v1/requests")
        );
        let bodies: Vec<_> = text
            .split("-d '")
            .skip(1)
            .filter_map(|rest| rest.split('\'').next())
            .collect();
        assert_eq!(bodies.len(), 2);
        for body in bodies {
            serde_json::from_str::<serde_json::Value>(body).unwrap();
        }
    }
}
