//! Argument checks. Invariant: past them, no kernel can index out of bounds, whatever the values.

use half::f16;

use crate::types::Prefill;
use crate::{Codec, ColumnSums, Heads, KernelError, Layout, Partial, Rows, RowsMut, Segment};

/// Checks `pack` or `unpack`: `values` f32 against `bytes` packed. Returns the rows.
pub(crate) fn codec(codec: Codec, dim: usize, values: usize, bytes: usize) -> Result<usize, KernelError> {
    nonzero("dim", dim)?;
    if !values.is_multiple_of(dim) {
        return Err(KernelError::Ragged {
            what: "values",
            given: values,
            row: dim,
        });
    }
    let rows = values / dim;
    length("packed bytes", bytes, rows.saturating_mul(codec.row_bytes(dim)))?;
    Ok(rows)
}

/// Checks `pack_run`: all of a run.
pub(crate) fn run(
    layout: Layout,
    codec: Codec,
    dim: usize,
    values: usize,
    bytes: usize,
) -> Result<(), KernelError> {
    first(layout, codec, dim, values, bytes)?;
    let expected = layout.stored_rows(values / dim) * codec.row_bytes(dim);
    length("packed bytes", bytes, expected)
}

/// Checks `unpack_run`: a run's first rows.
pub(crate) fn first(
    layout: Layout,
    codec: Codec,
    dim: usize,
    values: usize,
    bytes: usize,
) -> Result<(), KernelError> {
    nonzero("dim", dim)?;
    multiple("values", values, dim)?;
    layout.check("packed bytes", (codec, dim), values / dim, bytes)
}

/// Checks a table of what codes stand for: one level a code, in order, within the codes' own range. Products of scales and
/// levels are exact in f32 where both are numbers of f16, so that fused and unfused sums are the same.
pub(crate) fn levels(codec: Codec, levels: &[f32]) -> Result<(), KernelError> {
    let Some(largest) = codec.levels() else {
        return length("levels", levels.len(), 0);
    };
    length("levels", levels.len(), usize::from(largest) + 1)?;
    let allowed = "numbers of f16 in order, from 0 to the codec's largest code";
    let (mut least, most) = (0.0, f32::from(largest));
    for &given in levels {
        // Written so that NaN is refused.
        if !(given >= least && given <= most && f16::from_f32(given).to_f32() == given) {
            return Err(KernelError::Range {
                what: "level",
                given,
                allowed,
            });
        }
        least = given;
    }
    Ok(())
}

/// Checks `to_rows` or `of_rows`.
pub(crate) fn movable(
    layout: Layout,
    codec: Codec,
    dim: usize,
    from: usize,
    to: usize,
) -> Result<(), KernelError> {
    nonzero("dim", dim)?;
    let row = codec.row_bytes(dim);
    if !layout.fits(codec, dim) || layout == Layout::KeyChannels {
        return Err(KernelError::Layout {
            given: layout.name(),
            codec: codec.name(),
            dim,
        });
    }
    multiple("packed bytes", from, row)?;
    length("bytes of as many rows", to, from)
}

/// Checks `rotate`.
pub(crate) fn rotate(dim: usize, values: usize) -> Result<(), KernelError> {
    nonzero("dim", dim)?;
    if values.is_multiple_of(dim) {
        Ok(())
    } else {
        Err(KernelError::Ragged {
            what: "values",
            given: values,
            row: dim,
        })
    }
}

/// Checks `attend_decode`. Returns the rows of all segments.
pub(crate) fn decode(
    heads: &Heads,
    segments: &[Segment<'_>],
    q: &[f32],
    weights: Option<&[f32]>,
) -> Result<usize, KernelError> {
    shape(heads)?;
    let rows = past(heads, segments)?;
    length("query values", q.len(), heads.q_heads.saturating_mul(heads.k_dim))?;
    if let Some(weights) = weights {
        length("weights", weights.len(), heads.q_heads.saturating_mul(rows))?;
    }
    Ok(rows)
}

/// Checks `merge`.
pub(crate) fn merge<'a>(
    heads: &Heads,
    partials: impl IntoIterator<Item = &'a Partial>,
    out: &[f32],
) -> Result<(), KernelError> {
    shape(heads)?;
    let values = heads.q_heads.saturating_mul(heads.v_dim);
    length("output values", out.len(), values)?;
    for partial in partials {
        length("query heads of a part", partial.stats.len(), heads.q_heads)?;
        length("output values of a part", partial.out.len(), values)?;
    }
    Ok(())
}

/// Checks `attend_prefill`. Returns the rows of the past segments.
pub(crate) fn prefill(
    call: &Prefill<'_>,
    out: &[RowsMut<'_>],
    sums: Option<&ColumnSums<'_>>,
) -> Result<usize, KernelError> {
    let heads = call.heads;
    shape(heads)?;
    let rows = past(heads, call.past)?;
    let (t, n) = (call.fresh_k.rows, call.queries());
    strided("fresh keys", &call.fresh_k, t, heads.k_dim)?;
    strided("fresh values", &call.fresh_v, t, heads.v_dim)?;
    length("query heads", call.q.len(), heads.q_heads)?;
    length("output heads", out.len(), heads.q_heads)?;
    if call.first_query.saturating_add(n) > t {
        return Err(KernelError::Length {
            what: "queries from the first one on",
            given: n,
            expected: t.saturating_sub(call.first_query),
        });
    }
    for queries in call.q {
        strided("queries", queries, n, heads.k_dim)?;
    }
    for out in out {
        let view = Rows {
            data: &*out.data,
            stride: out.stride,
            rows: out.rows,
            dim: out.dim,
        };
        strided("outputs", &view, n, heads.v_dim)?;
        if n > 1 && out.stride < out.dim {
            return Err(KernelError::Stride {
                what: "outputs",
                given: out.stride,
                minimum: out.dim,
            });
        }
    }
    if let Some(sums) = sums {
        length("column sums", sums.out.len(), rows.saturating_add(t))?;
    }
    Ok(rows)
}

fn shape(heads: &Heads) -> Result<(), KernelError> {
    nonzero("q_heads", heads.q_heads)?;
    nonzero("k_dim", heads.k_dim)?;
    nonzero("v_dim", heads.v_dim)?;
    if !heads.scale.is_finite() {
        return Err(KernelError::Range {
            what: "scale",
            given: heads.scale,
            allowed: "finite",
        });
    }
    match heads.softcap {
        Some(cap) if !(cap.is_finite() && cap > 0.0) => Err(KernelError::Range {
            what: "softcap",
            given: cap,
            allowed: "finite and above 0",
        }),
        _ => Ok(()),
    }
}

fn past(heads: &Heads, segments: &[Segment<'_>]) -> Result<usize, KernelError> {
    let mut rows = 0;
    for s in segments {
        for (layout, what, side) in [(s.k_layout, "keys", true), (s.v_layout, "values", false)] {
            let allowed = match layout {
                Layout::Rows => true,
                Layout::KeyTiles | Layout::KeyChannels => side,
                Layout::ValueTiles => !side,
            };
            if !allowed {
                return Err(KernelError::Side {
                    given: layout.name(),
                    side: what,
                });
            }
        }
        let (k, v) = ((s.k_codec, heads.k_dim), (s.v_codec, heads.v_dim));
        s.k_layout.check("key bytes of a segment", k, s.rows, s.k.len())?;
        s.v_layout
            .check("value bytes of a segment", v, s.rows, s.v.len())?;
        rows += s.rows;
    }
    Ok(rows)
}

fn strided(what: &'static str, view: &Rows<'_>, rows: usize, dim: usize) -> Result<(), KernelError> {
    length(what, view.rows, rows)?;
    length(what, view.dim, dim)?;
    let needed = match rows {
        0 => 0,
        n => (n - 1).saturating_mul(view.stride).saturating_add(dim),
    };
    if view.data.len() < needed {
        return Err(KernelError::Length {
            what,
            given: view.data.len(),
            expected: needed,
        });
    }
    Ok(())
}

fn nonzero(what: &'static str, given: usize) -> Result<(), KernelError> {
    if given == 0 {
        Err(KernelError::Zero { what })
    } else {
        Ok(())
    }
}

pub(crate) fn length(what: &'static str, given: usize, expected: usize) -> Result<(), KernelError> {
    if given == expected {
        Ok(())
    } else {
        Err(KernelError::Length {
            what,
            given,
            expected,
        })
    }
}

/// A count that must be whole pieces of `row`.
pub(crate) fn multiple(what: &'static str, given: usize, row: usize) -> Result<(), KernelError> {
    if given.is_multiple_of(row) {
        Ok(())
    } else {
        Err(KernelError::Ragged { what, given, row })
    }
}
