//! Products with weights in ggml's Q8_0: blocks of an f16 scale and 32 signed codes. Rows of activations are
//! quantized to the same blocks and multiplied as integers, block by block.
//!
//! Invariant: the bits are those of candle's AVX2 code for the same product, whose order of adding is part of the
//! result: eight f32 lanes a sum, lane `i` takes codes `4i..4i + 4` of every block by a fused multiply-add, and the
//! lanes are added as `((0+4)+(2+6)) + ((1+5)+(3+7))`. A quantized model rounds its activations again at every
//! product, so another order would become another token sooner or later.

use std::ops::Range;

use half::f16;

use crate::{KernelError, Kernels, check};

/// Codes of a block. Part of ggml's format.
pub(crate) const CODES: usize = 32;
/// Bytes of a block. Part of ggml's format.
pub(crate) const BLOCK: usize = 2 + CODES;
/// Lanes of a sum.
pub(crate) const SUMS: usize = 8;

/// Quantized activations, two rows side by side.
#[derive(Debug, Default)]
pub struct Q8Rows {
    pub(crate) blocks: usize,
    rows: usize,
    pub(crate) pairs: Vec<Pair>,
}

/// A block of two rows. What there is no row for is 0.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Pair {
    /// Codes plus 128, the first row's, then the second's.
    pub(crate) codes: [u8; 2 * CODES],
    /// The first row's scale in the first eight, then the second's.
    pub(crate) scales: [f32; 2 * SUMS],
}

impl Pair {
    const EMPTY: Self = Self {
        codes: [128; 2 * CODES],
        scales: [0.0; 2 * SUMS],
    };
}

impl Q8Rows {
    /// Room for `rows` rows of `k` values, all 0.
    ///
    /// # Errors
    /// A `k` that is not a whole number of blocks of 32.
    pub fn resize(&mut self, rows: usize, k: usize) -> Result<(), KernelError> {
        check::multiple("k", k, CODES)?;
        self.blocks = k / CODES;
        self.rows = rows;
        self.pairs.clear();
        self.pairs.resize(rows.div_ceil(2) * self.blocks, Pair::EMPTY);
        Ok(())
    }

    /// Rows there is room for.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Parts of up to `rows` rows each, an even number, to be filled apart.
    pub fn parts(&mut self, rows: usize) -> impl Iterator<Item = Q8Part<'_>> {
        let blocks = self.blocks;
        let pairs = self.pairs.chunks_mut((rows / 2).max(1) * blocks.max(1));
        pairs.map(move |pairs| Q8Part { blocks, pairs })
    }
}

/// Some of the rows.
#[derive(Debug)]
pub struct Q8Part<'a> {
    blocks: usize,
    pairs: &'a mut [Pair],
}

impl Q8Part<'_> {
    /// Quantizes rows of `k` values, at most as many as there is room for.
    pub fn quantize(&mut self, values: &[f32]) {
        let k = self.blocks * CODES;
        for (r, row) in values.chunks_exact(k).enumerate() {
            let pairs = self.pairs[r / 2 * self.blocks..].iter_mut();
            let half = r % 2;
            for (pair, x) in pairs.zip(row.as_chunks::<CODES>().0) {
                // As candle does, operation by operation.
                let largest = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                let d = largest / 127.0;
                let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
                let codes = &mut pair.codes[half * CODES..][..CODES];
                for (code, x) in codes.iter_mut().zip(x) {
                    *code = ((x * inverse).round() as i8 as u8).wrapping_add(128);
                }
                pair.scales[half * SUMS..][..SUMS].fill(f16::from_f32(d).to_f32());
            }
        }
    }
}

/// One product's operands, checked.
pub(crate) struct Product<'a> {
    /// Blocks of all columns of the weights, column after column.
    pub(crate) weights: &'a [[u8; BLOCK]],
    pub(crate) activations: &'a Q8Rows,
    /// Columns of the result.
    pub(crate) columns: Range<usize>,
    /// Pairs of rows.
    pub(crate) pairs: Range<usize>,
}

impl Kernels {
    /// Whether [`q8_0_matmul`](Self::q8_0_matmul) is faster here than what it replaces.
    #[must_use]
    pub fn has_q8_0(self) -> bool {
        matches!(self.name(), "avx2" | "avx512")
    }

    /// Products of `rows` of `activations` (from an even one on) with `columns` of `weights`.
    ///
    /// * `weights`: column by column, `k / 32` blocks of 34 bytes each.
    /// * `out`: for each row of `rows`, as many values as there are `columns`; overwritten.
    ///
    /// # Errors
    /// Lengths and ranges that do not fit.
    pub fn q8_0_matmul(
        self,
        weights: &[u8],
        columns: Range<usize>,
        activations: &Q8Rows,
        rows: Range<usize>,
        out: &mut [&mut [f32]],
    ) -> Result<(), KernelError> {
        check::multiple(
            "bytes of weights",
            weights.len(),
            BLOCK * activations.blocks.max(1),
        )?;
        let weights = weights.as_chunks::<BLOCK>().0;
        let all = weights.len() / activations.blocks.max(1);
        check::length("columns, of those there are", columns.end.min(all), columns.end)?;
        check::length(
            "rows, of those there are",
            rows.end.min(activations.rows),
            rows.end,
        )?;
        check::multiple("first row", rows.start, 2)?;
        check::length("output rows", out.len(), rows.len())?;
        for out in out.iter() {
            check::length("output columns", out.len(), columns.len())?;
        }
        let product = Product {
            weights,
            activations,
            columns,
            pairs: rows.start / 2..rows.end.div_ceil(2),
        };
        if !self.own_q8_0(&product, out) {
            scalar(&product, out);
        }
        Ok(())
    }
}

/// The reference, and the way of every other CPU.
fn scalar(product: &Product<'_>, out: &mut [&mut [f32]]) {
    let blocks = product.activations.blocks;
    for (r, out) in out.iter_mut().enumerate() {
        let pairs = &product.activations.pairs[(product.pairs.start + r / 2) * blocks..][..blocks];
        for (out, column) in out.iter_mut().zip(product.columns.clone()) {
            let mut lanes = [0.0f32; SUMS];
            for (pair, weights) in pairs.iter().zip(&product.weights[column * blocks..]) {
                let d = f16::from_le_bytes([weights[0], weights[1]]).to_f32() * pair.scales[r % 2 * SUMS];
                let codes = &pair.codes[r % 2 * CODES..][..CODES];
                for (i, lane) in lanes.iter_mut().enumerate() {
                    let sum: i32 = (4 * i..4 * i + 4)
                        .map(|j| (i32::from(codes[j]) - 128) * i32::from(weights[2 + j] as i8))
                        .sum();
                    *lane = d.mul_add(sum as f32, *lane);
                }
            }
            let [a, b, c, d, e, f, g, h] = lanes;
            *out = ((a + e) + (c + g)) + ((b + f) + (d + h));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(state: &mut u64) -> u32 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*state >> 33) as u32
    }

    /// Every implementation gives the reference's bits, at every tail of rows and columns, saturated codes
    /// included.
    #[test]
    fn all_implementations_give_the_same_bits() {
        let mut state = 7;
        for (k, n) in [(32, 1), (96, 5), (576, 19), (64, 64)] {
            let blocks = k / CODES;
            let mut weights = vec![0u8; n * blocks * BLOCK];
            for (i, block) in weights.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                let scale = f16::from_f32(random(&mut state) as f32 / 1e11);
                block[..2].copy_from_slice(&scale.to_le_bytes());
                for code in &mut block[2..] {
                    *code = if i % 7 == 3 {
                        0x81
                    } else {
                        random(&mut state) as u8
                    };
                }
            }
            for rows in 1..=11 {
                let x: Vec<f32> = (0..rows * k)
                    .map(|i| {
                        if i / 40 % 5 == 2 {
                            3e4
                        } else {
                            random(&mut state) as f32 / 1e9 - 1.0
                        }
                    })
                    .collect();
                let mut activations = Q8Rows::default();
                activations.resize(rows, k).unwrap();
                for (part, x) in activations.parts(4).zip(x.chunks(4 * k)) {
                    { part }.quantize(x);
                }
                let run = |kernels: Kernels, columns: Range<usize>, from: usize| {
                    let mut out = vec![f32::NAN; (rows - from) * columns.len()];
                    let mut split: Vec<&mut [f32]> = out.chunks_exact_mut(columns.len()).collect();
                    kernels
                        .q8_0_matmul(&weights, columns, &activations, from..rows, &mut split)
                        .unwrap();
                    out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                let scalar = Kernels::forced("scalar").unwrap();
                for kernels in Kernels::available() {
                    for columns in [0..n, n / 2..n, n - 1..n] {
                        for from in [0, 2 * ((rows - 1) / 2)] {
                            let right = run(scalar, columns.clone(), from);
                            let name = kernels.name();
                            assert_eq!(
                                run(kernels, columns.clone(), from),
                                right,
                                "{name} {k}×{n}, {rows} rows"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let kernels = Kernels::detect();
        let mut activations = Q8Rows::default();
        assert!(activations.resize(1, 33).is_err());
        activations.resize(2, 64).unwrap();
        let weights = [0u8; 3 * 2 * BLOCK];
        let (mut a, mut b) = ([0.0; 3], [0.0; 3]);
        let mut refuse = |weights: &[u8], columns: Range<usize>, rows: Range<usize>| {
            let mut out: Vec<&mut [f32]> = vec![&mut a, &mut b];
            out.truncate(rows.len());
            kernels
                .q8_0_matmul(weights, columns, &activations, rows, &mut out)
                .is_err()
        };
        assert!(!refuse(&weights, 0..3, 0..2));
        assert!(refuse(&weights[1..], 0..3, 0..2));
        assert!(refuse(&weights, 1..4, 0..2));
        assert!(refuse(&weights, 0..2, 0..2));
        assert!(refuse(&weights, 0..3, 1..2));
        assert!(refuse(&weights, 0..3, 2..4));
    }
}
