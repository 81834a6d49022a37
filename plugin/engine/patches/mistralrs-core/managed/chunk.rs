//! Long prompts of managed sequences, a chunk at a time: what a chunk's activations take is bounded, each chunk's
//! rows are compressed before the next one's exist, and decoding requests go on between two chunks.
//!
//! Invariant: a sequence's cache has seen exactly the chunks that were run; its last chunk goes through the
//! engine's own prompt step, which samples.

use std::cell::Cell;
use std::time::{Duration, Instant};

use candle_core::Result;

use super::pass::{self, Pass};
use super::{handle, installed};
use crate::pipeline::{ForwardInputsResult, Pipeline};
use crate::sequence::Sequence;

/// Tokens of a chunk while nobody decodes: enough that a matmul's weights are read for many rows, few enough
/// that a request which becomes ready to decode does not wait long.
const MOST: usize = 512;
/// Tokens of a chunk at least: below, reading the weights costs more than the chunk's own arithmetic.
const LEAST: usize = 32;
/// What a chunk may take while others decode, of a decode step's time: their inter-token latency is then at
/// most this and one times what it is without it.
const SHARE: f64 = 1.5;
/// Weight of the newest measurement of a pace.
const NEWEST: f64 = 0.25;

thread_local! {
    /// Seconds of a decode step and prompt tokens a second, as measured lately by this thread's engine.
    static PACE: Cell<(f64, f64)> = const { Cell::new((0.0, 0.0)) };
}

fn blend(old: f64, new: f64) -> f64 {
    if old == 0.0 { new } else { old + NEWEST * (new - old) }
}

/// A decode step took this long.
pub(crate) fn decoded(took: Duration) {
    PACE.with(|pace| {
        let (step, rate) = pace.get();
        pace.set((blend(step, took.as_secs_f64()), rate));
    });
}

fn prefilled(tokens: usize, took: Duration) {
    PACE.with(|pace| {
        let (step, rate) = pace.get();
        pace.set((step, blend(rate, tokens as f64 / took.as_secs_f64().max(1e-6))));
    });
}

/// Prompt tokens that may be processed before the next decode step.
pub(crate) fn budget(decoding: bool) -> usize {
    let (step, rate) = PACE.with(Cell::get);
    if !decoding || step == 0.0 || rate == 0.0 {
        return MOST;
    }
    ((SHARE * step * rate) as usize).clamp(LEAST, MOST)
}

/// How far a prompt is.
#[derive(Default)]
pub struct Chunks {
    /// What was to be processed at the beginning; empty: the prompt is not in chunks.
    whole: Vec<u32>,
    /// Tokens before `whole`, from a reused prefix.
    from: usize,
    /// Tokens of `whole` that were handed out.
    done: usize,
    spent: Duration,
    /// Its second reading, once the first is done.
    pub(super) pass: Option<Pass>,
}

/// The next `left` tokens' share, in equal parts of at most `budget`: none is of a single token, which models and kernels
/// treat as decoding.
fn share(left: usize, budget: usize) -> usize {
    left.div_ceil(left.div_ceil(budget))
}

/// Runs the next chunk of a prompt unless it is its last: that one is left to the engine's own step. So it is with prompts that
/// are read once; one that is read twice leaves that step nothing but its logits. Whether a chunk was run.
pub(crate) fn run(pipeline: &mut dyn Pipeline, seqs: &mut [&mut Sequence], decoding: bool) -> Result<bool> {
    if !installed() {
        return Ok(false);
    }
    if seqs.len() > 1 {
        // Prompts that share a step are short, and read once: the scheduler puts no others together. One that was retuned
        // since then goes first, alone.
        for seq in seqs.iter_mut() {
            if pass::wanted(seq)? {
                return run(pipeline, std::slice::from_mut(seq), decoding);
            }
        }
    }
    let [seq] = seqs else {
        return Ok(false);
    };
    let budget = budget(decoding);
    if seq.chunks.pass.is_some() {
        return second(pipeline, seqs, budget);
    }
    let twice = pass::wanted(seq)?;
    if seq.return_raw_logits || seq.has_images() || seq.has_audios() || seq.has_videos() {
        if twice {
            candle_core::bail!("a prompt that is read twice: given raw logits or media, allowed text that is answered");
        }
        return Ok(false);
    }
    if seq.chunks.whole.is_empty() {
        if seq.get_toks().len() <= budget && !twice {
            return Ok(false);
        }
        seq.chunks.whole = seq.get_toks().to_vec();
        seq.chunks.from = seq.token_offset();
    }
    let left = seq.chunks.whole.len() - seq.chunks.done;
    let next = share(left, budget);
    let tokens = seq.chunks.whole[seq.chunks.done..][..next].to_vec();
    seq.set_part(Some(tokens), seq.chunks.from + seq.chunks.done);
    seq.chunks.done += next;
    if next == left && !twice {
        return Ok(false);
    }
    let logits = timed(pipeline, seqs, next)?;
    if next == left {
        let [seq] = seqs else {
            return Ok(true);
        };
        seq.set_part(None, seq.chunks.from);
        seq.chunks.pass = Some(Pass::new(&*pipeline, seq, logits)?);
    }
    Ok(true)
}

/// Runs the next chunk of a second reading. False when it is over: what is left is to sample.
fn second(pipeline: &mut dyn Pipeline, seqs: &mut [&mut Sequence], budget: usize) -> Result<bool> {
    let [seq] = seqs else {
        return Ok(false);
    };
    let (Some(handle), Some(pass)) = (handle(seq), &mut seq.chunks.pass) else {
        return Ok(false);
    };
    if let Some((tokens, offset)) = pass.next(&handle, |left| share(left, budget))? {
        let count = tokens.len();
        seq.set_part(Some(tokens), offset);
        timed(pipeline, seqs, count)?;
        return Ok(true);
    }
    // The engine's step wants tokens whose logits it asks for.
    let last = seq.chunks.whole.last().copied();
    let offset = (seq.chunks.from + seq.chunks.whole.len()).saturating_sub(1);
    seq.set_part(last.map(|token| vec![token]), offset);
    Ok(false)
}

/// A pass over the one sequence's present tokens, as many as given.
fn timed(
    pipeline: &mut dyn Pipeline,
    seqs: &mut [&mut Sequence],
    tokens: usize,
) -> Result<ForwardInputsResult> {
    let start = Instant::now();
    let logits = forward(pipeline, seqs)?;
    let took = start.elapsed();
    prefilled(tokens, took);
    for seq in seqs {
        seq.chunks.spent += took;
    }
    Ok(logits)
}

/// One pass over the sequences' present tokens, and the last one's logits.
fn forward(pipeline: &mut dyn Pipeline, seqs: &mut [&mut Sequence]) -> Result<ForwardInputsResult> {
    let metadata = pipeline.get_metadata();
    let inputs = pipeline
        .get_processor()
        .inputs_processor()
        .process_inputs(
            pipeline.tokenizer(),
            seqs,
            true,
            metadata.is_xlora,
            &pipeline.device(),
            metadata.no_kv_cache,
            None,
            false,
            metadata.sliding_window,
            pipeline.get_input_processor_config(),
            None,
            pipeline.device_mapper(),
        )
        .map_err(candle_core::Error::msg)?
        .inputs;
    pipeline.clone_in_cache(seqs);
    let logits = pipeline.forward_inputs(inputs, false)?;
    pipeline.clone_out_cache(seqs);
    Ok(logits)
}

/// A prompt that was in chunks is whole again before its first token is sampled: penalties look at all of it.
pub(crate) fn whole(seqs: &mut [&mut Sequence]) {
    for seq in seqs {
        if !std::mem::take(&mut seq.chunks.whole).is_empty() {
            seq.chunks.pass = None;
            let from = seq.chunks.from;
            seq.set_part(None, from);
        }
    }
}

/// Time that the chunks before the last one took.
pub(crate) fn spent(seq: &Sequence) -> Duration {
    seq.chunks.spent
}
