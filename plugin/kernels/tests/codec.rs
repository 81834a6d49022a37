//! Packing and unpacking: all implementations agree bit for bit, and errors stay in their bounds.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which may panic")]

mod common;

use cinch_kernels::{Codec, GROUP, KernelError, Kernels};
use common::{DIMS, ROWS, fast, oracle, random, rng};
use half::f16;

/// Inputs that reach every branch: ordinary ones, a large offset, f16 subnormals, saturation, equal
/// values, both zeros, and one outlier a group.
fn inputs(n: usize) -> Vec<(&'static str, Vec<f32>)> {
    let mut rng = rng(n as u64);
    let normal = random(&mut rng, n, 1.0);
    let with = |f: &dyn Fn(usize, f32) -> f32| normal.iter().enumerate().map(|(i, x)| f(i, *x)).collect();
    vec![
        ("offset", with(&|_, x| 100.0 + 0.01 * x)),
        ("subnormal", with(&|_, x| 1e-7 * x)),
        ("underflow", with(&|_, x| 1e-12 * x)),
        ("saturated", with(&|_, x| 1e6 * x)),
        (
            "largest",
            with(&|i, _| if i % 2 == 0 { f32::MAX } else { f32::MIN }),
        ),
        ("constant", vec![0.1; n]),
        ("exact constant", vec![-0.5; n]),
        ("zeros", with(&|i, _| if i % 3 == 0 { -0.0 } else { 0.0 })),
        ("outlier", with(&|i, x| if i % GROUP == 5 { 40.0 * x } else { x })),
        ("normal", normal.clone()),
    ]
}

fn packed(codec: Codec, dim: usize, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0xaa; values.len() / dim * codec.row_bytes(dim)];
    Kernels::detect().pack(codec, dim, values, &mut bytes).unwrap();
    bytes
}

#[test]
fn implementations_agree_bit_for_bit() {
    let fast = fast();
    for codec in Codec::ALL {
        for dim in DIMS {
            for rows in ROWS {
                for (name, values) in inputs(rows * dim) {
                    let mut right = vec![0x55; rows * codec.row_bytes(dim)];
                    let mut unpacked = vec![f32::NAN; values.len()];
                    oracle().pack(codec, dim, &values, &mut right).unwrap();
                    oracle().unpack(codec, dim, &right, &mut unpacked).unwrap();
                    for kernels in &fast {
                        let mut bytes = vec![0xaa; right.len()];
                        kernels.pack(codec, dim, &values, &mut bytes).unwrap();
                        let case = format!("{} {codec:?} dim {dim} rows {rows} {name}", kernels.name());
                        assert!(bytes == right, "{case}: packed bytes differ");
                        let mut values = vec![f32::NAN; values.len()];
                        kernels.unpack(codec, dim, &bytes, &mut values).unwrap();
                        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        assert!(bits(&values) == bits(&unpacked), "{case}: values differ");
                    }
                }
            }
        }
    }
}

/// Scale and zero of a value's group, read from the bytes as the format describes them.
fn parameters(codec: Codec, dim: usize, row: &[u8], i: usize) -> (f64, f64) {
    // The parameters are a row's last bytes.
    let at = codec.row_bytes(dim) - 4 * dim.div_ceil(32) + 4 * (i / 32);
    let read = |at: usize| f16::from_le_bytes([row[at], row[at + 1]]).to_f64();
    (read(at), read(at + 2))
}

#[test]
fn round_trips_stay_within_the_bound() {
    for codec in Codec::ALL {
        for dim in DIMS {
            for (name, values) in inputs(8 * dim) {
                let bytes = packed(codec, dim, &values);
                let mut back = vec![0.0; values.len()];
                Kernels::detect().unpack(codec, dim, &bytes, &mut back).unwrap();
                for (i, (x, y)) in values.iter().zip(&back).enumerate() {
                    let x = match codec {
                        Codec::F32 | Codec::Bf16 => *x as f64,
                        Codec::Fp8 => x.clamp(-448.0, 448.0) as f64,
                        _ => x.clamp(-65504.0, 65504.0) as f64,
                    };
                    let bound = match codec {
                        Codec::F32 => 0.0,
                        // Half an ulp; below the normals, half the smallest subnormal.
                        Codec::F16 => x.abs() / 2048.0 + 2f64.powi(-25),
                        // f32::MAX saturates at bf16's largest, 2^-8 below it.
                        Codec::Bf16 => x.abs() / 256.0,
                        // The same of three bits of mantissa, and of a smallest step of 2^-9.
                        Codec::Fp8 => (x.abs() / 16.0).max(2f64.powi(-10)),
                        _ => {
                            let row = &bytes[i / dim * codec.row_bytes(dim)..][..codec.row_bytes(dim)];
                            let (scale, zero) = parameters(codec, dim, row, i % dim);
                            // f32 rounding of (x − zero) / scale, and of the result.
                            scale * 0.5001 + 2.4e-7 * (x.abs() + zero.abs())
                        }
                    };
                    let error = (x - *y as f64).abs();
                    assert!(
                        error <= bound,
                        "{codec:?} dim {dim} {name} [{i}]: {x} to {y}, {error:e} > {bound:e}"
                    );
                }
            }
        }
    }
}

/// The scale is the range in `levels` steps, at most what rounding of zero and scale to f16 adds.
#[test]
fn scales_are_as_small_as_f16_allows() {
    for (codec, levels) in [
        (Codec::Int8, 255.0),
        (Codec::Int4, 15.0),
        (Codec::Int3, 7.0),
        (Codec::Int2, 3.0),
    ] {
        for dim in DIMS {
            for (name, values) in inputs(4 * dim) {
                let bytes = packed(codec, dim, &values);
                for (r, row) in values.chunks(dim).enumerate() {
                    for (g, group) in row.chunks(32).enumerate() {
                        let (mut min, mut max) = (f64::MAX, f64::MIN);
                        for x in group {
                            let x = x.clamp(-65504.0, 65504.0) as f64;
                            (min, max) = (min.min(x), max.max(x));
                        }
                        let stored = &bytes[r * codec.row_bytes(dim)..];
                        let (scale, zero) = parameters(codec, dim, stored, 32 * g);
                        let ulp = |x: f64| (x.abs() / 1024.0).max(2f64.powi(-24));
                        assert!(
                            zero <= min && min - zero <= ulp(min),
                            "{codec:?} {dim} {name}: zero {zero} of {min}"
                        );
                        let wanted = (max - min + ulp(min)) / levels * 1.000_001;
                        assert!(
                            scale <= wanted + ulp(wanted),
                            "{codec:?} {dim} {name}: scale {scale}, {wanted}"
                        );
                    }
                }
            }
        }
    }
}

/// The stored format, byte by byte: 33 values, so a full group and one of a single value.
#[test]
fn the_stored_format_does_not_change() {
    let row: Vec<f32> = (0..33)
        .map(|i| if i < 32 { (i % 16) as f32 } else { -2.0 })
        .collect();
    let one = f16::ONE.to_le_bytes();
    let minus_two = f16::from_f32(-2.0).to_le_bytes();
    let mut right: Vec<u8> = (0..16).map(|i| i | i << 4).collect();
    right.push(0);
    right.extend([one, [0, 0], [0, 0], minus_two].concat());
    assert_eq!(packed(Codec::Int4, 33, &row), right);

    // Range 0 to 15 in 255 steps: 15/255 = 0.0588…, rounded up to a multiple of 2^-15.
    let scale = f16::from_f32(((15.0f32 / 255.0) * 32768.0).ceil() / 32768.0);
    let mut right: Vec<u8> = (0..32)
        .map(|i| ((i % 16) as f32 / scale.to_f32()).round() as u8)
        .collect();
    right.push(0);
    right.extend([scale.to_le_bytes(), [0, 0], [0, 0], minus_two].concat());
    assert_eq!(packed(Codec::Int8, 33, &row), right);

    assert_eq!(packed(Codec::F16, 1, &[1.0]), [0x00, 0x3c]);
    assert_eq!(packed(Codec::Bf16, 1, &[1.0]), [0x80, 0x3f]);
    assert_eq!(packed(Codec::F32, 1, &[1.0]), [0x00, 0x00, 0x80, 0x3f]);
    // Values 0 to 31 modulo 8: two bits each from the four quarters, then high bits from the eight eighths.
    let row: Vec<f32> = (0..32).map(|i| (i % 8) as f32).collect();
    let mut right = vec![0x00, 0x55, 0xaa, 0xff, 0x00, 0x55, 0xaa, 0xff];
    right.extend([0xaa; 4]);
    right.extend([one, [0, 0]].concat());
    assert_eq!(packed(Codec::Int3, 32, &row), right);
    let row: Vec<f32> = (0..32).map(|i| (i / 8) as f32).collect();
    let mut right = vec![0b11_10_01_00; 8];
    right.extend([one, [0, 0]].concat());
    assert_eq!(packed(Codec::Int2, 32, &row), right);
    // A short group of 5: two bytes of two-bit codes (values 0, 2, 4 and 1, 3), one of high bits.
    let row = [0.0, 1.0, 2.0, 7.0, 4.0];
    assert_eq!(packed(Codec::Int3, 5, &row)[..3], [0b00_10_00, 0b11_01, 0b11000]);
    // An odd short group: 3 values in 2 bytes, the second half starting at value 2.
    assert_eq!(packed(Codec::Int4, 3, &[0.0, 15.0, 7.0])[..2], [0x70, 0x0f]);
}

#[test]
fn saturation_keeps_the_largest_finite_value() {
    for (codec, largest) in [
        (Codec::F16, 65504.0),
        (Codec::Int8, 65504.0),
        (Codec::Int4, 65504.0),
        (Codec::Int3, 65504.0),
        (Codec::Int2, 65504.0),
    ] {
        let mut back = [0.0; 2];
        Kernels::detect()
            .unpack(codec, 2, &packed(codec, 2, &[1e30, -1e30]), &mut back)
            .unwrap();
        assert!(
            (back[0] - largest).abs() <= largest / 512.0 && back[1] == -largest,
            "{codec:?}: {back:?}"
        );
    }
    let mut back = [0.0; 2];
    Kernels::detect()
        .unpack(
            Codec::Bf16,
            2,
            &packed(Codec::Bf16, 2, &[f32::MAX, f32::MIN]),
            &mut back,
        )
        .unwrap();
    assert_eq!(back, [half::bf16::MAX.to_f32(), half::bf16::MIN.to_f32()]);
}

#[test]
fn f16_conversion_is_exact_for_every_bit_pattern() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut values = vec![0.0; 1 << 16];
    Kernels::detect()
        .unpack(Codec::F16, 64, &bytes, &mut values)
        .unwrap();
    for (bits, x) in (0..=u16::MAX).zip(values) {
        let right = f16::from_bits(bits).to_f64();
        assert!(
            f64::from(x) == right || (x.is_nan() && right.is_nan()),
            "{bits:#06x}: {x} for {right}"
        );
    }
}

/// The format's own numbers (arXiv 2209.05433, table 1), and that every code comes back as itself.
#[test]
fn fp8_codes_are_e4m3() {
    let bytes: Vec<u8> = (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f).collect();
    for kernels in Kernels::available() {
        let mut values = vec![0.0; bytes.len()];
        kernels.unpack(Codec::Fp8, 127, &bytes, &mut values).unwrap();
        assert_eq!(values[0x7e], 448.0, "the largest");
        assert_eq!(values[0x08], 2f32.powi(-6), "the smallest normal");
        assert_eq!(values[0x07], 0.875 * 2f32.powi(-6), "the largest subnormal");
        assert_eq!(values[0x01], 2f32.powi(-9), "the smallest");
        assert_eq!(values[0x38], 1.0);
        assert_eq!(values[127 + 0x38], -1.0);
        let mut back = vec![0; bytes.len()];
        kernels.pack(Codec::Fp8, 127, &values, &mut back).unwrap();
        assert_eq!(back, bytes, "{}", kernels.name());
        // Half-way between neighbours, to the even code; a little more, to the larger.
        let ties: Vec<f32> = (0..0x7e)
            .map(|code| f32::midpoint(values[code], values[code + 1]))
            .collect();
        let mut rounded = vec![0; ties.len()];
        kernels.pack(Codec::Fp8, 126, &ties, &mut rounded).unwrap();
        assert!(
            rounded.iter().zip(0..).all(|(code, i)| *code == i + (i & 1)),
            "{}",
            kernels.name()
        );
        let above: Vec<f32> = ties.iter().map(|x| x.next_up()).collect();
        kernels.pack(Codec::Fp8, 126, &above, &mut rounded).unwrap();
        assert!(
            rounded.iter().zip(1..).all(|(code, next)| *code == next),
            "{}",
            kernels.name()
        );
    }
}

#[test]
fn non_finite_rows_are_named() {
    for codec in Codec::ALL {
        for given in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (row, column) in [(0, 0), (2, 31), (3, 32), (4, 64)] {
                let mut values = vec![1.0; 5 * 65];
                values[row * 65 + column] = given;
                values[5 * 65 - 1] = given;
                let mut bytes = vec![0; 5 * codec.row_bytes(65)];
                for kernels in Kernels::available() {
                    match kernels.pack(codec, 65, &values, &mut bytes) {
                        Err(KernelError::NonFinite {
                            row: r,
                            column: c,
                            given: g,
                        }) => {
                            assert_eq!((r, c, g.to_bits()), (row, column, given.to_bits()));
                        }
                        other => panic!("{codec:?} {given}: {other:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn sizes_and_names() {
    let sizes = |dim| Codec::ALL.map(|c| c.row_bytes(dim));
    assert_eq!(sizes(64), [256, 128, 128, 64, 72, 40, 32, 24]);
    assert_eq!(sizes(65), [260, 130, 130, 65, 77, 45, 38, 29]);
    assert_eq!(sizes(1), [4, 2, 2, 1, 5, 5, 6, 5]);
    assert_eq!(
        Codec::ALL.map(Codec::name),
        ["f32", "f16", "bf16", "fp8", "int8", "int4", "int3", "int2"]
    );
}
