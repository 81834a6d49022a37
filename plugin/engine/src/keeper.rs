//! What happens by itself, without a request or a write: the queue is looked at, leases end, the watermark acts.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::classes::Choice;
use crate::state::App;
use crate::watermark;

/// Between two looks at the queue: reservations also shrink by retunes, which tell nobody.
const QUEUE: Duration = Duration::from_millis(100);
/// Ticks of the queue between two looks at leases and the watermark.
const SLOW: u32 = 10;

/// Runs until it is dropped.
pub async fn run(app: Arc<App>) {
    let mut ticks = interval(QUEUE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut active = false;
    let mut default = None;
    for tick in (0..SLOW).cycle() {
        ticks.tick().await;
        if app.admission.has_queue() {
            app.admission.pump();
        }
        if tick == 0 {
            follow_default(&app, &mut default);
            active = guard(&app, active);
        }
    }
}

/// The host engine's own requests are served as the default class is, also after its lease has ended.
fn follow_default(app: &App, known: &mut Option<Choice>) {
    let Ok(now) = app.classes.current("default", "class.default") else {
        return;
    };
    if known.as_ref() != Some(&now) {
        if let Err(refusal) = app.kv.set_default(now.clone()) {
            warn!("class default: {}", refusal.0.detail);
        }
        *known = Some(now);
    }
}

/// One look of the watermark; answers whether it is in force.
pub fn guard(app: &App, was_active: bool) -> bool {
    let requests = app.kv.requests();
    let capacity = app.settings.kv.capacity_bytes;
    let ladder = app.classes.ladder();
    let settings = &app.settings.watermark;
    let size = |view: &cinch_protocol::RequestView, policy: &_| {
        let sequences = view.sequences.max(1);
        // Not `seen`, which counts tokens that every layer has processed: none, while a prompt is.
        let tokens = view.uncompressed_bytes / app.kv.uncompressed_bytes(1).max(1);
        let tokens = tokens.div_ceil(sequences) as usize;
        app.kv.most_bytes(policy, tokens) * sequences
    };
    let plan = watermark::plan(settings, capacity, &requests, ladder, was_active, size);
    if plan.active != was_active {
        let used: u64 = requests.iter().map(|view| view.bytes).sum();
        if plan.active {
            warn!(
                used,
                capacity, "watermark: over the high mark, running requests are tightened"
            );
        } else {
            info!(used, capacity, "watermark: under the low mark again");
        }
    }
    for one in &plan.tighten {
        let level = &ladder.levels[one.to as usize];
        let choice = Choice {
            level: Some(one.to),
            policy: level.policy.clone(),
        };
        match app.kv.tighten(one.id, choice) {
            Ok(()) => {
                app.metrics.watermark_retuned();
                let (request, from, to) = (one.id, one.from, one.to);
                if one.own {
                    warn!(
                        request,
                        from,
                        to,
                        "watermark: tightened, though its client asked for its level: nothing else was left"
                    );
                } else {
                    info!(request, from, to, "watermark: tightened");
                }
            }
            // It ended between the look and the retune.
            Err(refusal) => info!("watermark: {}", refusal.0.detail),
        }
    }
    if plan.short && plan.active && !was_active {
        warn!("watermark: tightening what can be tightened does not come under the low mark");
    }
    app.metrics.set_watermark(plan.active);
    plan.active
}
