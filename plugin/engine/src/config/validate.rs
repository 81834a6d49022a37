//! Ranges, and what must hold between fields.

use std::fmt::Display;

use cinch_kernels::Kernels;
use cinch_protocol::Ladder;

use super::types::{Class, ModelKind, Settings};
use crate::fields::FieldFault;

/// Whether `name` can be a class: it is an HTTP header value, a URL segment and a metric label.
#[must_use]
pub fn is_class_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
}

pub(super) fn validate(settings: &Settings) -> Result<(), FieldFault> {
    model(settings)?;
    range(
        "server.max_body_bytes",
        settings.server.max_body_bytes,
        1024,
        1 << 30,
    )?;
    range("server.drain_seconds", settings.server.drain_seconds, 0, 600)?;
    if settings.server.listen == settings.api.listen && settings.api.listen.port() != 0 {
        let given = settings.api.listen;
        return Err(FieldFault::new(
            "api.listen",
            given,
            "another port than server.listen has",
        ));
    }
    range("api.apply_wait_ms", settings.api.apply_wait_ms, 0, 60_000)?;
    token(settings)?;
    range("engine.max_running", settings.engine.max_running, 1, 256)?;
    if settings.engine.kernels().is_err() {
        let can: Vec<_> = Kernels::available()
            .iter()
            .map(|kernels| kernels.name())
            .collect();
        let allowed = format!("auto or, on this CPU, one of {}", can.join(", "));
        return Err(FieldFault::new(
            "engine.kernels",
            &settings.engine.kernels,
            allowed,
        ));
    }
    range("kv.capacity_bytes", settings.kv.capacity_bytes, 1 << 20, 1 << 44)?;
    range(
        "kv.prefix_cache_bytes",
        settings.kv.prefix_cache_bytes,
        0,
        1 << 44,
    )?;
    let admission = &settings.admission;
    range("admission.max_queue", admission.max_queue, 1, 100_000)?;
    range(
        "admission.max_wait_seconds",
        admission.max_wait_seconds,
        1,
        86_400,
    )?;
    range(
        "admission.default_max_tokens",
        admission.default_max_tokens,
        1,
        1 << 20,
    )?;
    let watermark = &settings.watermark;
    range("watermark.high", watermark.high, 0.1, 1.0)?;
    range("watermark.low", watermark.low, 0.05, 1.0)?;
    if watermark.low >= watermark.high {
        let allowed = format!("under {} (watermark.high)", watermark.high);
        return Err(FieldFault::new("watermark.low", watermark.low, allowed));
    }
    range(
        "metrics.error_every_layers",
        settings.metrics.error_every_layers,
        0,
        1000,
    )?;
    range("metrics.error_heads", settings.metrics.error_heads, 1, 64)?;
    if !settings.class.contains_key("default") {
        return Err(FieldFault::new(
            "class.default",
            "nothing",
            "a class: requests that name none get it",
        ));
    }
    Ok(())
}

/// The classes, against the ladder.
pub(super) fn validate_classes(settings: &Settings, ladder: &Ladder) -> Result<(), FieldFault> {
    let mut classes = settings.class.iter();
    classes.try_for_each(|(name, class)| self::class(name, class, ladder))
}

fn model(settings: &Settings) -> Result<(), FieldFault> {
    let model = &settings.model;
    match model.kind {
        ModelKind::Gguf if model.file.is_none() => Err(FieldFault::new(
            "model.file",
            "nothing",
            "the path of a GGUF file, for kind = \"gguf\"",
        )),
        ModelKind::Gguf if model.model_id.is_some() => Err(FieldFault::new(
            "model.model_id",
            "a value",
            "nothing, for kind = \"gguf\"",
        )),
        ModelKind::Hf if model.model_id.is_none() => Err(FieldFault::new(
            "model.model_id",
            "nothing",
            "a Hugging Face id or a folder, for kind = \"hf\"",
        )),
        ModelKind::Hf if model.file.is_some() => Err(FieldFault::new(
            "model.file",
            "a value",
            "nothing, for kind = \"hf\"",
        )),
        _ => template(settings),
    }
}

/// Upstream panics on another ending.
fn template(settings: &Settings) -> Result<(), FieldFault> {
    match &settings.model.chat_template {
        Some(path)
            if !path
                .extension()
                .is_some_and(|ext| ext == "json" || ext == "jinja") =>
        {
            Err(FieldFault::new(
                "model.chat_template",
                path.display(),
                "a file that ends in .json or .jinja",
            ))
        }
        _ => Ok(()),
    }
}

fn token(settings: &Settings) -> Result<(), FieldFault> {
    match &settings.api.token {
        None if !settings.api.listen.ip().is_loopback() => Err(FieldFault::new(
            "api.token",
            "nothing",
            "a token of 16 characters or more, where api.listen is not a loopback address",
        )),
        // The token itself stays out of messages and logs.
        Some(token) if token.len() < 16 || !token.bytes().all(|b| b.is_ascii_graphic()) => {
            Err(FieldFault::new(
                "api.token",
                format_args!("{} characters", token.chars().count()),
                "16 or more printable ASCII characters without spaces",
            ))
        }
        _ => Ok(()),
    }
}

fn class(name: &str, class: &Class, ladder: &Ladder) -> Result<(), FieldFault> {
    let field = format!("class.{name}");
    if !is_class_name(name) {
        return Err(FieldFault::new(
            field,
            name,
            "a name of a-z, 0-9, - and _, 1 to 64 characters",
        ));
    }
    let choice = class.choice(ladder);
    choice
        .map(drop)
        .map_err(|err| FieldFault::from(err).within(&field))
}

fn range<T: PartialOrd + Display>(field: &str, given: T, low: T, high: T) -> Result<(), FieldFault> {
    if given >= low && given <= high {
        Ok(())
    } else {
        Err(FieldFault::new(field, given, format!("{low} to {high}")))
    }
}
