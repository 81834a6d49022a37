//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use mistralrs_server_core::completions::parse_request;
use mistralrs_server_core::openai::CompletionRequest;

use super::{Incoming, Parsed, Rejected, channel, finish, named};
use crate::fields::decode;
use crate::http::{Received, Refusal};
use crate::state::App;

pub(super) async fn handle(State(app): State<Arc<App>>, headers: HeaderMap, body: Received) -> Response {
    let answer = complete(app.clone(), &headers, body).await;
    finish(&app, answer)
}

async fn complete(app: Arc<App>, headers: &HeaderMap, body: Received) -> Result<Response, Rejected> {
    let incoming = Incoming::open(app, headers, body)?;
    let wanted: CompletionRequest = decode(&incoming.body, "").map_err(|fault| incoming.rejected(fault))?;
    let model = named(&wanted.model);
    let (sender, answers) = channel();
    let (request, streaming) = parse_request(wanted, incoming.mistralrs.clone(), sender)
        .map_err(|err| incoming.rejected(Refusal::invalid(&err.to_string())))?;
    incoming
        .run(Parsed {
            request,
            streaming,
            model,
            answers,
        })
        .await
}
