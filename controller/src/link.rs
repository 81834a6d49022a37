//! The way to an engine's policy API, and to a Prometheus: HTTP with a bound on time and on bytes.

use std::time::Duration;

use cinch_protocol::Problem;
use reqwest::header::{CONTENT_TYPE, IF_MATCH};

/// Longest answer that is read. An engine's metrics are some tens of kilobytes.
const MAX_BYTES: usize = 4 << 20;

/// Why an engine's answer is none.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LinkError {
    /// No connection, or it broke.
    #[error("{0}")]
    Unreachable(String),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// An answer longer than is read.
    #[error("an answer longer than {MAX_BYTES} bytes")]
    TooLong,
    /// An answer that refuses.
    #[error("{status}: {detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The problem's kind, as `stale-epoch`; empty if it is no problem document.
        kind: String,
        /// What it says.
        detail: String,
    },
    /// An answer that is not what was asked for.
    #[error("{0}")]
    Body(String),
}

/// One engine, as the run loop sees it. A simulated one takes the same calls.
pub trait EngineLink: Send + Sync + 'static {
    /// `GET path`.
    fn get(&self, path: &str) -> impl Future<Output = Result<String, LinkError>> + Send;
    /// `method path` with a JSON body, if the resource is still what `if_match` names.
    fn send(
        &self,
        method: &str,
        path: &str,
        if_match: Option<&str>,
        body: String,
    ) -> impl Future<Output = Result<String, LinkError>> + Send;
}

/// An HTTP service.
#[derive(Debug, Clone)]
pub struct Http {
    client: reqwest::Client,
    base: String,
    token: Option<String>,
    timeout: Duration,
}

impl Http {
    /// The service at `base`, each call bounded by `timeout`.
    ///
    /// # Errors
    /// The client could not be set up.
    pub fn new(base: &str, token: Option<&str>, timeout: Duration) -> Result<Self, LinkError> {
        // No proxy: engines are neighbours, and a proxy of the environment is meant for the world outside.
        let client = reqwest::Client::builder()
            .no_proxy()
            // Nor a redirect: what another place says is not this engine's word.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(timeout)
            .pool_idle_timeout(Duration::from_secs(30))
            .build()
            .map_err(|err| LinkError::Unreachable(err.to_string()))?;
        Ok(Self {
            client,
            base: base.trim_end_matches('/').to_owned(),
            token: token.map(str::to_owned),
            timeout,
        })
    }

    /// `GET path?query=…`.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub async fn get_query(&self, path: &str, query: &str) -> Result<String, LinkError> {
        let request = self.client.get(format!("{}{path}", self.base));
        self.run(request.query(&[("query", query)])).await
    }

    async fn run(&self, mut request: reqwest::RequestBuilder) -> Result<String, LinkError> {
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        match tokio::time::timeout(self.timeout, answer(request)).await {
            Ok(answer) => answer,
            Err(_) => Err(LinkError::Timeout(self.timeout)),
        }
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Result<String, LinkError> {
    let mut response = request.send().await.map_err(unreachable)?;
    let status = response.status();
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        if bytes.len() + chunk.len() > MAX_BYTES {
            return Err(LinkError::TooLong);
        }
        bytes.extend_from_slice(&chunk);
    }
    let text = String::from_utf8(bytes).map_err(|_| LinkError::Body("an answer that is no text".into()))?;
    if status.is_success() {
        return Ok(text);
    }
    let problem: Option<Problem> = serde_json::from_str(&text).ok();
    Err(LinkError::Refused {
        status: status.as_u16(),
        kind: problem
            .as_ref()
            .and_then(|problem| problem.kind.rsplit(':').next())
            .unwrap_or_default()
            .to_owned(),
        detail: problem.map_or_else(|| status.to_string(), |problem| problem.detail),
    })
}

/// The innermost cause says most: "connection refused" rather than "error sending request".
fn unreachable(err: reqwest::Error) -> LinkError {
    let mut cause: &dyn std::error::Error = &err;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    LinkError::Unreachable(cause.to_string())
}

impl EngineLink for Http {
    async fn get(&self, path: &str) -> Result<String, LinkError> {
        self.run(self.client.get(format!("{}{path}", self.base))).await
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        if_match: Option<&str>,
        body: String,
    ) -> Result<String, LinkError> {
        let method =
            reqwest::Method::from_bytes(method.as_bytes()).map_err(|err| LinkError::Body(err.to_string()))?;
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if let Some(etag) = if_match {
            request = request.header(IF_MATCH, etag);
        }
        self.run(request.header(CONTENT_TYPE, "application/json").body(body))
            .await
    }
}
