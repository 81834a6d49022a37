//! Answers in one piece.

use axum::Json;
use axum::response::{IntoResponse, Response};
use mistralrs_core::Response as EngineResponse;
use tokio::sync::mpsc::Receiver;

use super::flight::Flight;
use super::outcome::{Message, silence, stopping};
use crate::http::{OpenAiRefusal, Refusal};
use crate::metrics::Outcome;

/// Waits for the whole answer.
///
/// The wait is a task of its own that outlives the client: 0.8.1 can't cancel a request that does not
/// stream, and fails the whole batch if its answer can't be delivered.
pub(super) async fn respond(flight: Flight, answers: Receiver<EngineResponse>) -> Response {
    let cancelled = flight.app.cancelled();
    let waiting = tokio::spawn(whole(flight, answers));
    tokio::select! {
        answer = waiting => answer.unwrap_or_else(|_| refuse(silence())),
        () = cancelled => refuse(stopping()),
    }
}

async fn whole(flight: Flight, mut answers: Receiver<EngineResponse>) -> Response {
    let message = answers.recv().await.map(Message::from);
    match message {
        Some(Message::Whole { mut body, usage }) => {
            flight.whole(&usage);
            flight.name_model(&mut body);
            body["cinch"] = serde_json::to_value(flight.served_with()).unwrap_or_default();
            flight.end(Outcome::Ok);
            Json(body).into_response()
        }
        Some(Message::Failed(refusal)) => {
            flight.end(Outcome::of(&refusal));
            refuse(refusal)
        }
        Some(Message::Chunk { .. }) => {
            flight.end(Outcome::Error);
            refuse(Refusal::internal(
                "the engine streamed an answer that was to come whole",
            ))
        }
        None => {
            flight.end(Outcome::Error);
            refuse(silence())
        }
    }
}

fn refuse(refusal: Refusal) -> Response {
    OpenAiRefusal(refusal).into_response()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use http_body_util::BodyExt;
    use mistralrs_core::{CompletionChoice, CompletionResponse, Usage};
    use tokio::sync::mpsc::channel;

    use super::*;
    use crate::serve::tests::app;

    fn done() -> EngineResponse {
        EngineResponse::CompletionDone(CompletionResponse {
            id: "1".into(),
            choices: vec![CompletionChoice {
                finish_reason: "length".into(),
                index: 0,
                text: "hello".into(),
                logprobs: None,
            }],
            created: 1,
            model: "/a/folder".into(),
            system_fingerprint: "local".into(),
            object: "text_completion".into(),
            usage: Usage {
                completion_tokens: 11,
                prompt_tokens: 5,
                total_tokens: 16,
                avg_tok_per_sec: 0.0,
                avg_prompt_tok_per_sec: 0.0,
                avg_compl_tok_per_sec: 0.0,
                total_time_sec: 0.7,
                total_prompt_time_sec: 0.2,
                total_completion_time_sec: 0.5,
            },
        })
    }

    fn text(app: &crate::state::App) -> String {
        String::from_utf8(app.metrics.render(&app.kv, &app.classes, &app.admission).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn an_answer_carries_what_it_was_served_with() {
        let app = app(&[]);
        let choice = app.classes.current("default", "class").unwrap();
        app.kv.assign(9, "default", choice, false).unwrap();
        let arrival = Instant::now() - std::time::Duration::from_millis(900);
        let flight = Flight::begin(app.clone(), 9, "default".into(), arrival, 1);
        let (sender, answers) = channel(1);
        sender.send(done()).await.unwrap();
        let response = respond(flight, answers).await;
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(body["choices"][0]["text"], "hello");
        assert_eq!(body["model"], "smollm2");
        assert_eq!(body["cinch"]["request"], 9);
        assert_eq!(body["cinch"]["level"], 0);
        assert_eq!(body["cinch"]["managed"], true);
        let text = text(&app);
        // 0.9 s since it came, of which decoding took 0.5 s: the first token was there after 0.4 s.
        assert!(text.contains("cinch_time_to_first_token_seconds_bucket{class=\"default\",le=\"0.25\"} 0\n"));
        assert!(text.contains("cinch_time_to_first_token_seconds_bucket{class=\"default\",le=\"0.5\"} 1\n"));
        // 0.5 s for ten tokens.
        assert!(
            text.contains("cinch_time_per_output_token_seconds_sum{class=\"default\"} 0.05\n"),
            "{text}"
        );
        assert!(text.contains("cinch_inter_token_latency_seconds_count{class=\"default\"} 0\n"));
        assert!(text.contains("cinch_generated_tokens_total{class=\"default\"} 11\n"));
    }

    #[tokio::test]
    async fn with_the_plugin_off_only_what_is_known_is_said() {
        let app = app(&["kv.plugin=off"]);
        let flight = Flight::begin(app.clone(), 9, "default".into(), Instant::now(), 1);
        let (sender, answers) = channel(1);
        sender.send(done()).await.unwrap();
        let bytes = respond(flight, answers)
            .await
            .into_body()
            .collect()
            .await
            .unwrap()
            .to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(
            body["cinch"],
            serde_json::json!({"request": 9, "class": "default", "managed": false})
        );
    }

    #[tokio::test]
    async fn the_answer_is_waited_for_when_the_client_has_gone() {
        let app = app(&[]);
        let flight = Flight::begin(app.clone(), 9, "default".into(), Instant::now(), 1);
        let (sender, answers) = channel(1);
        let wait = std::time::Duration::from_millis(20);
        assert!(
            tokio::time::timeout(wait, respond(flight, answers))
                .await
                .is_err()
        );
        sender
            .send(done())
            .await
            .expect("delivered: its failure would fail the whole batch");
        sender.closed().await;
        tokio::task::yield_now().await;
        assert!(text(&app).contains("cinch_requests_total{class=\"default\",outcome=\"ok\"} 1\n"));
    }
}
