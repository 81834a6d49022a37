//! What one side of a block holds beside its codes, so that its rows come back nearer to what they were. Such a block is
//! attended to as it unpacks.

use cinch_hooks::HookError;
use cinch_kernels::{Codec, Kernels, Layout};
use half::f16;

use super::pair::Pair;
use super::salient::{Columns, Salient};
use super::side::Side;
use super::twin::{self, Twin};
use crate::error::kernel;
use crate::quantize::gear::LowRank;
use crate::quantize::outliers::{self, Outlier};
use crate::quantize::zipcache::Marks;
use crate::quantize::{Beside, Fraction, bits, kvquant};

/// What a block holds beside the codes of K and V.
#[derive(Debug, Clone, Default)]
pub(super) struct Extras {
    pub(super) k: Extra,
    pub(super) v: Extra,
    pub(super) marks: Marks,
    /// Where rows are merged with those of another head.
    pub(super) twin: Option<Twin>,
}

/// The same of one side.
#[derive(Debug, Clone, Default)]
pub(super) struct Extra {
    levels: Box<[f16]>,
    outliers: Box<[Outlier]>,
    error: Option<LowRank>,
    salient: Option<Salient>,
}

impl Extras {
    /// Packs rows of K and V to `to`, and what goes beside them.
    pub(super) fn pack(
        kernels: Kernels,
        pair: Pair,
        sides: (Side, Side),
        marks: Marks,
        (k, v): (Vec<f32>, Vec<f32>),
        to: (&mut [u8], &mut [u8]),
    ) -> Result<Self, HookError> {
        let mixed = matches!(pair.beside, Beside::Salient { .. });
        let pack = |side, codec, key, values, to| {
            if mixed && bits(codec) < 16 {
                Extra::salient(kernels, (side, codec), key, &marks, values, to)
            } else {
                Extra::pack(kernels, (side, codec), pair.beside, values, to)
            }
        };
        Ok(Self {
            k: pack(sides.0, pair.k, true, k, to.0)?,
            v: pack(sides.1, pair.v, false, v, to.1)?,
            marks,
            twin: None,
        })
    }

    /// Bytes allocated, without what is shared.
    pub(super) fn own_bytes(&self) -> usize {
        let twin = self.twin.as_ref().map_or(0, Twin::own_bytes);
        size_of::<Self>() + self.k.bytes() + self.v.bytes() + twin
    }

    /// This block's part of what is shared.
    pub(super) fn shared_bytes(&self) -> usize {
        self.twin.as_ref().map_or(0, Twin::shared_bytes)
    }

    /// Unpacks the first keys as they are stored.
    pub(super) fn keys(
        &self,
        kernels: Kernels,
        side: Side,
        bytes: &[u8],
        to: &mut [f32],
    ) -> Result<(), HookError> {
        match &self.twin {
            Some(twin) => twin.keys(kernels, side, to),
            None => self.k.unpack(kernels, side, &self.marks, bytes, to),
        }
    }

    /// Unpacks the first values.
    pub(super) fn values(
        &self,
        kernels: Kernels,
        side: Side,
        bytes: &[u8],
        to: &mut [f32],
    ) -> Result<(), HookError> {
        match &self.twin {
            Some(twin) => twin.values(kernels, side, to),
            None => self.v.unpack(kernels, side, &self.marks, bytes, to),
        }
    }
}

impl Extra {
    /// Packs rows of `values` to `to`, and what goes beside them. `codec` is the pair's own; `side` is how codes lie.
    fn pack(
        kernels: Kernels,
        (side, codec): (Side, Codec),
        beside: Beside,
        mut values: Vec<f32>,
        to: &mut [u8],
    ) -> Result<Self, HookError> {
        let (dim, by_column) = (side.dim(), side.layout == Layout::KeyChannels);
        let room = |values: usize| side.layout.stored_rows(values / dim) * side.row();
        let whole = |values: &[f32], to: &mut [u8]| {
            let to = &mut to[..room(values.len())];
            kernels
                .pack_run(side.layout, side.codec, dim, values, to)
                .map_err(kernel)
        };
        let mut extra = Self::default();
        match beside {
            // A side that is not packed has no error.
            _ if bits(codec) >= 16 => whole(&values, to)?,
            // Of these, blocks have no extras.
            Beside::Nothing | Beside::Shared { .. } | Beside::Salient { .. } => whole(&values, to)?,
            Beside::Levels { outliers } => {
                let count = outliers.of(values.len());
                extra.outliers = outliers::take(&mut values, dim, by_column, count).into();
                let largest = (1 << bits(codec)) - 1;
                extra.levels = kvquant::levels(&values, dim, by_column, largest as u8).into();
                let to = &mut to[..room(values.len())];
                kernels
                    .pack_levels(side.layout, side.codec, dim, &extra.levels(), &values, to)
                    .map_err(kernel)?;
            }
            Beside::Error { outliers, rank } => {
                let count = outliers.of(values.len());
                extra.outliers = outliers::take(&mut values, dim, by_column, count).into();
                whole(&values, to)?;
                let mut error = vec![0.0; values.len()];
                kernels
                    .unpack_run(
                        side.layout,
                        side.codec,
                        dim,
                        &to[..room(values.len())],
                        &mut error,
                    )
                    .map_err(kernel)?;
                error.iter_mut().zip(&values).for_each(|(to, x)| *to = x - *to);
                for outlier in &extra.outliers {
                    error[usize::from(outlier.place)] = 0.0;
                }
                extra.error = Some(LowRank::of(&error, dim, usize::from(rank)));
            }
        }
        Ok(extra)
    }

    /// The same, of which some rows have more bits: `codec` is theirs.
    fn salient(
        kernels: Kernels,
        (side, codec): (Side, Codec),
        key: bool,
        marks: &Marks,
        values: Vec<f32>,
        to: &mut [u8],
    ) -> Result<Self, HookError> {
        let salient = if key {
            Salient::of_keys(kernels, (codec, side.codec), side.dim(), marks, &values)
        } else {
            Salient::of_values(kernels, (side, codec), marks, values, to)
        };
        Ok(Self {
            salient: Some(salient?),
            ..Self::default()
        })
    }

    /// Unpacks the first rows; `bytes` are all that [`pack`](Self::pack) filled.
    fn unpack(
        &self,
        kernels: Kernels,
        side: Side,
        marks: &Marks,
        bytes: &[u8],
        to: &mut [f32],
    ) -> Result<(), HookError> {
        let dim = side.dim();
        if let Some(salient) = &self.salient {
            return salient.unpack(kernels, side, marks, bytes, to);
        }
        let rows = to.len() / dim;
        let stored = bytes.len() / side.row();
        let span = side.layout.span(stored, 0, rows).end * side.row();
        let bytes = &bytes[..span];
        if self.levels.is_empty() {
            kernels.unpack_run(side.layout, side.codec, dim, bytes, to)
        } else {
            kernels.unpack_levels(side.layout, side.codec, dim, &self.levels(), bytes, to)
        }
        .map_err(kernel)?;
        if let Some(error) = &self.error {
            error.add_to(to, dim);
        }
        outliers::restore(&self.outliers, to);
        Ok(())
    }

    fn levels(&self) -> Vec<f32> {
        self.levels.iter().map(|level| level.to_f32()).collect()
    }

    fn bytes(&self) -> usize {
        size_of_val(&*self.levels)
            + size_of_val(&*self.outliers)
            + self.error.as_ref().map_or(0, LowRank::bytes)
            + self.salient.as_ref().map_or(0, Salient::bytes)
    }
}

/// The most that a block of `rows` rows holds beside its codes; `k` and `v` are the pair's codecs.
pub(crate) fn most_bytes(beside: Beside, rows: usize, k: (Codec, usize), v: (Codec, usize)) -> usize {
    let side = |(codec, dim): (Codec, usize), key| {
        let outlying = |outliers: Fraction| (outliers.of(rows * dim) + 1) * size_of::<Outlier>();
        match beside {
            Beside::Shared { retained } => twin::most_bytes(retained, rows, codec.row_bytes(dim)),
            _ if bits(codec) >= 16 => 0,
            Beside::Nothing => 0,
            Beside::Levels { outliers } => (1 << bits(codec)) * size_of::<f16>() + outlying(outliers),
            Beside::Error { outliers, rank } => {
                usize::from(rank) * (rows + dim) * size_of::<f16>() + outlying(outliers)
            }
            Beside::Salient { share, .. } => {
                // All rows count as those of the fewest bits already.
                let more = codec.row_bytes(dim) - beside.least(codec).row_bytes(dim);
                let rows = (share.of(rows) + 1) * more;
                let rest = if key {
                    2 * Columns::padding(codec, dim)
                } else {
                    dim * size_of::<f16>()
                };
                rows + rest
            }
        }
    };
    match beside {
        Beside::Nothing => 0,
        _ => size_of::<Extras>() + side(k, true) + side(v, false),
    }
}
