//! Writing to an engine: levels of classes under a lease, then running requests, largest first and only tighter.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cinch_protocol::{ClassPolicy, Fence, PolicyChange, RequestState, RequestViews};
use futures::stream::{self, StreamExt};

use crate::link::{EngineLink, LinkError};

/// Requests retuned at a time: an engine answers when the request's layers have followed.
const AT_ONCE: usize = 8;

/// Longest wait for what a write is answered.
const PATIENCE: Duration = Duration::from_secs(4);

/// On whose behalf, and for how long.
#[derive(Debug)]
pub(crate) struct Writer<L> {
    pub(crate) link: Arc<L>,
    pub(crate) holder: String,
    pub(crate) epoch: u64,
    pub(crate) ttl_seconds: u64,
}

/// One call and what came of it.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) call: &'static str,
    pub(crate) class: Option<String>,
    pub(crate) result: Result<(), LinkError>,
}

impl<L: EngineLink> Writer<L> {
    /// Sets the level of each class, as it was read, under a lease. Ends with the first that is refused.
    pub(crate) async fn put(&self, classes: Vec<(ClassPolicy, u32)>) -> Vec<Written> {
        let mut all = Vec::new();
        for (class, level) in classes {
            let path = format!("/v1/policies/{}", class.class);
            let etag = Some(class.etag.as_str());
            let result = self.send("PUT", &path, etag, level, Some(self.ttl_seconds)).await;
            let refused = result.is_err();
            all.push(Written {
                call: "put",
                class: Some(class.class),
                result,
            });
            if refused {
                break;
            }
        }
        all
    }

    /// Tightens running requests to the level of their class, some at a time.
    pub(crate) async fn tighten(&self, levels: BTreeMap<String, u32>) -> Vec<Written> {
        let views = bounded(self.link.get("/v1/requests")).await;
        let behind = match views.and_then(|text| behind(&text, &levels)) {
            Ok(behind) => behind,
            Err(err) => {
                return vec![Written {
                    call: "requests",
                    class: None,
                    result: Err(err),
                }];
            }
        };
        let patches = behind.into_iter().map(|(id, level)| async move {
            let path = format!("/v1/requests/{id}");
            Written {
                call: "patch",
                class: None,
                result: self.send("PATCH", &path, None, level, None).await,
            }
        });
        let patches: Vec<_> = patches.collect();
        stream::iter(patches).buffered(AT_ONCE).collect().await
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        if_match: Option<&str>,
        level: u32,
        ttl_seconds: Option<u64>,
    ) -> Result<(), LinkError> {
        let change = PolicyChange {
            level: Some(level),
            fence: Some(Fence {
                holder: self.holder.clone(),
                epoch: self.epoch,
            }),
            ttl_seconds,
            ..PolicyChange::default()
        };
        let body = serde_json::to_string(&change).map_err(|err| LinkError::Body(err.to_string()))?;
        bounded(self.link.send(method, path, if_match, body))
            .await
            .map(|_| ())
    }
}

async fn bounded(call: impl Future<Output = Result<String, LinkError>>) -> Result<String, LinkError> {
    let answer = tokio::time::timeout(PATIENCE, call).await;
    answer.unwrap_or(Err(LinkError::Timeout(PATIENCE)))
}

/// Live requests looser than their class, largest first. One whose client asked for its policy is left alone,
/// and so is one off the ladder.
fn behind(text: &str, levels: &BTreeMap<String, u32>) -> Result<Vec<(u64, u32)>, LinkError> {
    let views: RequestViews = serde_json::from_str(text).map_err(|err| LinkError::Body(err.to_string()))?;
    let mut behind: Vec<_> = views
        .requests
        .iter()
        .filter(|request| request.state != RequestState::Finished && !request.own)
        .filter_map(|request| {
            let wanted = *levels.get(&request.class)?;
            (request.level? < wanted).then_some((request.bytes, request.id, wanted))
        })
        .collect();
    behind.sort_by(|a, b| b.cmp(a));
    Ok(behind.into_iter().map(|(_, id, level)| (id, level)).collect())
}
