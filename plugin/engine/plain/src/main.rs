//! The unhooked engine under the same probe that the hooked one answers: `cinch-plain MODEL.gguf PLAN.json OUT.json`.
#![forbid(unsafe_code)]

#[path = "../../src/probe/mod.rs"]
mod probe;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use mistralrs_core::{
    DefaultSchedulerMethod, DeviceMapSetting, GGUFLoaderBuilder, GGUFSpecificConfig, MistralRsBuilder,
    ModelDType, SchedulerConfig, TokenSource,
};

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model, plan, out] = args.as_slice() else {
        bail!("usage: cinch-plain MODEL.gguf PLAN.json OUT.json");
    };
    let plan: cinch_protocol::probe::Plan = serde_json::from_slice(&std::fs::read(plan).context("reading the plan")?)
        .context("parsing the plan")?;
    let folder = model.parent().context("MODEL.gguf has no folder")?;
    let file = model.file_name().context("MODEL.gguf has no name")?;
    let loader = GGUFLoaderBuilder::new(
        None,
        None,
        folder.to_string_lossy().into_owned(),
        vec![file.to_string_lossy().into_owned()],
        GGUFSpecificConfig::default(),
        false,
        None,
    )
    .build();
    let pipeline = loader.load_model_from_hf(
        None,
        TokenSource::None,
        &ModelDType::Auto,
        &candle_core::Device::Cpu,
        true,
        DeviceMapSetting::dummy(),
        None,
        None,
    )?;
    let dtype = pipeline.lock().await.get_metadata().activation_dtype;
    let scheduler = SchedulerConfig::DefaultScheduler {
        method: DefaultSchedulerMethod::Fixed(16.try_into()?),
    };
    let engine = MistralRsBuilder::new(pipeline, scheduler, false, None)
        .with_no_prefix_cache(!plan.prefix_cache)
        .with_disable_eos_stop(plan.timing)
        .build()
        .await;
    let mut report = probe::run(Arc::clone(&engine), &plan).await?;
    report.dtype = Some(dtype.as_str().to_owned());
    std::fs::write(out, serde_json::to_vec_pretty(&report)?).context("writing the report")?;
    Ok(())
}
