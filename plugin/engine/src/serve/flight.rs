//! A request on its way: however it ends, the plugin and the metrics hear of it exactly once.

use std::sync::Arc;
use std::time::Instant;

use cinch_protocol::ServedWith;
use mistralrs_core::Usage;
use serde_json::Value;

use crate::admission::Place;
use crate::metrics::Outcome;
use crate::model;
use crate::state::App;

/// Dropped without [`end`](Flight::end), the client went away.
pub(super) struct Flight {
    pub(super) app: Arc<App>,
    pub(super) id: usize,
    pub(super) class: String,
    pub(super) choices: usize,
    arrival: Instant,
    /// Where it was admitted; none where nobody waits to be.
    place: Option<Place>,
    /// Of the first and the last chunk that streamed, and their number.
    chunks: Option<(Instant, Instant, u32)>,
    outcome: Outcome,
}

impl Flight {
    pub(super) fn begin(app: Arc<App>, id: usize, class: String, arrival: Instant, choices: usize) -> Self {
        app.metrics.begin(&class);
        Self {
            app,
            id,
            class,
            choices,
            arrival,
            place: None,
            chunks: None,
            outcome: Outcome::Canceled,
        }
    }

    /// Its turn came.
    pub(super) fn admitted(&mut self, place: Place) {
        self.app
            .metrics
            .waited(&self.class, self.arrival.elapsed().as_secs_f64());
        self.place = Some(place);
    }

    /// Gives an answer the name clients asked for: mistral.rs puts the model's folder there.
    pub(super) fn name_model(&self, body: &mut Value) {
        body["model"] = model::served_name(&self.app.settings.model).into();
    }

    /// What the answer says of the cache.
    pub(super) fn served_with(&self) -> ServedWith {
        self.app.kv.served_with(self.id, &self.class)
    }

    /// A chunk came: one token of each of `choices`.
    pub(super) fn chunk(&mut self, choices: usize) {
        let now = Instant::now();
        let metrics = &self.app.metrics;
        metrics.generated(&self.class, choices);
        self.chunks = Some(match self.chunks {
            None => {
                metrics.first_token(&self.class, (now - self.arrival).as_secs_f64());
                (now, now, 1)
            }
            Some((first, last, count)) => {
                metrics.inter_token(&self.class, (now - last).as_secs_f64());
                (first, now, count + 1)
            }
        });
    }

    /// A whole answer came. mistral.rs has timed its tokens: decoding began when the first was there. With
    /// several choices its times are those of the last to finish, which say nothing of the first token.
    pub(super) fn whole(&self, usage: &Usage) {
        self.app.metrics.generated(&self.class, usage.completion_tokens);
        if self.choices != 1 {
            return;
        }
        let decode = f64::from(usage.total_completion_time_sec);
        let first = self.arrival.elapsed().as_secs_f64() - decode;
        self.app.metrics.first_token(&self.class, first.max(0.0));
        if usage.completion_tokens > 1 {
            let rest = (usage.completion_tokens - 1) as f64;
            self.app.metrics.per_output_token(&self.class, decode / rest);
        }
    }

    /// The request ended.
    pub(super) fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
        if let Some((first, last, count @ 2..)) = self.chunks {
            let mean = (last - first).as_secs_f64() / f64::from(count - 1);
            self.app.metrics.per_output_token(&self.class, mean);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.app.kv.finish(self.id);
        // After that: who is admitted in its place must not be measured beside it.
        self.place.take();
        self.app.metrics.end(&self.class, self.outcome);
    }
}
