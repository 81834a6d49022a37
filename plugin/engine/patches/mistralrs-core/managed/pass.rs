//! A prompt's second reading, where its cache wants one: parts of the prompt go through the model once more, right behind
//! it, and are forgotten. What they were attended to with tells the cache which rows the prompt can be told from.
//!
//! Invariants: the prompt's own logits are those of its first reading; a part's positions are those that follow the prompt,
//! within the model's context; when it is over, the caches of all layers are what they would be without it but for what the
//! cache evicted.

use candle_core::Result;
use cinch_hooks::ExtraPass;

use super::{handle, Handle, Windows};
use crate::pipeline::{ForwardInputsResult, Pipeline};
use crate::sequence::Sequence;

/// Tokens of the prompt in a part at least: fewer would be read in more passes than they are worth.
const LEAST: usize = 32;

/// How far it is.
pub(crate) struct Pass {
    /// Of the prompt's last token.
    logits: Option<ForwardInputsResult>,
    prompt: Vec<u32>,
    /// What comes before the tokens of the first part and of others.
    texts: [Vec<u32>; 2],
    how: ExtraPass,
    /// Tokens of a part, at most.
    most: usize,
    /// Tokens of the prompt in the parts so far.
    read: usize,
    /// The present part, and how much of it was handed out.
    part: Vec<u32>,
    done: usize,
    /// Sliding windows at the end of the prompt.
    windows: Windows,
    over: bool,
}

/// Whether a prompt is to be read twice, or is being so. Its cache then waits for that.
pub(super) fn wanted(seq: &mut Sequence) -> Result<bool> {
    if seq.chunks.pass.is_some() {
        return Ok(true);
    }
    let Some(handle) = handle(seq) else {
        return Ok(false);
    };
    let pass = handle.cache.extra_pass().map_err(candle_core::Error::wrap)?;
    Ok(pass.is_some())
}

/// The logits of a prompt that was read twice.
pub(crate) fn kept_logits(seqs: &mut [&mut Sequence]) -> Option<ForwardInputsResult> {
    let [seq] = seqs else {
        return None;
    };
    seq.chunks.pass.as_mut().filter(|pass| pass.over)?.logits.take()
}

impl Pass {
    /// Of a prompt that has been read, all of whose tokens are those that the sequence now has.
    pub(super) fn new(
        pipeline: &dyn Pipeline,
        seq: &mut Sequence,
        logits: ForwardInputsResult,
    ) -> Result<Self> {
        let Some(handle) = handle(seq) else {
            candle_core::bail!("a prompt of a sequence that is not managed can't be read twice");
        };
        let Some(how) = handle.cache.extra_pass().map_err(candle_core::Error::wrap)? else {
            return Ok(Self::none(logits, &handle));
        };
        let Some(tokenizer) = pipeline.tokenizer() else {
            candle_core::bail!("a prompt can't be read twice: the model has no tokenizer for what comes before it");
        };
        let text = |text: &str| -> Result<Vec<u32>> {
            let encoding = tokenizer.encode_fast(text, false).map_err(candle_core::Error::msg)?;
            Ok(encoding.get_ids().to_vec())
        };
        let prompt = seq.get_toks().to_vec();
        let texts = [text(how.first)?, text(how.further)?];
        let context = pipeline.get_metadata().max_seq_len;
        let most = how.tokens.min(context.saturating_sub(prompt.len()));
        let before = texts[0].len().max(texts[1].len() + how.overlap);
        if most < before + LEAST {
            candle_core::bail!(
                "a prompt of {} tokens can't be read twice: that takes {} positions behind it, of {context} in all",
                prompt.len(),
                before + LEAST
            );
        }
        Ok(Self { prompt, texts, how, most, windows: handle.windows.fork()?, ..Self::none(logits, &handle) })
    }

    /// One that is not wanted any more.
    fn none(logits: ForwardInputsResult, handle: &Handle) -> Self {
        Self {
            logits: Some(logits),
            prompt: Vec::new(),
            texts: [Vec::new(), Vec::new()],
            how: ExtraPass { first: "", further: "", overlap: 0, tokens: 0 },
            most: 0,
            read: 0,
            part: Vec::new(),
            done: 0,
            windows: handle.windows.clone(),
            over: false,
        }
    }

    /// The tokens to process next, of what is left of a part as many as `share` says, and their first position. `None` when
    /// the pass is over: the caches have then gone back to the prompt.
    pub(super) fn next(
        &mut self,
        handle: &Handle,
        share: impl Fn(usize) -> usize,
    ) -> Result<Option<(Vec<u32>, usize)>> {
        if self.over {
            return Ok(None);
        }
        if self.done == self.part.len() {
            if self.read > 0 {
                handle.windows.restore(&self.windows)?;
            }
            let more = self.read < self.prompt.len();
            if !more || !handle.cache.begin_part().map_err(candle_core::Error::wrap)? {
                handle.cache.end_pass().map_err(candle_core::Error::wrap)?;
                self.over = true;
                return Ok(None);
            }
            self.next_part();
        }
        let next = share(self.part.len() - self.done);
        let tokens = self.part[self.done..][..next].to_vec();
        let offset = self.prompt.len() + self.done;
        self.done += next;
        Ok(Some((tokens, offset)))
    }

    /// Parts are as many as it takes, and equally long.
    fn next_part(&mut self) {
        let [first, further] = &self.texts;
        self.part = if self.read == 0 {
            first.clone()
        } else {
            let overlap = &self.prompt[self.read.saturating_sub(self.how.overlap)..self.read];
            [further, overlap].concat()
        };
        let before = first.len().max(further.len() + self.how.overlap);
        let left = self.prompt.len() - self.read;
        let next = left.div_ceil(left.div_ceil(self.most - before));
        self.part.extend_from_slice(&self.prompt[self.read..][..next]);
        self.read += next;
        self.done = 0;
    }
}
