//! mistral.rs' answers, chat and plain alike.

use axum::http::StatusCode;
use mistralrs_core::{Response, Usage};
use mistralrs_server_core::util::sanitize_error_message;
use serde::Serialize;
use serde_json::Value;

use crate::http::Refusal;

/// One message of the engine.
pub(super) enum Message {
    /// Part of a streamed answer: a token of each of `choices`; those in `ended` end with it.
    Chunk {
        body: Value,
        choices: usize,
        ended: Vec<usize>,
    },
    /// A whole answer.
    Whole { body: Value, usage: Box<Usage> },
    /// It failed; no more comes.
    Failed(Refusal),
}

/// The engine ended the request without a word: its thread has panicked, or the sequence was dropped.
pub(super) fn silence() -> Refusal {
    Refusal::internal("the engine ended this request without an answer")
}

/// The server stopped before the request was through.
pub(super) fn stopping() -> Refusal {
    Refusal::not_ready("the server is stopping; this request was cancelled")
}

impl From<Response> for Message {
    fn from(response: Response) -> Self {
        match response {
            Response::Chunk(chunk) => {
                let choices = chunk.choices.iter();
                let ended = choices
                    .filter(|c| c.finish_reason.is_some())
                    .map(|c| c.index)
                    .collect();
                Self::Chunk {
                    body: value(&chunk),
                    choices: chunk.choices.len(),
                    ended,
                }
            }
            Response::CompletionChunk(chunk) => {
                let choices = chunk.choices.iter();
                let ended = choices
                    .filter(|c| c.finish_reason.is_some())
                    .map(|c| c.index)
                    .collect();
                Self::Chunk {
                    body: value(&chunk),
                    choices: chunk.choices.len(),
                    ended,
                }
            }
            Response::Done(done) => Self::Whole {
                body: value(&done),
                usage: Box::new(done.usage),
            },
            Response::CompletionDone(done) => Self::Whole {
                body: value(&done),
                usage: Box::new(done.usage),
            },
            Response::ValidationError(err) => Self::Failed(Refusal::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid-request",
                "The engine can't take this request",
                sanitize_error_message(err.as_ref()),
            )),
            Response::InternalError(err) => {
                Self::Failed(Refusal::internal(sanitize_error_message(err.as_ref())))
            }
            Response::ModelError(message, _) | Response::CompletionModelError(message, _) => {
                Self::Failed(Refusal::internal(message))
            }
            Response::ImageGeneration(_)
            | Response::Speech { .. }
            | Response::Raw { .. }
            | Response::Embeddings { .. } => Self::Failed(Refusal::internal(
                "the engine answered with something else than a completion",
            )),
        }
    }
}

fn value(body: &impl Serialize) -> Value {
    // Strings, numbers and lists of them: serializing can't fail.
    serde_json::to_value(body).unwrap_or_default()
}
