//! Raises requirements in the manifests of prepared copies: candle 0.10.2 to 0.11.1 and what it
//! brings along (docs/decisions/002). Nothing else of a manifest changes.

/// `(dependency, published requirement, ours)`.
pub(super) const RAISED: [(&str, &str, &str); 6] = [
    ("candle-core", "0.10.2", "0.11.1"),
    ("candle-nn", "0.10.2", "0.11.1"),
    // Optional, never built here; raised alike so that cargo resolves one candle.
    ("candle-flash-attn", "0.10.2", "0.11.1"),
    ("candle-flash-attn-v3", "0.10.2", "0.11.1"),
    ("candle-metal-kernels", "0.10.2", "0.11.1"),
    // candle 0.11 reads tensors with 0.8; a type of it crosses the border.
    ("safetensors", "0.7.0", "0.8"),
];

/// A manifest that is not as published.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("{krate}: Cargo.toml is not UTF-8")]
    NotText { krate: String },
    #[error("{krate}: Cargo.toml: {dependency}: expected {expected}, given {given}")]
    Requirement {
        krate: String,
        dependency: String,
        expected: String,
        given: String,
    },
    #[error("{krate}: Cargo.toml: no dependency on candle-core to raise")]
    NoCandle { krate: String },
}

/// The manifest with raised requirements. cargo publishes one table per dependency, one key per
/// line: that is what is looked for.
pub(super) fn raise(krate: &str, manifest: &[u8]) -> Result<String, ManifestError> {
    let text = std::str::from_utf8(manifest).map_err(|_| ManifestError::NotText {
        krate: krate.to_owned(),
    })?;
    let mut rule = None;
    let mut candle = false;
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let content = line.trim_end();
        if content.starts_with('[') {
            rule = dependency(content).and_then(|name| RAISED.iter().find(|(raised, ..)| *raised == name));
        }
        match (rule, content.strip_prefix("version = ")) {
            (Some((name, published, ours)), Some(given)) => {
                let given = given.trim_matches('"');
                if given != *published {
                    return Err(ManifestError::Requirement {
                        krate: krate.to_owned(),
                        dependency: (*name).to_owned(),
                        expected: (*published).to_owned(),
                        given: given.to_owned(),
                    });
                }
                candle |= *name == "candle-core";
                out += &line.replacen(published, ours, 1);
            }
            _ => out += line,
        }
    }
    if !candle {
        return Err(ManifestError::NoCandle {
            krate: krate.to_owned(),
        });
    }
    Ok(out)
}

/// The dependency a table header is about: `[dependencies.x]`, `[target.'…'.dependencies.x]`, …
fn dependency(header: &str) -> Option<&str> {
    let inner = header.strip_prefix('[')?.strip_suffix(']')?;
    let (table, name) = inner.rsplit_once('.')?;
    table.ends_with("dependencies").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHED: &str = "[package]\nname = \"x\"\nversion = \"0.10.2\"\n\n[dependencies.candle-core]\n\
        version = \"0.10.2\"\noptional = true\n\n[dependencies.other]\nversion = \"0.7.0\"\n\n\
        [target.'cfg(any(target_os = \"macos\"))'.dependencies.candle-metal-kernels]\nversion = \"0.10.2\"\n\n\
        [dev-dependencies.safetensors]\nversion = \"0.7.0\"\n";

    #[test]
    fn raises_the_named_requirements_and_nothing_else() {
        let raised = raise("x", PUBLISHED.as_bytes()).unwrap();
        let changed: Vec<_> = PUBLISHED
            .lines()
            .zip(raised.lines())
            .enumerate()
            .filter(|(_, (old, new))| old != new)
            .map(|(line, (_, new))| (line, new))
            .collect();
        assert_eq!(
            changed,
            [
                (5, "version = \"0.11.1\""),
                (12, "version = \"0.11.1\""),
                (15, "version = \"0.8\"")
            ]
        );
        assert_eq!(raised.lines().count(), PUBLISHED.lines().count());
    }

    #[test]
    fn another_requirement_is_named() {
        let err = raise("x", b"[dependencies.candle-core]\nversion = \"0.12.0\"\n").unwrap_err();
        assert_eq!(
            err.to_string(),
            "x: Cargo.toml: candle-core: expected 0.10.2, given 0.12.0"
        );
        assert!(matches!(
            raise("x", b"[package]\n").unwrap_err(),
            ManifestError::NoCandle { .. }
        ));
    }
}
