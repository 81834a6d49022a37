//! Requests: how they ended, how long they took, what compressing them cost. Observed as it happens.

use prometheus::{HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::outcome::Outcome;
use super::register::{add, counters, histograms};

/// vLLM's buckets of `vllm:time_to_first_token_seconds`, so that dashboards compare.
const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's buckets of `vllm:inter_token_latency_seconds`.
const INTER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// From int8 (about 0.002) to an eviction that hurts.
const ERROR_BUCKETS: &[f64] = &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

pub(super) struct Requests {
    pub(super) ended: IntCounterVec,
    pub(super) in_flight: IntGaugeVec,
    pub(super) generated: IntCounterVec,
    pub(super) waited: HistogramVec,
    pub(super) first_token: HistogramVec,
    pub(super) inter_token: HistogramVec,
    pub(super) per_output_token: HistogramVec,
    pub(super) error: HistogramVec,
}

impl Requests {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            ended: add(
                r,
                IntCounterVec::new(
                    Opts::new(
                        "cinch_requests_total",
                        "Requests by how they ended: ok, error, canceled, rejected, overloaded.",
                    ),
                    &["class", "outcome"],
                )?,
            )?,
            // Feeds `cinch_requests_running` when the plugin is off; not exported by itself.
            in_flight: IntGaugeVec::new(
                Opts::new("cinch_requests_in_flight", "Requests in flight."),
                &["class"],
            )?,
            generated: counters(
                r,
                "cinch_generated_tokens_total",
                "Tokens generated and sent: pieces of streams as they go out, those of a whole answer when it is done.",
            )?,
            waited: histograms(
                r,
                "cinch_admission_waited_seconds",
                "From a request's arrival at the gate to its admission; those not admitted are not counted.",
                FIRST_TOKEN_BUCKETS,
            )?,
            first_token: histograms(
                r,
                "cinch_time_to_first_token_seconds",
                "From the request's arrival to its first token. Where a request has several choices and does not \
                 stream, it is not measured.",
                FIRST_TOKEN_BUCKETS,
            )?,
            inter_token: histograms(
                r,
                "cinch_inter_token_latency_seconds",
                "Between two tokens of a streaming request; not measured for others.",
                INTER_TOKEN_BUCKETS,
            )?,
            per_output_token: histograms(
                r,
                "cinch_time_per_output_token_seconds",
                "Mean time of a request's tokens after the first, one observation a request.",
                INTER_TOKEN_BUCKETS,
            )?,
            error: histograms(
                r,
                "cinch_attention_error",
                "Relative error of attention output, compressed against exact, where a compression measured it.",
                ERROR_BUCKETS,
            )?,
        })
    }

    /// Makes the series of a class exist.
    pub(super) fn touch(&self, class: &str) {
        let label = &[class];
        self.in_flight.with_label_values(label);
        self.generated.with_label_values(label);
        for outcome in Outcome::ALL {
            self.ended.with_label_values(&[class, outcome.name()]);
        }
        for histogram in [
            &self.waited,
            &self.first_token,
            &self.inter_token,
            &self.per_output_token,
            &self.error,
        ] {
            histogram.with_label_values(label);
        }
    }
}
