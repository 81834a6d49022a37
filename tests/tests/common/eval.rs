//! A small evaluation of the demo model.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::{cinch, said, text};

/// A small grid on little text.
pub(crate) const GRID: &str = r#"
[quick]
windows = 2
context = 192
steps = 32
task_lengths = [256]
task_depths = [0.2, 0.8]
task_repeats = 1
speed_context = 64
speed_steps = 4
speed_rounds = 1

[full]
windows = 1
context = 64
steps = 16
task_lengths = []
task_depths = []
task_repeats = 1
speed_context = 64
speed_steps = 2
speed_rounds = 0

[[grid]]
quick = true
policy = { quantize = { k_bits = [8, 2], v_bits = 8 } }

[[grid]]
quick = true
policy = { select = { method = "streaming", budget = 0.5, recent = 32 } }
"#;

/// `cinch eval` on the demo model, in a folder that keeps its text and grid; it writes to `out` there.
pub(crate) fn eval(dir: &Path, out: &str, more: &[&str]) -> Command {
    // The machine-made part of a long text is enough.
    let file = dir.join("text.txt");
    if !file.exists() {
        let text = text();
        let end = text.char_indices().nth(20_000).unwrap().0;
        fs::write(&file, &text[..end]).unwrap();
        fs::write(dir.join("grid.toml"), GRID).unwrap();
    }
    let mut command = cinch("eval", &["log.level=warn"]);
    command.arg("--text").arg(file);
    command.arg("--out").arg(dir.join(out));
    command.arg("--grid").arg(dir.join("grid.toml"));
    command.args(more);
    command
}

pub(crate) fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    output
}

/// What it measured.
pub(crate) fn report(dir: &Path, out: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.join(out).join("report.json")).unwrap()).unwrap()
}
