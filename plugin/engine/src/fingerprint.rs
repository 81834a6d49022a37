//! What a model is told apart from others by, so that a ladder measured on one is not served with another.
//!
//! Of a GGUF file: SHA-256 over its length, its header (metadata, tokenizer, names, types and places of all tensors) and
//! the first 4 KiB of each tensor. So it costs milliseconds however large the file, and differs between
//! quantizations of a model and between its fine-tunes, whose headers can be alike. Of a model from the hub: SHA-256 over
//! its id, since its files are only known once it is loaded.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use sha2::{Digest, Sha256};

use crate::config::{Model, ModelKind, Settings};
use crate::fields::FieldFault;
use crate::model;

/// Bytes of each tensor that count.
const SAMPLE: u64 = 4096;

/// The fingerprint of the configured model: `sha256:` and 64 hexadecimal digits.
///
/// # Errors
/// A file that can't be read.
pub fn of(model: &Model) -> Result<String, FieldFault> {
    match model.kind {
        ModelKind::Hf => {
            let id = model.model_id.as_deref().unwrap_or_default();
            Ok(text(&Sha256::new().chain_update(b"hf\0").chain_update(id)))
        }
        ModelKind::Gguf => {
            let file = model.file.as_deref().map(model::home).unwrap_or_default();
            gguf(&file).map_err(|err| {
                let given = format!("{} ({err})", file.display());
                FieldFault::new("model.file", given, "a readable GGUF file")
            })
        }
    }
}

/// Refuses a ladder that was measured on another model than is configured, unless that is allowed. A ladder without a
/// fingerprint says nothing that could be checked.
///
/// # Errors
/// The ladder's file, both models, and how to have it all the same.
pub fn check_ladder(settings: &Settings) -> Result<(), FieldFault> {
    let ladder = &settings.ladder;
    let Some(measured) = ladder.content.fingerprint.as_deref() else {
        return Ok(());
    };
    if ladder.allow_other_model {
        return Ok(());
    }
    let served = of(&settings.model)?;
    if served == measured {
        return Ok(());
    }
    let given = format!(
        "{}, measured on {} ({})",
        ladder.file.display(),
        ladder.content.model,
        short(measured)
    );
    let allowed = format!(
        "a ladder measured on {} ({}), as `cinch eval` makes it, or ladder.allow_other_model=true",
        model::served_name(&settings.model),
        short(&served)
    );
    Err(FieldFault::new("ladder.file", given, allowed))
}

/// Enough of it for people.
fn short(fingerprint: &str) -> &str {
    fingerprint.get(..19).unwrap_or(fingerprint)
}

fn text(hasher: &Sha256) -> String {
    let digest = hasher.clone().finalize();
    digest.iter().fold("sha256:".to_owned(), |mut text, byte| {
        text += &format!("{byte:02x}");
        text
    })
}

fn gguf(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let mut file = BufReader::new(file);
    let content = Content::read(&mut file).map_err(io::Error::other)?;
    let mut hasher = Sha256::new().chain_update(bytes.to_le_bytes());
    let mut take = |from: u64, length: u64| -> io::Result<()> {
        file.seek(SeekFrom::Start(from))?;
        io::copy(&mut (&mut file).take(length), &mut hasher)?;
        Ok(())
    };
    take(0, content.tensor_data_offset)?;
    let mut offsets: Vec<u64> = content.tensor_infos.values().map(|info| info.offset).collect();
    offsets.sort_unstable();
    for offset in offsets {
        take(content.tensor_data_offset.saturating_add(offset), SAMPLE)?;
    }
    Ok(text(&hasher))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::gguf_file::{self, Value};
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    /// A GGUF file of this name and of tensors full of `value`; removed at the end.
    struct Temporary(std::path::PathBuf);

    impl Temporary {
        fn new(file: &str, name: &str, value: f32) -> Self {
            let tensor = Tensor::full(value, (64, 32), &Device::Cpu).unwrap();
            let tensor = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
            let name = Value::String(name.into());
            let mut bytes = io::Cursor::new(Vec::new());
            gguf_file::write(
                &mut bytes,
                &[("general.name", &name)],
                &[("a", &tensor), ("b", &tensor)],
            )
            .unwrap();
            let path =
                std::env::temp_dir().join(format!("cinch-fingerprint-{file}-{}.gguf", std::process::id()));
            std::fs::write(&path, bytes.into_inner()).unwrap();
            Self(path)
        }
    }

    impl Drop for Temporary {
        fn drop(&mut self) {
            let _gone = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn equal_files_are_one_model_and_others_are_not() {
        let of = |file: &str, name: &str, value: f32| gguf(&Temporary::new(file, name, value).0).unwrap();
        let one = of("one", "a", 1.0);
        assert_eq!(one.len(), 71, "{one}");
        assert_eq!(one, of("same", "a", 1.0));
        assert_ne!(one, of("header", "b", 1.0), "the header counts");
        assert_ne!(one, of("weights", "a", 2.0), "the weights count");
        assert!(gguf(Path::new("no-such-file")).is_err());
    }

    fn settings(file: &Path, more: &[String]) -> Settings {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml"));
        let mut set = vec![format!("model.file={}", file.display())];
        set.extend_from_slice(more);
        Settings::load(path, &set).unwrap()
    }

    #[test]
    fn a_ladder_of_another_model_is_refused_by_name() {
        let model = Temporary::new("served", "a", 1.0);
        let mut settings = settings(&model.0, &[]);
        settings.ladder.content.fingerprint = Some(of(&settings.model).unwrap());
        check_ladder(&settings).unwrap();
        settings.ladder.content.fingerprint = None;
        check_ladder(&settings).unwrap();
        settings.ladder.content.fingerprint = Some(format!("sha256:{}", "0".repeat(64)));
        let said = check_ladder(&settings).unwrap_err().to_string();
        let begin = "field `ladder.file`: given ladders/smollm2-135m-instruct.toml, measured on ";
        assert!(said.starts_with(begin), "{said}");
        for part in [
            "(sha256:000000000000)",
            "allowed a ladder measured on smollm2 (sha256:",
            "ladder.allow_other_model=true",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        settings.ladder.allow_other_model = true;
        check_ladder(&settings).unwrap();
    }
}
