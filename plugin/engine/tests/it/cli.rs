//! The binary itself: exit codes, and errors of one line.

use std::net::TcpListener;
use std::process::{Command, Output};

use crate::gguf::{Folder, gguf};

const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml");

fn cinch(command: &str, overrides: &[String]) -> Output {
    let mut cinch = Command::new(env!("CARGO_BIN_EXE_cinch"));
    cinch.args([command, "--config", CONFIG]);
    for given in overrides {
        cinch.args(["--set", given]);
    }
    cinch.output().unwrap()
}

/// The one line that begins with `error: `, and the exit code.
fn error(output: &Output) -> (String, i32) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    (errors[0].to_owned(), output.status.code().unwrap())
}

#[test]
fn version_and_help() {
    let output = Command::new(env!("CARGO_BIN_EXE_cinch"))
        .arg("--version")
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        format!("cinch {}", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn check_config_is_silent_about_what_is_right() {
    let output = cinch("check-config", &["model.file=/no/such/model.gguf".into()]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("engine.toml: ok\n"));
}

#[test]
fn an_unknown_field_ends_it() {
    let (line, code) = error(&cinch("serve", &["kv.capacity=1".into()]));
    assert!(
        line.contains("field `kv.capacity`: given an unknown field"),
        "{line}"
    );
    assert_eq!(code, 2);
}

#[test]
fn the_environment_is_named_where_it_is_wrong() {
    let mut cinch = Command::new(env!("CARGO_BIN_EXE_cinch"));
    cinch
        .args(["check-config", "--config", CONFIG])
        .env("CINCH__ENGINE__MAX_RUNNING", "1000");
    let (line, code) = error(&cinch.output().unwrap());
    let wanted = "error: environment variable CINCH__ENGINE__MAX_RUNNING: field `engine.max_running`: given 1000, allowed 1 to 256";
    assert_eq!(line, wanted);
    assert_eq!(code, 2);
}

#[test]
fn a_file_that_is_no_gguf_ends_it() {
    let folder = Folder::new("cli-none");
    let file = folder.file("model.gguf", b"not a model");
    let (line, code) = error(&cinch("serve", &[format!("model.file={}", file.display())]));
    assert!(line.starts_with("error: field `model.file`: given "), "{line}");
    assert!(line.contains("allowed a GGUF file"), "{line}");
    assert_eq!(code, 2);
}

#[test]
fn a_port_in_use_ends_it() {
    let folder = Folder::new("cli-port");
    let file = folder.file("model.gguf", &gguf("llama"));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    for field in ["server.listen", "api.listen"] {
        let other = if field == "api.listen" {
            "server.listen"
        } else {
            "api.listen"
        };
        let output = cinch(
            "serve",
            &[
                format!("model.file={}", file.display()),
                "ladder.allow_other_model=true".into(),
                format!("{field}={address}"),
                format!("{other}=127.0.0.1:0"),
            ],
        );
        let (line, code) = error(&output);
        let wanted =
            format!("error: {field} {address}: address already in use; choose another with --set {field}=…");
        assert_eq!(line, wanted);
        assert_eq!(code, 1);
    }
}

/// A header alone does not make a model: whatever the loader does with it, it ends in one line.
#[test]
fn a_model_that_does_not_load_ends_it() {
    let folder = Folder::new("cli-load");
    let file = folder.file("model.gguf", &gguf("llama"));
    let output = cinch(
        "serve",
        &[
            format!("model.file={}", file.display()),
            "ladder.allow_other_model=true".into(),
            "server.listen=127.0.0.1:0".into(),
            "api.listen=127.0.0.1:0".into(),
        ],
    );
    let (line, code) = error(&output);
    assert!(line.starts_with("error: model smollm2: "), "{line}");
    assert_eq!(code, 1);
}

/// What `cinch calibrate` refuses before it loads a model.
#[test]
fn a_calibration_that_cannot_be_ends_it() {
    let folder = Folder::new("cli-calibrate");
    let model = folder.file("model.gguf", &gguf("llama"));
    let text = folder.file("text.txt", b"Call me Ishmael.");
    let empty = folder.file("empty.txt", b" \n");
    let none = text.with_file_name("none.txt");
    let [text, empty, none] = [&text, &empty, &none].map(|path| path.display().to_string());
    let under_a_file = format!("{text}/out");
    let calibrate = |text: &str, out: &str, more: &[&str], set: &str| {
        let mut cinch = Command::new(env!("CARGO_BIN_EXE_cinch"));
        cinch.args(["calibrate", "--config", CONFIG, "--text", text, "--out", out]);
        cinch.args(["--set", &format!("model.file={}", model.display())]);
        cinch.args(["--set", set]).args(more);
        error(&cinch.output().unwrap())
    };
    let warn = "log.level=warn";
    let cases: [(&String, &str, &[&str], &str, &str); 7] = [
        (&none, "out", &[], warn, "field `--text`: given "),
        (
            &empty,
            "out",
            &[],
            warn,
            "empty.txt (nothing in it), allowed a text file",
        ),
        (&text, &under_a_file, &[], warn, "field `--out`: given "),
        (
            &text,
            &under_a_file,
            &[],
            warn,
            "allowed a folder that can be made and written to",
        ),
        (
            &text,
            "out",
            &["--method", "fp8"],
            warn,
            "field `--method`: given fp8, allowed rtn or kivi, ",
        ),
        (
            &text,
            "out",
            &[],
            "kv.plugin=off",
            "field `--set`: given kv.plugin=off, allowed other fields: `cinch calibrate` sets ",
        ),
        (
            &text,
            "out",
            &[],
            "engine.prefix_cache=true",
            "field `--set`: given engine.prefix_cache=true, allowed other fields",
        ),
    ];
    for (text, out, more, set, wanted) in cases {
        let (line, code) = calibrate(text, out, more, set);
        assert!(line.contains(wanted), "{line}\n  wanted {wanted}");
        assert_eq!(code, 2, "{line}");
    }
    let other_model = Command::new(env!("CARGO_BIN_EXE_cinch"))
        .args(["calibrate", "--config", CONFIG, "--text", &text, "--out", "out"])
        .args(["--set", "model.file=/no/such/model.gguf"])
        .output()
        .unwrap();
    let (line, code) = error(&other_model);
    assert!(
        line.starts_with("error: field `model.file`: given /no/such/model.gguf"),
        "{line}"
    );
    assert_eq!(code, 2);
}
