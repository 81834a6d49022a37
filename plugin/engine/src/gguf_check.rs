//! A GGUF file is looked at before the loader gets it: the loader panics on what this refuses.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};

use crate::architecture;
use crate::fields::{FieldFault, first_line};

/// `general.architecture` values that mistral.rs 0.8.1 loads from GGUF and whose attention goes through
/// the seam.
pub const ARCHITECTURES: [&str; 8] = [
    "llama",
    "mistral3",
    "phi2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "starcoder2",
];

/// `tokenizer.ggml.model` values that mistral.rs converts.
const TOKENIZERS: [&str; 3] = ["gpt2", "llama", "replit"];

const TYPES: &str =
    "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K or Q8_K";

/// What is known of a file that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// `general.architecture`.
    pub architecture: String,
    /// Layers.
    pub layers: u64,
    /// Tensors.
    pub tensors: usize,
    /// The file's size.
    pub bytes: u64,
}

/// Checks that the file at `path` is a whole GGUF of an architecture and types that can be served.
///
/// # Errors
/// What is wrong, as a fault of the field `model.file`.
pub fn check(path: &Path) -> Result<Header, FieldFault> {
    let fault = |given: String, allowed: String| {
        FieldFault::new("model.file", format!("{} ({given})", path.display()), allowed)
    };
    let unreadable = |err: std::io::Error| fault(err.to_string(), "a readable GGUF file".into());
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(fault("a folder".into(), "a GGUF file".into()));
    }
    let bytes = metadata.len();
    let mut reader = BufReader::new(file);
    let mut magic = [0; 4];
    let is_gguf = reader.read_exact(&mut magic).is_ok() && &magic == b"GGUF";
    if !is_gguf {
        let given = format!("begins with {:?}", String::from_utf8_lossy(&magic));
        return Err(fault(given, "a GGUF file: it begins with \"GGUF\"".into()));
    }
    reader.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    let content = Content::read(&mut reader).map_err(|err| {
        let text = err.to_string();
        let text = first_line(&text);
        match unknown_type(text) {
            Some(given) => fault(format!("has tensors of type {given}"), TYPES.into()),
            None => fault(
                format!("unreadable header: {text}"),
                "a whole GGUF file, version 1 to 3".into(),
            ),
        }
    })?;
    let architecture = string(&content, "general.architecture")
        .unwrap_or("none")
        .to_ascii_lowercase();
    if !ARCHITECTURES.contains(&architecture.as_str()) {
        let reason =
            architecture::reason(&architecture).map_or_else(String::new, |reason| format!(": {reason}"));
        return Err(fault(
            format!("general.architecture is {architecture}{reason}"),
            format!("one of {}", ARCHITECTURES.join(", ")),
        ));
    }
    let blocks = format!("{architecture}.block_count");
    let layers = content
        .metadata
        .get(&blocks)
        .and_then(|value| value.to_u32().ok());
    let Some(layers) = layers.filter(|layers| *layers > 0) else {
        return Err(fault(format!("{blocks} is missing"), "a whole model".into()));
    };
    if let Some(splits) = content
        .metadata
        .get("split.count")
        .and_then(|value| value.to_u64().ok())
        && splits > 1
    {
        return Err(fault(
            format!("one of {splits} parts"),
            "a model in one file".into(),
        ));
    }
    let tokenizer = string(&content, "tokenizer.ggml.model").unwrap_or("none");
    if !TOKENIZERS.contains(&tokenizer) {
        return Err(fault(
            format!("tokenizer.ggml.model is {tokenizer}"),
            format!("one of {}", TOKENIZERS.join(", ")),
        ));
    }
    whole(&content, bytes).map_err(|given| fault(given, "a whole file".into()))?;
    Ok(Header {
        layers: u64::from(layers),
        tensors: content.tensor_infos.len(),
        architecture,
        bytes,
    })
}

fn string<'a>(content: &'a Content, key: &str) -> Option<&'a str> {
    match content.metadata.get(key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

/// Every tensor lies within the file.
fn whole(content: &Content, bytes: u64) -> Result<(), String> {
    if content.tensor_infos.is_empty() {
        return Err("no tensors".into());
    }
    for (name, info) in &content.tensor_infos {
        let block = info.ggml_dtype.block_size();
        let elements = info.shape.elem_count();
        if !elements.is_multiple_of(block) {
            return Err(format!(
                "tensor {name} has {elements} elements in blocks of {block}"
            ));
        }
        let size = (elements / block * info.ggml_dtype.type_size()) as u64;
        let end = content
            .tensor_data_offset
            .saturating_add(info.offset)
            .saturating_add(size);
        if end > bytes {
            return Err(format!(
                "{bytes} bytes, but tensor {name} ends at {end}: truncated"
            ));
        }
    }
    Ok(())
}

/// candle names an unknown type by its number; people know it by its name (ggml.h, `enum ggml_type`).
fn unknown_type(message: &str) -> Option<String> {
    let (_, number) = message.split_once("unknown dtype for tensor ")?;
    let number: u32 = number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    let name = match number {
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return Some(format!("number {number}")),
    };
    Some(format!("{name} (number {number})"))
}
