//! What the load came to: counted and measured, never assumed.

use std::collections::BTreeMap;

use cinch_tests::load::{End, Outcome};
use serde::Serialize;

use super::plan::Args;
use super::watch::{Moved, Seen, reversals};
use crate::up::settings::Mode;

/// A latency against its objective.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) p50: Option<f64>,
    pub(super) p95: Option<f64>,
    pub(super) most: Option<f64>,
    pub(super) objective: f64,
    /// Samples within the objective.
    pub(super) within: usize,
    pub(super) samples: usize,
}

impl Latency {
    /// Of these seconds.
    pub(super) fn of(mut seconds: Vec<f64>, objective: f64) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self {
            p50: quantile(&seconds, 0.5),
            p95: quantile(&seconds, 0.95),
            most: seconds.last().copied(),
            objective,
            within: seconds.iter().filter(|value| **value <= objective).count(),
            samples: seconds.len(),
        }
    }
}

/// The smallest of the sorted values that at least a share `q` of them does not exceed; none of no values.
pub(super) fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// What is known of the services at the end.
#[derive(Debug, Clone, Default)]
pub(super) struct Services {
    /// The engine's start as it said itself, before and after the load.
    pub(super) engine_started: (Option<f64>, Option<f64>),
    /// Calls of the controller that change something at the engine.
    pub(super) writes: Option<u64>,
    /// Who ended by itself.
    pub(super) fallen: Vec<String>,
}

/// The summary.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    pub(super) mode: Mode,
    pub(super) requests: usize,
    pub(super) fit: usize,
    /// Mean tokens of prompt and answer, as the engine counted them.
    pub(super) mean_tokens: Option<f64>,
    pub(super) finished: usize,
    /// Refused to the end.
    pub(super) rejected: usize,
    pub(super) lost: usize,
    /// Why those were.
    pub(super) lost_reasons: Vec<String>,
    /// 503s.
    pub(super) refusals: u32,
    pub(super) retries: u32,
    pub(super) most_running: usize,
    pub(super) most_waiting: usize,
    /// Finished requests by the level they ended at; `none` is a policy off the ladder.
    pub(super) levels: BTreeMap<String, usize>,
    /// Those of them that were retuned while they ran.
    pub(super) retuned: usize,
    pub(super) capacity_bytes: u64,
    pub(super) peak_bytes: u64,
    /// The most demanded as if uncompressed, of capacity.
    pub(super) most_demand: f64,
    pub(super) first_token: Latency,
    pub(super) between_tokens: Latency,
    pub(super) tokens: usize,
    pub(super) wall_seconds: f64,
    /// None where the engine did not say when it started.
    pub(super) engine_restarts: Option<usize>,
    pub(super) fallen: Vec<String>,
    pub(super) writes: Option<u64>,
    pub(super) moves: Vec<Moved>,
    pub(super) reversals: usize,
    /// Seconds from the load's end until new requests were back at level 0, where that was waited for.
    pub(super) released_after: Option<f64>,
    pub(super) release_within: Option<u64>,
}

impl Figures {
    pub(super) fn new(
        args: &Args,
        capacity: u64,
        outcomes: &[Outcome],
        seen: &Seen,
        services: Services,
        wall_seconds: f64,
    ) -> Self {
        let count = |is: fn(&End) -> bool| outcomes.iter().filter(|outcome| is(&outcome.end)).count();
        let mut levels = BTreeMap::new();
        let (mut retuned, mut lost_reasons, mut seen_tokens) = (0, Vec::new(), Vec::new());
        for outcome in outcomes {
            match &outcome.end {
                End::Finished(served) => {
                    let cache = served.cache.as_ref();
                    let level = cache.and_then(|cache| cache.level);
                    let name = level.map_or_else(|| "none".to_owned(), |level| level.to_string());
                    *levels.entry(name).or_default() += 1;
                    retuned += usize::from(cache.is_some_and(|cache| cache.served.len() > 1));
                    seen_tokens.extend(cache.map(|cache| cache.seen as f64));
                }
                End::Lost(why) => lost_reasons.push(why.clone()),
                End::GivenUp => {}
            }
        }
        let first = outcomes
            .iter()
            .filter_map(|outcome| Some(outcome.first_token?.as_secs_f64()));
        let gaps = outcomes.iter().flat_map(|outcome| &outcome.gaps);
        let (before, after) = services.engine_started;
        Self {
            mode: args.mode,
            requests: outcomes.len(),
            fit: args.fit(),
            mean_tokens: (!seen_tokens.is_empty())
                .then(|| seen_tokens.iter().sum::<f64>() / seen_tokens.len() as f64),
            finished: count(|end| matches!(end, End::Finished(_))),
            rejected: count(|end| matches!(end, End::GivenUp)),
            lost: lost_reasons.len(),
            lost_reasons,
            refusals: outcomes.iter().map(|outcome| outcome.refused).sum(),
            retries: outcomes.iter().map(|outcome| outcome.retried).sum(),
            most_running: seen.most_running,
            most_waiting: seen.most_waiting,
            levels,
            retuned,
            capacity_bytes: capacity,
            peak_bytes: seen.peak_bytes,
            most_demand: seen.most_demand,
            first_token: Latency::of(first.collect(), args.ttft_slo),
            between_tokens: Latency::of(gaps.map(|gap| gap.as_secs_f64()).collect(), args.itl_slo),
            tokens: outcomes
                .iter()
                .map(|outcome| outcome.gaps.len() + usize::from(outcome.first_token.is_some()))
                .sum(),
            wall_seconds,
            engine_restarts: before
                .zip(after)
                .map(|(before, after)| usize::from(before != after)),
            fallen: services.fallen,
            writes: services.writes,
            reversals: reversals(&seen.moves),
            moves: seen.moves.clone(),
            released_after: None,
            release_within: args.release_within,
        }
    }

    /// What must not have happened; nothing, if all is well.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut all = Vec::new();
        if self.lost > 0 {
            all.push(format!("{} of {} requests were lost", self.lost, self.requests));
        }
        if self.peak_bytes > self.capacity_bytes {
            all.push(format!(
                "KV bytes passed the capacity: {} of {}",
                self.peak_bytes, self.capacity_bytes
            ));
        }
        if self.engine_restarts != Some(0) {
            all.push("the engine is not the process it was at the start".into());
        }
        all.extend(
            self.fallen
                .iter()
                .map(|name| format!("the {name} ended by itself")),
        );
        if let (Some(within), None) = (self.release_within, self.released_after) {
            all.push(format!("new requests were not back at level 0 within {within} s"));
        }
        all
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use cinch_protocol::ServedWith;
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn served(levels: &[u32]) -> End {
        let stretches: Vec<_> = levels
            .iter()
            .map(|level| json!({"level": level, "policy": {}, "from_seen": 0}))
            .collect();
        let served: ServedWith = serde_json::from_value(json!({
            "request": 1, "class": "default", "managed": true, "level": levels.last(), "policy": {},
            "served": stretches, "seen": 800, "kept": 800.0, "bytes": 1, "uncompressed_bytes": 2,
            "attention_error": null,
        }))
        .unwrap();
        End::Finished(Box::new(served))
    }

    fn outcome(end: End, refused: u32, first: Option<u64>) -> Outcome {
        Outcome {
            end,
            first_token: first.map(Duration::from_secs),
            gaps: vec![Duration::from_millis(100); 3],
            refused,
            retried: refused,
            took: Duration::from_secs(9),
        }
    }

    /// Four requests: two finished (one retuned), one refused to the end, one lost.
    pub(in super::super) fn figures() -> Figures {
        let args = Cli::parse_from(["demo", "--ttft-slo=5"]).args;
        let outcomes = [
            outcome(served(&[0, 3]), 0, Some(2)),
            outcome(served(&[3]), 1, Some(8)),
            outcome(End::GivenUp, 2, None),
            outcome(End::Lost("500: oh".into()), 0, None),
        ];
        let seen = Seen {
            peak_bytes: 90,
            most_waiting: 2,
            most_running: 2,
            most_demand: 3.9,
            ..Seen::default()
        };
        let services = Services {
            engine_started: (Some(1.0), Some(1.0)),
            writes: Some(0),
            fallen: Vec::new(),
        };
        Figures::new(&args, 100, &outcomes, &seen, services, 12.0)
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(quantile(&values, 0.5), Some(10.0));
        assert_eq!(quantile(&values, 0.95), Some(19.0));
        assert_eq!(quantile(&values, 1.0), Some(20.0));
        assert_eq!(quantile(&[7.0], 0.5), Some(7.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn every_request_is_in_one_count() {
        let figures = figures();
        assert_eq!((figures.finished, figures.rejected, figures.lost), (2, 1, 1));
        assert_eq!((figures.refusals, figures.retries), (3, 3));
        assert_eq!(figures.levels, BTreeMap::from([("3".to_owned(), 2)]));
        assert_eq!((figures.retuned, figures.mean_tokens), (1, Some(800.0)));
        assert_eq!((figures.first_token.within, figures.first_token.samples), (1, 2));
        assert_eq!((figures.tokens, figures.engine_restarts), (14, Some(0)));
    }

    #[test]
    fn what_must_not_happen_is_a_failure() {
        let mut figures = figures();
        assert_eq!(figures.failures(), ["1 of 4 requests were lost"]);
        figures.lost = 0;
        assert_eq!(figures.failures(), [""; 0]);
        figures.peak_bytes = 101;
        figures.engine_restarts = None;
        figures.fallen = vec!["controller".into()];
        figures.release_within = Some(60);
        assert_eq!(figures.failures().len(), 4);
    }
}
