//! Scheduling of managed sequences. Rows keep their own caches, so sequences of different lengths decode
//! in one batch; upstream buckets by exact length and lets them take turns.

use std::sync::atomic::Ordering;

use super::{chunk, pass};
use crate::engine::TERMINATE_ALL_NEXT_STEP;
use crate::sequence::{Sequence, SequenceState, StopReason};

/// Splits all sequences into those that run now (every completion, then one bucket of equally long
/// prompts) and those that wait, in order of arrival.
pub(crate) fn schedule(
    running: Vec<Sequence>,
    waiting: Vec<Sequence>,
    max_running: usize,
) -> (Vec<Sequence>, Vec<Sequence>) {
    let (mut completions, unfinished): (Vec<_>, Vec<_>) = running
        .into_iter()
        .filter(|seq| seq.is_running() || seq.is_prompt())
        .partition(Sequence::is_completion);
    if TERMINATE_ALL_NEXT_STEP.swap(false, Ordering::SeqCst) {
        for seq in &completions {
            seq.set_state(SequenceState::Done(StopReason::Canceled));
        }
    }
    let mut queue = unfinished;
    queue.extend(waiting);
    queue.sort_by_key(|seq| *seq.id());

    // A prompt longer than this goes alone, in chunks, and so does one that is read twice.
    let budget = chunk::budget(!completions.is_empty());
    let mut prompts: Vec<Sequence> = Vec::new();
    let mut tokens = 0;
    let mut rest = Vec::new();
    let mut alone = false;
    for mut seq in queue {
        // Unless the cache refuses: then the chunk of it does, too, and says so.
        let wants = pass::wanted(&mut seq).unwrap_or(true);
        let room = completions.len() + prompts.len() < max_running;
        let same_bucket = prompts.first().is_none_or(|first| {
            first.len() == seq.len()
                && first.token_offset() == seq.token_offset()
                && first.return_raw_logits == seq.return_raw_logits
                && tokens + seq.len() <= budget
                && !(alone || wants)
                && !(first.has_images() || seq.has_images())
        });
        if room && same_bucket {
            // Upstream's own state for both kinds of prompt: with and without a reused prefix.
            seq.set_state(SequenceState::RunningPrompt);
            tokens += seq.len();
            alone = wants;
            prompts.push(seq);
        } else {
            rest.push(seq);
        }
    }
    completions.append(&mut prompts);
    (completions, rest)
}
