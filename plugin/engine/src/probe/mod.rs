//! A probe of the serving path: prompts in, per-step logits out, through the engine's own queue, batching
//! and sampling. A logits processor sees every step's raw logits and can force the next token (teacher
//! forcing), so what is measured is what is served. The hooked and the unhooked engine share these files.

mod memory;
mod recorder;

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cinch_protocol::probe::{Plan, Report, Run, RunReport};
use either::Either;
use mistralrs_core::{
    CompletionResponse, CustomLogitsProcessor, MistralRs, NormalRequest, Request, RequestMessage, Response,
    SamplingParams, TokenizationRequest,
};

use recorder::{Clock, Recorder, Step};

/// Runs the plan.
///
/// # Errors
/// An engine's refusal, with its message; a file that can't be written.
pub async fn run(engine: Arc<MistralRs>, plan: &Plan) -> Result<Report> {
    if plan.capture.is_some() {
        bail!("capture: given, allowed where a policy is installed");
    }
    run_with(engine, plan, |_| {}).await
}

/// Runs the plan; `before` is told each request's id before it is sent.
///
/// # Errors
/// An engine's refusal, with its message; a file that can't be written.
pub async fn run_with(engine: Arc<MistralRs>, plan: &Plan, before: impl Fn(usize)) -> Result<Report> {
    let mut runs = plan.groups.iter().flatten();
    if plan.timing && (plan.logits.is_some() || runs.any(|run| run.n != 1 || !run.force.is_empty())) {
        bail!("timing: given with logits, n or force, allowed for plain greedy runs");
    }
    let mut logits = match &plan.logits {
        Some(path) => Some(std::io::BufWriter::new(
            std::fs::File::create(path).with_context(|| format!("creating {}", path.display()))?,
        )),
        None => None,
    };
    let mut report = Report {
        context: engine.max_sequence_length(None).ok().flatten(),
        loaded_rss: memory::resident(),
        loaded_peak_rss: memory::peak(),
        ..Report::default()
    };
    if !plan.tokenize.is_empty() {
        report.tokenized = tokenize(&engine, &plan.tokenize).await?;
    }
    for group in &plan.groups {
        let fresh = memory::reset_peak();
        let start = Instant::now();
        let mut open = Vec::new();
        for run in group {
            let watch = Watch::new(run, plan);
            open.push((send(&engine, run, &watch, &before).await?, watch));
        }
        for (run, (mut answers, watch)) in group.iter().zip(open) {
            let answer = answers
                .recv()
                .await
                .with_context(|| format!("{}: the engine went away", run.name))?;
            let one = collect(run, answer, &watch, start, logits.as_mut())?;
            report.runs.push(one);
        }
        report.group_seconds.push(start.elapsed().as_secs_f64());
        // A peak that could not be set back is not this group's.
        report.group_peak_rss.push(memory::peak().filter(|_| fresh));
    }
    Ok(report)
}

/// The engine's own tokens of `text`.
async fn tokenize(engine: &MistralRs, text: &str) -> Result<Vec<u32>> {
    let (response, mut answers) = tokio::sync::mpsc::channel(1);
    let request = TokenizationRequest {
        text: Either::Right(text.to_owned()),
        tools: None,
        add_generation_prompt: false,
        add_special_tokens: true,
        enable_thinking: None,
        reasoning_effort: None,
        response,
    };
    submit(engine, Request::Tokenize(request)).await?;
    let answer = answers.recv().await.context("the engine went away")?;
    answer.context("tokenizing")
}

/// Sends a request to the engine.
pub(crate) async fn submit(engine: &MistralRs, request: Request) -> Result<()> {
    let sender = engine
        .get_sender(None)
        .map_err(|err| anyhow::anyhow!("{err:?}"))?;
    let sent = sender.send(request).await;
    sent.context("the engine's queue is closed")
}

type Answers = tokio::sync::mpsc::Receiver<Response>;

/// What sees a run's steps.
enum Watch {
    /// Each step's logits.
    Steps(Arc<Recorder>),
    /// Only when each step was.
    Clock(Arc<Clock>),
}

impl Watch {
    fn new(run: &Run, plan: &Plan) -> Self {
        if plan.timing {
            Self::Clock(Arc::new(Clock::new(run.max_tokens)))
        } else {
            Self::Steps(Arc::new(Recorder::new(run, plan.logits.is_some())))
        }
    }

    fn processor(&self) -> Arc<dyn CustomLogitsProcessor> {
        match self {
            Self::Steps(recorder) => recorder.clone(),
            Self::Clock(clock) => clock.clone(),
        }
    }
}

async fn send(engine: &MistralRs, run: &Run, watch: &Watch, before: &impl Fn(usize)) -> Result<Answers> {
    let (tx, rx) = tokio::sync::mpsc::channel(64);
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
    request.logits_processors = Some(vec![watch.processor()]);
    before(id);
    submit(engine, Request::Normal(Box::new(request))).await?;
    Ok(rx)
}

/// The completion that an answer is.
pub(crate) fn done(answer: Response) -> Result<CompletionResponse> {
    match answer {
        Response::CompletionDone(done) => Ok(done),
        Response::ValidationError(err) | Response::InternalError(err) => bail!("{err}"),
        Response::CompletionModelError(err, _) | Response::ModelError(err, _) => bail!("{err}"),
        _ => bail!("an answer of another kind than a completion"),
    }
}

fn collect(
    run: &Run,
    answer: Response,
    watch: &Watch,
    start: Instant,
    logits: Option<&mut std::io::BufWriter<std::fs::File>>,
) -> Result<RunReport> {
    let done = done(answer).with_context(|| run.name.clone())?;
    let seconds = |at: Instant| (at - start).as_secs_f64();
    let mut report = RunReport {
        name: run.name.clone(),
        prompt_tokens: done.usage.prompt_tokens,
        answered_tokens: Some(done.usage.completion_tokens),
        prompt: run.tokens.clone(),
        texts: done.choices.into_iter().map(|choice| choice.text).collect(),
        ..RunReport::default()
    };
    match watch {
        Watch::Clock(clock) => report.step_seconds = clock.take()?.into_iter().map(seconds).collect(),
        Watch::Steps(recorder) => {
            let (prompt, steps) = recorder.take()?;
            if let Some(file) = logits {
                write_logits(file, &steps)?;
            }
            if run.tokens.is_empty() {
                report.prompt = prompt;
            }
            report.step_seconds = steps.iter().map(|step| seconds(step.at)).collect();
            report.tokens = steps.iter().map(|step| step.token).collect();
            report.gaps = steps.iter().map(|step| step.gap).collect();
            report.hashes = steps.iter().map(|step| format!("{:016x}", step.hash)).collect();
        }
    }
    report.first_token_seconds = report.step_seconds.first().copied().unwrap_or_default();
    report.seconds = report.step_seconds.last().copied().unwrap_or_default();
    Ok(report)
}

fn write_logits(file: &mut std::io::BufWriter<std::fs::File>, steps: &[Step]) -> Result<()> {
    for value in steps.iter().flat_map(|step| step.logits.iter().flatten()) {
        file.write_all(&value.to_le_bytes()).context("writing logits")?;
    }
    Ok(())
}
