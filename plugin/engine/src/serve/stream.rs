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
            Some(Message::Chunk {
                mut body,
                choices,
                ended,
            }) => {
                if let Some(flight) = &self.flight {
                    flight.name_model(&mut body);
                }
                for key in REPEATED {
                    if let Some(value) = body.get(key) {
                        self.head.insert(key.into(), value.clone());
                    }
                }
                self.pending.push_back(body.to_string());
                self.ended.extend(ended);
                if let Some(flight) = &mut self.flight {
                    flight.chunk(choices);
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
        self.end(Outcome::of(refusal));
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use futures::StreamExt;
    use http_body_util::BodyExt;
    use mistralrs_core::{ChatCompletionChunkResponse, ChunkChoice, Delta};
    use tokio::sync::mpsc::{Sender, channel};

    use super::*;
    use crate::serve::tests::app;
    use crate::state::App;

    fn chunk(text: &str, ends: &[(usize, bool)]) -> EngineResponse {
        EngineResponse::Chunk(ChatCompletionChunkResponse {
            id: "17".into(),
            choices: ends
                .iter()
                .map(|(index, end)| ChunkChoice {
                    finish_reason: end.then(|| "stop".into()),
                    index: *index,
                    delta: Delta {
                        content: Some(text.into()),
                        role: "assistant".into(),
                        tool_calls: None,
                        reasoning_content: None,
                    },
                    logprobs: None,
                })
                .collect(),
            created: 1,
            model: "/a/folder".into(),
            system_fingerprint: "local".into(),
            object: "chat.completion.chunk".into(),
            usage: None,
        })
    }

    fn begin(id: usize, choices: usize) -> (Arc<App>, Sender<EngineResponse>, Response) {
        let app = app(&[]);
        let choice = app.classes.current("batch", "class").unwrap();
        app.kv.assign(id, "batch", choice, false).unwrap();
        let flight = Flight::begin(app.clone(), id, "batch".into(), Instant::now(), choices);
        let (sender, answers) = channel(16);
        (app, sender, respond(flight, answers))
    }

    async fn said(response: Response) -> Vec<String> {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        text.split("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .map(str::to_owned)
            .collect()
    }

    fn count(app: &App, series: &str) -> String {
        let text =
            String::from_utf8(app.metrics.render(&app.kv, &app.classes, &app.admission).unwrap()).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with(series))
            .unwrap_or_else(|| panic!("{series}"));
        line.rsplit(' ').next().unwrap().to_owned()
    }

    fn outcome(app: &App, name: &str) -> String {
        count(
            app,
            &format!("cinch_requests_total{{class=\"batch\",outcome=\"{name}\"}}"),
        )
    }

    #[tokio::test]
    async fn chunks_then_cinch_then_done() {
        let (app, sender, response) = begin(3, 1);
        for (text, end) in [("a", false), ("b", false), ("c", true)] {
            sender.send(chunk(text, &[(0, end)])).await.unwrap();
        }
        let events = said(response).await;
        assert_eq!(events.len(), 5, "{events:?}");
        assert!(events[0].contains("\"content\":\"a\""));
        let last: Value = serde_json::from_str(&events[3]).unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(
            (&last["id"], &last["object"]),
            (&json!("17"), &json!("chat.completion.chunk"))
        );
        assert_eq!(last["model"], "smollm2");
        assert_eq!(last["cinch"]["request"], 3);
        assert_eq!(last["cinch"]["class"], "batch");
        assert_eq!(last["cinch"]["level"], 2);
        assert_eq!(last["cinch"]["served"][0]["policy"]["quantize"]["v_bits"], 4);
        assert_eq!(
            last["cinch"]["attention_error"],
            Value::Null,
            "nothing was measured"
        );
        assert_eq!(events[4], "[DONE]");
        assert_eq!(outcome(&app, "ok"), "1");
        assert_eq!(
            count(&app, "cinch_time_to_first_token_seconds_count{class=\"batch\"}"),
            "1"
        );
        assert_eq!(
            count(&app, "cinch_inter_token_latency_seconds_count{class=\"batch\"}"),
            "2"
        );
        assert_eq!(
            count(&app, "cinch_time_per_output_token_seconds_count{class=\"batch\"}"),
            "1"
        );
        assert_eq!(count(&app, "cinch_generated_tokens_total{class=\"batch\"}"), "3");
        assert!(app.kv.requests().is_empty());
    }

    #[tokio::test]
    async fn choices_end_one_by_one() {
        let (app, sender, response) = begin(4, 2);
        sender.send(chunk("a", &[(0, true), (1, false)])).await.unwrap();
        sender.send(chunk("b", &[(1, false), (1, false)])).await.unwrap();
        // The last chunk of choice 1 is one that 0.8.1 swallows: it never fills a message of two.
        drop(sender);
        let events = said(response).await;
        assert_eq!(events.len(), 4, "{events:?}");
        assert!(events[2].contains("\"cinch\""));
        assert_eq!(outcome(&app, "ok"), "1");
        assert_eq!(count(&app, "cinch_generated_tokens_total{class=\"batch\"}"), "4");
    }

    #[tokio::test]
    async fn failures_are_events_and_still_end_with_done() {
        let (app, sender, response) = begin(5, 1);
        sender
            .send(EngineResponse::InternalError(
                "no more memory\n  0: a backtrace".into(),
            ))
            .await
            .unwrap();
        let events = said(response).await;
        let failure: Value = serde_json::from_str(&events[0]).unwrap();
        assert_eq!(failure["error"]["message"], "no more memory");
        assert!(events[1].contains("\"cinch\""));
        assert_eq!(events[2], "[DONE]");
        assert_eq!(outcome(&app, "error"), "1");

        let (app, sender, response) = begin(6, 1);
        drop(sender);
        assert!(said(response).await[0].contains("without an answer"));
        assert_eq!(outcome(&app, "error"), "1");
    }

    #[tokio::test]
    async fn a_client_that_goes_away_is_noticed() {
        let (app, sender, response) = begin(7, 1);
        sender.send(chunk("a", &[(0, false)])).await.unwrap();
        let mut body = response.into_body().into_data_stream();
        assert!(body.next().await.is_some());
        assert_eq!(app.kv.requests().len(), 1);
        drop(body);
        assert!(
            sender.send(chunk("b", &[(0, false)])).await.is_err(),
            "the engine must see it closed"
        );
        assert_eq!(outcome(&app, "canceled"), "1");
        assert!(app.kv.requests().is_empty());
    }

    #[tokio::test]
    async fn a_stop_reaches_the_client() {
        let (app, _sender, response) = begin(8, 1);
        app.cancel_all();
        let events = said(response).await;
        assert!(events[0].contains("the server is stopping"), "{events:?}");
        assert_eq!(events[2], "[DONE]");
        assert_eq!(outcome(&app, "canceled"), "1");
    }
}
