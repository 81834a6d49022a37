//! `/v1/capacity`: KV bytes used, queued and demanded, against the configured capacity.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use cinch_protocol::{Capacity, ClassCapacity};

use crate::state::App;

pub(super) async fn get(State(app): State<Arc<App>>) -> Json<Capacity> {
    let mut totals = app.kv.totals();
    for class in app.classes.names() {
        totals.classes.entry(class).or_default();
    }
    let sum = |of: fn(&crate::kv::ClassTotals) -> u64| totals.classes.values().map(of).sum::<u64>();
    let (used_bytes, queued_bytes) = (sum(|class| class.bytes), sum(|class| class.queued_bytes));
    Json(Capacity {
        capacity_bytes: app.settings.kv.capacity_bytes,
        used_bytes,
        reserved_bytes: app.admission.reserved_bytes(),
        queued_bytes,
        demanded_bytes: used_bytes + queued_bytes,
        uncompressed_bytes: sum(|class| class.uncompressed_bytes),
        allocated_bytes: totals.allocated_bytes,
        peak_bytes: totals.peak_bytes,
        prefix_cache_bytes: totals.prefix_bytes,
        prefix_cache_capacity_bytes: app.kv.prefix_cache_capacity(),
        classes: totals
            .classes
            .into_iter()
            .map(|(class, totals)| ClassCapacity {
                class,
                running: totals.running,
                waiting: totals.queued,
                used_bytes: totals.bytes,
                queued_bytes: totals.queued_bytes,
                uncompressed_bytes: totals.uncompressed_bytes,
            })
            .collect(),
    })
}
