//! From time stamps to rates and latencies, and from rounds to medians.

use anyhow::{Result, bail};
use cinch_protocol::bench::Figures;
use cinch_protocol::probe::Report;

/// Most steps over those asked for that a run may have where no plugin schedules. mistral.rs sets a sequence that ends in
/// a prompt's step back to running, and makes one step more with it after it was answered. Requests at once end there
/// often: its scheduler lets one wait for the others and then takes its whole text for a prompt again.
const SURPLUS: usize = 1;

/// The figures of a report's last group, in which each of `prompts` had to bring `new_tokens` tokens. What was not
/// answered does not count: neither its tokens nor its time.
pub(crate) fn of(report: &Report, prompts: &[usize], new_tokens: usize) -> Result<Figures> {
    let Some(first) = report.runs.len().checked_sub(prompts.len()) else {
        bail!(
            "the report has {} runs, expected at least {}",
            report.runs.len(),
            prompts.len()
        );
    };
    // Only the plugin counts bytes, and with it requests are scheduled by us.
    let surplus = if report.kv_peak_bytes.is_some() {
        0
    } else {
        SURPLUS
    };
    let mut steps: Vec<&[f64]> = Vec::new();
    for (run, &prompt) in report.runs[first..].iter().zip(prompts) {
        let made = run.step_seconds.len();
        let answered = run.answered_tokens.unwrap_or(made);
        let asked = new_tokens..=new_tokens + surplus;
        if run.prompt_tokens != prompt
            || !asked.contains(&answered)
            || !(answered..=*asked.end()).contains(&made)
        {
            bail!(
                "{}: expected {prompt} prompt and {new_tokens} new tokens, given {} and {answered} in {made} steps",
                run.name,
                run.prompt_tokens,
            );
        }
        steps.push(&run.step_seconds[..answered]);
    }
    let steps = || steps.iter().copied();
    let mut firsts: Vec<f64> = steps().filter_map(|steps| steps.first().copied()).collect();
    firsts.sort_by(f64::total_cmp);
    let prefilled = firsts.last().copied().unwrap_or_default();
    let end = steps().flatten().copied().fold(0.0, f64::max);
    let decoded = steps().flatten().filter(|&&at| at > prefilled).count();
    let mut gaps: Vec<f64> = steps()
        .flat_map(|steps| steps.windows(2).map(|pair| pair[1] - pair[0]))
        .collect();
    gaps.sort_by(f64::total_cmp);
    let prompt: usize = prompts.iter().sum();
    let answered: usize = steps().map(<[f64]>::len).sum();
    let per_second = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(f64::MIN_POSITIVE);
    Ok(Figures {
        prefill_tps: per_second(prompt, prefilled),
        decode_tps: (decoded > 0).then(|| per_second(decoded, end - prefilled)),
        total_tps: per_second(prompt + answered, end),
        ttft_p50_ms: percentile(&firsts, 50) * 1e3,
        ttft_max_ms: prefilled * 1e3,
        itl_p50_ms: percentile(&gaps, 50) * 1e3,
        itl_p95_ms: percentile(&gaps, 95) * 1e3,
        itl_p99_ms: percentile(&gaps, 99) * 1e3,
        loaded_rss_bytes: report.loaded_rss,
        loaded_peak_rss_bytes: report.loaded_peak_rss,
        run_peak_rss_bytes: report.group_peak_rss.last().copied().flatten(),
        kv_bytes: report.kv_peak_bytes,
    })
}

/// The least of `sorted` that at least `percent` of them do not exceed (nearest rank).
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(rank).copied().unwrap_or_default()
}

/// Of each figure the median; of an even number the upper one. What one round lacks is absent.
pub(crate) fn median(rounds: &[Figures]) -> Figures {
    let number = |of: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let bytes = |of: fn(&Figures) -> Option<u64>| {
        let mut values: Vec<u64> = rounds.iter().map(of).collect::<Option<_>>()?;
        values.sort_unstable();
        values.get(values.len() / 2).copied()
    };
    let decoded = rounds.iter().all(|figures| figures.decode_tps.is_some());
    Figures {
        prefill_tps: number(|f| f.prefill_tps),
        decode_tps: decoded.then(|| number(|f| f.decode_tps.unwrap_or_default())),
        total_tps: number(|f| f.total_tps),
        ttft_p50_ms: number(|f| f.ttft_p50_ms),
        ttft_max_ms: number(|f| f.ttft_max_ms),
        itl_p50_ms: number(|f| f.itl_p50_ms),
        itl_p95_ms: number(|f| f.itl_p95_ms),
        itl_p99_ms: number(|f| f.itl_p99_ms),
        loaded_rss_bytes: bytes(|f| f.loaded_rss_bytes),
        loaded_peak_rss_bytes: bytes(|f| f.loaded_peak_rss_bytes),
        run_peak_rss_bytes: bytes(|f| f.run_peak_rss_bytes),
        kv_bytes: bytes(|f| f.kv_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cinch_protocol::probe::RunReport;

    fn report(runs: &[(usize, &[f64])]) -> Report {
        let run = |&(prompt_tokens, steps): &(usize, &[f64])| RunReport {
            prompt_tokens,
            step_seconds: steps.to_vec(),
            ..RunReport::default()
        };
        Report {
            runs: runs.iter().map(run).collect(),
            group_peak_rss: vec![Some(1), Some(7)],
            loaded_peak_rss: Some(9),
            ..Report::default()
        }
    }

    #[test]
    fn rates_of_one_and_of_two_requests() {
        // The warm-up before it does not count.
        let one = report(&[(16, &[0.5]), (100, &[2.0, 2.5, 3.0])]);
        let figures = of(&one, &[100], 3).unwrap();
        assert_eq!((figures.prefill_tps, figures.decode_tps), (50.0, Some(2.0)));
        assert_eq!((figures.total_tps, figures.itl_p50_ms), (103.0 / 3.0, 500.0));
        assert_eq!(
            (figures.run_peak_rss_bytes, figures.peak_rss_bytes()),
            (Some(7), Some(9))
        );
        assert_eq!(figures.kv_bytes, None);

        // The first request's second token comes before the other's first: it is no step of pure decoding.
        let two = report(&[(100, &[1.0, 1.5, 5.0]), (200, &[3.0, 4.0, 5.0])]);
        let figures = of(&two, &[100, 200], 3).unwrap();
        assert_eq!((figures.prefill_tps, figures.decode_tps), (100.0, Some(1.5)));
        assert_eq!((figures.ttft_p50_ms, figures.ttft_max_ms), (1000.0, 3000.0));
        assert_eq!((figures.itl_p50_ms, figures.itl_p99_ms), (1000.0, 3500.0));

        let none = report(&[(1, &[1.0, 2.0]), (1, &[3.0, 3.0])]);
        assert_eq!(of(&none, &[1, 1], 2).unwrap().decode_tps, None);
    }

    #[test]
    fn a_run_that_ended_early_is_no_measurement() {
        let short = report(&[(100, &[2.0, 2.5])]);
        assert!(
            of(&short, &[100], 3)
                .unwrap_err()
                .to_string()
                .contains("given 100 and 2 in 2 steps")
        );
        assert!(of(&short, &[101], 2).is_err());
        assert!(of(&short, &[100, 100], 2).is_err());
    }

    #[test]
    fn a_step_after_the_answer_counts_for_nothing() {
        let with = |answered_tokens, kv_peak_bytes, steps: &[f64]| {
            let mut report = report(&[(100, steps), (100, &[1.0, 2.0, 3.0])]);
            report.runs[0].answered_tokens = answered_tokens;
            report.kv_peak_bytes = kv_peak_bytes;
            of(&report, &[100, 100], 3)
        };
        let exact = with(Some(3), None, &[1.0, 2.0, 4.0]).unwrap();
        assert_eq!(
            (exact.decode_tps, exact.total_tps),
            (Some(4.0 / 3.0), 206.0 / 4.0)
        );
        assert_eq!(with(Some(3), None, &[1.0, 2.0, 4.0, 9.0]).unwrap(), exact);

        // One that was answered is a token as any other.
        for answered in [Some(4), None] {
            let more = with(answered, None, &[1.0, 2.0, 4.0, 9.0]).unwrap();
            assert_eq!((more.decode_tps, more.total_tps), (Some(5.0 / 8.0), 207.0 / 9.0));
        }

        // Two too many, one too few, and steps that are missing are errors, and with the plugin any difference.
        let refused: [(Option<usize>, Option<u64>, &[f64]); 8] = [
            (Some(3), None, &[1.0, 2.0, 4.0, 9.0, 9.5]),
            (Some(5), None, &[1.0, 2.0, 4.0, 9.0, 9.5]),
            (Some(2), None, &[1.0, 2.0, 4.0]),
            (Some(3), None, &[1.0, 2.0]),
            (Some(4), None, &[1.0, 2.0, 4.0]),
            (Some(3), Some(7), &[1.0, 2.0, 4.0, 9.0]),
            (Some(4), Some(7), &[1.0, 2.0, 4.0, 9.0]),
            (Some(2), Some(7), &[1.0, 2.0, 4.0]),
        ];
        for (answered, kv, steps) in refused {
            assert!(
                with(answered, kv, steps).is_err(),
                "{answered:?} {kv:?} {steps:?}"
            );
        }
        assert!(with(Some(3), Some(7), &[1.0, 2.0, 4.0]).is_ok());
    }

    #[test]
    fn percentiles_by_nearest_rank() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let of = |percent| percentile(&hundred, percent);
        assert_eq!((of(50), of(95), of(99)), (50.0, 95.0, 99.0));
        assert_eq!((percentile(&[3.0], 99), percentile(&[], 50)), (3.0, 0.0));
    }

    #[test]
    fn medians_of_what_every_round_has() {
        let round = |decode_tps, kv_bytes| Figures {
            decode_tps,
            kv_bytes,
            prefill_tps: decode_tps.unwrap_or(9.0),
            ..Figures::default()
        };
        let all = median(&[
            round(Some(3.0), Some(1)),
            round(Some(1.0), Some(5)),
            round(Some(2.0), Some(2)),
        ]);
        assert_eq!(
            (all.prefill_tps, all.decode_tps, all.kv_bytes),
            (2.0, Some(2.0), Some(2))
        );
        let some = median(&[round(Some(3.0), None), round(None, Some(5))]);
        assert_eq!(
            (some.prefill_tps, some.decode_tps, some.kv_bytes),
            (9.0, None, None)
        );
    }
}
