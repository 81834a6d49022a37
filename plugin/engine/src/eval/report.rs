//! Everything measured, as it is written to report.json and drawn in report.html. The JSON's schema is
//! docs/eval-report.schema.json.

use cinch_protocol::Policy;
use serde::{Deserialize, Serialize};

use super::about::About;
use super::compare::Step;
use super::figures::{self, BLOCK, Estimate, Quality, RESAMPLES, SEED};
use super::frontier::{self, Candidate};
use super::grid::Sizes;
use super::jobs::{Job, Kind};
use super::options::Floors;
use super::runner::Piece;
use super::scores::{self, TaskScore};
use super::speed::Speed;

/// Raised when a field changes its meaning or goes.
pub(super) const FORMAT: u32 = 1;

/// What `cinch eval` found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// What was measured with what.
    #[serde(flatten)]
    pub(super) about: About,
    /// How much.
    pub(super) sizes: Sizes,
    /// How intervals are made.
    pub(super) bootstrap: Bootstrap,
    /// What levels of the ladder have to meet.
    pub(super) floors: Floors,
    /// One a policy; level 0 is the first.
    pub(super) points: Vec<Point>,
    /// Spearman's rank correlation, over the policies, of the attention error that requests report with their KL
    /// divergence; absent with fewer than three policies that have one.
    pub(super) error_kl_correlation: Option<f64>,
}

/// How intervals are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bootstrap {
    /// Consecutive steps that are drawn together.
    pub(super) block: usize,
    /// How often all are drawn.
    pub(super) resamples: usize,
    /// With what.
    pub(super) seed: u64,
}

/// A policy and what it was measured to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Point {
    /// For people.
    pub(super) name: String,
    /// The policy.
    pub(super) policy: Policy,
    /// What its cache holds.
    pub(super) bytes: Bytes,
    /// What it does to the next token.
    pub(super) quality: Quality,
    /// What it does to retrieval, one a task.
    pub(super) tasks: Vec<TaskScore>,
    /// Mean relative error of attention output, as the engine measures it at compressions; absent where nothing is
    /// compressed.
    pub(super) attention_error: Option<f64>,
    /// Speed and memory; absent where they were not measured.
    pub(super) speed: Option<Speed>,
    /// Whether no other holds fewer bytes and diverges less.
    pub(super) frontier: bool,
    /// Its level in the ladder; absent where it is none.
    pub(super) level: Option<u32>,
}

/// What a policy's caches hold, over the text's windows. Counted by the allocator.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Bytes {
    /// Mean of a request at the end of its prompt.
    pub(super) prompt: u64,
    /// Those of all requests over level 0's, four decimals.
    pub(super) ratio: f64,
    /// The same when the requests end.
    pub(super) end_ratio: f64,
    /// Share of the tokens seen that are kept at the end, mean over layers and heads.
    pub(super) kept: f64,
}

impl Report {
    /// The ladder's levels in order.
    pub(super) fn levels(&self) -> impl Iterator<Item = &Point> {
        let mut levels: Vec<&Point> = self.points.iter().filter(|point| point.level.is_some()).collect();
        levels.sort_by_key(|point| point.level);
        levels.into_iter()
    }

    /// Puts the points on the frontier and in the ladder that belong there.
    pub(super) fn choose_levels(&mut self) {
        let candidates: Vec<Candidate> = self.points.iter().map(candidate).collect();
        for i in frontier::pareto(&candidates) {
            self.points[i].frontier = true;
        }
        for (level, i) in (0..).zip(frontier::levels(&candidates, &self.floors)) {
            self.points[i].level = Some(level);
        }
        let errors = self.points.iter().skip(1).filter_map(|point| {
            let error = point.attention_error?;
            Some((error, point.quality.kl_mean.value))
        });
        self.error_kl_correlation = figures::spearman(&errors.collect::<Vec<_>>());
    }
}

fn candidate(point: &Point) -> Candidate {
    Candidate {
        bytes_ratio: point.bytes.ratio,
        kl: point.quality.kl_mean.value,
        perplexity_ratio: point.quality.perplexity_ratio.value,
        top1: point.quality.top1_agreement.value,
    }
}

/// How intervals are made here.
pub(super) const BOOTSTRAP: Bootstrap = Bootstrap {
    block: BLOCK,
    resamples: RESAMPLES,
    seed: SEED,
};

/// A point of a policy's pieces, one a job; `full` are level 0's.
pub(super) fn point(
    (name, policy): &(String, Policy),
    jobs: &[Job],
    pieces: &[Piece],
    full: &[Piece],
    speed: Option<Speed>,
) -> Point {
    let text: Vec<usize> = (0..jobs.len())
        .filter(|&i| jobs[i].spans.iter().any(|span| span.kind == Kind::Text))
        .collect();
    let of =
        |pieces: &[Piece], what: fn(&Piece) -> f64| -> f64 { text.iter().map(|&i| what(&pieces[i])).sum() };
    let ratio = |what: fn(&Piece) -> f64| of(pieces, what) / of(full, what).max(f64::MIN_POSITIVE);
    let steps: Vec<Vec<Step>> = text
        .iter()
        .map(|&i| pieces[i].steps.iter().copied().flatten().collect())
        .collect();
    let steps: Vec<&[Step]> = steps.iter().map(Vec::as_slice).collect();
    let errors: Vec<f64> = text.iter().filter_map(|&i| pieces[i].attention_error).collect();
    Point {
        name: name.clone(),
        policy: policy.clone(),
        bytes: Bytes {
            prompt: (of(pieces, |piece| piece.prompt_bytes as f64) / text.len().max(1) as f64).round() as u64,
            ratio: (ratio(|piece| piece.prompt_bytes as f64) * 1e4).round() / 1e4,
            end_ratio: ratio(|piece| piece.end_bytes as f64),
            kept: of(pieces, |piece| piece.kept) / of(pieces, |piece| piece.seen as f64).max(1.0),
        },
        quality: figures::quality(&steps),
        tasks: scores::of(jobs, pieces),
        attention_error: (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64),
        speed,
        frontier: false,
        level: None,
    }
}

impl Estimate {
    /// `0.0123 [0.0110, 0.0140]`, with so many decimals.
    pub(super) fn show(&self, decimals: usize) -> String {
        let Self { value, low, high } = self;
        format!("{value:.decimals$} [{low:.decimals$}, {high:.decimals$}]")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::about::tests::about;
    use super::super::jobs::Span;
    use super::*;

    fn step(kl: f64) -> Step {
        Step {
            nll: 2.0 + kl,
            reference_nll: 2.0,
            kl,
            delta_p: -kl / 4.0,
            agrees: kl < 0.3,
            right: kl < 0.2,
            reference_right: true,
        }
    }

    fn jobs() -> Vec<Job> {
        let job = |kind: Kind, depth: f64, steps: usize| Job {
            name: kind.title().into(),
            prompt: vec![0; 1024],
            forced: vec![0; steps],
            spans: vec![Span {
                kind,
                length: 1024,
                depth,
                steps: 0..steps,
            }],
        };
        let mut jobs = vec![job(Kind::Text, 1.0, 64), job(Kind::Text, 1.0, 64)];
        for kind in Kind::TASKS {
            jobs.extend([job(kind, 0.1, 3), job(kind, 0.9, 3)]);
        }
        jobs
    }

    fn pieces(jobs: &[Job], policy: &Policy, bytes: u64, kl: f64) -> Vec<Piece> {
        let piece = |job: &Job| Piece {
            job: job.name.clone(),
            policy: policy.clone(),
            steps: (0..job.forced.len())
                .map(|i| Some(step(kl * (1.0 + i as f64 / 64.0))))
                .collect(),
            prompt_bytes: bytes,
            end_bytes: bytes + 64,
            seen: 1088,
            kept: 544.0,
            attention_error: (kl > 0.0).then_some(kl / 2.0),
        };
        jobs.iter().map(piece).collect()
    }

    /// A report of six policies; the last one holds more than level 0, the fifth has no speed.
    pub(in super::super) fn report() -> Report {
        let policies = [
            ("full", r"{}", 10_000, 0.0),
            (
                "k8-v8",
                r#"{"quantize": {"k_bits": 8, "v_bits": 8}}"#,
                5700,
                0.001,
            ),
            ("k4-v4", r#"{"quantize": {"k_bits": 4, "v_bits": 4}}"#, 3300, 0.05),
            (
                "h2o-0.5",
                r#"{"select": {"method": "h2o", "budget": 0.5}}"#,
                5000,
                0.2,
            ),
            (
                "h2o-0.25-<&>",
                r#"{"select": {"method": "h2o", "budget": 0.25}, "quantize": {"k_bits": 8, "v_bits": 4}}"#,
                1250,
                0.4,
            ),
            ("exact", r#"{"store": "exact"}"#, 20_000, 0.0),
        ];
        let jobs = jobs();
        let full = pieces(&jobs, &Policy::default(), 10_000, 0.0);
        let speed = |i: usize| {
            (i != 4).then_some(Speed {
                rounds: 1,
                prefill_tps: 500.0,
                decode_tps: Some(80.0 + i as f64),
                ttft_ms: 2000.0,
                itl_p50_ms: 12.0,
                loaded_rss_bytes: Some(300_000_000),
                run_peak_rss_bytes: Some(350_000_000),
            })
        };
        let points = policies
            .iter()
            .enumerate()
            .map(|(i, &(name, policy, bytes, kl))| {
                let policy: Policy = serde_json::from_str(policy).unwrap();
                let pieces = pieces(&jobs, &policy, bytes, kl);
                point(&(name.to_owned(), policy), &jobs, &pieces, &full, speed(i))
            });
        let mut report = Report {
            about: about(FORMAT, "2026-11-25"),
            sizes: Sizes {
                windows: 2,
                context: 1024,
                steps: 64,
                task_lengths: vec![1024],
                task_depths: vec![0.1, 0.9],
                task_repeats: 1,
                speed_context: 1024,
                speed_steps: 32,
                speed_rounds: 1,
            },
            bootstrap: BOOTSTRAP,
            floors: Floors::default(),
            points: points.collect(),
            error_kl_correlation: None,
        };
        report.choose_levels();
        report
    }

    #[test]
    fn points_of_pieces() {
        let report = report();
        let point = &report.points[2];
        assert_eq!((point.bytes.prompt, point.bytes.ratio), (3300, 0.33));
        assert_eq!(point.bytes.end_ratio, 3364.0 / 10_064.0);
        assert_eq!(point.bytes.kept, 0.5);
        assert_eq!(point.quality.tokens, 128);
        assert!((point.quality.kl_mean.value - 0.05 * (1.0 + 31.5 / 64.0)).abs() < 1e-12);
        assert_eq!(point.attention_error, Some(0.025));
        assert_eq!(report.points[0].attention_error, None);
        assert_eq!(point.tasks.len(), 5);
    }

    #[test]
    fn levels_are_the_frontier_in_order() {
        let report = report();
        let levels: Vec<&str> = report.levels().map(|point| point.name.as_str()).collect();
        assert_eq!(levels, ["full", "k8-v8", "k4-v4", "h2o-0.25-<&>"]);
        assert!(!report.points[3].frontier, "k4-v4 beats it in both");
        assert_eq!(report.points[5].level, None, "it holds more than level 0");
        assert!((report.error_kl_correlation.unwrap() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let report = report();
        let text = serde_json::to_string(&report).unwrap();
        let read: Report = serde_json::from_str(&text).unwrap();
        // Reading a float may change its last bit.
        let names = |report: &Report| -> Vec<String> {
            report
                .levels()
                .map(|point| format!("{} {}", point.name, point.policy))
                .collect()
        };
        assert_eq!(names(&read), names(&report));
        assert_eq!(
            (&read.about.model, &read.sizes, read.about.mode),
            (&report.about.model, &report.sizes, report.about.mode)
        );
    }
}
