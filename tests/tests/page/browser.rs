//! Chromium without a window, through ChromeDriver: the WebDriver protocol (W3C), and ChromeDriver's own calls for DevTools
//! and logs.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::Screen;
use crate::common::free_port;

/// Ended when dropped.
pub(crate) struct Browser {
    driver: Child,
    /// Where its session is.
    session: String,
    _profile: TempDir,
}

impl Browser {
    pub(crate) fn start() -> Self {
        let port = free_port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .args(["--log-level=SEVERE"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|err| {
                panic!("chromedriver: {err}; on Debian: apt-get install chromium chromium-driver")
            });
        let url = format!("http://127.0.0.1:{port}");
        let start = Instant::now();
        while ureq::get(format!("{url}/status")).call().is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "ChromeDriver is not ready"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        let profile = tempfile::tempdir().unwrap();
        let folder = format!("--user-data-dir={}", profile.path().display());
        // The sandbox does not work for root, whom containers run as; the pages are our own.
        let args = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            &folder,
        ];
        let wanted = json!({
            "browserName": "chrome",
            "goog:chromeOptions": {"args": args},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        });
        let mut browser = Self {
            driver,
            session: format!("{url}/session"),
            _profile: profile,
        };
        let opened = browser.call("", &json!({"capabilities": {"alwaysMatch": wanted}}));
        let id = opened["sessionId"].as_str().unwrap();
        browser.session = format!("{url}/session/{id}");
        browser
    }

    /// The answer's value.
    fn call(&self, path: &str, body: &Value) -> Value {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build()
            .into();
        let mut answer = agent
            .post(format!("{}{path}", self.session))
            .send_json(body)
            .unwrap();
        let status = answer.status();
        let mut answer: Value = answer.body_mut().read_json().unwrap();
        assert!(status.is_success(), "{path}: {answer}");
        answer["value"].take()
    }

    fn devtools(&self, command: &str, params: &Value) {
        self.call("/goog/cdp/execute", &json!({"cmd": command, "params": params}));
    }

    /// Opens a file, and drops what was logged before; its address.
    pub(crate) fn open(&self, page: &Path) -> String {
        self.call("/url", &json!({"url": "about:blank"}));
        self.log("browser");
        let url = format!("file://{}", page.display());
        self.call("/url", &json!({"url": url}));
        url
    }

    /// What a script returns that runs in the page.
    pub(crate) fn ask(&self, script: &str) -> Value {
        self.call("/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Shows the page on a screen of this kind from now on.
    pub(crate) fn screen(&self, screen: Screen) {
        let metrics = json!({"width": screen.width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.devtools("Emulation.setDeviceMetricsOverride", &metrics);
        let scheme = if screen.dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.devtools("Emulation.setEmulatedMedia", &media);
    }

    /// Entries of a log since it was last asked for.
    pub(crate) fn log(&self, kind: &str) -> Vec<Value> {
        let entries = self.call("/se/log", &json!({"type": kind}));
        entries.as_array().unwrap().clone()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium goes with its session, and would outlive a driver that is killed before.
        let _ended = ureq::delete(&self.session).call();
        let _ended_before = self.driver.kill();
        let _reaped = self.driver.wait();
    }
}
