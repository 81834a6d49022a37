//! llama.cpp, by way of llama-cpp-python from PyPI: built for this machine, in a folder of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use cinch_protocol::bench::Other;

use crate::step::Step;
use crate::workspace::Workspace;
use crate::{digest, process};

const PACKAGE: &str = "llama-cpp-python==0.3.36";
/// Types of its KV cache that are measured.
const KV: [&str; 3] = ["f16", "q8_0", "q4_0"];

/// How it is compiled: for this CPU, without AMX, with which it crashes on virtual machines that offer it.
/// `GGML_NATIVE` would put its `-march=native` after our flags and turn AMX on again, so the flags say it themselves.
const FLAGS: (&str, &str) = if cfg!(target_arch = "x86_64") {
    (
        "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF",
        "-march=native -mno-amx-tile -mno-amx-int8 -mno-amx-bf16",
    )
} else {
    ("-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "")
};

/// The systems to measure, built first where they are not there.
pub(super) fn ready(workspace: &Workspace, model: &Path) -> anyhow::Result<Vec<Other>> {
    let python = build(&workspace.home.join("llama.cpp"))?;
    let script = workspace.root.join("xtask/src/bench/llama_probe.py");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let words = |path: &Path| path.to_string_lossy().into_owned();
    let systems = KV.map(|kv| Other {
        system: "llama.cpp".to_owned(),
        kv: Some(kv.to_owned()),
        command: vec![
            words(&python),
            // Nothing of the user's own Python.
            "-I".to_owned(),
            words(&script),
            words(model),
            kv.to_owned(),
            threads.to_string(),
        ],
        max_concurrency: Some(1),
    });
    Ok(systems.to_vec())
}

/// The Python that has it.
fn build(dir: &Path) -> anyhow::Result<PathBuf> {
    let venv = dir.join("venv");
    let python = venv.join("bin/python");
    // Written last: a build that was broken off leaves none.
    let stamp = dir.join("built");
    let (cmake, compiler) = FLAGS;
    let wanted = format!("{PACKAGE}\n{cmake}\n{compiler}\n");
    if fs::read_to_string(&stamp).ok().as_deref() == Some(&wanted) && python.is_file() {
        return Ok(python);
    }
    let Some(system) = process::first_working(&[&["python3"], &["python"]]) else {
        bail!("no Python found to run llama.cpp with; on Debian: apt-get install python3-venv");
    };
    if ["c++", "g++", "clang++"]
        .into_iter()
        .find_map(process::in_path)
        .is_none()
    {
        bail!("no C++ compiler found to build llama.cpp with; on Debian: apt-get install g++");
    }
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let mut step = Step::start(format!("Building {PACKAGE} for this machine (5 to 20 minutes)"));
    let mut command = Command::new(&system[0]);
    command
        .args(&system[1..])
        .args(["-m", "venv", "--clear"])
        .arg(&venv);
    process::run_patiently(&mut command, &mut step, "making a Python environment")
        .context("making a Python environment for llama.cpp; on Debian: apt-get install python3-venv")?;
    let mut command = Command::new(&python);
    command
        // pip's cache would give a build with other flags.
        .args(["-m", "pip", "install", "--quiet", "--no-cache-dir"])
        .args(["--no-binary", "llama-cpp-python", PACKAGE])
        .env("CMAKE_ARGS", cmake)
        .env("CFLAGS", compiler)
        .env("CXXFLAGS", compiler)
        .env("CMAKE_BUILD_PARALLEL_LEVEL", "2");
    process::run_patiently(&mut command, &mut step, "building")
        .context("building llama-cpp-python; it needs a C++17 compiler and PyPI")?;
    digest::write_atomically(&stamp, wanted.as_bytes()).context("noting that llama.cpp is built")?;
    step.done(format!("built {}", venv.display()));
    Ok(python)
}
