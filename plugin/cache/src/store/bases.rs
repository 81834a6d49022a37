//! Rows of a head that are coordinates in its bases, and how they come to be.

use std::borrow::Cow;
use std::sync::Arc;

use cinch_hooks::HookError;
use cinch_protocol::Project;

use super::{Dims, Head, Pair, Targets};
use crate::project::{self, Bases, Basis, Queries};

/// A basis of K and one of V; `None`: rows have all their dimensions.
type Sides<'a> = (Option<&'a Basis>, Option<&'a Basis>);

impl Head {
    /// What rows can be packed to now: not projected before there are enough to make bases of.
    pub(crate) fn reachable(&self, targets: &Targets) -> Targets {
        let packed = Pair {
            projected: targets.packed.projected && self.bases.is_some(),
            ..targets.packed
        };
        Targets { packed, ..*targets }
    }

    /// Makes bases of what is held, if that is enough and there are none.
    pub(crate) fn learn(
        &mut self,
        project: &Project,
        queries: impl FnOnce() -> Queries,
    ) -> Result<(), HookError> {
        if self.bases.is_some() || self.kept < project::rows_needed(self.dims.k.max(self.dims.v)) {
            return Ok(());
        }
        let (k, v) = self.unpack()?;
        let source = project::Source {
            k: &k,
            k_dim: self.dims.k,
            v: &v,
            v_dim: self.dims.v,
            queries: &queries(),
        };
        self.bases = Some(Arc::new(Bases::of(&self.ledger, project, &source)));
        Ok(())
    }

    /// The bases that rows of a pair are coordinates in; `None`: they have all their dimensions.
    pub(super) fn bases_of(&self, pair: Pair) -> Sides<'_> {
        of(self.bases.as_deref(), pair)
    }

    /// Dimensions of rows of a pair.
    pub(crate) fn block_dims(&self, pair: Pair) -> Dims {
        let (k, v) = self.bases_of(pair);
        Dims {
            k: k.map_or(self.dims.k, Basis::rank),
            v: v.map_or(self.dims.v, Basis::rank),
            ..self.dims
        }
    }
}

/// As [`Head::bases_of`], of a head of which something else is borrowed.
pub(super) fn of(bases: Option<&Bases>, pair: Pair) -> Sides<'_> {
    match bases.filter(|_| pair.projected) {
        Some(bases) => (bases.k.as_ref(), bases.v.as_ref()),
        None => (None, None),
    }
}

/// Fills `rows` with whole rows, of what `unpack` gives as they are stored.
pub(super) fn whole(
    basis: Option<&Basis>,
    rows: &mut [f32],
    unpack: impl FnOnce(&mut [f32]) -> Result<(), HookError>,
) -> Result<(), HookError> {
    let Some(basis) = basis else {
        return unpack(rows);
    };
    let mut coordinates = vec![0.0; rows.len() / basis.dim() * basis.rank()];
    unpack(&mut coordinates)?;
    basis.expand(&coordinates, rows);
    Ok(())
}

/// A row as it is stored: as it is, or in a basis.
pub(super) fn coordinates<'a>(basis: Option<&Basis>, row: &'a [f32]) -> Cow<'a, [f32]> {
    basis.map_or(Cow::Borrowed(row), |basis| {
        let mut out = Vec::with_capacity(basis.rank());
        basis.project(row, &mut out);
        Cow::Owned(out)
    })
}
