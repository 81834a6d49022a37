//! `cinch calibrate`: which layers' keys and values need their bits, and whether spreading a uniform policy's bits by that is
//! better at as many bytes.
//!
//! Each part of the cache (keys or values of a layer) is measured alone in few bits, by forced decoding through the serving
//! path as in [`cinch eval`](super). Bits are then given out so that the damages add up to least, and what comes of it is
//! measured beside uniform policies on text that was not calibrated on. `KVTuner` (arXiv 2502.04420) spreads bits by layer and
//! side as well.

mod allocate;
mod family;
mod options;
mod report;
mod sensitivity;

use std::fs;

use anyhow::{Context, Result};
use cinch_protocol::{Bits, Policy, QuantizeMethod};
use tracing::info;

pub use options::Options;

use super::about::{About, Machine, ModelAbout, Text};
use super::grid::{self, Sizes as EvalSizes};
use super::jobs::{self, Job};
use super::points::{self, Points};
use super::runner::{Engine, Piece};
use super::{figures, model_name, open, pieces};
use crate::config::Settings;
use crate::fields::FieldFault;
use crate::run::{self, RunError};
use crate::{fingerprint, model};
use allocate::{Choice, allocate};
use family::{BITS, Side, by_layer, parts, uniform};
use options::Checked;
use report::{Floor, Layer, Level, Measured, Report, Verdict};
use sensitivity::{Sensitivity, kl};

/// Bits of K and of V together, of the levels that are spread.
const LEVELS: [u32; 3] = [8, 6, 5];
/// About how many layers' floors are measured.
const FLOORS: usize = 6;
/// What a budget loses each time that its policy was measured to hold more than the uniform ones.
const CLOSER: f64 = 0.01;

/// Measures, writes what was found, and prints it.
///
/// # Errors
/// An option that can't be, or a measurement that failed.
pub fn run(options: &Options, mut settings: Settings, overrides: &[String]) -> Result<(), RunError> {
    let checked = options::check(options, &settings, overrides)?;
    model::check(&settings)?;
    let fingerprint = fingerprint::of(&settings.model)?;
    // Errors of all layers, not of a sample.
    settings.metrics.error_every_layers = 1;
    let machine = Machine::of(&settings);
    let points = open(&options.out, &settings, &fingerprint, &machine)?;
    let name = model_name(&settings);

    let runtime = run::threads()?;
    let report = runtime.block_on(async {
        let engine = Engine::load(settings).await?;
        let about = ModelAbout {
            name,
            fingerprint,
            dtype: engine.dtype().to_owned(),
        };
        let measured = measure(&engine, &checked, &points, (about, machine)).await;
        engine.stop();
        measured
    });
    runtime.shutdown_background();
    let report = report?;
    write(options, &report).map_err(RunError::Calibrate)?;
    print!("{}", report::table(&report));
    Ok(())
}

fn write(options: &Options, report: &Report) -> Result<()> {
    let path = options.out.join("calibration.json");
    points::write(&path, (serde_json::to_string_pretty(report)? + "\n").as_bytes())?;
    info!("wrote {}", path.display());
    let path = options.out.join("grid.toml");
    match report::grid(report)? {
        Some(grid) => {
            points::write(&path, grid.as_bytes())?;
            info!("wrote {}, for `cinch eval --grid`", path.display());
        }
        // An earlier calibration's does not stay beside this one.
        None if path.exists() => {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?
        }
        None => {}
    }
    Ok(())
}

/// What all measurements of a calibration need.
struct Bench<'a> {
    engine: &'a Engine,
    points: &'a Points,
    method: QuantizeMethod,
    layers: usize,
    /// How many of them are measured together.
    together: usize,
    /// On which parts are measured.
    calibration: &'a [Job],
    /// Other ones.
    verification: &'a [Job],
}

/// What was measured of parts.
struct Calibrated {
    floors: Vec<Floor>,
    /// One a part, in order.
    parts: Vec<Sensitivity>,
    /// What each part may get.
    choices: Vec<Vec<Choice>>,
    /// Of what was measured, attention error and KL divergence.
    errors: Vec<(f64, f64)>,
}

async fn measure(
    engine: &Engine,
    checked: &Checked,
    points: &Points,
    (model, machine): (ModelAbout, Machine),
) -> Result<Report, RunError> {
    let failed = RunError::Calibrate;
    let sizes = &checked.sizes;
    let text = engine.encode(&checked.text, false).map_err(failed)?;
    let start = engine.start().map_err(failed)?;
    let windows = EvalSizes {
        windows: sizes.calibration_windows + sizes.verification_windows,
        context: sizes.context,
        steps: sizes.steps,
        ..EvalSizes::default()
    };
    let longest = sizes.context + sizes.steps;
    if longest > engine.context() {
        let allowed = format!("one with a context of at least {longest}, what is measured on");
        return Err(FieldFault::new("model", format!("a context of {}", engine.context()), allowed).into());
    }
    let jobs = jobs::windows(&text, &start, &windows)?;
    let (calibration, verification) = jobs.split_at(sizes.calibration_windows);
    let bench = Bench {
        engine,
        points,
        method: checked.method,
        layers: engine.layers(),
        together: sizes.layers_together,
        calibration,
        verification,
    };
    bench.fits()?;
    let calibrated = bench.calibrate().await.map_err(failed)?;
    let levels = bench.levels(&calibrated).await.map_err(failed)?;
    let layer = |(layer, pair): (usize, &[Sensitivity])| {
        Some(Layer {
            layer,
            k: *pair.first()?,
            v: *pair.get(1)?,
        })
    };
    let described = Text::of(&checked.text_name, &checked.text, text.len());
    Ok(Report {
        about: About::new(report::FORMAT, checked.mode, model, machine, described),
        sizes: *sizes,
        method: checked.method,
        bits: BITS.to_vec(),
        floors: calibrated.floors,
        layers: calibrated.parts.chunks(2).enumerate().filter_map(layer).collect(),
        error_kl_correlation: figures::spearman(&calibrated.errors),
        levels,
    })
}

impl Bench<'_> {
    /// Refuses a model that cannot be served with a method's bits.
    fn fits(&self) -> Result<(), FieldFault> {
        for bits in BITS {
            let policy = uniform(self.method, (bits, bits));
            self.engine.fits(&policy).map_err(|reason| {
                let allowed = format!("a method that this model can be served with: {reason}");
                FieldFault::new("--method", self.method.name(), allowed)
            })?;
        }
        Ok(())
    }

    /// A policy's pieces of all of `jobs`.
    async fn pieces(&self, policies: Vec<Policy>, jobs: &[Job]) -> Result<Vec<Vec<Piece>>> {
        let named: Vec<(String, Policy)> = std::iter::once(Policy::default())
            .chain(policies)
            .map(|policy| (grid::name(&policy), policy))
            .collect();
        let rows = pieces(self.engine, &named, jobs, self.points).await?;
        let of = |policy: usize| rows.iter().filter_map(|row| row.get(policy).cloned()).collect();
        Ok((0..named.len()).map(of).collect())
    }

    /// Measures each part alone, and how bytes go with bits.
    async fn calibrate(&self) -> Result<Calibrated> {
        let parts = parts(self.layers, self.together);
        let every = self.layers.div_ceil(FLOORS).max(1);
        let floor_layers: Vec<usize> = (0..self.layers)
            .filter(|layer| layer % every == 0 || layer + 1 == self.layers)
            .collect();
        let mut policies: Vec<Policy> = Vec::new();
        policies.extend(BITS.map(|bits| uniform(self.method, (bits, bits))));
        policies.extend(floor_layers.iter().map(|layer| family::next_to_nothing(*layer)));
        policies.extend(
            parts
                .iter()
                .map(|part| family::alone(self.method, *part, BITS[0])),
        );
        let rows = self.pieces(policies, self.calibration).await?;
        let mut rows = rows.iter().map(|row| row.iter().collect::<Vec<&Piece>>());
        let full = sensitivity::bytes(&rows.next().unwrap_or_default());
        let uniform: Vec<u64> = BITS
            .iter()
            .map(|_| sensitivity::bytes(&rows.next().unwrap_or_default()))
            .collect();
        let floors: Vec<Floor> = floor_layers
            .iter()
            .map(|layer| Floor {
                layer: *layer,
                kl: kl(&rows.next().unwrap_or_default()),
            })
            .collect();
        let measured: Vec<(usize, f64)> = floors.iter().map(|floor| (floor.layer, floor.kl.value)).collect();
        let by_layer = sensitivity::floors(&measured, self.layers);
        let measured: Vec<Sensitivity> = parts
            .iter()
            .zip(rows)
            .map(|(part, pieces)| sensitivity::of(&pieces, part.count(), full, by_layer[part.first()]))
            .collect();
        let of_layer = |layer: usize| measured.chunks(2).nth(layer / self.together).unwrap_or_default();
        let parts: Vec<Sensitivity> = (0..self.layers).flat_map(of_layer).copied().collect();
        let error = |part: &Sensitivity| Some((part.attention_error?, part.kl.value));
        Ok(Calibrated {
            choices: sensitivity::choices(&parts, &uniform),
            errors: measured.iter().filter_map(error).collect(),
            floors,
            parts,
        })
    }

    /// Spreads each level's bits and measures what comes of it.
    async fn levels(&self, calibrated: &Calibrated) -> Result<Vec<Level>> {
        let mut proposed = Vec::new();
        for bits in LEVELS {
            let rivals: Vec<Policy> = rivals(bits)
                .into_iter()
                .map(|pair| uniform(self.method, pair))
                .collect();
            proposed.push((bits, self.spread(&rivals, calibrated).await?, rivals));
        }
        let policies = proposed
            .iter()
            .flat_map(|(_, own, rivals)| rivals.iter().chain([own]).cloned())
            .collect();
        let rows = self.pieces(policies, self.verification).await?;
        let mut rows = rows.iter().map(|row| row.iter().collect::<Vec<&Piece>>());
        let full = sensitivity::bytes(&rows.next().unwrap_or_default());
        let mut levels = Vec::new();
        for (bits, own, rivals) in proposed {
            let mut measured: Vec<(Measured, Vec<&Piece>)> = Vec::new();
            for policy in rivals.into_iter().chain([own]) {
                let pieces = rows.next().unwrap_or_default();
                let bytes = sensitivity::bytes(&pieces);
                measured.push((
                    Measured {
                        name: grid::name(&policy),
                        bytes,
                        bytes_ratio: bytes as f64 / full.max(1) as f64,
                        kl: kl(&pieces),
                        predicted_kl: self.predict(&policy, calibrated),
                        policy,
                    },
                    pieces,
                ));
            }
            let (own, own_pieces) = measured.pop().context("no policy")?;
            let best = measured
                .iter()
                .min_by(|a, b| a.0.kl.value.total_cmp(&b.0.kl.value));
            let (best, best_pieces) = best.context("no uniform policy")?;
            let change = sensitivity::change(best_pieces, &own_pieces);
            levels.push(Level {
                bits: f64::from(bits) / 2.0,
                against: best.name.clone(),
                change,
                verdict: Verdict::of(change),
                calibrated: own,
                uniform: measured.into_iter().map(|(measured, _)| measured).collect(),
            });
        }
        Ok(levels)
    }

    /// The policy by layer that holds no more bytes than any of `rivals`, as measured.
    async fn spread(&self, rivals: &[Policy], calibrated: &Calibrated) -> Result<Policy> {
        let mut most = u64::MAX;
        for rival in rivals {
            most = most.min(self.bytes(rival).await?);
        }
        let cost = |policy: &Policy| -> u64 {
            let of = |(choices, choice): (&Vec<Choice>, usize)| choices.get(choice).map_or(0, |of| of.bytes);
            calibrated
                .choices
                .iter()
                .zip(self.choices_of(policy))
                .map(of)
                .sum()
        };
        let mut budget = rivals.iter().map(cost).min().unwrap_or_default();
        loop {
            let chosen = allocate(&calibrated.choices, budget);
            let chosen = chosen.context("no bits by layer hold as few bytes as the uniform ones")?;
            let pairs: Vec<(Bits, Bits)> = chosen
                .chunks(2)
                .filter_map(|pair| Some((*BITS.get(*pair.first()?)?, *BITS.get(*pair.get(1)?)?)))
                .collect();
            let policy = by_layer(self.method, &pairs);
            let bytes = self.bytes(&policy).await?;
            if bytes <= most {
                return Ok(policy);
            }
            let over = (bytes - most).max((budget as f64 * CLOSER) as u64).max(1);
            budget = budget
                .checked_sub(over)
                .context("no bits by layer hold as few bytes as the uniform ones")?;
        }
    }

    /// Bytes at the end of a prompt of the text that is verified on.
    async fn bytes(&self, policy: &Policy) -> Result<u64> {
        let job = self.verification.first().context("no text to verify on")?;
        let key = self.points.key(&("bytes", policy, &job.prompt))?;
        if let Some(bytes) = self.points.get(&key) {
            return Ok(bytes);
        }
        self.points.put(&key, &self.engine.bytes(job, policy).await?)
    }

    /// The sum of what its parts do, and the floor of a change in the first layer.
    fn predict(&self, policy: &Policy, calibrated: &Calibrated) -> f64 {
        let of = |(choices, choice): (&Vec<Choice>, usize)| choices.get(choice).map_or(0.0, |of| of.damage);
        let damages: f64 = calibrated
            .choices
            .iter()
            .zip(self.choices_of(policy))
            .map(of)
            .sum();
        damages + calibrated.floors.first().map_or(0.0, |floor| floor.kl.value)
    }

    /// What a policy's parts have, as indices into [`BITS`].
    fn choices_of(&self, policy: &Policy) -> Vec<usize> {
        let of = |part: family::Part| {
            let (k, v) = policy.quantize.as_ref()?.bits(part.first());
            let bits = match part.side {
                Side::K => k,
                Side::V => v,
            };
            BITS.iter().position(|other| *other == bits)
        };
        parts(self.layers, 1).into_iter().filter_map(of).collect()
    }
}

/// All ways to have `bits` of K and V together.
fn rivals(bits: u32) -> Vec<(Bits, Bits)> {
    let pairs = BITS.iter().flat_map(|k| BITS.iter().map(|v| (*k, *v)));
    pairs
        .filter(|(k, v)| u32::from(*k) + u32::from(*v) == bits)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rivals_have_as_many_bits() {
        let (two, three, four) = (Bits::B2, Bits::B3, Bits::B4);
        let of = LEVELS.map(rivals);
        assert_eq!(of[0], [(four, four)]);
        assert_eq!(of[1], [(two, four), (three, three), (four, two)]);
        assert_eq!(of[2], [(two, three), (three, two)]);
    }
}
