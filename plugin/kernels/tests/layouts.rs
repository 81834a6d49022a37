//! Runs of rows in every layout: all implementations agree with the oracle bit for bit, and rows go in and come out
//! unchanged.

#![allow(clippy::unwrap_used, reason = "helpers of tests, which may panic")]

mod common;

use cinch_kernels::{Codec, KernelError, Kernels, Layout};
use common::{fast, oracle, random, rng};

const DIMS: [usize; 4] = [32, 64, 96, 128];
const ROWS: [usize; 10] = [0, 1, 15, 16, 17, 31, 32, 33, 64, 75];

fn cases() -> impl Iterator<Item = (Layout, Codec, usize, usize)> {
    Layout::ALL.into_iter().flat_map(|layout| {
        Codec::ALL.into_iter().flat_map(move |codec| {
            DIMS.into_iter()
                .filter(move |dim| layout.fits(codec, *dim))
                .flat_map(move |dim| ROWS.into_iter().map(move |rows| (layout, codec, dim, rows)))
        })
    })
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn implementations_agree_bit_for_bit() {
    let mut rng = rng(31);
    let fast = fast();
    for (layout, codec, dim, rows) in cases() {
        let mut values = random(&mut rng, rows * dim, 1.0);
        // A channel of large values, one of equal ones, and what saturates.
        for row in values.chunks_mut(dim) {
            row[3] *= 40.0;
            row[7] = 0.25;
            row[9] *= 1e6;
        }
        let mut right = vec![0x55; layout.stored_rows(rows) * codec.row_bytes(dim)];
        let mut unpacked = vec![f32::NAN; values.len()];
        oracle()
            .pack_run(layout, codec, dim, &values, &mut right)
            .unwrap();
        oracle()
            .unpack_run(layout, codec, dim, &right, &mut unpacked)
            .unwrap();
        for kernels in &fast {
            let case = format!("{} {layout:?} {codec:?} dim {dim} rows {rows}", kernels.name());
            let mut bytes = vec![0xaa; right.len()];
            kernels.pack_run(layout, codec, dim, &values, &mut bytes).unwrap();
            assert!(bytes == right, "{case}: packed bytes differ");
            let mut again = vec![f32::NAN; values.len()];
            kernels
                .unpack_run(layout, codec, dim, &right, &mut again)
                .unwrap();
            assert!(bits(&again) == bits(&unpacked), "{case}: values differ");
        }
    }
}

/// Tiles only move bytes: what is unpacked is what rows by themselves unpack to, and rows come out as they went in.
#[test]
fn tiles_hold_the_rows_themselves() {
    let mut rng = rng(32);
    for (layout, codec, dim, rows) in cases().filter(|(layout, ..)| *layout != Layout::KeyChannels) {
        let values = random(&mut rng, rows * dim, 1.0);
        let mut plain = vec![0; rows * codec.row_bytes(dim)];
        let mut right = vec![0.0; values.len()];
        oracle().pack(codec, dim, &values, &mut plain).unwrap();
        oracle().unpack(codec, dim, &plain, &mut right).unwrap();
        for kernels in Kernels::available() {
            let case = format!("{} {layout:?} {codec:?} dim {dim} rows {rows}", kernels.name());
            let (mut run, mut back) = (vec![0xaa; plain.len()], vec![0xaa; plain.len()]);
            kernels.of_rows(layout, codec, dim, &plain, &mut run).unwrap();
            let mut values = vec![0.0; values.len()];
            kernels.unpack_run(layout, codec, dim, &run, &mut values).unwrap();
            assert!(bits(&values) == bits(&right), "{case}: values differ");
            kernels.to_rows(layout, codec, dim, &run, &mut back).unwrap();
            assert!(back == plain, "{case}: rows differ");
            assert_eq!(
                layout == Layout::Rows || rows < 16,
                run == plain,
                "{case}: moved or not"
            );
        }
    }
}

/// KIVI's rule written again in f64: a channel's values over a tile's tokens are off by half a step at most, and a step is
/// their range over the levels, up to the rounding of f16.
#[test]
fn channels_are_off_by_half_their_own_step() {
    let mut rng = rng(33);
    for (codec, levels) in [
        (Codec::Int8, 255.0),
        (Codec::Int4, 15.0),
        (Codec::Int3, 7.0),
        (Codec::Int2, 3.0),
    ] {
        let (dim, rows) = (64, 75);
        let mut values = random(&mut rng, rows * dim, 1.0);
        for row in values.chunks_mut(dim) {
            row[5] += 100.0;
        }
        let mut bytes = vec![0; Layout::KeyChannels.stored_rows(rows) * codec.row_bytes(dim)];
        let mut stored = vec![0.0; values.len()];
        let kernels = Kernels::detect();
        kernels
            .pack_run(Layout::KeyChannels, codec, dim, &values, &mut bytes)
            .unwrap();
        kernels
            .unpack_run(Layout::KeyChannels, codec, dim, &bytes, &mut stored)
            .unwrap();
        for (given, stored) in values.chunks(32 * dim).zip(stored.chunks(32 * dim)) {
            for c in 0..dim {
                let column: Vec<f64> = given.iter().skip(c).step_by(dim).map(|x| f64::from(*x)).collect();
                let (min, max) = column
                    .iter()
                    .fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
                // Zero and scale are rounded to 11 bits, away from the values.
                let step = (max - min + min.abs() / 1024.0) / levels * (1.0 + 1.0 / 1024.0);
                for (x, stored) in column.iter().zip(stored.iter().skip(c).step_by(dim)) {
                    let error = (x - f64::from(*stored)).abs();
                    assert!(
                        error <= step / 2.0 + 1e-5,
                        "{codec:?} channel {c}: {error} for a step of {step}"
                    );
                }
            }
        }
        // Packing what was unpacked changes nothing: a tile may be written again.
        let mut again = vec![0; bytes.len()];
        kernels
            .pack_run(Layout::KeyChannels, codec, dim, &stored, &mut again)
            .unwrap();
        let mut values = vec![0.0; stored.len()];
        kernels
            .unpack_run(Layout::KeyChannels, codec, dim, &again, &mut values)
            .unwrap();
        assert_eq!(values, stored, "{codec:?}");
    }
}

#[test]
fn what_can_not_lie_so_is_refused() {
    let layout = |given, codec, dim| Err(KernelError::Layout { given, codec, dim });
    for kernels in Kernels::available() {
        let pack = |layout, codec, dim, n| {
            let mut bytes = vec![0; 32 * Codec::F32.row_bytes(dim)];
            kernels.pack_run(layout, codec, dim, &vec![0.0; n], &mut bytes)
        };
        assert_eq!(
            pack(Layout::KeyTiles, Codec::F16, 64, 64),
            layout("key tiles", "f16", 64)
        );
        assert_eq!(
            pack(Layout::KeyTiles, Codec::Int4, 80, 80),
            layout("key tiles", "int4", 80)
        );
        assert_eq!(
            pack(Layout::ValueTiles, Codec::Int3, 64, 64),
            layout("value tiles", "int3", 64)
        );
        let mut bytes = vec![0; 32 * 40];
        let channels = Layout::KeyChannels;
        assert_eq!(
            kernels.to_rows(channels, Codec::Int4, 64, &[0; 32 * 40], &mut bytes),
            layout("key channels", "int4", 64)
        );
        // A channel tile is whole, whatever it holds.
        assert_eq!(
            kernels.pack_run(channels, Codec::Int4, 64, &[0.0; 5 * 64], &mut bytes[..5 * 40]),
            Err(KernelError::Length {
                what: "packed bytes",
                given: 5 * 40,
                expected: 32 * 40
            })
        );
        let mut values = vec![0.0; 5 * 64];
        values[2 * 64 + 1] = f32::NAN;
        let refused = kernels.pack_run(channels, Codec::Int4, 64, &values, &mut bytes);
        assert!(
            matches!(
                refused,
                Err(KernelError::NonFinite {
                    row: 2,
                    column: 1,
                    ..
                })
            ),
            "{refused:?}"
        );
    }
}

/// Levels of no pattern, from 0 to the largest code, with two that are the same.
fn levels(codec: Codec) -> Vec<f32> {
    let most = codec_levels(codec) as f32;
    let square = |i: usize| most * (i as f32 / most).powi(2);
    let levels = (0..=codec_levels(codec)).map(|i| half::f16::from_f32(square(i)).to_f32());
    let mut levels: Vec<f32> = levels.collect();
    levels[1] = levels[0];
    levels
}

fn is_integer(codec: Codec) -> bool {
    matches!(codec, Codec::Int8 | Codec::Int4 | Codec::Int3 | Codec::Int2)
}

fn codec_levels(codec: Codec) -> usize {
    match codec {
        Codec::Int8 => 255,
        Codec::Int4 => 15,
        Codec::Int3 => 7,
        _ => 3,
    }
}

#[test]
fn levels_agree_bit_for_bit() {
    let mut rng = rng(33);
    for (layout, codec, dim, rows) in cases().filter(|(_, codec, ..)| is_integer(*codec)) {
        let values = random(&mut rng, rows * dim, 1.0);
        let levels = levels(codec);
        let mut right = vec![0x55; layout.stored_rows(rows) * codec.row_bytes(dim)];
        let mut unpacked = vec![f32::NAN; values.len()];
        oracle()
            .pack_levels(layout, codec, dim, &levels, &values, &mut right)
            .unwrap();
        oracle()
            .unpack_levels(layout, codec, dim, &levels, &right, &mut unpacked)
            .unwrap();
        for kernels in fast() {
            let case = format!("{} {layout:?} {codec:?} dim {dim} rows {rows}", kernels.name());
            let mut bytes = vec![0xaa; right.len()];
            kernels
                .pack_levels(layout, codec, dim, &levels, &values, &mut bytes)
                .unwrap();
            assert!(bytes == right, "{case}: packed bytes differ");
            let mut again = vec![f32::NAN; values.len()];
            kernels
                .unpack_levels(layout, codec, dim, &levels, &right, &mut again)
                .unwrap();
            assert!(bits(&again) == bits(&unpacked), "{case}: values differ");
        }
    }
}

/// Evenly spaced levels are what codes stand for anyway: but for ties, which are as near, nothing changes.
#[test]
fn even_levels_change_nothing() {
    let mut rng = rng(34);
    for (layout, codec, dim, rows) in cases().filter(|(_, codec, ..)| is_integer(*codec)) {
        let values = random(&mut rng, rows * dim, 1.0);
        let even: Vec<f32> = (0..=codec_levels(codec)).map(|i| i as f32).collect();
        let mut bytes = vec![0; layout.stored_rows(rows) * codec.row_bytes(dim)];
        let (mut plain, mut leveled) = (values.clone(), values.clone());
        oracle()
            .pack_run(layout, codec, dim, &values, &mut bytes)
            .unwrap();
        oracle()
            .unpack_run(layout, codec, dim, &bytes, &mut plain)
            .unwrap();
        oracle()
            .pack_levels(layout, codec, dim, &even, &values, &mut bytes)
            .unwrap();
        oracle()
            .unpack_levels(layout, codec, dim, &even, &bytes, &mut leveled)
            .unwrap();
        for ((x, a), b) in values.iter().zip(&plain).zip(&leveled) {
            let (a, b) = ((x - a).abs(), (x - b).abs());
            assert!(
                (a - b).abs() < 1e-5,
                "{layout:?} {codec:?} dim {dim} rows {rows}: {a} and {b} off"
            );
        }
    }
}

#[test]
fn levels_that_make_no_sense_are_refused() {
    let values = [0.5; 32];
    for kernels in Kernels::available() {
        let mut bytes = vec![0; Codec::Int2.row_bytes(32)];
        for levels in [
            &[0.0, 1.0, 2.0][..],
            &[0.0, 2.0, 1.0, 3.0],
            &[0.0, 1.0, 2.0, 3.5],
            &[-0.5, 1.0, 2.0, 3.0],
            &[0.0, f32::NAN, 2.0, 3.0],
            // Not a number of f16.
            &[0.0, 1.1, 2.0, 3.0],
        ] {
            let refused = kernels.pack_levels(Layout::Rows, Codec::Int2, 32, levels, &values, &mut bytes);
            assert!(
                matches!(
                    refused,
                    Err(KernelError::Range { .. } | KernelError::Length { .. })
                ),
                "{levels:?}: {refused:?}"
            );
        }
        let mut halves = [0; 64];
        let refused = kernels.pack_levels(Layout::Rows, Codec::F16, 32, &[0.0], &values, &mut halves);
        assert!(matches!(refused, Err(KernelError::Length { .. })), "{refused:?}");
    }
}
