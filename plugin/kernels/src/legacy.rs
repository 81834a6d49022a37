//! Functions of an earlier interface, on the detected implementation.

use crate::{
    Codec, ColumnSums, Heads, KernelError, Kernels, Partial, Rows, RowsMut, Scratch, Segment, merge, total,
};

/// See [`Kernels::pack`].
///
/// # Errors
/// As there.
pub fn pack(codec: Codec, dim: usize, src: &[f32], dst: &mut [u8]) -> Result<(), KernelError> {
    Kernels::detect().pack(codec, dim, src, dst)
}

/// See [`Kernels::unpack`].
///
/// # Errors
/// As there.
pub fn unpack(codec: Codec, dim: usize, src: &[u8], dst: &mut [f32]) -> Result<(), KernelError> {
    Kernels::detect().unpack(codec, dim, src, dst)
}

/// [`Kernels::attend_decode`] over all rows at once; `weights` become softmax weights.
///
/// # Errors
/// As there, and [`KernelError::NoRows`].
pub fn attend_decode(
    heads: &Heads,
    segments: &[Segment<'_>],
    q: &[f32],
    weights: &mut Vec<f32>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let rows: usize = segments.iter().map(|s| s.rows).sum();
    weights.clear();
    weights.resize(heads.q_heads * rows, 0.0);
    let mut partial = Partial::default();
    Kernels::detect().attend_decode(
        heads,
        segments,
        q,
        &mut partial,
        Some(weights),
        &mut Scratch::default(),
    )?;
    merge(heads, [&partial], out)?;
    for (h, weights) in weights.chunks_exact_mut(rows).enumerate() {
        let factor = partial.stats()[h].factor(total(h, [&partial]));
        weights.iter_mut().for_each(|w| *w *= factor);
    }
    Ok(())
}

/// [`Kernels::attend_prefill`] of all fresh tokens.
///
/// # Errors
/// As there.
#[expect(clippy::too_many_arguments, reason = "as there")]
pub fn attend_prefill(
    heads: &Heads,
    past: &[Segment<'_>],
    fresh_k: Rows<'_>,
    fresh_v: Rows<'_>,
    q: &[Rows<'_>],
    out: &mut [RowsMut<'_>],
    sums: Option<ColumnSums<'_>>,
    scratch: &mut Scratch,
) -> Result<(), KernelError> {
    Kernels::detect().attend_prefill(heads, past, fresh_k, fresh_v, 0, q, out, sums, scratch)
}
