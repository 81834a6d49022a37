//! What a probe puts between the model and the sampler: every step passes here, with its raw logits.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use candle_core::{D, DType, Error, Result, Tensor};
use cinch_protocol::probe::Run;
use mistralrs_core::CustomLogitsProcessor;

/// One step of choice 0.
pub(super) struct Step {
    pub(super) token: u32,
    pub(super) gap: f32,
    pub(super) hash: u64,
    pub(super) logits: Option<Vec<f32>>,
    pub(super) at: Instant,
}

/// Sees each step's raw logits; forces the greedy (or planned) token.
pub(super) struct Recorder {
    force: Vec<u32>,
    keep_logits: bool,
    max_tokens: usize,
    choices: usize,
    seen: Mutex<(Option<Vec<u32>>, Vec<Step>)>,
}

impl Recorder {
    pub(super) fn new(run: &Run, keep_logits: bool) -> Self {
        Self {
            force: run.force.clone(),
            keep_logits,
            max_tokens: run.max_tokens,
            choices: run.n,
            seen: Mutex::default(),
        }
    }

    /// The prompt as the engine tokenized it, and the steps.
    pub(super) fn take(&self) -> Result<(Vec<u32>, Vec<Step>)> {
        let mut seen = self.seen.lock().map_err(poisoned)?;
        let (prompt, steps) = std::mem::take(&mut *seen);
        Ok((prompt.unwrap_or_default(), steps))
    }
}

/// Notes when each step was; looks at nothing, so that it costs nothing.
pub(super) struct Clock {
    steps: Mutex<Vec<Instant>>,
}

impl Clock {
    /// For so many steps.
    pub(super) fn new(steps: usize) -> Self {
        Self {
            steps: Mutex::new(Vec::with_capacity(steps)),
        }
    }

    /// When the steps were.
    pub(super) fn take(&self) -> Result<Vec<Instant>> {
        let mut steps = self.steps.lock().map_err(poisoned)?;
        Ok(std::mem::take(&mut *steps))
    }
}

impl CustomLogitsProcessor for Clock {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> Result<Tensor> {
        let now = Instant::now();
        self.steps.lock().map_err(poisoned)?.push(now);
        Ok(logits.clone())
    }
}

fn poisoned<T>(_: PoisonError<T>) -> Error {
    Error::msg("the recorder's lock is poisoned")
}

impl CustomLogitsProcessor for Recorder {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> Result<Tensor> {
        let values = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut seen = self.seen.lock().map_err(poisoned)?;
        let (prompt, steps) = &mut *seen;
        let prompt_len = prompt.get_or_insert_with(|| context.to_vec()).len();
        let step = if self.choices == 1 {
            // Not by the context's length: after a reused prefix the first context is only what was new.
            steps.len()
        } else {
            // Every choice comes here; greedy choices agree, so the first to reach a step counts.
            context.len().saturating_sub(prompt_len)
        };
        let (best, gap) = top_two(&values);
        let token = self.force.get(step).copied().unwrap_or(best);
        if step == steps.len() && step < self.max_tokens {
            steps.push(Step {
                token,
                gap,
                hash: fnv1a(&values),
                at: Instant::now(),
                logits: self.keep_logits.then_some(values),
            });
        }
        if token == best {
            return Ok(logits.clone());
        }
        let mut forced = vec![f32::NEG_INFINITY; logits.dim(D::Minus1)?];
        if let Some(slot) = forced.get_mut(token as usize) {
            *slot = 0.0;
        }
        Tensor::from_vec(forced, logits.shape(), logits.device())?.to_dtype(logits.dtype())
    }
}

fn top_two(values: &[f32]) -> (u32, f32) {
    let (mut best, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (i, &x) in values.iter().enumerate() {
        if x > first {
            (second, first, best) = (first, x, i);
        } else if x > second {
            second = x;
        }
    }
    (u32::try_from(best).unwrap_or(u32::MAX), first - second)
}

fn fnv1a(values: &[f32]) -> u64 {
    values.iter().fold(0xcbf2_9ce4_8422_2325, |hash, x| {
        (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3)
    })
}
