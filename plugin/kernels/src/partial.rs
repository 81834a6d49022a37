//! Attention over a part of the rows, and how parts go together. Invariant: a merge of the parts of any
//! split equals attention over the whole, up to rounding (Milakov and Gimelshein, arXiv 1805.02867,
//! section 3.1: the pair of maximum and sum is associative).

use crate::{Heads, KernelError, check};

/// Per query head, what softmax over a part of the rows is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stat {
    /// The largest logit; −∞ over no rows.
    pub max: f32,
    /// The sum of e^(logit − max); 0 over no rows.
    pub sum: f32,
}

impl Stat {
    /// Over no rows.
    pub const EMPTY: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };

    /// Both parts together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        // The second operand is kept where both are equal or one is NaN.
        let max = if self.max > other.max { self.max } else { other.max };
        let scaled = |part: Self| {
            if part.sum == 0.0 {
                0.0
            } else {
                part.sum * (part.max - max).exp()
            }
        };
        Self {
            max,
            sum: scaled(self) + scaled(other),
        }
    }

    /// What turns this part's e^(logit − max) into softmax weights of the whole: e^(max − total.max) / total.sum;
    /// 0 for no rows.
    #[must_use]
    pub fn factor(self, total: Self) -> f32 {
        if self.sum == 0.0 {
            0.0
        } else {
            (self.max - total.max).exp() / total.sum
        }
    }
}

/// The result of [`crate::Kernels::attend_decode`]; reused from call to call without allocating.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Partial {
    pub(crate) stats: Vec<Stat>,
    /// q_heads × v_dim: Σ e^(logit − max) · v.
    pub(crate) out: Vec<f32>,
}

impl Partial {
    /// Maximum and sum of each query head.
    #[must_use]
    pub fn stats(&self) -> &[Stat] {
        &self.stats
    }

    /// Adds a part over other rows, whose values are combinations of `basis`: `basis` is (the part's v_dim) × v_dim,
    /// row by row; `None`: they are values as they are.
    ///
    /// # Errors
    /// Parts of other heads, or a basis of other dimensions.
    pub fn add(&mut self, heads: &Heads, part: &Self, basis: Option<&[f32]>) -> Result<(), KernelError> {
        check::length("query heads of a part", part.stats.len(), heads.q_heads)?;
        check::length("query heads of a part", self.stats.len(), heads.q_heads)?;
        let rank = part.out.len() / heads.q_heads;
        match basis {
            Some(basis) => check::length("values of a basis", basis.len(), rank * heads.v_dim)?,
            None => check::length("output values of a part", rank, heads.v_dim)?,
        }
        for h in 0..heads.q_heads {
            let (own, other) = (self.stats[h], part.stats[h]);
            let total = own.plus(other);
            if other.sum == 0.0 {
                continue;
            }
            let out = &mut self.out[h * heads.v_dim..][..heads.v_dim];
            let shrink = if own.sum == 0.0 {
                0.0
            } else {
                (own.max - total.max).exp()
            };
            out.iter_mut().for_each(|out| *out *= shrink);
            let grow = (other.max - total.max).exp();
            let values = &part.out[h * rank..][..rank];
            match basis {
                Some(basis) => {
                    for (x, basis) in values.iter().zip(basis.chunks_exact(heads.v_dim)) {
                        for (out, b) in out.iter_mut().zip(basis) {
                            *out += grow * x * b;
                        }
                    }
                }
                None => {
                    for (out, x) in out.iter_mut().zip(values) {
                        *out += grow * x;
                    }
                }
            }
            self.stats[h] = total;
        }
        Ok(())
    }

    /// Makes it neutral: attention of these heads over no rows.
    pub fn reset(&mut self, heads: &Heads) {
        self.stats.clear();
        self.stats.resize(heads.q_heads, Stat::EMPTY);
        self.out.clear();
        self.out.resize(heads.q_heads * heads.v_dim, 0.0);
    }
}

/// Maximum and sum of query head `h` over all parts.
pub fn total<'a>(h: usize, partials: impl IntoIterator<Item = &'a Partial>) -> Stat {
    partials
        .into_iter()
        .filter_map(|p| p.stats.get(h))
        .fold(Stat::EMPTY, |total, stat| total.plus(*stat))
}

/// Attention over all parts' rows, normalized: `out` is `q_heads × v_dim`, overwritten.
///
/// # Errors
/// [`KernelError::NoRows`] if no part has any rows; other variants tell of parts of other heads or an output of
/// the wrong length.
pub fn merge<'a, P>(heads: &Heads, partials: P, out: &mut [f32]) -> Result<(), KernelError>
where
    P: IntoIterator<Item = &'a Partial> + Clone,
{
    check::merge(heads, partials.clone(), out)?;
    for (h, out) in out.chunks_exact_mut(heads.v_dim).enumerate() {
        let total = total(h, partials.clone());
        if total.sum == 0.0 {
            return Err(KernelError::NoRows);
        }
        out.fill(0.0);
        for partial in partials.clone() {
            let factor = partial.stats[h].factor(total);
            if partial.stats[h].sum == 0.0 {
                continue;
            }
            for (out, x) in out.iter_mut().zip(&partial.out[h * heads.v_dim..]) {
                *out += factor * x;
            }
        }
    }
    Ok(())
}

/// Adds Σ over heads of `factors[h] · weights[h][row]` to each row of `out`: softmax weights from those of
/// [`crate::Kernels::attend_decode`], with factors from [`Stat::factor`].
///
/// # Errors
/// `weights` must be `factors.len() × out.len()` long.
pub fn accumulate(weights: &[f32], factors: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
    check::length("weights", weights.len(), factors.len().saturating_mul(out.len()))?;
    if out.is_empty() {
        return Ok(());
    }
    // Few heads and one pass of plain multiply-adds over each: the compiler vectorizes this anywhere.
    for (weights, factor) in weights.chunks_exact(out.len()).zip(factors) {
        for (out, w) in out.iter_mut().zip(weights) {
            *out += factor * w;
        }
    }
    Ok(())
}
