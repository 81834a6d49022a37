//! Loading: all contact with mistral.rs' loaders. Blocking and slow; nothing here touches a network for
//! `kind = "gguf"`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Device;
use cinch_cache::RotaryLayers;
use mistralrs_core::{
    AutoLoaderBuilder, DefaultSchedulerMethod, DeviceMapSetting, EmbeddingSpecificConfig, GGUFLoaderBuilder,
    GGUFSpecificConfig, Loader, MistralRs, MistralRsBuilder, ModelDType, MultimodalSpecificConfig,
    NormalRequest, NormalSpecificConfig, Pipeline, Request, RequestMessage, Response, SamplingParams,
    SchedulerConfig, TokenSource, Usage,
};
use mistralrs_server_core::mistralrs_server_router_builder::MistralRsServerRouterBuilder;
use tokio::sync::Mutex;
use tracing::{debug, info, warn};

use crate::config::{DType, LogFormat, Model, ModelKind, Settings};
use crate::fields::{FieldFault, first_line};
use crate::kv::Kv;
use crate::state::{Encode, Loaded};
use crate::{architecture, gguf_check, rotary};

/// Prefixes mistral.rs keeps where the plugin does not bound them by bytes: its own default.
const PREFIXES: usize = 16;
/// The same token in a row, by which the self-test tells how keys turn.
const SAME: usize = 64;
/// Between two lines that say a load still goes on.
const STILL_LOADING: Duration = Duration::from_secs(5);
/// What the self-test's two tokens may take at most, on the slowest machine with the largest model.
const SELF_TEST_TIMEOUT: Duration = Duration::from_secs(300);

/// Why no model is served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configured file is not one that can be served.
    #[error("{0}")]
    File(#[from] FieldFault),
    /// The loader refused.
    #[error("model {id}: {reason}")]
    Load {
        /// The model.
        id: String,
        /// What the loader said.
        reason: String,
    },
    /// The self-test failed.
    #[error("model {id}: self-test failed: {reason}")]
    SelfTest {
        /// The model.
        id: String,
        /// What went wrong.
        reason: String,
    },
    /// The host engine's routes could not be built.
    #[error("model {id}: {reason}")]
    Routes {
        /// The model.
        id: String,
        /// Why.
        reason: String,
    },
}

type Loading = Arc<Mutex<dyn Pipeline + Send + Sync>>;

/// The name clients ask for.
#[must_use]
pub fn served_name(model: &Model) -> String {
    let stem = |path: &PathBuf| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let id = model.id.clone().or_else(|| model.model_id.clone());
    id.or_else(|| model.file.as_ref().and_then(stem))
        .unwrap_or_else(|| "model".into())
}

/// Whether the configured GGUF file is there.
#[must_use]
pub fn file_exists(model: &Model) -> bool {
    model.file.as_deref().is_some_and(|file| home(file).exists())
}

/// Checks what can be checked of the configured model without loading it.
///
/// # Errors
/// The field that names something that can't be served.
pub fn check(settings: &Settings) -> Result<(), FieldFault> {
    let model = &settings.model;
    if let Some(template) = model.chat_template.as_deref().map(home)
        && !template.is_file()
    {
        return Err(FieldFault::new(
            "model.chat_template",
            template.display(),
            "a file that exists",
        ));
    }
    if let Some(file) = model.file.as_deref().map(home) {
        let header = gguf_check::check(&file)?;
        info!(
            architecture = %header.architecture,
            layers = header.layers,
            tensors = header.tensors,
            megabytes = header.bytes / 1_000_000,
            "{} is a GGUF that can be served",
            file.display()
        );
    }
    architecture::check(settings)
}

/// What the model's end-of-text token does to an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndOfText {
    /// Ends it.
    Ends,
    /// Nothing: answers go on to their full length, so that measurements are of one length.
    Ignored,
}

/// Loads the configured model and starts its engine.
///
/// # Errors
/// The loader refused, with its reason.
pub async fn load(settings: &Settings, end_of_text: EndOfText) -> Result<Loaded, ModelError> {
    let id = served_name(&settings.model);
    let start = Instant::now();
    info!("loading {id}");
    let wanted = settings.clone();
    let mut loading = tokio::task::spawn_blocking(move || pipeline(&wanted));
    let joined = loop {
        match tokio::time::timeout(STILL_LOADING, &mut loading).await {
            Ok(joined) => break joined,
            Err(_) => info!("still loading {id}, {} s so far", start.elapsed().as_secs()),
        }
    };
    let refuse = |reason: String| {
        debug!("{reason}");
        ModelError::Load {
            id: id.clone(),
            reason: first_line(&reason).to_owned(),
        }
    };
    let pipeline = match joined {
        Ok(loaded) => loaded.map_err(|err| refuse(format!("{err:#}")))?,
        // Upstream unwraps in places; its panic message has gone to standard error.
        Err(join) => return Err(refuse(format!("the loader panicked ({join})"))),
    };
    info!("loaded {id} in {:.1} s", start.elapsed().as_secs_f64());
    // A model from the hub is described on this machine only now.
    architecture::check(settings)?;
    let scheduler = SchedulerConfig::DefaultScheduler {
        method: DefaultSchedulerMethod::Fixed(
            NonZeroUsize::new(settings.engine.max_running).unwrap_or(NonZeroUsize::MIN),
        ),
    };
    let (encode, context, dtype) = {
        let pipeline = pipeline.lock().await;
        let tokenizer = pipeline.tokenizer();
        let encode = move |text: &str, special: bool| {
            let encoded = tokenizer.as_ref()?.encode_fast(text, special).ok()?;
            Some(encoded.get_ids().to_vec())
        };
        let metadata = pipeline.get_metadata();
        let encode: Encode = Arc::new(encode);
        (encode, metadata.max_seq_len, metadata.activation_dtype)
    };
    let count = encode.clone();
    let mistralrs = MistralRsBuilder::new(pipeline, scheduler, false, None)
        .with_model_id(&id)
        .with_no_prefix_cache(!settings.engine.prefix_cache)
        .with_prefix_cache_n(PREFIXES)
        .with_disable_eos_stop(end_of_text == EndOfText::Ignored)
        .build()
        .await;
    let upstream = MistralRsServerRouterBuilder::new()
        .with_mistralrs(mistralrs.clone())
        .build()
        .await
        .map_err(|err| ModelError::Routes {
            id,
            reason: first_line(&format!("{err:#}")).to_owned(),
        })?;
    Ok(Loaded {
        mistralrs,
        upstream,
        tokens: Arc::new(move |text| Some(count(text, true)?.len())),
        encode,
        context,
        dtype,
        rotary: rotary::of(settings),
    })
}

fn pipeline(settings: &Settings) -> anyhow::Result<Loading> {
    let model = &settings.model;
    let (loader, tokens) = match model.kind {
        ModelKind::Gguf => (gguf(model)?, TokenSource::None),
        ModelKind::Hf => (hugging_face(model), TokenSource::CacheToken),
    };
    let dtype = match model.dtype {
        DType::Auto => ModelDType::Auto,
        DType::F32 => ModelDType::F32,
        DType::F16 => ModelDType::F16,
        DType::Bf16 => ModelDType::BF16,
    };
    // Its progress bars are for people.
    let silent = settings.log.format == LogFormat::Json;
    loader.load_model_from_hf(
        None,
        tokens,
        &dtype,
        &Device::Cpu,
        silent,
        DeviceMapSetting::dummy(),
        None,
        None,
    )
}

fn gguf(model: &Model) -> anyhow::Result<Box<dyn Loader>> {
    let file = model.file.as_deref().map(home).unwrap_or_default();
    let file = std::path::absolute(&file)?;
    let folder = file
        .parent()
        .map(|folder| folder.to_string_lossy().into_owned())
        .unwrap_or_default();
    let name = file
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(GGUFLoaderBuilder::new(
        template(model),
        None,
        folder,
        vec![name],
        GGUFSpecificConfig::default(),
        false,
        None,
    )
    .build())
}

fn hugging_face(model: &Model) -> Box<dyn Loader> {
    AutoLoaderBuilder::new(
        NormalSpecificConfig::default(),
        MultimodalSpecificConfig::default(),
        EmbeddingSpecificConfig::default(),
        template(model),
        None,
        repository(model),
        false,
        None,
    )
    .build()
}

/// The folder, if it is one; else the id on the hub.
fn repository(model: &Model) -> String {
    let id = model.model_id.clone().unwrap_or_default();
    let folder = home(Path::new(&id));
    if folder.is_dir() {
        folder.to_string_lossy().into_owned()
    } else {
        id
    }
}

fn template(model: &Model) -> Option<String> {
    model
        .chat_template
        .as_deref()
        .map(|path| home(path).to_string_lossy().into_owned())
}

/// `~/` as the shell would have it.
pub(crate) fn home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

/// Runs a short prompt and two tokens through the serving path, and checks that the plugin saw them: an
/// architecture that goes round the seam must not be served as compressed.
///
/// # Errors
/// What went wrong.
pub async fn self_test(id: &str, loaded: &Loaded, kv: &Kv) -> Result<(), ModelError> {
    let failed = |reason: String| ModelError::SelfTest {
        id: id.to_owned(),
        reason: first_line(&reason).to_owned(),
    };
    let mistralrs = &loaded.mistralrs;
    kv.set_rotary(loaded.rotary.clone());
    let request = mistralrs.next_request_id();
    let message = RequestMessage::Completion {
        text: "The quick brown fox".into(),
        echo_prompt: false,
        best_of: None,
    };
    let usage = answered(mistralrs, request, message).await.map_err(failed)?;
    if kv.on() {
        let view = kv.request(request).map_err(|_| {
            failed("this architecture goes round the seam: the plugin never saw its keys and values".into())
        })?;
        // The last token drawn is not processed any more.
        let processed = (usage.total_tokens as u64).saturating_sub(1);
        if view.seen < processed {
            let seen = view.seen;
            return Err(failed(format!(
                "the plugin saw {seen} tokens of {processed} that were processed"
            )));
        }
        kv.learn_bytes_per_token(&view);
        check_rotary(loaded, kv).await.map_err(failed)?;
    } else {
        warn!("kv.plugin is off: the KV cache is mistral.rs' own, nothing is compressed");
    }
    info!(
        "self-test passed: {} prompt and {} new tokens",
        usage.prompt_tokens, usage.completion_tokens
    );
    Ok(())
}

/// Two tokens' answer to a prompt of the self-test.
async fn answered(mistralrs: &MistralRs, request: usize, message: RequestMessage) -> Result<Usage, String> {
    let (response, mut answers) = tokio::sync::mpsc::channel(4);
    let params = SamplingParams {
        max_len: Some(2),
        ..SamplingParams::deterministic()
    };
    let normal = NormalRequest::new_simple(message, params, response, request, None, None);
    let sender = mistralrs.get_sender(None).map_err(|err| err.to_string())?;
    let sent = sender.send(Request::Normal(Box::new(normal))).await;
    sent.map_err(|_| "the engine's thread has ended")?;
    match tokio::time::timeout(SELF_TEST_TIMEOUT, answers.recv()).await {
        Ok(Some(Response::CompletionDone(done))) => Ok(done.usage),
        Ok(Some(Response::CompletionModelError(message, _))) => Err(message),
        Ok(Some(Response::InternalError(err) | Response::ValidationError(err))) => Err(err.to_string()),
        Ok(Some(_)) => Err("an answer of another kind than was asked for".into()),
        Ok(None) => Err("no answer: the engine's thread has panicked".into()),
        Err(_) => Err(format!("no answer within {} s", SELF_TEST_TIMEOUT.as_secs())),
    }
}

/// Holds how keys are said to turn against those of one token again and again. Where it is not so, it is not known.
async fn check_rotary(loaded: &Loaded, kv: &Kv) -> Result<(), String> {
    if let RotaryLayers::Unknown(reason) = &loaded.rotary {
        info!("how keys turn with their positions is not known: {reason}");
        return Ok(());
    }
    let token = (loaded.encode)("fox", false).and_then(|tokens| tokens.last().copied());
    let same = vec![token.unwrap_or(0); SAME.min(loaded.context / 2)];
    let request = loaded.mistralrs.next_request_id();
    kv.check_rotary(request);
    let answer = answered(&loaded.mistralrs, request, RequestMessage::CompletionTokens(same)).await;
    let checked = kv.rotary_checked();
    answer?;
    match checked {
        Ok(off) => info!("keys turn with their positions as the model's description says, within {off:.1e}"),
        Err(reason) => warn!("{reason}; policies that need to know are refused"),
    }
    Ok(())
}
