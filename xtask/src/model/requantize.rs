//! Rewrites a GGUF with every quantized matrix as Q8_0; norms and metadata stay as they are.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};

/// GGUF's number for "mostly Q8_0".
const FILE_TYPE_Q8_0: u32 = 7;

/// Why a file could not be rewritten.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequantizeError {
    #[error("reading {path}")]
    Read {
        path: String,
        source: candle_core::Error,
    },
    #[error("tensor {name}")]
    Tensor {
        name: String,
        source: candle_core::Error,
    },
    #[error(
        "tensor {name}: rows of {columns} cannot be Q8_0: expected a multiple of {}",
        GgmlDType::Q8_0.block_size()
    )]
    Columns { name: String, columns: usize },
    #[error("writing {path}")]
    Write {
        path: String,
        source: candle_core::Error,
    },
}

/// Rewrites `source` as `target`, telling `progress` (bytes done, bytes in all, tensor).
pub(super) fn q8_0(
    source: &Path,
    target: &Path,
    mut progress: impl FnMut(u64, u64, &str),
) -> Result<(), RequantizeError> {
    let read = |source_error| RequantizeError::Read {
        path: source.display().to_string(),
        source: source_error,
    };
    let mut reader = BufReader::new(File::open(source).map_err(|err| read(err.into()))?);
    let content = gguf_file::Content::read(&mut reader).map_err(read)?;
    // candle keeps both in hash maps: sorted, the same source makes the same file.
    let mut names: Vec<_> = content.tensor_infos.keys().cloned().collect();
    names.sort();
    let size = |name: &String| content.tensor_infos[name].shape.elem_count() as u64;
    let total = names.iter().map(size).sum();
    let mut done = 0;
    let mut tensors = Vec::with_capacity(names.len());
    for name in &names {
        let tensor = content
            .tensor(&mut reader, name, &Device::Cpu)
            .map_err(|source| RequantizeError::Tensor {
                name: name.clone(),
                source,
            })?;
        tensors.push(convert(name, tensor)?);
        done += size(name);
        progress(done, total, name);
    }
    let metadata = metadata(&content);
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<_> = names.iter().map(String::as_str).zip(&tensors).collect();
    let write = |source| RequantizeError::Write {
        path: target.display().to_string(),
        source,
    };
    let file = File::create(target).map_err(|err| write(err.into()))?;
    let mut writer = BufWriter::new(file);
    gguf_file::write(&mut writer, &metadata, &tensors).map_err(write)?;
    writer.flush().map_err(|err| write(err.into()))
}

fn convert(name: &str, tensor: QTensor) -> Result<QTensor, RequantizeError> {
    let exact = matches!(tensor.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
    let &[_, columns] = tensor.shape().dims() else {
        return Ok(tensor);
    };
    if exact || tensor.dtype() == GgmlDType::Q8_0 {
        return Ok(tensor);
    }
    if columns % GgmlDType::Q8_0.block_size() != 0 {
        return Err(RequantizeError::Columns {
            name: name.to_owned(),
            columns,
        });
    }
    tensor
        .dequantize(&Device::Cpu)
        .and_then(|tensor| QTensor::quantize(&tensor, GgmlDType::Q8_0))
        .map_err(|source| RequantizeError::Tensor {
            name: name.to_owned(),
            source,
        })
}

fn metadata(content: &gguf_file::Content) -> Vec<(String, Value)> {
    let mut metadata: Vec<_> = content
        .metadata
        .iter()
        .map(|(key, value)| match key.as_str() {
            "general.file_type" => (key.clone(), Value::U32(FILE_TYPE_Q8_0)),
            _ => (key.clone(), value.clone()),
        })
        .collect();
    metadata.sort_by(|(a, _), (b, _)| a.cmp(b));
    metadata
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;

    /// A file of one matrix of each kind, one norm, two metadata keys.
    fn write(path: &Path, columns: usize) -> Vec<f32> {
        let values: Vec<f32> = (0..2 * columns).map(|i| (i as f32 * 0.37).sin()).collect();
        let matrix = Tensor::from_vec(values.clone(), (2, columns), &Device::Cpu).unwrap();
        let norm = Tensor::from_vec(values[..columns].to_vec(), columns, &Device::Cpu).unwrap();
        let q4 = QTensor::quantize(&matrix, GgmlDType::Q4_1).unwrap();
        let f32s = QTensor::quantize(&matrix, GgmlDType::F32).unwrap();
        let norm = QTensor::quantize(&norm, GgmlDType::F32).unwrap();
        let (name, kind) = (Value::String("tiny".into()), Value::U32(3));
        gguf_file::write(
            &mut File::create(path).unwrap(),
            &[("general.name", &name), ("general.file_type", &kind)],
            &[
                ("blk.0.w.weight", &q4),
                ("blk.0.norm.weight", &norm),
                ("exact.weight", &f32s),
            ],
        )
        .unwrap();
        values
    }

    #[test]
    fn matrices_become_q8_0_the_rest_stays_and_runs_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name);
        let values = write(&path("in"), 64);
        let mut seen = Vec::new();
        q8_0(&path("in"), &path("out"), |done, total, _| {
            seen.push((done, total))
        })
        .unwrap();
        assert_eq!(seen.last(), Some(&(64 + 128 + 128, 64 + 128 + 128)));
        let mut file = File::open(path("out")).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        let kinds = |name: &str| content.tensor_infos[name].ggml_dtype;
        assert_eq!(kinds("blk.0.w.weight"), GgmlDType::Q8_0);
        assert_eq!(
            (kinds("blk.0.norm.weight"), kinds("exact.weight")),
            (GgmlDType::F32, GgmlDType::F32)
        );
        assert_eq!(content.metadata["general.name"].to_string().unwrap(), "tiny");
        assert_eq!(
            content.metadata["general.file_type"].to_u32().unwrap(),
            FILE_TYPE_Q8_0
        );
        let mut load = |name| {
            let tensor = content.tensor(&mut file, name, &Device::Cpu).unwrap();
            tensor
                .dequantize(&Device::Cpu)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        assert_eq!(load("exact.weight"), values);
        assert_eq!(load("blk.0.norm.weight"), values[..64]);
        // Values span 2: Q4_1 steps by 2/15, Q8_0 adds half of its own 1/127 step.
        let worst = load("blk.0.w.weight")
            .iter()
            .zip(&values)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst < 1.0 / 15.0 + 0.5 / 127.0 + 0.005, "{worst}");
        q8_0(&path("in"), &path("again"), |_, _, _| {}).unwrap();
        assert_eq!(
            std::fs::read(path("out")).unwrap(),
            std::fs::read(path("again")).unwrap()
        );
    }

    #[test]
    fn what_is_no_gguf_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("junk");
        std::fs::write(&path, "not a model").unwrap();
        let err = q8_0(&path, &dir.path().join("out"), |_, _, _| {})
            .unwrap_err()
            .to_string();
        assert!(err.contains("junk"), "{err}");
        assert!(!dir.path().join("out").exists());
    }
}
