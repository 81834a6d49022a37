//! What to tell who started it: where things are, and what to try.

use super::settings::{Controller, Engine, Mode};

/// Everything is ready.
pub(super) fn text(engine: &Engine, controller: Option<&Controller>) -> String {
    let (openai, api) = (engine.openai_url(), engine.api_url());
    // The token itself is for nobody's screen.
    let (token, note) = match engine.token {
        Some(_) => (
            " -H \"authorization: Bearer $TOKEN\"",
            "  # TOKEN: your api.token",
        ),
        None => ("", ""),
    };
    let mut text = format!(
        r#"
  OpenAI API  {openai}/v1
  Policy API  {api}/v1        metrics: /metrics   description: /openapi.json
"#
    );
    if let Some(controller) = controller {
        text += &format!(
            "  Controller  {}/v1        metrics: /metrics   mode: {}{}\n",
            controller.url(),
            controller.mode.name(),
            match controller.mode {
                Mode::Off => ", it only watches",
                Mode::Recommend => ", it writes nothing (--controller-mode live: it does)",
                Mode::NewRequests | Mode::Live => "",
            }
        );
    }
    text += &format!(
        r#"
  Try, in another terminal:{note}

    # a chat of the class "batch", long enough to watch
    curl -sN {openai}/v1/chat/completions -H 'content-type: application/json' \
      -H 'x-cinch-class: batch' -d '{{"model": "default", "stream": true, "max_tokens": 800,
      "messages": [{{"role": "user", "content": "Tell me a long story about a lighthouse."}}]}}'

    # meanwhile: which requests run, and what their caches hold
    curl -s{token} {api}/v1/requests

    # squeeze a running one harder, by the id of that answer
    curl -s{token} -X PATCH {api}/v1/requests/ID -H 'content-type: application/json' \
      -d '{{"policy": {{"select": {{"method": "h2o", "budget": 0.5}}, "quantize": {{"k_bits": 4, "v_bits": 4}}}}}}'
"#
    );
    if let Some(controller) = controller {
        let url = controller.url();
        text += &format!(
            r"
    # what the controller sees, and what it decided and why
    curl -s {url}/v1/status
    curl -s {url}/v1/decisions
"
        );
    }
    text + "\n  Ctrl-C stops it all.\n\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(token: Option<&str>) -> Engine {
        Engine {
            openai: "0.0.0.0:81".parse().unwrap(),
            api: "127.0.0.1:9180".parse().unwrap(),
            token: token.map(|token| serde_json::from_value(token.into()).unwrap()),
        }
    }

    #[test]
    fn addresses_one_can_connect_to_and_valid_json() {
        let controller = Controller {
            listen: "127.0.0.1:9190".parse().unwrap(),
            mode: Mode::Recommend,
        };
        let text = text(&engine(None), Some(&controller));
        for part in [
            "http://127.0.0.1:81/v1/chat",
            "http://127.0.0.1:9180/v1/requests",
            "http://127.0.0.1:9190/v1/status",
            "http://127.0.0.1:9190/v1/decisions",
            "--controller-mode live",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
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

    #[test]
    fn no_controller_no_word_of_it_and_never_the_token() {
        let text = text(&engine(Some("0123456789abcdef")), None);
        assert!(!text.to_lowercase().contains("controller"), "{text}");
        assert!(text.contains("Bearer $TOKEN") && !text.contains("0123456789abcdef"));
    }
}
