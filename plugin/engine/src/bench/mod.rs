//! `cinch bench`: rates, latencies and memory end to end, system beside system.
//!
//! Every measurement is a process of its own that runs a plan through the engine's queue, batching and sampling
//! as [`crate::probe`] does; within a round each system has its turn at a load before the next load comes, so
//! that what else the machine does meets all of them. Admission and watermark are the server's and not on that
//! path; the prefix cache is off: nothing waits, nothing is tightened, nothing is reused.

mod cases;
mod child;
mod figures;
mod kernel;
mod options;
mod svg;
mod table;

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use cinch_protocol::bench::{Figures, Measured, Row};
use cinch_protocol::probe::Plan;
use tracing::{info, warn};

pub use options::Options;

pub(crate) use cases::Case;
pub(crate) use child::Children;
pub(crate) use figures::{median, of as of_report};
pub(crate) use options::{Runner, System};

use crate::config::Settings;
use crate::fields::FieldFault;
use crate::run::RunError;
use crate::{fingerprint, model};
use options::Checked;

/// A load average over this many runnable tasks a core means that the machine was not idle.
const BUSY: f64 = 0.25;
/// Bytes of text a token surely has: what is beyond is not tokenized.
const TOKEN_BYTES: usize = 64;

/// Measures, and prints the table.
///
/// # Errors
/// An option that can't be, or a process that failed.
pub fn run(
    options: &Options,
    settings: &Settings,
    config: &Path,
    overrides: &[String],
) -> Result<(), RunError> {
    let checked = options::check(options, settings, overrides)?;
    for (field, path) in [("--json", &options.json), ("--svg", &options.svg)] {
        let folder = path.as_deref().and_then(Path::parent);
        if let Some(folder) = folder.filter(|folder| *folder != Path::new("") && !folder.is_dir()) {
            let allowed = "a file in a folder that exists";
            return Err(FieldFault::new(field, folder.display(), allowed).into());
        }
    }
    model::check(settings)?;
    fingerprint::check_ladder(settings)?;
    let cases = Case::all(&checked.contexts, &checked.concurrency);
    let longest = cases.iter().flat_map(|case| &case.prompts).copied().max();
    let longest = longest.unwrap_or_default();
    let mut text = match &options.text {
        None => cases::sentences(longest),
        Some(path) => fs::read_to_string(path).map_err(|err| {
            let given = format!("{} ({err})", path.display());
            FieldFault::new("--text", given, "a text file that can be read")
        })?,
    };
    let end = (0..=text.len().min(longest * TOKEN_BYTES)).rev();
    text.truncate(
        end.into_iter()
            .find(|&end| text.is_char_boundary(end))
            .unwrap_or_default(),
    );

    let children = Children::new(config, overrides).map_err(RunError::Bench)?;
    let mut measured = about(options, settings);
    let threads = measured.threads as f64;
    if let Some(load) = measured.load_average.filter(|load| load[0] > BUSY * threads) {
        warn!(
            "load average {:.2}: the machine is not idle, and what is measured will be slower for it",
            load[0]
        );
    }
    info!("tokenizing the prompts");
    let tokenizer = System {
        name: "cinch".to_owned(),
        kv: "off".to_owned(),
        run: Runner::Cinch(vec!["kv.plugin=off".to_owned()]),
        max_concurrency: None,
    };
    let plan = Plan {
        tokenize: text,
        timing: true,
        ..Plan::default()
    };
    let report = children.run(&tokenizer, &plan).map_err(RunError::Bench)?;
    measured.dtype = report.dtype.clone().unwrap_or_default();
    options::check_lengths(options, &checked, report.context, report.tokenized.len())?;
    if options.kernel {
        info!("measuring the decode kernel");
        measured.kernel = kernel::measure(measured.threads).map_err(RunError::Bench)?;
    }
    measure(
        options,
        &checked,
        &cases,
        &children,
        &report.tokenized,
        &mut measured,
    )
    .map_err(RunError::Bench)?;
    print!("{}", table::render(&measured));
    Ok(())
}

fn measure(
    options: &Options,
    checked: &Checked,
    cases: &[Case],
    children: &Children,
    tokens: &[u32],
    measured: &mut Measured,
) -> Result<()> {
    for case in cases {
        for system in systems_of(case, checked) {
            measured.rows.push(Row {
                system: system.name.clone(),
                kv: system.kv.clone(),
                context: case.context(),
                concurrency: case.prompts.len(),
                prompts: case.prompts.clone(),
                median: Figures::default(),
                samples: Vec::new(),
            });
        }
    }
    for round in 0..options.rounds {
        let mut first_row = 0;
        for case in cases {
            let systems: Vec<&System> = systems_of(case, checked).collect();
            let plan = case.plan(tokens, options.new_tokens);
            for turn in 0..systems.len() {
                // Another one begins each round: what comes after what is not always the same.
                let index = (turn + round) % systems.len();
                let system = systems[index];
                let report = children.run(system, &plan)?;
                let what = || format!("{} {}", system.name, system.kv);
                let figures = figures::of(&report, &case.prompts, options.new_tokens).with_context(what)?;
                info!(
                    "round {} of {}, {} × {} tokens, {}: prefill {:.1}, decode {:.1} tok/s",
                    round + 1,
                    options.rounds,
                    case.prompts.len(),
                    case.context(),
                    what(),
                    figures.prefill_tps,
                    figures.decode_tps.unwrap_or(f64::NAN),
                );
                let row = &mut measured.rows[first_row + index];
                if let Some(dtype) = report.dtype.filter(|_| system.kv.is_empty()) {
                    row.kv = dtype;
                }
                row.samples.push(figures);
            }
            first_row += systems.len();
        }
        measured.rounds = round + 1;
        for row in &mut measured.rows {
            row.median = median(&row.samples);
        }
        // After each round: a long benchmark that is stopped leaves what it has.
        write(options, measured)?;
    }
    Ok(())
}

fn systems_of<'a>(case: &Case, checked: &'a Checked) -> impl Iterator<Item = &'a System> + use<'a> {
    let at_once = case.prompts.len();
    let takes = move |system: &&System| system.max_concurrency.is_none_or(|most| at_once <= most);
    checked.systems.iter().filter(takes)
}

fn write(options: &Options, measured: &Measured) -> Result<()> {
    if let Some(path) = &options.json {
        let text = serde_json::to_vec_pretty(measured)?;
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &options.svg {
        fs::write(path, svg::render(measured)).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn about(options: &Options, settings: &Settings) -> Measured {
    let file = settings.model.file.as_deref().and_then(Path::file_name);
    let file = file.map(|name| name.to_string_lossy().into_owned());
    Measured {
        date: today(),
        cpu: cpu(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        model: file.unwrap_or_else(|| model::served_name(&settings.model)),
        // Known once a model is loaded.
        dtype: String::new(),
        new_tokens: options.new_tokens,
        rounds: 0,
        load_average: fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| load_average(&text)),
        rows: Vec::new(),
        kernel: Vec::new(),
    }
}

/// The CPU's name, from what `/proc/cpuinfo` says.
pub(crate) fn cpu(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    let name = line.and_then(|line| line.split_once(':'));
    name.map_or_else(
        || std::env::consts::ARCH.to_owned(),
        |(_, name)| name.trim().to_owned(),
    )
}

fn load_average(loadavg: &str) -> Option<[f64; 3]> {
    let mut numbers = loadavg.split_whitespace().map_while(|word| word.parse().ok());
    Some([numbers.next()?, numbers.next()?, numbers.next()?])
}

/// Today, in UTC, as YYYY-MM-DD.
pub(crate) fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    date(since.as_secs() / 86_400)
}

/// The day, counted from 1970-01-01, as YYYY-MM-DD.
fn date(days: u64) -> String {
    let (mut year, mut left) = (1970, days);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}", left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cinch_protocol::bench::KernelRow;

    /// Two systems; one lacks a decode rate and all of the memory.
    pub(super) fn measured() -> Measured {
        let row = |system: &str, kv: &str, prompts: &[usize], prefill, decode: Option<f64>| {
            let memory = decode.map(|_| 300_000_000);
            Row {
                system: system.into(),
                kv: kv.into(),
                context: prompts.iter().sum::<usize>() / prompts.len(),
                concurrency: prompts.len(),
                prompts: prompts.to_vec(),
                median: Figures {
                    prefill_tps: prefill,
                    decode_tps: decode,
                    total_tps: prefill / 2.0,
                    ttft_p50_ms: 20.0,
                    ttft_max_ms: 30.0,
                    itl_p50_ms: 14.0,
                    itl_p95_ms: 15.0,
                    itl_p99_ms: 16.0,
                    loaded_rss_bytes: memory,
                    loaded_peak_rss_bytes: memory,
                    run_peak_rss_bytes: memory.map(|bytes| bytes + 50_000_000),
                    kv_bytes: memory.map(|_| 2_500_000),
                },
                samples: Vec::new(),
            }
        };
        Measured {
            date: "2026-11-25".into(),
            cpu: "a CPU".into(),
            threads: 2,
            model: "m.gguf".into(),
            dtype: "auto".into(),
            new_tokens: 8,
            rounds: 3,
            load_average: Some([0.25, 0.0, 0.0]),
            rows: vec![
                row("cinch", "int4", &[64], 300.0, Some(70.0)),
                row("llama.cpp", "f16", &[64], 500.0, None),
                row("cinch", "int4", &[2048], 250.0, Some(60.0)),
                row("cinch", "int4", &[1024, 2048], 200.0, Some(90.0)),
            ],
            kernel: vec![KernelRow {
                kv: "int4".into(),
                gb_s: 10.0,
                roofline_gb_s: 20.0,
            }],
        }
    }

    #[test]
    fn days_have_dates() {
        let days = [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (789, "1972-02-29"),
            (11_016, "2000-02-29"),
            (20_786, "2026-11-29"),
            (20_818, "2026-12-31"),
            (20_819, "2027-01-01"),
        ];
        for (day, wanted) in days {
            assert_eq!(date(day), wanted);
        }
    }

    #[test]
    fn the_machine_by_its_own_words() {
        assert_eq!(cpu("processor : 0\nmodel name\t: AMD EPYC\n"), "AMD EPYC");
        assert_eq!(cpu(""), std::env::consts::ARCH);
        assert_eq!(load_average("0.52 0.4 0.33 1/234 5\n"), Some([0.52, 0.4, 0.33]));
        assert_eq!(load_average("0.52 x"), None);
    }

    #[test]
    fn a_system_is_left_out_where_it_takes_fewer_requests() {
        let system = |max_concurrency| System {
            name: "x".into(),
            kv: "y".into(),
            run: Runner::Other(vec!["true".into()]),
            max_concurrency,
        };
        let checked = Checked {
            contexts: vec![64],
            concurrency: vec![1, 4],
            systems: vec![system(None), system(Some(1))],
        };
        let cases = Case::all(&[64], &[1, 4]);
        let counts: Vec<usize> = cases
            .iter()
            .map(|case| systems_of(case, &checked).count())
            .collect();
        assert_eq!(counts, [2, 1]);
    }
}
