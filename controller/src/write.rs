//! Writing to an engine: levels of classes under a lease, then running requests, largest first and only tighter.

use std::collections::BTreeMap;
use std::sync::Arc;

use cinch_protocol::{ClassPolicy, Fence, PolicyChange, RequestState, RequestViews};
use futures::stream::{self, StreamExt};

use crate::link::{EngineLink, LinkError};

/// Requests retuned at a time: an engine answers when the request's layers have followed.
const AT_ONCE: usize = 8;

/// What is to be written.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) holder: String,
    pub(crate) epoch: u64,
    pub(crate) ttl_seconds: u64,
    /// Classes as they were read, and the level each is to have.
    pub(crate) puts: Vec<(ClassPolicy, u32)>,
    /// Levels that running requests of a class are to have at least; none to leave them alone.
    pub(crate) tighten: Option<BTreeMap<String, u32>>,
}

/// One call and what came of it.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) call: &'static str,
    pub(crate) class: Option<String>,
    pub(crate) result: Result<(), LinkError>,
}

/// Carries an order out.
pub(crate) async fn write<L: EngineLink>(link: Arc<L>, order: Order) -> Vec<Written> {
    let mut all = Vec::new();
    let change = |level: u32, ttl_seconds: Option<u64>| {
        let change = PolicyChange {
            level: Some(level),
            fence: Some(Fence {
                holder: order.holder.clone(),
                epoch: order.epoch,
            }),
            ttl_seconds,
            ..PolicyChange::default()
        };
        serde_json::to_string(&change).map_err(|err| LinkError::Body(err.to_string()))
    };
    for (class, level) in &order.puts {
        let path = format!("/v1/policies/{}", class.class);
        let result = match change(*level, Some(order.ttl_seconds)) {
            Ok(body) => link.send("PUT", &path, Some(&class.etag), body).await.map(|_| ()),
            Err(err) => Err(err),
        };
        let refused = result.is_err();
        all.push(Written {
            call: "put",
            class: Some(class.class.clone()),
            result,
        });
        if refused {
            // Running requests follow their class, not the other way round.
            return all;
        }
    }
    let Some(levels) = order.tighten else { return all };
    let behind = match link.get("/v1/requests").await {
        Ok(text) => behind(&text, &levels),
        Err(err) => Err(err),
    };
    let behind = match behind {
        Ok(behind) => behind,
        Err(result) => {
            all.push(Written {
                call: "requests",
                class: None,
                result: Err(result),
            });
            return all;
        }
    };
    let patches = behind.into_iter().map(|(id, level)| {
        let (link, body) = (link.clone(), change(level, None));
        async move {
            let result = match body {
                Ok(body) => link
                    .send("PATCH", &format!("/v1/requests/{id}"), None, body)
                    .await
                    .map(|_| ()),
                Err(err) => Err(err),
            };
            Written {
                call: "patch",
                class: None,
                result,
            }
        }
    });
    let patches: Vec<_> = patches.collect();
    all.extend(stream::iter(patches).buffered(AT_ONCE).collect::<Vec<_>>().await);
    all
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
