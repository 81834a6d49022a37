//! The live quality proxy: what a compression did to the attention output of queries still at hand,
//! exact against compressed. Nothing is reported that was not measured.

use cinch_hooks::HookError;
use cinch_kernels::{Heads, Partial, Scratch, merge};

use crate::error::kernel;
use crate::store::Head;

/// Prompt queries measured, the last ones: those the first generated token depends on most.
pub(crate) const WINDOW: usize = 8;

/// Told of measurements as they happen, so that they can feed a histogram.
pub trait Observer: Send + Sync {
    /// A compression changed the attention output of `class` by this relative L2 error (0: not at all).
    fn attention_error(&self, class: &str, value: f64);
}

/// Probes that are kept until rows go.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) heads: Heads,
    pub(crate) queries: Vec<HeldQuery>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct HeldQuery {
    pub(crate) kv: usize,
    pub(crate) position: usize,
    /// As in [`Probe`].
    pub(crate) q: Vec<f32>,
    /// One output a query head.
    pub(crate) exact: Vec<Vec<f32>>,
}

impl Held {
    /// Those of a KV head.
    pub(crate) fn of(&self, kv: usize) -> Vec<Probe<'_>> {
        let own = self.queries.iter().filter(|query| query.kv == kv);
        own.map(|query| Probe {
            q: query.q.clone(),
            exact: query.exact.iter().map(Vec::as_slice).collect(),
            position: query.position,
        })
        .collect()
    }
}

/// A query, the output it had, and the rows of the compressed store it may see.
pub(crate) struct Probe<'a> {
    /// q_heads × k_dim.
    pub(crate) q: Vec<f32>,
    /// One output a query head.
    pub(crate) exact: Vec<&'a [f32]>,
    /// The query's position.
    pub(crate) position: usize,
}

/// Relative L2 error over all probes: ‖exact − compressed‖ / ‖exact‖. `None` if there is nothing to compare.
pub(crate) fn relative_error(
    head: &Head,
    heads: &Heads,
    probes: &[Probe<'_>],
) -> Result<Option<f64>, HookError> {
    let (mut partial, mut scratch) = (Partial::default(), Scratch::default());
    let mut out = vec![0.0; heads.q_heads * heads.v_dim];
    let (mut wrong, mut norm) = (0.0, 0.0);
    for probe in probes {
        let rows = head.rows_before(probe.position + 1);
        if rows == 0 {
            continue;
        }
        head.attend(
            heads,
            std::slice::from_ref(&(0..rows)),
            &probe.q,
            &mut partial,
            None,
            &mut scratch,
        )?;
        merge(heads, [&partial], &mut out).map_err(kernel)?;
        for (exact, compressed) in probe.exact.iter().zip(out.chunks_exact(heads.v_dim)) {
            for (a, b) in exact.iter().zip(compressed) {
                wrong += f64::from(a - b).powi(2);
                norm += f64::from(*a).powi(2);
            }
        }
    }
    let error = (wrong / norm).sqrt();
    Ok(error.is_finite().then_some(error))
}
