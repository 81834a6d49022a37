//! Latency and quality of a class, checked: what can't be a time or an error is missing, and says so.

use std::collections::BTreeMap;

use crate::law::{Latency, Quality, Reading};

pub(super) const FIRST_TOKEN: &str = "cinch_time_to_first_token_seconds";
pub(super) const INTER_TOKEN: &str = "cinch_inter_token_latency_seconds";
pub(super) const ERROR: &str = "cinch_attention_error";

/// By class: a value, or why there is none.
pub(super) type Checked<T> = BTreeMap<String, Result<T, String>>;

/// A 95th percentile and the samples it rests on.
pub(super) type Percentile = (Option<f64>, f64);

/// A number that can be a size, a count or a time.
pub(super) fn sound(name: &str, value: f64) -> Result<f64, String> {
    if value.is_finite() && value >= 0.0 {
        Ok(value)
    } else {
        Err(format!("{name} is {value}"))
    }
}

/// Latency of percentiles in seconds.
pub(super) fn latency(first: Percentile, next: Percentile) -> Result<Latency, String> {
    let percentile = |metric: &str, (p95, samples): Percentile| {
        sound(&format!("{metric}_count over the window"), samples)?;
        let p95 = p95.filter(|_| samples > 0.0);
        let p95 = p95.map(|p95| sound(&format!("{metric}'s 95th percentile"), p95));
        Ok::<_, String>((p95.transpose()?, samples))
    };
    let (ttft_p95, ttft_samples) = percentile(FIRST_TOKEN, first)?;
    let (itl_p95, itl_samples) = percentile(INTER_TOKEN, next)?;
    Ok(Latency {
        ttft_p95,
        ttft_samples,
        itl_p95,
        itl_samples,
    })
}

/// Quality of errors' sum and number; a class whose cache was never compressed in the window has no error to report.
pub(super) fn quality(sum: f64, samples: f64) -> Result<Quality, String> {
    sound(&format!("{ERROR}_count over the window"), samples)?;
    sound(&format!("{ERROR}_sum over the window"), sum)?;
    let error = if samples > 0.0 { sum / samples } else { 0.0 };
    Ok(Quality { error, samples })
}

/// A reading of all classes as one of each: what is missing for all is missing for each of `classes`.
pub(super) fn split<'a, T>(
    reading: Reading<Checked<T>>,
    classes: impl Iterator<Item = &'a str>,
) -> BTreeMap<String, Reading<T>> {
    let each =
        |reading: &dyn Fn() -> Reading<T>| classes.map(|class| (class.to_owned(), reading())).collect();
    match reading {
        Reading::Fresh { value, age } => {
            let all = value.into_iter().map(|(class, checked)| {
                let reading = match checked {
                    Ok(value) => Reading::Fresh { value, age },
                    Err(reason) => Reading::Missing { reason, lost: false },
                };
                (class, reading)
            });
            all.collect()
        }
        Reading::Stale { age } => each(&|| Reading::Stale { age }),
        Reading::Missing { reason, lost } => each(&|| Reading::Missing {
            reason: reason.clone(),
            lost,
        }),
    }
}
