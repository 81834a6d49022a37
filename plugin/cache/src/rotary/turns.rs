//! Keys turned back and forth. An angle is the sum of a coarse and a fine one, whose sines and cosines are in tables: a row
//! costs two multiplications of complex numbers a pair, wherever it is.

use super::{Pairing, Rotary};

/// Positions that a coarse step is.
const FINE: usize = 256;

/// Coarse steps in the table: 131,072 positions. Those past it are computed.
const COARSE: usize = 512;

/// Where rows are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Positions<'a> {
    /// One after another from here on.
    From(usize),
    Each(&'a [u32]),
}

impl Positions<'_> {
    /// Without the first rows.
    pub(crate) fn after(self, rows: usize) -> Self {
        match self {
            Self::From(start) => Self::From(start + rows),
            Self::Each(positions) => Self::Each(&positions[rows..]),
        }
    }

    pub(crate) fn at(self, row: usize) -> usize {
        match self {
            Self::From(start) => start + row,
            Self::Each(positions) => positions[row] as usize,
        }
    }
}

/// Which way keys turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// As the model does.
    Forth,
    Back,
}

/// A rotary embedding and its tables.
#[derive(Debug)]
pub(crate) struct Turns {
    rotary: Rotary,
    /// Cosines of each pair, then sines, one step behind the other.
    fine: Box<[f32]>,
    coarse: Box<[f32]>,
}

impl Turns {
    pub(crate) fn new(rotary: Rotary) -> Self {
        let table = |steps: usize, by: usize| {
            (0..steps)
                .flat_map(|step| {
                    let angles = rotary.frequencies.iter().map(move |x| angle(step * by, *x));
                    angles.clone().map(f64::cos).chain(angles.map(f64::sin))
                })
                .map(|x| x as f32)
                .collect()
        };
        Self {
            fine: table(FINE, 1),
            coarse: table(COARSE, FINE),
            rotary,
        }
    }

    pub(crate) fn rotary(&self) -> &Rotary {
        &self.rotary
    }

    /// Turns `rows` of `dim` values each, the first of which is at `positions.at(0)`.
    pub(crate) fn turn(&self, way: Way, positions: Positions<'_>, dim: usize, rows: &mut [f32]) {
        let rows = rows.chunks_exact_mut(dim).enumerate();
        self.turn_each(way, rows.map(|(row, x)| (positions.at(row), x)));
    }

    /// Turns rows, each with its position.
    pub(crate) fn turn_each<'a>(&self, way: Way, rows: impl Iterator<Item = (usize, &'a mut [f32])>) {
        let pairs = self.rotary.frequencies.len();
        if pairs == 0 {
            return;
        }
        let mut turn = vec![0.0; 2 * pairs];
        for (position, x) in rows {
            self.at(position, &mut turn);
            let (cos, sin) = turn.split_at_mut(pairs);
            if way == Way::Back {
                sin.iter_mut().for_each(|x| *x = -*x);
            }
            let turns = cos.iter().zip(&*sin);
            match self.rotary.pairing {
                Pairing::Halves => {
                    let (a, b) = x[..2 * pairs].split_at_mut(pairs);
                    for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(turns) {
                        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                    }
                }
                Pairing::Neighbours => {
                    for (pair, (cos, sin)) in x[..2 * pairs].chunks_exact_mut(2).zip(turns) {
                        let (a, b) = (pair[0], pair[1]);
                        (pair[0], pair[1]) = (a * cos - b * sin, a * sin + b * cos);
                    }
                }
            }
        }
    }

    /// Cosines and sines of a position's angles.
    fn at(&self, position: usize, to: &mut [f32]) {
        let pairs = self.rotary.frequencies.len();
        let (cos, sin) = to.split_at_mut(pairs);
        let Some(coarse) = self.coarse.chunks_exact(2 * pairs).nth(position / FINE) else {
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&self.rotary.frequencies) {
                let (s, c) = angle(position, *frequency).sin_cos();
                (*cos, *sin) = (c as f32, s as f32);
            }
            return;
        };
        let fine = &self.fine[position % FINE * 2 * pairs..][..2 * pairs];
        let (coarse_cos, coarse_sin) = coarse.split_at(pairs);
        let (fine_cos, fine_sin) = fine.split_at(pairs);
        let coarse = coarse_cos.iter().zip(coarse_sin);
        let fine = fine_cos.iter().zip(fine_sin);
        let to = cos.iter_mut().zip(sin);
        for ((cos, sin), ((a_cos, a_sin), (b_cos, b_sin))) in to.zip(coarse.zip(fine)) {
            *cos = a_cos * b_cos - a_sin * b_sin;
            *sin = a_sin * b_cos + a_cos * b_sin;
        }
    }
}

fn angle(position: usize, frequency: f32) -> f64 {
    position as f64 * f64::from(frequency)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const DIM: usize = 24;

    /// The definition, in f64: x turned by m θᵢ in the plane of its pair.
    fn defined(x: &[f32], position: usize, base: f64, dims: usize, pairing: Pairing) -> Vec<f64> {
        let mut out: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        for i in 0..dims / 2 {
            let angle = position as f64 * base.powf(-2.0 * i as f64 / dims as f64);
            let (a, b) = match pairing {
                Pairing::Halves => (i, i + dims / 2),
                Pairing::Neighbours => (2 * i, 2 * i + 1),
            };
            let (u, v) = (f64::from(x[a]), f64::from(x[b]));
            out[a] = u * angle.cos() - v * angle.sin();
            out[b] = u * angle.sin() + v * angle.cos();
        }
        out
    }

    #[test]
    fn keys_turn_as_defined_and_back() {
        let mut rng = StdRng::seed_from_u64(4);
        for (pairing, dims) in [
            (Pairing::Halves, DIM),
            (Pairing::Neighbours, DIM),
            (Pairing::Halves, 16),
            (Pairing::Neighbours, 8),
        ] {
            let turns = Turns::new(Rotary::new(10_000.0, dims, pairing));
            // Within the first steps, across them, and past the table.
            let positions = [0, 1, 255, 256, 1000, 20_011, 131_071, 131_072, 150_001];
            let rows: Vec<f32> = (0..positions.len() * DIM)
                .map(|_| rng.random::<f32>() - 0.5)
                .collect();
            let mut turned = rows.clone();
            turns.turn(Way::Forth, Positions::Each(&positions), DIM, &mut turned);
            for ((x, own), position) in rows.chunks(DIM).zip(turned.chunks(DIM)).zip(positions) {
                let right = defined(x, position as usize, 10_000.0, dims, pairing);
                // A frequency is an f32: so far out, its last bit shows.
                let bound = 1e-6 + f64::from(position) * 6e-8;
                let far = own
                    .iter()
                    .zip(&right)
                    .any(|(a, b)| (f64::from(*a) - b).abs() > bound);
                assert!(!far, "{pairing:?}, {dims} dimensions, position {position}");
            }
            turns.turn(Way::Back, Positions::Each(&positions), DIM, &mut turned);
            assert!(turned.iter().zip(&rows).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }

    #[test]
    fn runs_are_rows_one_after_another() {
        let turns = Turns::new(Rotary::new(500.0, DIM, Pairing::Halves));
        let rows: Vec<f32> = (0..3 * DIM).map(|i| (i as f32).sin()).collect();
        let (mut run, mut each) = (rows.clone(), rows.clone());
        turns.turn(Way::Forth, Positions::From(254), DIM, &mut run);
        turns.turn(Way::Forth, Positions::Each(&[254, 255, 256]), DIM, &mut each);
        assert_eq!(run, each);
        let mut none = rows.clone();
        Turns::new(Rotary::none()).turn(Way::Forth, Positions::From(7), DIM, &mut none);
        assert_eq!(none, rows);
    }
}
