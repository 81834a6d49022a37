//! A probe of the serving path: prompts in, per-step logits out, through the engine's own queue, batching
//! and sampling. A logits processor sees every step's raw logits and can force the next token (teacher
//! forcing), so what is measured is what is served. The hooked and the unhooked engine share this file.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Tensor};
use cinch_protocol::probe::{Plan, Report, Run, RunReport};
use mistralrs_core::{
    CustomLogitsProcessor, MistralRs, NormalRequest, Request, RequestMessage, Response, SamplingParams,
};

struct Step {
    token: u32,
    gap: f32,
    hash: u64,
    logits: Option<Vec<f32>>,
    at: Instant,
}

/// Sees each step's raw logits; forces the greedy (or planned) token.
struct Recorder {
    force: Vec<u32>,
    keep_logits: bool,
    max_tokens: usize,
    choices: usize,
    seen: Mutex<(Option<Vec<u32>>, Vec<Step>)>,
}

impl CustomLogitsProcessor for Recorder {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> candle_core::Result<Tensor> {
        let values = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut seen = self
            .seen
            .lock()
            .map_err(|_| candle_core::Error::msg("the recorder's lock is poisoned"))?;
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

/// Runs the plan.
///
/// # Errors
/// An engine's refusal, with its message; a file that can't be written.
pub async fn run(engine: Arc<MistralRs>, plan: &Plan) -> Result<Report> {
    run_with(engine, plan, |_| {}).await
}

/// Runs the plan; `before` is told each request's id before it is sent.
///
/// # Errors
/// An engine's refusal, with its message; a file that can't be written.
pub async fn run_with(engine: Arc<MistralRs>, plan: &Plan, before: impl Fn(usize)) -> Result<Report> {
    let mut logits = match &plan.logits {
        Some(path) => Some(std::io::BufWriter::new(
            std::fs::File::create(path).with_context(|| format!("creating {}", path.display()))?,
        )),
        None => None,
    };
    let mut report = Report {
        group_seconds: Vec::new(),
        runs: Vec::new(),
    };
    for group in &plan.groups {
        let start = Instant::now();
        let mut open = Vec::new();
        for run in group {
            open.push(send(&engine, run, logits.is_some(), &before).await?);
        }
        for (run, (mut answers, recorder)) in group.iter().zip(open) {
            let answer = answers
                .recv()
                .await
                .with_context(|| format!("{}: the engine went away", run.name))?;
            let one = collect(run, answer, &recorder, start, logits.as_mut())?;
            report.runs.push(one);
        }
        report.group_seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(report)
}

type Answers = tokio::sync::mpsc::Receiver<Response>;

async fn send(
    engine: &MistralRs,
    run: &Run,
    keep_logits: bool,
    before: &impl Fn(usize),
) -> Result<(Answers, Arc<Recorder>)> {
    let (tx, rx) = tokio::sync::mpsc::channel(64);
    let recorder = Arc::new(Recorder {
        force: run.force.clone(),
        keep_logits,
        max_tokens: run.max_tokens,
        choices: run.n,
        seen: Mutex::new((None, Vec::new())),
    });
    let messages = if run.tokens.is_empty() {
        RequestMessage::Completion {
            text: run.text.clone(),
            echo_prompt: false,
            best_of: None,
        }
    } else {
        RequestMessage::CompletionTokens(run.tokens.clone())
    };
    let sampling = SamplingParams {
        max_len: Some(run.max_tokens),
        n_choices: run.n,
        ..SamplingParams::deterministic()
    };
    let id = engine.next_request_id();
    let mut request = NormalRequest::new_simple(messages, sampling, tx, id, None, None);
    let processor: Arc<dyn CustomLogitsProcessor> = recorder.clone();
    request.logits_processors = Some(vec![processor]);
    before(id);
    let sender = engine
        .get_sender(None)
        .map_err(|err| anyhow::anyhow!("{err:?}"))?;
    sender
        .send(Request::Normal(Box::new(request)))
        .await
        .context("the engine's queue is closed")?;
    Ok((rx, recorder))
}

fn collect(
    run: &Run,
    answer: Response,
    recorder: &Recorder,
    start: Instant,
    logits: Option<&mut std::io::BufWriter<std::fs::File>>,
) -> Result<RunReport> {
    let done = match answer {
        Response::CompletionDone(done) => done,
        Response::ValidationError(err) | Response::InternalError(err) => bail!("{}: {err}", run.name),
        Response::CompletionModelError(err, _) | Response::ModelError(err, _) => bail!("{}: {err}", run.name),
        _ => bail!("{}: an answer of another kind than a completion", run.name),
    };
    let mut seen = recorder
        .seen
        .lock()
        .map_err(|_| anyhow::anyhow!("the recorder's lock is poisoned"))?;
    let (prompt, steps) = &mut *seen;
    if let Some(file) = logits {
        for step in steps.iter() {
            for value in step.logits.iter().flatten() {
                file.write_all(&value.to_le_bytes()).context("writing logits")?;
            }
        }
    }
    let seconds = |step: Option<&Step>| step.map_or(0.0, |step| (step.at - start).as_secs_f64());
    Ok(RunReport {
        name: run.name.clone(),
        prompt_tokens: done.usage.prompt_tokens,
        first_token_seconds: seconds(steps.first()),
        seconds: seconds(steps.last()),
        prompt: if run.tokens.is_empty() {
            prompt.take().unwrap_or_default()
        } else {
            run.tokens.clone()
        },
        tokens: steps.iter().map(|step| step.token).collect(),
        gaps: steps.iter().map(|step| step.gap).collect(),
        hashes: steps.iter().map(|step| format!("{:016x}", step.hash)).collect(),
        texts: done.choices.into_iter().map(|choice| choice.text).collect(),
    })
}
