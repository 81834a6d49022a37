//! Answers as server-sent events: mistral.rs' chunks as they come, then one event without choices that
//! carries `cinch`, then `[DONE]`. OpenAI's clients skip an event without choices.

use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::Stream;
use futures::stream::unfold;
use mistralrs_core::Response as EngineResponse;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::Receiver;

use super::flight::Flight;
use super::outcome::{Message, silence, stopping};
use crate::http::Refusal;
use crate::metrics::Outcome;

/// A comment this often keeps proxies from closing a stream that waits for its turn.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// What the last event repeats of the chunks before it.
const REPEATED: [&str; 5] = ["id", "object", "created", "model", "system_fingerprint"];

/// Dropped when the client goes away; the engine then finds the channel closed and stops the sequence.
struct Pump {
    answers: Receiver<EngineResponse>,
    cancelled: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// None once the request has ended and only `pending` is left to say.
    flight: Option<Flight>,
    ended: BTreeSet<usize>,
    head: Map<String, Value>,
    pending: VecDeque<String>,
}

pub(super) fn respond(flight: Flight, answers: Receiver<EngineResponse>) -> Response {
    Sse::new(events(flight, answers))
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

fn events(
    flight: Flight,
    answers: Receiver<EngineResponse>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    let pump = Pump {
        answers,
        cancelled: Box::pin(flight.app.cancelled()),
        flight: Some(flight),
        ended: BTreeSet::new(),
        head: Map::new(),
        pending: VecDeque::new(),
    };
    unfold(pump, |mut pump| async {
        let data = pump.next().await?;
        Some((Ok(Event::default().data(data)), pump))
    })
}

impl Pump {
    async fn next(&mut self) -> Option<String> {
        if self.pending.is_empty() && self.flight.is_some() {
            let message = tokio::select! {
                answer = self.answers.recv() => answer.map(Message::from),
                () = &mut self.cancelled => Some(Message::Failed(stopping())),
            };
            self.take(message);
        }
        self.pending.pop_front()
    }

    fn take(&mut self, message: Option<Message>) {
        match message {
            Some(Message::Chunk { body, ended }) => {
                for key in REPEATED {
                    if let Some(value) = body.get(key) {
                        self.head.insert(key.into(), value.clone());
                    }
                }
                self.pending.push_back(body.to_string());
                self.ended.extend(ended);
                if let Some(flight) = &mut self.flight {
                    flight.chunk();
                    if self.ended.len() >= flight.choices {
                        self.end(Outcome::Ok);
                    }
                }
            }
            Some(Message::Failed(refusal)) => self.fail(&refusal),
            Some(Message::Whole { .. }) => {
                self.fail(&Refusal::internal(
                    "the engine sent a whole answer that was to be streamed",
                ));
            }
            // With several choices 0.8.1 can swallow the last chunk: what ended well shows in `ended`.
            None if self.ended.is_empty() => self.fail(&silence()),
            None => self.end(Outcome::Ok),
        }
    }

    fn fail(&mut self, refusal: &Refusal) {
        self.pending.push_back(refusal.openai().to_string());
        let outcome = match refusal.status() {
            status if status.is_client_error() => Outcome::Rejected,
            status if status == axum::http::StatusCode::SERVICE_UNAVAILABLE => Outcome::Canceled,
            _ => Outcome::Error,
        };
        self.end(outcome);
    }

    fn end(&mut self, outcome: Outcome) {
        if let Some(flight) = self.flight.take() {
            let mut last = std::mem::take(&mut self.head);
            last.insert("choices".into(), json!([]));
            last.insert(
                "cinch".into(),
                serde_json::to_value(flight.served_with()).unwrap_or_default(),
            );
            self.pending.push_back(Value::Object(last).to_string());
            self.pending.push_back("[DONE]".into());
            flight.end(outcome);
        }
    }
}
