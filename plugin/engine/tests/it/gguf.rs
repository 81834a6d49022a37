//! GGUF files that can't be served, each named for what it is.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use cinch_engine::gguf_check::check;

/// A folder of this test process, removed at the end.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cinch-it-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// A GGUF whose header can be served; nobody could load so small a model.
pub(crate) fn gguf(architecture: &str) -> Vec<u8> {
    let tensor = Tensor::zeros((32, 32), DType::F32, &Device::Cpu).unwrap();
    let tensor = QTensor::quantize(&tensor, GgmlDType::Q8_0).unwrap();
    let text = |text: &str| Value::String(text.into());
    let (arch, blocks, model) = (text(architecture), Value::U32(1), text("gpt2"));
    let blocks_key = format!("{architecture}.block_count");
    let metadata = [
        ("general.architecture", &arch),
        (blocks_key.as_str(), &blocks),
        ("tokenizer.ggml.model", &model),
    ];
    let mut out = std::io::Cursor::new(Vec::new());
    gguf_file::write(&mut out, &metadata, &[("output.weight", &tensor)]).unwrap();
    out.into_inner()
}

fn refused(path: &Path) -> (String, String) {
    let fault = check(path).unwrap_err();
    assert_eq!(fault.field, "model.file");
    assert!(fault.given.starts_with(&path.display().to_string()), "{fault}");
    assert!(!fault.to_string().contains('\n'), "{fault}");
    (fault.given, fault.allowed)
}

#[test]
fn a_servable_header_passes() {
    let folder = Folder::new("good");
    let header = check(&folder.file("good.gguf", &gguf("llama"))).unwrap();
    assert_eq!(
        (header.architecture.as_str(), header.layers, header.tensors),
        ("llama", 1, 1)
    );
}

#[test]
fn what_is_no_gguf_is_called_that() {
    let folder = Folder::new("none");
    for (name, bytes) in [
        ("safetensors", &b"\x40\0\0\0\0\0\0\0{\"__metadata__\""[..]),
        ("empty", b""),
        ("text", b"hello there"),
    ] {
        let (given, allowed) = refused(&folder.file(name, bytes));
        assert!(given.contains("begins with"), "{given}");
        assert!(allowed.contains("GGUF"), "{allowed}");
    }
    let (given, _) = refused(&folder.0);
    assert!(given.contains("a folder"), "{given}");
    let (given, allowed) = refused(&folder.0.join("missing.gguf"));
    assert!(
        given.contains("No such file") && allowed.contains("readable"),
        "{given}, {allowed}"
    );
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let folder = Folder::new("cut");
    let whole = gguf("llama");
    // All lengths within the header, and some within the weights.
    for length in (0..whole.len()).filter(|length| *length < 256 || length % 97 == 0) {
        let (_, allowed) = refused(&folder.file("cut.gguf", &whole[..length]));
        assert!(
            allowed.contains("GGUF") || allowed.contains("whole") || allowed.contains("one of"),
            "{length}: {allowed}"
        );
    }
    let (given, allowed) = refused(&folder.file("cut.gguf", &whole[..whole.len() - 1]));
    assert!(
        given.contains("truncated") && allowed == "a whole file",
        "{given}, {allowed}"
    );
}

#[test]
fn garbage_after_the_magic_is_refused_without_a_panic() {
    let folder = Folder::new("garbage");
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for round in 0..200 {
        let mut bytes = gguf("llama");
        for _ in 0..1 + round % 8 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = 4 + (state >> 33) as usize % (bytes.len().min(300) - 4);
            bytes[at] = (state >> 24) as u8;
        }
        // Some changes do no harm: only a panic would.
        let _any = check(&folder.file("garbage.gguf", &bytes));
    }
}

#[test]
fn architectures_that_cannot_be_served_are_named_with_those_that_can() {
    let folder = Folder::new("arch");
    for (architecture, reason) in [
        ("deepseek2", ": multi-head latent attention"),
        ("mamba", ": recurrent layers"),
        ("mllama", ": cross-attention"),
        ("gemma3", "safetensors only"),
        ("falcon", ""),
    ] {
        let (given, allowed) = refused(&folder.file("arch.gguf", &gguf(architecture)));
        assert!(
            given.contains(&format!("general.architecture is {architecture}")) && given.contains(reason),
            "{given}"
        );
        assert!(
            allowed.contains("llama") && allowed.contains("qwen3"),
            "{allowed}"
        );
    }
}

#[test]
fn types_that_cannot_be_loaded_are_named_with_those_that_can() {
    let folder = Folder::new("type");
    let mut bytes = gguf("llama");
    let name = b"output.weight";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap();
    // After the name: number of dimensions, two dimensions, type.
    let at = at + name.len() + 4 + 2 * 8;
    assert_eq!(bytes[at..at + 4], 8_u32.to_le_bytes(), "Q8_0");
    bytes[at..at + 4].copy_from_slice(&23_u32.to_le_bytes());
    let (given, allowed) = refused(&folder.file("type.gguf", &bytes));
    assert!(given.contains("IQ4_XS (number 23)"), "{given}");
    assert!(allowed.contains("Q8_0") && allowed.contains("Q4_K"), "{allowed}");
}
