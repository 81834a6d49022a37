//! Codes that stand for levels of a table, not for whole numbers: rows are packed and unpacked by the same code on a
//! machine whose rounding and whose codes go by the table. Invariant: the same bytes and values as the oracle, bit for
//! bit.

use half::f16;

use crate::portable::Portable;
use crate::simd::{LANES, Simd};

type Lanes = [f32; LANES];

/// [`Portable`], with codes of a table.
#[derive(Clone, Copy)]
pub(crate) struct Leveled<'a> {
    table: &'a [f32],
    /// Between each level and the next: what is more belongs to the next.
    middles: &'a [f32],
}

/// Half-way between neighbouring levels.
pub(crate) fn middles(levels: &[f32]) -> Vec<f32> {
    levels.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect()
}

impl<'a> Leveled<'a> {
    /// `middles` are those of the table, as [`middles`] has them.
    pub(crate) fn new(table: &'a [f32], middles: &'a [f32]) -> Self {
        Self { table, middles }
    }

    #[inline(always)]
    fn level(self, codes: Lanes) -> Lanes {
        codes.map(|code| self.table[code as usize])
    }
}

macro_rules! as_portable {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty;)*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: $type),*) -> $out {
            Portable.$name($($arg),*)
        })*
    };
}

impl Simd for Leveled<'_> {
    type V = Lanes;
    const WIDE: bool = false;

    as_portable! {
        splat(x: f32) -> Lanes;
        load(x: &Lanes) -> Lanes;
        f32s(x: &[u8; 4 * LANES]) -> Lanes;
        f16s(x: &[u8; 2 * LANES]) -> Lanes;
        bf16s(x: &[u8; 2 * LANES]) -> Lanes;
        u8s(x: &[u8; LANES]) -> Lanes;
        add(a: Lanes, b: Lanes) -> Lanes;
        sub(a: Lanes, b: Lanes) -> Lanes;
        mul(a: Lanes, b: Lanes) -> Lanes;
        div(a: Lanes, b: Lanes) -> Lanes;
        madd(a: Lanes, b: Lanes, c: Lanes) -> Lanes;
        max(a: Lanes, b: Lanes) -> Lanes;
        min(a: Lanes, b: Lanes) -> Lanes;
        exp(x: Lanes) -> Lanes;
        sum(v: Lanes) -> f32;
        top(v: Lanes) -> f32;
        bottom(v: Lanes) -> f32;
        to_f16s(v: Lanes) -> [u8; 2 * LANES];
        parameters(min: f32, max: f32, levels: f32) -> (f16, f16);
    }

    #[inline(always)]
    fn store(self, v: Lanes, to: &mut Lanes) {
        *to = v;
    }

    #[inline(always)]
    fn codes8(self, group: &[u8; 32]) -> [Lanes; 2] {
        Portable.codes8(group).map(|codes| self.level(codes))
    }

    #[inline(always)]
    fn codes4(self, group: &[u8; 16]) -> [Lanes; 2] {
        Portable.codes4(group).map(|codes| self.level(codes))
    }

    #[inline(always)]
    fn codes3(self, group: &[u8; 12]) -> [Lanes; 2] {
        Portable.codes3(group).map(|codes| self.level(codes))
    }

    #[inline(always)]
    fn codes2(self, group: &[u8; 8]) -> [Lanes; 2] {
        Portable.codes2(group).map(|codes| self.level(codes))
    }

    #[inline(always)]
    fn to_u8s(self, v: Lanes) -> [u8; LANES] {
        let mut codes = [0; LANES];
        for middle in self.middles {
            for (code, x) in codes.iter_mut().zip(v) {
                *code += u8::from(x > *middle);
            }
        }
        codes
    }
}
