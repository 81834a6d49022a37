//! A real engine for a test: probed without a server, or served on ports of its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod eval;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cinch_protocol::probe::{Plan, Report};
use serde_json::Value;

pub(crate) fn env(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set: run these tests with `cargo xtask test`"))
        .into()
}

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// Moby Dick.
pub(crate) fn text() -> String {
    std::fs::read_to_string(env("CINCH_TEXT")).unwrap()
}

/// The `cinch` binary with the repository's own configuration and the demo model.
pub(crate) fn cinch(subcommand: &str, overrides: &[&str]) -> Command {
    let model = format!("model.file={}", env("CINCH_MODEL").display());
    let overrides = [&[model.as_str()], overrides].concat();
    cinch_with(&root().join("configs/engine.toml"), subcommand, &overrides)
}

/// The `cinch` binary with a configuration of the test's own.
pub(crate) fn cinch_with(config: &Path, subcommand: &str, overrides: &[&str]) -> Command {
    let mut command = Command::new(env("CINCH_BIN"));
    command.arg(subcommand).arg("--config").arg(config);
    for change in overrides {
        command.args(["--set", change]);
    }
    command
}

pub(crate) fn probe(overrides: &[&str], plan: &Plan) -> Report {
    run_probe(cinch("probe", overrides), plan)
}

/// Runs a command that is `cinch probe` without its plan.
pub(crate) fn run_probe(mut command: Command, plan: &Plan) -> Report {
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("plan.json"), dir.path().join("report.json"));
    std::fs::write(&path, serde_json::to_vec(plan).unwrap()).unwrap();
    let output = command.arg(&path).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap()
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

/// Runs tests/`folder`/compare.py with the Python that `variable` names, if it has these modules.
pub(crate) fn compare(folder: &str, variable: &str, modules: &str) {
    let python = std::env::var(variable).unwrap_or_else(|_| "python3".into());
    let installed = Command::new(&python)
        .args(["-c", &format!("import {modules}")])
        .output()
        .is_ok_and(|output| output.status.success());
    if !installed {
        println!("{python} cannot import all of {modules}: nothing was compared");
        return;
    }
    let mut compare = Command::new(&python);
    // No compiled copies in the source tree.
    compare
        .arg("-B")
        .arg(root().join("tests").join(folder).join("compare.py"));
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

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A served engine; stopped when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) openai: String,
    pub(crate) api: String,
}

impl Server {
    pub(crate) fn start(overrides: &[&str]) -> Self {
        Self::start_at(free_port(), free_port(), overrides)
    }

    /// On these ports: where another process was before.
    pub(crate) fn start_at(port: u16, api_port: u16, overrides: &[&str]) -> Self {
        Self::spawn(cinch("serve", overrides), port, api_port)
    }

    /// Runs a command that is `cinch serve`.
    pub(crate) fn run(command: Command) -> Self {
        Self::spawn(command, free_port(), free_port())
    }

    fn spawn(mut command: Command, port: u16, api_port: u16) -> Self {
        let child = command
            .args(["--set", &format!("server.listen=127.0.0.1:{port}")])
            .args(["--set", &format!("api.listen=127.0.0.1:{api_port}")])
            .args(["--set", "log.level=warn"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            openai: format!("http://127.0.0.1:{port}"),
            api: format!("http://127.0.0.1:{api_port}"),
        };
        let start = Instant::now();
        while ureq::get(format!("{}/readyz", server.api)).call().is_err() {
            assert_eq!(
                server.child.try_wait().unwrap(),
                None,
                "the engine ended while loading"
            );
            assert!(
                start.elapsed() < Duration::from_secs(120),
                "the engine is not ready"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        server
    }

    /// The ports it listens on.
    pub(crate) fn ports(&self) -> (u16, u16) {
        let port = |url: &str| url.rsplit_once(':').unwrap().1.parse().unwrap();
        (port(&self.openai), port(&self.api))
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let mut answer = ureq::get(format!("{}{path}", self.api)).call().unwrap();
        answer.body_mut().read_json().unwrap()
    }

    /// Status and body, whatever the status.
    pub(crate) fn send(&self, method: &str, url: &str, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
        let (status, text) = self.send_text(method, url, headers, body);
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub(crate) fn send_text(
        &self,
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (u16, String) {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build()
            .into();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(url)
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut answer = agent.run(request.body(body.to_owned()).unwrap()).unwrap();
        let status = answer.status().as_u16();
        (
            status,
            answer
                .body_mut()
                .with_config()
                .limit(64 << 20)
                .read_to_string()
                .unwrap(),
        )
    }

    pub(crate) fn complete(&self, headers: &[(&str, &str)], body: &Value) -> (u16, Value) {
        self.send(
            "POST",
            &format!("{}/v1/completions", self.openai),
            headers,
            &body.to_string(),
        )
    }

    /// A metric's value, labels included in `name`.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = self.send_text("GET", &format!("{}/metrics", self.api), &[], "");
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Starts a streaming completion and hands each event, with its arrival, to `each` until that ends it.
    pub(crate) fn stream(&self, body: &Value, mut each: impl FnMut(Instant, &Value)) {
        let mut answer = ureq::post(format!("{}/v1/completions", self.openai))
            .send_json(body)
            .unwrap();
        let reader = BufReader::new(answer.body_mut().as_reader());
        for line in reader.lines() {
            let line = line.unwrap();
            if let Some(data) = line.strip_prefix("data: ")
                && data != "[DONE]"
            {
                each(Instant::now(), &serde_json::from_str(data).unwrap());
            }
        }
    }

    /// The id of the running request with a long prompt, once it runs.
    pub(crate) fn running_long(&self) -> u64 {
        let start = Instant::now();
        loop {
            let live = self.get("/v1/requests");
            let long = |r: &&Value| r["state"] == "running" && r["prompt_tokens"].as_u64() > Some(1000);
            if let Some(request) = live["requests"].as_array().unwrap().iter().find(long) {
                return request["id"].as_u64().unwrap();
            }
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "no running request: {live}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ctrl-C, as a person would; the exit status.
    pub(crate) fn stop(mut self) -> Option<i32> {
        let interrupt = Command::new("kill")
            .args(["-INT", &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(interrupt.success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended_before = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A controller of one engine; killed when dropped.
pub(crate) struct Controller {
    child: Child,
    url: String,
}

impl Controller {
    pub(crate) fn start(server: &Server, mode: &str, overrides: &[&str]) -> Self {
        let url = format!("127.0.0.1:{}", free_port());
        let mut command = Command::new(env("CINCH_CONTROLLER_BIN"));
        command
            .args(["run", "--config"])
            .arg(root().join("configs/controller.toml"))
            .args([
                "--set",
                &format!("listen={url}"),
                "--set",
                &format!("mode={mode}"),
            ])
            .args([
                "--set",
                &format!("engine=[{{name=\"local\",url=\"{}\"}}]", server.api),
            ]);
        for change in overrides {
            command.args(["--set", change]);
        }
        let controller = Self {
            child: command.stdin(Stdio::null()).spawn().unwrap(),
            url: format!("http://{url}"),
        };
        let start = Instant::now();
        while ureq::get(format!("{}/healthz", controller.url)).call().is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "the controller does not answer"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        controller
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let mut answer = ureq::get(format!("{}{path}", self.url)).call().unwrap();
        answer.body_mut().read_json().unwrap()
    }

    /// Whether a condition of this kind holds.
    pub(crate) fn condition(&self, kind: &str) -> bool {
        let status = self.get("/v1/status");
        let all = status["engines"][0]["conditions"].as_array().cloned();
        all.unwrap_or_default()
            .iter()
            .any(|condition| condition["kind"] == kind)
    }

    /// The sum of a metric's series.
    pub(crate) fn sum(&self, metric: &str) -> f64 {
        let mut answer = ureq::get(format!("{}/metrics", self.url)).call().unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        let series = text.lines().filter_map(|line| line.strip_prefix(metric));
        let values = series.filter(|rest| rest.starts_with(['{', ' ']));
        values
            .map(|rest| rest.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
            .sum()
    }

    /// SIGKILL: no chance to say goodbye.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ended_before = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Reads f32 logits, little endian.
pub(crate) fn logits(path: &Path) -> Vec<f32> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .unwrap()
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}
