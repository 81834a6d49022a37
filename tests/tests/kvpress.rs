//! Selection methods beside kvpress, where it is installed: tests/kvpress says how to.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::process::Command;

use common::{env, root};

#[test]
fn selection_is_as_close_to_the_full_cache_as_with_kvpress() {
    let python = std::env::var("CINCH_KVPRESS_PYTHON").unwrap_or_else(|_| "python3".into());
    let installed = Command::new(&python)
        .args(["-c", "import kvpress, transformers, gguf"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !installed {
        println!("{python} has no kvpress, transformers and gguf: nothing was compared");
        return;
    }
    let mut compare = Command::new(&python);
    compare.arg(root().join("tests/kvpress/compare.py"));
    for (option, variable) in [
        ("--cinch", "CINCH_BIN"),
        ("--model", "CINCH_MODEL"),
        ("--text", "CINCH_TEXT"),
    ] {
        compare.arg(option).arg(env(variable));
    }
    compare.arg("--config").arg(root().join("configs/engine.toml"));
    let status = compare.status().unwrap();
    assert!(status.success(), "{status}");
}
