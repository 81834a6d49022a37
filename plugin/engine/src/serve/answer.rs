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
            body["cinch"] = serde_json::to_value(flight.served_with()).unwrap_or_default();
            flight.end(Outcome::Ok);
            Json(body).into_response()
        }
        Some(Message::Failed(refusal)) => {
            let outcome = if refusal.status().is_client_error() {
                Outcome::Rejected
            } else {
                Outcome::Error
            };
            flight.end(outcome);
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
