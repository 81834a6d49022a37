//! Bad input gets a clear error that names the field, what was given and what is allowed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;

use std::net::TcpListener;

use common::{Server, cinch, said};
use serde_json::json;

/// Starts `cinch serve` with `overrides`, expects it to refuse, and returns its one line.
fn refused(overrides: &[&str], code: i32) -> String {
    let output = cinch("serve", overrides).output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    let line = said
        .lines()
        .find(|line| line.starts_with("error: "))
        .unwrap_or_else(|| panic!("no error line: {said}"));
    println!("{line}");
    line.to_owned()
}

fn names(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "{part:?} is not in: {line}");
    }
}

#[test]
fn configuration() {
    names(
        &refused(&["kv.capacty_bytes=1"], 2),
        &["capacty_bytes", "capacity_bytes"],
    );
    names(
        &refused(&["kv.capacity_bytes=lots"], 2),
        &["kv.capacity_bytes", "lots"],
    );
    names(
        &refused(&["engine.max_running=0"], 2),
        &["engine.max_running", "0", "1 to 256"],
    );
    names(
        &refused(
            &["class.batch={ policy = { quantize = { k_bits = 5, v_bits = 4 } } }"],
            2,
        ),
        &["k_bits", "5", "2, 3, 4, 8 or 16"],
    );
    names(
        &refused(&["class.batch.ratio=99"], 2),
        &["class.batch.ratio", "99", "1.0 to "],
    );
    names(
        &refused(&["class.night={ level = 1, ratio = 2.0 }"], 2),
        &["class.night", "`level` and `ratio`"],
    );
}

#[test]
fn a_port_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("server.listen={}", taken.local_addr().unwrap());
    names(
        &refused(&[&listen, "api.listen=127.0.0.1:0"], 1),
        &["server.listen", "in use"],
    );
}

#[test]
fn model_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        format!("model.file={}", path.display())
    };
    let ports = ["server.listen=127.0.0.1:0", "api.listen=127.0.0.1:0"];
    let refused = |model: &str| refused(&[model, ports[0], ports[1]], 2);
    names(
        &refused("model.file=/no/such/file.gguf"),
        &["model.file", "/no/such/file.gguf"],
    );
    names(
        &refused(&file("text.gguf", b"this is no model at all")),
        &["model.file", "GGUF"],
    );

    let real = std::fs::read(std::env::var_os("CINCH_MODEL").unwrap()).unwrap();
    names(
        &refused(&file("cut.gguf", &real[..real.len() / 3])),
        &["model.file"],
    );
    let at = real.windows(5).position(|bytes| bytes == b"llama").unwrap();
    let mut other = real;
    other[at..at + 5].copy_from_slice(b"mamba");
    names(
        &refused(&file("mamba.gguf", &other)),
        &["model.file", "mamba", "llama"],
    );
}

#[test]
fn requests_and_policies() {
    let server = Server::start(&[]);
    let complete = |change: serde_json::Value, headers: &[(&str, &str)]| {
        let mut body = json!({"model": "default", "prompt": "Call me", "max_tokens": 2});
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        server.complete(headers, &body)
    };
    let (status, problem) = complete(json!({}), &[("x-cinch-class", "nobody")]);
    assert_eq!(status, 400, "{problem}");
    names(&problem.to_string(), &["class", "nobody", "batch", "default"]);
    let (status, problem) = complete(
        json!({"cinch": {"policy": {"quantize": {"k_bits": 5, "v_bits": 4}}}}),
        &[],
    );
    assert_eq!(status, 400, "{problem}");
    assert_eq!(
        (&problem["given"], &problem["allowed"]),
        (&json!("5"), &json!("2, 3, 4, 8 or 16")),
        "{problem}"
    );
    assert!(
        problem["field"].as_str().unwrap().ends_with("quantize.k_bits"),
        "{problem}"
    );
    let (status, problem) = complete(json!({"cinch": {"level": 99}}), &[]);
    assert_eq!(status, 400, "{problem}");
    names(&problem.to_string(), &["level", "99"]);
    let (status, problem) = complete(json!({"cinch": {"ratio": 99}}), &[]);
    assert_eq!(status, 400, "{problem}");
    assert_eq!(
        (&problem["field"], &problem["given"]),
        (&json!("cinch.ratio"), &json!("99")),
        "{problem}"
    );
    names(problem["allowed"].as_str().unwrap(), &["1.0 to "]);
    let (status, problem) = complete(json!({"cinch": {"ratio": 2.0, "level": 1}}), &[]);
    assert_eq!(status, 400, "{problem}");
    names(problem["given"].as_str().unwrap(), &["`level` and `ratio`"]);
    let (status, problem) = server.send(
        "POST",
        &format!("{}/v1/completions", server.openai),
        &[],
        "{\"prompt\": ",
    );
    assert_eq!(status, 400, "{problem}");
    names(&problem.to_string(), &["JSON"]);

    let put = |body: &str| server.send("PUT", &format!("{}/v1/policies/batch", server.api), &[], body);
    for (body, parts) in [
        (
            r#"{"policy": {"select": {"method": "h2o", "budget": 1.5}}}"#,
            ["budget", "1.5"],
        ),
        (
            r#"{"policy": {"select": {"method": "magic", "budget": 0.5}}}"#,
            ["magic", "h2o"],
        ),
        (r#"{"policy": {"quantise": {}}}"#, ["quantise", "quantize"]),
        (r#"{"ratio": 0.5}"#, ["ratio", "0.5"]),
        (
            r#"{"ratio": 2.0, "policy": {}}"#,
            ["`policy` and `ratio`", "exactly one"],
        ),
        ("{nonsense", ["JSON", "line 1"]),
    ] {
        let (status, problem) = put(body);
        assert_eq!(status, 400, "{body}: {problem}");
        names(&problem.to_string(), &parts);
    }
    let (status, problem) = server.send(
        "PUT",
        &format!("{}/v1/policies/nobody", server.api),
        &[],
        r#"{"level": 1}"#,
    );
    assert_eq!(status, 404, "{problem}");
    names(&problem.to_string(), &["nobody"]);
}
