//! `cinch eval`: what each method costs in quality and saves in bytes, on the user's own model and text, through the
//! serving path; and the ladder that engine and controller run on, made of it.
//!
//! Every request is measured beside level 0 on the same forced tokens. What was measured is kept as it comes, by what it
//! depends on: the same command goes on where it was ended, and measures nothing twice.

mod about;
pub mod calibrate;
mod compare;
mod figures;
mod frontier;
mod grid;
mod heat;
mod html;
mod jobs;
mod ladder;
mod matrix;
mod options;
mod plot;
mod plots;
mod points;
mod progress;
mod random;
mod report;
mod runner;
mod scores;
mod speed;
mod table;
mod tasks;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cinch_protocol::Policy;
use cinch_protocol::bench::Figures;
use tracing::{info, warn};

pub use options::Options;

use crate::config::{ModelKind, Settings};
use crate::fields::FieldFault;
use crate::run::{self, RunError};
use crate::{fingerprint, model};
use about::{About, Machine, ModelAbout, Text};
use grid::Grid;
use jobs::Job;
use options::Checked;
use points::Points;
use progress::Progress;
use report::Report;
use runner::{Engine, Piece};
use speed::{Speed, Stopwatch};
use tasks::Maker;

/// What a process of its own costs beside the tokens of its request, in prompt tokens: loading the model.
const PROCESS_COST: f64 = 1000.0;

/// What came of the engine.
struct Quality {
    jobs: Vec<Job>,
    /// A job each, a policy each in turn.
    pieces: Vec<Vec<Piece>>,
    model: ModelAbout,
    /// Tokens of all of the text.
    text: Vec<u32>,
}

/// Measures, writes report and ladder, and prints the table.
///
/// # Errors
/// An option that can't be, or a measurement that failed.
pub fn run(
    options: &Options,
    settings: Settings,
    config: &Path,
    overrides: &[String],
) -> Result<(), RunError> {
    let mut checked = options::check(options, &settings, overrides)?;
    model::check(&settings)?;
    let fingerprint = fingerprint::of(&settings.model)?;
    let machine = Machine::of(&settings);
    let points = open(&options.out, &settings, &fingerprint, &machine)?;
    let name = model_name(&settings);

    let runtime = run::threads()?;
    let quality = runtime.block_on(quality(&mut checked, settings, &points, (name, fingerprint)));
    runtime.shutdown_background();
    let quality = quality?;
    let speeds = speeds(&checked.grid, config, overrides, &points, &machine, &quality.text);
    let speeds = speeds.map_err(RunError::Eval)?;

    let mut report = assemble(checked, machine, quality, speeds);
    report.choose_levels();
    write(&options.out, &report).map_err(RunError::Eval)?;
    print!("{}", table::render(&report));
    Ok(())
}

/// The points in `out`, a folder that is made if it is not there.
fn open(out: &Path, settings: &Settings, fingerprint: &str, machine: &Machine) -> Result<Points, FieldFault> {
    let common = (
        fingerprint,
        &machine.kernels,
        settings.model.dtype,
        &settings.metrics,
    );
    let points = fs::create_dir_all(out)
        .map_err(anyhow::Error::from)
        .and_then(|()| Points::open(out, &common))
        // Now, not after what may have taken an hour.
        .and_then(|points| points.try_out().map(|()| points));
    points.map_err(|err| {
        let given = format!("{} ({err:#})", out.display());
        FieldFault::new("--out", given, "a folder that can be made and written to")
    })
}

/// The model's own name, not what clients ask for.
fn model_name(settings: &Settings) -> String {
    let stem = settings.model.file.as_deref().and_then(Path::file_stem);
    match (settings.model.kind, stem) {
        (ModelKind::Gguf, Some(stem)) => stem.to_string_lossy().into_owned(),
        _ => model::served_name(&settings.model),
    }
}

async fn quality(
    checked: &mut Checked,
    settings: Settings,
    points: &Points,
    (name, fingerprint): (String, String),
) -> Result<Quality, RunError> {
    let failed = RunError::Eval;
    let engine = Engine::load(settings).await?;
    checked.grid.fit(|policy| engine.fits(policy))?;
    let sizes = &checked.grid.sizes;
    let text = engine.encode(&checked.text, false).map_err(failed)?;
    let start = engine.start().map_err(failed)?;
    let mut jobs = jobs::windows(&text, &start, sizes)?;
    let maker = Maker {
        encode: &|text| engine.encode(text, false),
        start: &start,
        text: &text,
    };
    jobs.extend(maker.all(sizes).map_err(failed)?);
    jobs::fit(&jobs, sizes, engine.context())?;
    if text.len() < sizes.speed_context {
        let given = format!("a text of {} tokens", text.len());
        let allowed = format!("at least the {} of speed_context", sizes.speed_context);
        return Err(FieldFault::new("--text", given, allowed).into());
    }
    let pieces = pieces(&engine, &checked.grid.policies, &jobs, points).await;
    let dtype = engine.dtype().to_owned();
    engine.stop();
    Ok(Quality {
        jobs,
        pieces: pieces.map_err(failed)?,
        model: ModelAbout {
            name,
            fingerprint,
            dtype,
        },
        text,
    })
}

/// Runs what was not measured yet, a job after the other with all policies: level 0's distributions of one job are all
/// that is in memory at once.
async fn pieces(
    engine: &Engine,
    policies: &[(String, Policy)],
    jobs: &[Job],
    points: &Points,
) -> Result<Vec<Vec<Piece>>> {
    let mut plan: Vec<Vec<(String, Option<Piece>)>> = Vec::new();
    let mut cost = 0.0;
    for job in jobs {
        let mut row = Vec::new();
        for (_, policy) in policies {
            let key = points.key(&("quality", policy, &job.prompt, &job.forced, spans(job)))?;
            let kept = points.get::<Piece>(&key);
            row.push((key, kept));
        }
        let missing = row.iter().filter(|(_, piece)| piece.is_none()).count();
        // Level 0 runs again for its distributions.
        let again = missing > 0 && row.first().is_some_and(|(_, piece)| piece.is_some());
        cost += job.cost() * (missing + usize::from(again)) as f64;
        plan.push(row);
    }
    let kept = plan.iter().flatten().filter(|(_, piece)| piece.is_some()).count();
    if kept > 0 {
        info!(
            "{kept} of {} requests were measured before",
            jobs.len() * policies.len()
        );
    } else if points.others() {
        warn!(
            "what was measured into this folder before was with another model, text, size or program: all is measured"
        );
    }
    let mut progress = Progress::new(cost);
    let mut pieces = Vec::new();
    for (job, row) in jobs.iter().zip(plan) {
        if row.iter().all(|(_, piece)| piece.is_some()) {
            pieces.push(row.into_iter().filter_map(|(_, piece)| piece).collect());
            continue;
        }
        let (full, reference) = engine.reference(job).await?;
        let mut done = Vec::new();
        for ((name, policy), (key, kept)) in policies.iter().zip(row) {
            let first = done.is_empty();
            let piece = match kept {
                Some(piece) if !first => piece,
                // What is there is what was measured first; it was run again for the others' sake.
                _ => {
                    let piece = if first {
                        full.clone()
                    } else {
                        engine.run(job, policy, &reference).await?
                    };
                    let piece = points.put(&key, &piece)?;
                    progress.step(
                        job.cost(),
                        &format!("{}, {name}: {}", job.name, found(job, &piece)),
                    );
                    piece
                }
            };
            done.push(piece);
        }
        pieces.push(done);
    }
    Ok(pieces)
}

/// What a piece depends on beside its tokens.
fn spans(job: &Job) -> Vec<(usize, usize)> {
    job.spans
        .iter()
        .map(|span| (span.steps.start, span.steps.end))
        .collect()
}

fn found(job: &Job, piece: &Piece) -> String {
    let all: Vec<compare::Step> = piece.steps.iter().copied().flatten().collect();
    if job.spans.iter().any(|span| span.kind == jobs::Kind::Text) {
        let kl = all.iter().map(|step| step.kl).sum::<f64>() / all.len().max(1) as f64;
        return format!("KL {kl:.4}, {} bytes", piece.prompt_bytes);
    }
    let change: f64 = all.iter().map(|step| step.reference_nll - step.nll).sum();
    format!("{change:+.2} nats")
}

/// The rounds' figures of each policy.
fn speeds(
    grid: &Grid,
    config: &Path,
    overrides: &[String],
    points: &Points,
    machine: &Machine,
    text: &[u32],
) -> Result<Vec<Vec<Figures>>> {
    let sizes = &grid.sizes;
    let tokens = &text[..sizes.speed_context];
    let mut keys = Vec::new();
    for round in 0..sizes.speed_rounds {
        for (_, policy) in &grid.policies {
            keys.push(points.key(&("speed", policy, machine, tokens, sizes.speed_steps, round))?);
        }
    }
    let kept: Vec<Option<Figures>> = keys.iter().map(|key| points.get(key)).collect();
    let missing = kept.iter().filter(|figures| figures.is_none()).count();
    let cost = PROCESS_COST + (sizes.speed_context + 5 * sizes.speed_steps) as f64;
    let mut progress = Progress::new(cost * missing as f64);
    let stopwatch = Stopwatch::new(config, overrides, text, sizes)?;
    let mut speeds = vec![Vec::new(); grid.policies.len()];
    // Round after round, so that what else the machine does meets all policies.
    for (i, (key, kept)) in keys.iter().zip(kept).enumerate() {
        let at = i % grid.policies.len();
        let (name, policy) = &grid.policies[at];
        let figures = match kept {
            Some(figures) => figures,
            None => {
                let figures = points.put(key, &stopwatch.measure(name, policy)?)?;
                let decode = figures.decode_tps.unwrap_or(f64::NAN);
                let what = format!(
                    "speed, {name}: prefill {:.0}, decode {decode:.1} tok/s",
                    figures.prefill_tps
                );
                progress.step(cost, &what);
                figures
            }
        };
        speeds[at].push(figures);
    }
    Ok(speeds)
}

fn assemble(checked: Checked, machine: Machine, quality: Quality, speeds: Vec<Vec<Figures>>) -> Report {
    let of = |policy: usize| -> Vec<Piece> { quality.pieces.iter().map(|row| row[policy].clone()).collect() };
    let full = of(0);
    let policies = checked.grid.policies.iter().zip(speeds).enumerate();
    let points = policies.map(|(i, (policy, rounds))| {
        report::point(policy, &quality.jobs, &of(i), &full, Speed::new(&rounds))
    });
    let text = Text::of(&checked.text_name, &checked.text, quality.text.len());
    Report {
        about: About::new(report::FORMAT, checked.mode, quality.model.clone(), machine, text),
        points: points.collect(),
        sizes: checked.grid.sizes,
        bootstrap: report::BOOTSTRAP,
        floors: checked.floors,
        error_kl_correlation: None,
    }
}

fn write(out: &Path, report: &Report) -> Result<()> {
    let ladder = ladder::render(report)?;
    crate::config::parse_ladder(&ladder, "ladder.toml").context("the ladder that was made")?;
    for (name, content) in [
        ("report.json", serde_json::to_string_pretty(report)? + "\n"),
        ("report.html", html::render(report)),
        ("ladder.toml", ladder),
    ] {
        let path = out.join(name);
        points::write(&path, content.as_bytes())?;
        info!("wrote {}", path.display());
    }
    Ok(())
}
