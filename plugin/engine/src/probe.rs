//! A probe of the serving path: prompts in, per-step logits out, through the engine's own queue, batching
//! and sampling. A logits processor sees every step's raw logits and can force the next token (teacher
//! forcing), so what is measured is what is served. The hooked and the unhooked engine share this file.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Tensor};
use mistralrs_core::{
    CustomLogitsProcessor, MistralRs, NormalRequest, Request, RequestMessage, Response, SamplingParams,
};
use serde::{Deserialize, Serialize};

/// What to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Whether the engine may reuse prefixes of finished runs.
    #[serde(default)]
    pub prefix_cache: bool,
    /// Groups run one after another, the runs within a group at once.
    pub groups: Vec<Vec<Run>>,
    /// Where to write every step's logits, f32 little endian, run after run; absent: only hashes.
    #[serde(default)]
    pub logits: Option<PathBuf>,
}

/// One request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Name in the report.
    pub name: String,
    /// Prompt, as a raw completion.
    #[serde(default)]
    pub text: String,
    /// Prompt as tokens; takes the place of `text` if not empty.
    #[serde(default)]
    pub tokens: Vec<u32>,
    /// New tokens.
    pub max_tokens: usize,
    /// Choices.
    #[serde(default = "one")]
    pub n: usize,
    /// Tokens to force instead of the greedy ones; empty: greedy.
    #[serde(default)]
    pub force: Vec<u32>,
}

fn one() -> usize {
    1
}

/// What came out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Wall time a group, seconds.
    pub group_seconds: Vec<f64>,
    /// One a run, in the order of the plan.
    pub runs: Vec<RunReport>,
}

/// One request's steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunReport {
    /// The run's name.
    pub name: String,
    /// Prompt tokens, as the engine counted them.
    pub prompt_tokens: usize,
    /// Seconds from sending to the first sampled token.
    pub first_token_seconds: f64,
    /// Seconds from sending to the last sampled token.
    pub seconds: f64,
    /// The prompt as the engine tokenized it.
    pub prompt: Vec<u32>,
    /// Greedy (or forced) token of each step of choice 0.
    pub tokens: Vec<u32>,
    /// Distance of the two highest logits at each step.
    pub gaps: Vec<f32>,
    /// FNV-1a over the bits of each step's logits.
    pub hashes: Vec<String>,
    /// The text answered, one a choice.
    pub texts: Vec<String>,
}

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
        // With n > 1 every choice comes here; greedy choices agree, so the first to reach a step counts.
        let step = context.len().saturating_sub(prompt_len);
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
    values
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, x| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3))
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
    let mut report = Report { group_seconds: Vec::new(), runs: Vec::new() };
    for group in &plan.groups {
        let start = Instant::now();
        let mut open = Vec::new();
        for run in group {
            open.push(send(&engine, run, logits.is_some(), &before).await?);
        }
        for (run, (mut answers, recorder)) in group.iter().zip(open) {
            let answer = answers.recv().await.with_context(|| format!("{}: the engine went away", run.name))?;
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
        seen: Mutex::new((None, Vec::new())),
    });
    let messages = if run.tokens.is_empty() {
        RequestMessage::Completion { text: run.text.clone(), echo_prompt: false, best_of: None }
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
    let sender = engine.get_sender(None).map_err(|err| anyhow::anyhow!("{err:?}"))?;
    sender.send(Request::Normal(Box::new(request))).await.context("the engine's queue is closed")?;
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
    let mut seen = recorder.seen.lock().map_err(|_| anyhow::anyhow!("the recorder's lock is poisoned"))?;
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
        prompt: prompt.take().unwrap_or_default(),
        tokens: steps.iter().map(|step| step.token).collect(),
        gaps: steps.iter().map(|step| step.gap).collect(),
        hashes: steps.iter().map(|step| format!("{:016x}", step.hash)).collect(),
        texts: done.choices.into_iter().map(|choice| choice.text).collect(),
    })
}
