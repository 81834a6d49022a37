//! Products with Q8_0 weights: the same bits as candle's own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use cinch_cache::Matmul;
use cinch_hooks::QuantizedMatmul;
use cinch_kernels::Kernels;

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.iter().map(|x| x.to_bits()).collect()
}

/// Whether candle has other code, and other bits, for some shapes: on CPUs with integer dot products.
#[cfg(target_arch = "x86_64")]
fn candle_repacks() -> bool {
    is_x86_feature_detected!("avx512vnni") || is_x86_feature_detected!("avxvnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn candle_repacks() -> bool {
    true
}

fn weights(n: usize, k: usize, dtype: GgmlDType) -> QTensor {
    let weights = Tensor::randn(0.0f32, 0.05, (n, k), &Device::Cpu).unwrap();
    QTensor::quantize(&weights, dtype).unwrap()
}

#[test]
fn the_bits_are_candles() {
    let Some(ours) = Matmul::new(Kernels::detect()) else {
        println!("no kernels of our own on this CPU: {}", Kernels::detect().name());
        return;
    };
    let repacked = (576, 1536);
    for (n, k) in [(576, 576), (192, 576), (37, 96), (2048, 320), (33, 32), repacked] {
        if (n, k) == repacked && candle_repacks() {
            continue;
        }
        let weights = Arc::new(weights(n, k, GgmlDType::Q8_0));
        let candles = QMatMul::QTensor(weights.clone());
        for rows in [1, 2, 3, 8, 31, 32, 33, 70] {
            let x = Tensor::randn(0.0f32, 2.0, (1, rows, k), &Device::Cpu).unwrap();
            let out = ours.matmul(&x, &weights).unwrap().expect("taken");
            assert_eq!(out.dims(), [1, rows, n]);
            assert_eq!(
                bits(&out),
                bits(&candles.forward(&x).unwrap()),
                "{n}×{k}, {rows} rows"
            );
        }
    }
}

#[test]
fn what_candle_repacks_or_we_do_not_know_is_left_to_it() {
    let Some(ours) = Matmul::new(Kernels::detect()) else {
        return;
    };
    let x = |k: usize| Tensor::ones((1, 2, k), candle_core::DType::F32, &Device::Cpu).unwrap();
    let repacked = weights(64, 256, GgmlDType::Q8_0);
    assert_eq!(
        ours.matmul(&x(256), &repacked).unwrap().is_none(),
        candle_repacks()
    );
    for (n, k, dtype) in [(8, 64, GgmlDType::Q4_0), (8, 64, GgmlDType::F16)] {
        assert!(ours.matmul(&x(k), &weights(n, k, dtype)).unwrap().is_none());
    }
    let taken = weights(8, 64, GgmlDType::Q8_0);
    assert!(ours.matmul(&x(64), &taken).unwrap().is_some());
    let halves = x(64).to_dtype(candle_core::DType::BF16).unwrap();
    assert!(ours.matmul(&halves, &taken).unwrap().is_none());
    let strided = x(128).narrow(2, 0, 64).unwrap();
    assert!(ours.matmul(&strided, &taken).unwrap().is_none());
    assert!(
        ours.matmul(&x(96), &taken).unwrap().is_none(),
        "candle says what does not fit"
    );
}
