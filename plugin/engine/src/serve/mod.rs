//! The OpenAI listener. Completions are ours, so that every request has a class and a policy before the
//! host engine hears of it; a few harmless routes are mistral.rs' own. Its other routes are left out: they
//! would bypass classes and policies (`/v1/responses`), or change the loaded model under running requests
//! (`/re_isq`, unload, reload, tune).

mod answer;
mod chat;
mod completions;
mod flight;
mod outcome;
mod size;
mod stream;
mod wish;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, post};
use mistralrs_core::{MistralRs, NormalRequest};
use mistralrs_server_core::handler_core::{create_response_channel, send_request_with_model};
use mistralrs_server_core::util::validate_model_name;
use serde_json::Value;
use tower::ServiceExt;

use crate::admission::Demand;
use crate::fields::FieldFault;
use crate::http::{OpenAiRefusal, Received, Refusal, json, received};
use crate::metrics::Outcome;
use crate::state::App;
use flight::Flight;
use size::{Prompt, new_tokens};
use wish::Wish;

/// Names the class of a request.
pub const CLASS_HEADER: &str = "x-cinch-class";
/// Carries a request's id in its answer.
pub const REQUEST_HEADER: &str = "x-cinch-request";
/// Most choices of one request.
const MAX_CHOICES: u64 = 64;

/// Every route of this listener, with the one method it takes.
pub const ROUTES: [(&str, &str); 6] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("POST", "/v1/models/status"),
    ("GET", "/health"),
    ("GET", "/"),
];

/// The listener's routes.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    for (_, path) in ROUTES {
        router = router.route(path, route(path));
    }
    router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(app.settings.server.max_body_bytes))
        .with_state(app)
}

fn route(path: &str) -> MethodRouter<Arc<App>> {
    match path {
        "/v1/chat/completions" => post(chat::handle),
        "/v1/completions" => post(completions::handle),
        // The host's own routes: which method they take is theirs to say.
        _ => any(upstream),
    }
}

async fn upstream(State(app): State<Arc<App>>, request: Request<Body>) -> Response {
    match app.engine() {
        Ok(loaded) => match loaded.upstream.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        },
        Err(refusal) => OpenAiRefusal(refusal).into_response(),
    }
}

fn listed() -> String {
    let routes: Vec<String> = ROUTES
        .iter()
        .map(|(method, path)| format!("{method} {path}"))
        .collect();
    routes.join(", ")
}

async fn no_route(method: Method, uri: Uri) -> OpenAiRefusal {
    OpenAiRefusal(Refusal::no_route(method.as_str(), uri.path(), &listed()))
}

async fn no_method(method: Method, uri: Uri) -> OpenAiRefusal {
    OpenAiRefusal(Refusal::no_method(method.as_str(), uri.path(), &listed()))
}

/// A completion request of either kind, taken apart as far as both kinds are alike.
struct Incoming {
    app: Arc<App>,
    arrival: Instant,
    mistralrs: Arc<MistralRs>,
    wish: Wish,
    body: Value,
    choices: usize,
}

/// What a request that was refused counts as, and the refusal.
struct Rejected {
    class: String,
    refusal: Refusal,
}

impl Incoming {
    fn open(app: Arc<App>, headers: &HeaderMap, body: Received) -> Result<Self, Rejected> {
        let arrival = Instant::now();
        let mut class = "default".to_owned();
        let taken = || -> Result<Self, Refusal> {
            let mistralrs = app.engine()?.mistralrs.clone();
            let body = received(body, app.settings.server.max_body_bytes)?;
            let mut body = json(headers, &body)?;
            let wish = Wish::take(&app, headers, &mut body)?;
            class.clone_from(&wish.class);
            let choices = choices(&body)?;
            model(&body, &mistralrs)?;
            only_text(&body)?;
            Ok(Self {
                app: app.clone(),
                arrival,
                mistralrs,
                wish,
                body,
                choices,
            })
        };
        taken().map_err(|refusal| Rejected { class, refusal })
    }

    fn rejected(&self, refusal: impl Into<Refusal>) -> Rejected {
        Rejected {
            class: self.wish.class.clone(),
            refusal: refusal.into(),
        }
    }

    /// Waits for room, sends the request on and answers as it asked to be answered.
    async fn run(self, parsed: Parsed) -> Result<Response, Rejected> {
        let Parsed {
            mut request,
            streaming,
            model,
            answers,
        } = parsed;
        let mistralrs_core::Request::Normal(normal) = &mut request else {
            return Err(self.rejected(Refusal::internal(
                "the host engine made no completion of this request",
            )));
        };
        let id = normal.id;
        let demand = match self.app.kv.on() {
            true => Some(
                self.demand(normal)
                    .await
                    .map_err(|refusal| self.rejected(refusal))?,
            ),
            false => None,
        };
        let mut flight = Flight::begin(
            self.app.clone(),
            id,
            self.wish.class.clone(),
            self.arrival,
            self.choices,
        );
        if let Some(demand) = demand {
            match self.app.admission.enter(id, demand).await {
                Ok(place) => flight.admitted(place),
                Err(refusal) => {
                    flight.end(Outcome::of(&refusal));
                    return Ok(OpenAiRefusal(refusal).into_response());
                }
            }
        }
        if let Err(err) = send_request_with_model(&self.mistralrs, request, model.as_deref()).await {
            flight.end(Outcome::Error);
            return Ok(OpenAiRefusal(Refusal::internal(format!("{err:#}"))).into_response());
        }
        let mut response = if streaming {
            stream::respond(flight, answers)
        } else {
            answer::respond(flight, answers).await
        };
        let name = HeaderName::from_static(REQUEST_HEADER);
        response.headers_mut().insert(name, HeaderValue::from(id));
        Ok(response)
    }
}

impl Incoming {
    /// What the request may come to hold, and makes that true: from here on it generates no more tokens.
    async fn demand(&self, normal: &mut NormalRequest) -> Result<Demand, Refusal> {
        let loaded = self.app.engine()?;
        let prompt = Prompt::of(normal, &self.body);
        let tokens = loaded.tokens.clone();
        let counted = tokio::task::spawn_blocking(move || prompt.tokens(&tokens)).await;
        let counted = counted.map_err(|err| Refusal::internal(err.to_string()))?;
        let default = self.app.settings.admission.default_max_tokens;
        let asked = normal.sampling_params.max_len;
        let new_tokens = new_tokens(asked, default, counted, loaded.context);
        normal.sampling_params.max_len = Some(new_tokens);
        Ok(Demand {
            class: self.wish.class.clone(),
            own: self.wish.own.then(|| self.wish.choice.clone()),
            // The engine refuses a longer one.
            prompt_tokens: counted.min(loaded.context),
            new_tokens,
            choices: self.choices,
        })
    }
}

/// A request as mistral.rs takes it.
struct Parsed {
    request: mistralrs_core::Request,
    streaming: bool,
    model: Option<String>,
    answers: tokio::sync::mpsc::Receiver<mistralrs_core::Response>,
}

/// Counts a refusal, and answers with it.
fn finish(app: &App, result: Result<Response, Rejected>) -> Response {
    result.unwrap_or_else(|rejected| {
        app.metrics.count(&rejected.class, Outcome::Rejected);
        OpenAiRefusal(rejected.refusal).into_response()
    })
}

fn channel() -> (
    tokio::sync::mpsc::Sender<mistralrs_core::Response>,
    tokio::sync::mpsc::Receiver<mistralrs_core::Response>,
) {
    create_response_channel(None)
}

/// `default` is whatever is loaded.
fn named(model: &str) -> Option<String> {
    (model != "default").then(|| model.to_owned())
}

/// mistral.rs opens no sequence for n = 0 and would never answer.
fn choices(body: &Value) -> Result<usize, FieldFault> {
    match body.get("n") {
        None | Some(Value::Null) => Ok(1),
        Some(given) => match given.as_u64() {
            Some(n @ 1..=MAX_CHOICES) => Ok(n as usize),
            _ => Err(FieldFault::new(
                "n",
                crate::fields::show(given),
                format!("1 to {MAX_CHOICES}"),
            )),
        },
    }
}

fn model(body: &Value, mistralrs: &Arc<MistralRs>) -> Result<(), Refusal> {
    // Another type than a string is the decoder's to refuse.
    let Some(given) = body.get("model").and_then(Value::as_str) else {
        return Ok(());
    };
    if validate_model_name(given, mistralrs.clone()).is_ok() {
        return Ok(());
    }
    let mut allowed = mistralrs.list_models().unwrap_or_default();
    allowed.push("default".into());
    let fault = FieldFault::new("model", crate::fields::cut(given), allowed.join(" or "));
    let refusal = Refusal::new(
        StatusCode::NOT_FOUND,
        "unknown-model",
        "No such model",
        fault.to_string(),
    );
    Err(refusal.naming(fault))
}

/// mistral.rs would fetch URLs and read files of this machine before it finds out that the model takes text
/// only, and search the web in requests of its own that no policy covers.
fn only_text(body: &Value) -> Result<(), FieldFault> {
    if body
        .get("web_search_options")
        .is_some_and(|given| !given.is_null())
    {
        return Err(FieldFault::new(
            "web_search_options",
            "a value",
            "nothing: web search is not served",
        ));
    }
    let messages = body.get("messages").and_then(Value::as_array);
    if messages.is_some_and(Vec::is_empty) {
        // The chat template makes a prompt of nothing, which the model then answers at any length.
        return Err(FieldFault::new("messages", "[]", "at least one message"));
    }
    for (m, message) in messages.into_iter().flatten().enumerate() {
        let parts = message.get("content").and_then(Value::as_array);
        for (p, part) in parts.into_iter().flatten().enumerate() {
            if let Some(kind) = part.get("type").filter(|kind| *kind != "text") {
                let field = format!("messages[{m}].content[{p}].type");
                return Err(FieldFault::new(field, crate::fields::show(kind), "\"text\""));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) use tests::app as tests_app;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Settings;

    /// As `configs/engine.toml` has it; no model.
    pub(crate) fn app(overrides: &[&str]) -> Arc<App> {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml");
        App::new(Settings::load(file.as_ref(), &overrides).unwrap()).unwrap()
    }

    #[test]
    fn choices_are_bounded() {
        assert_eq!(choices(&json!({})), Ok(1));
        assert_eq!(choices(&json!({"n": 2})), Ok(2));
        assert_eq!(choices(&json!({"n": 0})).unwrap_err().given, "0");
        assert!(choices(&json!({"n": 65})).is_err());
        assert!(choices(&json!({"n": "two"})).is_err());
    }

    #[test]
    fn images_and_searches_are_refused_before_anything_is_fetched() {
        let image = json!({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "what is it?"},
            {"type": "image_url", "image_url": {"url": "/etc/hostname"}},
        ]}]});
        assert_eq!(
            only_text(&image).unwrap_err().field,
            "messages[0].content[1].type"
        );
        assert_eq!(only_text(&json!({"messages": []})).unwrap_err().field, "messages");
        assert!(only_text(&json!({"web_search_options": {}})).is_err());
        assert!(only_text(&json!({"messages": [{"role": "user", "content": "hello"}]})).is_ok());
    }
}
