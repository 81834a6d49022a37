//! A load of streaming completions as its clients meet it: times are taken where the events arrive, a 503 is
//! counted and tried again when the answer says so, and a request counts as finished only if its stream was whole.
//!
//! Invariant: every request ends in exactly one [`End`]; nothing is dropped silently.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cinch_protocol::ServedWith;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::plan::stretch;

/// Characters of a token of English prose, about.
const TOKEN_CHARS: f64 = 4.2;
/// Between two looks at whether to stop, while a client waits to try again.
const LOOK: Duration = Duration::from_millis(100);

/// How long clients bear with a server.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Patience {
    /// Times that a refused request is tried again.
    pub retries: u32,
    /// Longest wait before that, whatever the answer asks for.
    pub longest_wait: Duration,
    /// Longest that one attempt takes, its answer included.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            retries: 10,
            longest_wait: Duration::from_secs(60),
            answer: Duration::from_secs(3600),
        }
    }
}

/// What a client meets, as it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A 503.
    Refused,
    /// It tries again.
    Retried,
    /// A token arrived.
    Token,
    /// The whole stream came.
    Finished,
    /// It tries no more.
    GivenUp,
    /// Its answer broke off, or was none.
    Lost,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// The whole stream came; what the engine says of it.
    Finished(Box<ServedWith>),
    /// Refused more often than patience bears, or told to stop while waiting.
    GivenUp,
    /// Anything else, and why: it was sent and there is no whole answer.
    Lost(String),
}

/// One request, when it is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// From first being sent to its first token, refusals and waits included.
    pub first_token: Option<Duration>,
    /// Between each token and the next.
    pub gaps: Vec<Duration>,
    /// Times it was answered 503.
    pub refused: u32,
    /// Times it was tried again.
    pub retried: u32,
    /// From first being sent to its end.
    pub took: Duration,
}

/// `count` distinct prompts of about `tokens` tokens, from places all over `text`.
#[must_use]
pub fn prompts(text: &str, count: usize, tokens: usize) -> Vec<String> {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )]
    let chars = (tokens as f64 * TOKEN_CHARS) as usize;
    #[allow(clippy::cast_precision_loss)]
    let last = (1.0 - 1.2 * chars as f64 / text.len().max(1) as f64).max(0.0);
    #[allow(clippy::cast_precision_loss)]
    let share = |i: usize| last * i as f64 / count as f64;
    (0..count).map(|i| stretch(text, share(i), chars)).collect()
}

/// The body of a greedy streaming completion.
#[must_use]
pub fn completion(prompt: &str, max_tokens: usize) -> Value {
    json!({"model": "default", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "stream": true})
}

/// Sends all `bodies` at once to `url` (`…/v1/completions`) and waits for all of them. `on` hears what happens to
/// which; once `stop` is set, nobody tries again.
pub fn run(
    url: &str,
    bodies: &[Value],
    patience: Patience,
    stop: &AtomicBool,
    on: &(dyn Fn(usize, Event) + Sync),
) -> Vec<Outcome> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = bodies
            .iter()
            .enumerate()
            .map(|(i, body)| scope.spawn(move || request(url, body, patience, stop, &|event| on(i, event))))
            .collect();
        let ended = clients.into_iter().map(|client| {
            client
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        ended.collect()
    })
}

/// What came of one attempt.
enum Attempt {
    Whole(Box<ServedWith>),
    Refused(Duration),
    Broken(String),
}

/// One request, from its first attempt to its end.
fn request(url: &str, body: &Value, patience: Patience, stop: &AtomicBool, on: &dyn Fn(Event)) -> Outcome {
    // No proxy of the environment: the server is a neighbour.
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(patience.answer))
        .proxy(None)
        .build()
        .into();
    let sent = Instant::now();
    let mut outcome = Outcome {
        end: End::GivenUp,
        first_token: None,
        gaps: Vec::new(),
        refused: 0,
        retried: 0,
        took: Duration::ZERO,
    };
    loop {
        let mut last: Option<Instant> = None;
        let attempt = attempt(&agent, url, body, &mut || {
            let now = Instant::now();
            match last {
                None => outcome.first_token = Some(now - sent),
                Some(last) => outcome.gaps.push(now - last),
            }
            last = Some(now);
            on(Event::Token);
        });
        match attempt {
            Attempt::Whole(served) => {
                outcome.end = End::Finished(served);
                on(Event::Finished);
            }
            Attempt::Broken(why) => {
                outcome.end = End::Lost(why);
                on(Event::Lost);
            }
            Attempt::Refused(wait) => {
                outcome.refused += 1;
                on(Event::Refused);
                if outcome.retried < patience.retries && slept(wait.min(patience.longest_wait), stop) {
                    outcome.retried += 1;
                    on(Event::Retried);
                    continue;
                }
                on(Event::GivenUp);
            }
        }
        outcome.took = sent.elapsed();
        return outcome;
    }
}

/// Waits; `false` if it was told to stop.
fn slept(wait: Duration, stop: &AtomicBool) -> bool {
    let until = Instant::now() + wait;
    while !stop.load(Ordering::Relaxed) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(LOOK));
    }
    false
}

fn attempt(agent: &ureq::Agent, url: &str, body: &Value, token: &mut dyn FnMut()) -> Attempt {
    let mut answer = match agent.post(url).send_json(body) {
        Ok(answer) => answer,
        Err(err) => return Attempt::Broken(err.to_string()),
    };
    match answer.status().as_u16() {
        200 => read(BufReader::new(answer.body_mut().as_reader()), token),
        503 => {
            let header = answer.headers().get("retry-after");
            let seconds = header.and_then(|value| value.to_str().ok()?.parse().ok());
            Attempt::Refused(Duration::from_secs(seconds.unwrap_or(1)))
        }
        status => {
            let said = answer.body_mut().read_to_string().unwrap_or_default();
            Attempt::Broken(format!("{status}: {said}"))
        }
    }
}

/// Reads a stream to its end. It is whole if it says what it was served with, and ends with `[DONE]`.
fn read(stream: impl BufRead, token: &mut dyn FnMut()) -> Attempt {
    let mut served = None;
    for line in stream.lines() {
        let line = match line {
            Ok(line) => line,
            Err(err) => return Attempt::Broken(format!("the stream broke: {err}")),
        };
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        if data == "[DONE]" {
            return match served {
                Some(served) => Attempt::Whole(served),
                None => Attempt::Broken("the stream did not say what it was served with".into()),
            };
        }
        let event: Value = match serde_json::from_str(data) {
            Ok(event) => event,
            Err(err) => return Attempt::Broken(format!("an event is no JSON: {err}")),
        };
        if let Some(error) = event.get("error") {
            return Attempt::Broken(error.to_string());
        }
        if let Some(cinch) = event.get("cinch") {
            match ServedWith::deserialize(cinch) {
                Ok(of) => served = Some(Box::new(of)),
                Err(err) => return Attempt::Broken(format!("what it was served with: {err}")),
            }
        } else if event["choices"]
            .as_array()
            .is_some_and(|choices| !choices.is_empty())
        {
            token();
        }
    }
    Attempt::Broken("the stream ended before [DONE]".into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::Mutex;

    use super::*;

    const LAST: &str = r#"data: {"choices":[],"cinch":{"request":1,"class":"default","managed":false}}"#;

    fn stream(lines: &[&str]) -> (Attempt, usize) {
        let mut tokens = 0;
        let text = lines.join("\n\n");
        let attempt = read(text.as_bytes(), &mut || tokens += 1);
        (attempt, tokens)
    }

    fn broken(lines: &[&str]) -> String {
        match stream(lines).0 {
            Attempt::Broken(why) => why,
            _ => panic!("{lines:?} is no whole stream"),
        }
    }

    #[test]
    fn only_a_whole_stream_is_one() {
        let token = r#"data: {"choices":[{"index":0,"text":"a"}]}"#;
        let (attempt, tokens) = stream(&[": keep-alive", token, token, LAST, "data: [DONE]"]);
        assert!(matches!(attempt, Attempt::Whole(served) if served.request == 1));
        assert_eq!(tokens, 2);
        assert!(broken(&[token, LAST]).contains("before [DONE]"));
        assert!(broken(&[token, "data: [DONE]"]).contains("served with"));
        assert!(
            broken(&[token, "data: {\"error\":{\"message\":\"no memory\"}}", LAST]).contains("no memory")
        );
        assert!(broken(&["data: {"]).contains("no JSON"));
    }

    #[test]
    fn prompts_differ_and_have_about_the_length() {
        let text = (0..40_000).map(|i| format!("w{i}")).collect::<Vec<_>>().join(" ");
        let all = prompts(&text, 16, 700);
        assert_eq!(all.len(), 16);
        for (i, prompt) in all.iter().enumerate() {
            assert!((2_880..=2_940).contains(&prompt.len()), "{}", prompt.len());
            assert!(
                all[..i]
                    .iter()
                    .all(|other| !other.starts_with(&prompt[..20]) && other != prompt)
            );
        }
    }

    /// A server that answers one connection after another.
    fn serve(answers: Vec<String>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1/completions", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let _read = stream.read(&mut request).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        url
    }

    fn answer(status: &str, headers: &str, body: &str) -> String {
        format!(
            "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }

    fn one(answers: Vec<String>, retries: u32) -> (Outcome, Vec<Event>) {
        let events = Mutex::new(Vec::new());
        let patience = Patience {
            retries,
            longest_wait: Duration::from_millis(10),
            ..Patience::default()
        };
        let url = serve(answers);
        let all = run(
            &url,
            &[completion("once", 4)],
            patience,
            &AtomicBool::new(false),
            &|i, event| {
                assert_eq!(i, 0);
                events.lock().unwrap().push(event);
            },
        );
        assert_eq!(all.len(), 1);
        (all[0].clone(), events.into_inner().unwrap())
    }

    #[test]
    fn a_refusal_is_counted_and_tried_again_within_bounds() {
        let refusal = || answer("503 Service Unavailable", "retry-after: 30\r\n", "{}");
        let token = r#"data: {"choices":[{"index":0,"text":"a"}]}"#;
        let good = answer("200 OK", "", &[token, LAST, "data: [DONE]"].join("\n\n"));
        let (outcome, events) = one(vec![refusal(), good], 3);
        assert!(matches!(outcome.end, End::Finished(_)), "{outcome:?}");
        assert_eq!((outcome.refused, outcome.retried), (1, 1));
        assert_eq!(
            events,
            [Event::Refused, Event::Retried, Event::Token, Event::Finished]
        );
        assert!(outcome.first_token.unwrap() >= Duration::from_millis(10));

        let (outcome, _) = one(vec![refusal(), refusal()], 1);
        assert_eq!(
            (outcome.end, outcome.refused, outcome.retried),
            (End::GivenUp, 2, 1)
        );
        let (outcome, _) = one(vec![answer("500 Internal Server Error", "", "oh")], 3);
        assert_eq!(outcome.end, End::Lost("500: oh".into()));
    }
}
