//! Jobs through the engine's own queue, scheduler and decode steps, one request at a time.
//!
//! One load of the model serves all policies: each request is assigned its own. Each has a prompt of its own, too: what a
//! policy does to a prompt's first chunks changes what the later ones attend to, so that no prefix of one policy is
//! another's, and the prefix cache is off. Only level 0 is not run again for each of them. Requests do not run at once: how
//! a prompt is cut into chunks beside running requests depends on the clock, and two runs would not agree.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{D, DType, Tensor};
use cinch_protocol::Policy;
use mistralrs_core::{CustomLogitsProcessor, NormalRequest, Request, RequestMessage, SamplingParams};
use serde::{Deserialize, Serialize};

use super::compare::{Distribution, Step, compare};
use super::jobs::Job;
use crate::classes::Choice;
use crate::config::Settings;
use crate::kv::Kv;
use crate::model::{self, EndOfText};
use crate::probe;
use crate::run::RunError;
use crate::state::{App, Loaded};

/// What a request under a policy came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Piece {
    /// The job, for people.
    pub(super) job: String,
    pub(super) policy: Policy,
    /// One a forced token; absent where it is not scored.
    pub(super) steps: Vec<Option<Step>>,
    /// Bytes that its cache held at the end of the prompt.
    pub(super) prompt_bytes: u64,
    /// Bytes that it held at its end.
    pub(super) end_bytes: u64,
    /// Tokens seen by then.
    pub(super) seen: u64,
    /// Rows kept of them, mean over layers and heads.
    pub(super) kept: f64,
    /// Mean relative error of attention output, where a compression measured it.
    pub(super) attention_error: Option<f64>,
}

/// Level 0's distributions at the scored steps of a job.
pub(super) type Reference = Arc<Vec<Option<Distribution>>>;

/// The engine with the model in it.
pub(super) struct Engine {
    app: Arc<App>,
    loaded: Loaded,
}

impl Engine {
    /// Loads the model.
    pub(super) async fn load(mut settings: Settings) -> Result<Self, RunError> {
        settings.engine.prefix_cache = false;
        let app = App::new(settings)?;
        app.kv.install()?;
        let loaded = model::load(&app.settings, EndOfText::Ignored).await?;
        let name = model::served_name(&app.settings.model);
        model::self_test(&name, &loaded, &app.kv).await?;
        Ok(Self { app, loaded })
    }

    /// Tokens that the model can attend to.
    pub(super) fn context(&self) -> usize {
        self.loaded.context
    }

    /// What activations are in.
    pub(super) fn dtype(&self) -> &'static str {
        self.loaded.dtype.as_str()
    }

    /// Tokens of `text`; with `special`, those around it that start and end a prompt.
    pub(super) fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let tokens = (self.loaded.encode)(text, special);
        tokens.context("the model has no tokenizer for text")
    }

    /// The tokens that start a prompt, whatever its text.
    pub(super) fn start(&self) -> Result<Vec<u32>> {
        let (all, plain) = (self.encode("a", true)?, self.encode("a", false)?);
        let at = all.windows(plain.len().max(1)).position(|part| part == plain);
        Ok(all[..at.unwrap_or_default()].to_vec())
    }

    /// Whether the model can be served with `policy`; if not, why.
    pub(super) fn fits(&self, policy: &Policy) -> Result<(), String> {
        let id = self.loaded.mistralrs.next_request_id();
        let assigned = self.app.kv.assign(id, "default", spelled_out(policy), false);
        self.app.kv.finish(id);
        assigned.map_err(|refusal| refusal.0.detail)
    }

    /// Layers whose cache is managed.
    pub(super) fn layers(&self) -> usize {
        self.app.kv.layers()
    }

    /// Bytes that a cache holds under `policy` at the end of `job`'s prompt.
    pub(super) async fn bytes(&self, job: &Job, policy: &Policy) -> Result<u64> {
        let prompt = Job {
            forced: job.forced.iter().take(1).copied().collect(),
            spans: Vec::new(),
            ..job.clone()
        };
        let (piece, _) = self.request(&prompt, policy, None).await?;
        Ok(piece.prompt_bytes)
    }

    /// Runs `job` under level 0: its piece, and what other policies are compared with.
    pub(super) async fn reference(&self, job: &Job) -> Result<(Piece, Reference)> {
        let (piece, own) = self.request(job, &Policy::default(), None).await?;
        Ok((piece, Arc::new(own)))
    }

    /// Runs `job` under `policy`, compared with `reference`.
    pub(super) async fn run(&self, job: &Job, policy: &Policy, reference: &Reference) -> Result<Piece> {
        let (piece, _) = self.request(job, policy, Some(reference.clone())).await?;
        Ok(piece)
    }

    async fn request(
        &self,
        job: &Job,
        policy: &Policy,
        reference: Option<Reference>,
    ) -> Result<(Piece, Vec<Option<Distribution>>)> {
        let engine = &self.loaded.mistralrs;
        let id = engine.next_request_id();
        let assigned = self.app.kv.assign(id, "default", spelled_out(policy), false);
        assigned.map_err(|refusal| anyhow::anyhow!("{policy}: {}", refusal.0.detail))?;
        let watcher = Arc::new(Watcher {
            forced: job.forced.clone(),
            scored: (0..job.forced.len()).map(|step| job.scored(step)).collect(),
            reference,
            kv: self.app.kv.clone(),
            id,
            seen: Mutex::default(),
        });
        let (tx, mut answers) = tokio::sync::mpsc::channel(64);
        let sampling = SamplingParams {
            max_len: Some(job.forced.len()),
            ..SamplingParams::deterministic()
        };
        let message = RequestMessage::CompletionTokens(job.prompt.clone());
        let mut request = NormalRequest::new_simple(message, sampling, tx, id, None, None);
        request.logits_processors = Some(vec![watcher.clone()]);
        probe::submit(engine, Request::Normal(Box::new(request))).await?;
        let answer = answers.recv().await;
        let what = || format!("{} under {policy}", job.name);
        let answer = answer.with_context(|| format!("{}: the engine went away", what()))?;
        let usage = probe::done(answer).with_context(what)?.usage;
        ensure!(
            usage.prompt_tokens == job.prompt.len(),
            "{}: expected {} prompt tokens, given {}",
            what(),
            job.prompt.len(),
            usage.prompt_tokens
        );
        let seen = watcher.take()?;
        ensure!(
            seen.steps.len() == job.forced.len(),
            "{}: expected {} steps, given {}",
            what(),
            job.forced.len(),
            seen.steps.len()
        );
        let view = self.app.kv.request(id);
        let view = view.map_err(|refusal| anyhow::anyhow!("{}: {}", what(), refusal.0.detail))?;
        self.app.kv.finish(id);
        let piece = Piece {
            job: job.name.clone(),
            policy: policy.clone(),
            steps: seen.steps,
            prompt_bytes: seen.prompt_bytes,
            end_bytes: view.bytes,
            seen: view.seen,
            kept: view.kept,
            attention_error: view.attention_error,
        };
        Ok((piece, seen.own))
    }

    /// Ends the engine's thread.
    pub(super) fn stop(self) {
        if let Ok(sender) = self.loaded.mistralrs.get_sender(None) {
            let _ended_before = sender.try_send(Request::Terminate);
        }
    }
}

fn spelled_out(policy: &Policy) -> Choice {
    Choice {
        level: None,
        policy: policy.clone(),
    }
}

/// Sees each step's raw logits and forces the job's token.
struct Watcher {
    forced: Vec<u32>,
    scored: Vec<bool>,
    /// Absent for level 0 itself.
    reference: Option<Reference>,
    kv: Kv,
    id: usize,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    steps: Vec<Option<Step>>,
    own: Vec<Option<Distribution>>,
    prompt_bytes: u64,
}

impl Watcher {
    fn take(&self) -> Result<Seen> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *seen))
    }

    /// Scores a step, and says whether its forced token is the likeliest anyway.
    fn see(&self, values: Vec<f32>) -> Result<(u32, bool)> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let at = seen.steps.len();
        let Some(&forced) = self.forced.get(at) else {
            bail!("a step more than there are tokens to force");
        };
        if at == 0 {
            // The prompt is whole, and nothing was decoded yet.
            let view = self.kv.request(self.id);
            seen.prompt_bytes = view.map(|view| view.bytes).unwrap_or_default();
        }
        let given = Distribution::new(values)?;
        let likeliest = given.best() == forced as usize;
        if !self.scored.get(at).copied().unwrap_or_default() {
            seen.steps.push(None);
            seen.own.push(None);
            return Ok((forced, likeliest));
        }
        match &self.reference {
            None => {
                let step = compare(&given, &given, forced)?;
                seen.steps.push(Some(step));
                seen.own.push(Some(given));
            }
            Some(reference) => {
                let reference = reference.get(at).and_then(Option::as_ref);
                let reference = reference.context("level 0 has not scored this step")?;
                let step = compare(reference, &given, forced)?;
                seen.steps.push(Some(step));
            }
        }
        Ok((forced, likeliest))
    }
}

impl CustomLogitsProcessor for Watcher {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> candle_core::Result<Tensor> {
        let values = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let (forced, likeliest) = self.see(values).map_err(candle_core::Error::msg)?;
        if likeliest {
            return Ok(logits.clone());
        }
        let mut only = vec![f32::NEG_INFINITY; logits.dim(D::Minus1)?];
        if let Some(slot) = only.get_mut(forced as usize) {
            *slot = 0.0;
        }
        Tensor::from_vec(only, logits.shape(), logits.device())?.to_dtype(logits.dtype())
    }
}
