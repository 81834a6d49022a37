//! A real Prometheus over the repository's own configuration; what it answers, checked.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::{root, yaml};

/// Samples of one series: seconds and values.
pub(crate) type Samples = Vec<(f64, f64)>;

/// Killed when dropped.
pub(crate) struct Prometheus {
    child: Child,
    url: String,
    _folder: TempDir,
}

impl Prometheus {
    /// `configs/prometheus.yml` with other addresses, and a scrape and an evaluation each second.
    pub(crate) fn start(port: u16, targets: &[(&str, &str)]) -> Self {
        let mut config: Value = yaml("configs/prometheus.yml");
        for field in ["scrape_interval", "scrape_timeout", "evaluation_interval"] {
            config["global"][field] = "1s".into();
        }
        for files in config["rule_files"].as_array_mut().unwrap() {
            let absolute = root().join("configs").join(files.as_str().unwrap());
            *files = absolute.to_str().unwrap().into();
        }
        for job in config["scrape_configs"].as_array_mut().unwrap() {
            let found = targets.iter().find(|(name, _)| job["job_name"] == *name);
            let (_, url) = found.unwrap_or_else(|| panic!("no target for {}", job["job_name"]));
            job["static_configs"][0]["targets"] = Value::from(vec![url.trim_start_matches("http://")]);
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prometheus.yml");
        // JSON is YAML.
        std::fs::write(&file, config.to_string()).unwrap();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|err| panic!("prometheus: {err}; on Debian: apt-get install prometheus"));
        let prometheus = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            _folder: folder,
        };
        let start = Instant::now();
        while ureq::get(format!("{}/-/ready", prometheus.url)).call().is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "Prometheus is not ready"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        prometheus
    }

    /// `data` of an answer; an error of Prometheus' own is one here.
    pub(crate) fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, String> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build()
            .into();
        let request = agent.get(format!("{}/api/v1/{path}", self.url));
        let mut answer = request.query_pairs(query.iter().copied()).call().unwrap();
        let mut body: Value = answer.body_mut().read_json().unwrap();
        match body["status"].as_str() {
            Some("success") => Ok(body["data"].take()),
            _ => Err(body["error"].to_string()),
        }
    }

    /// What an expression is at one instant.
    pub(crate) fn instant(&self, expr: &str, at: f64) -> Result<Vec<Samples>, String> {
        let data = self.get("query", &[("query", expr), ("time", &at.to_string())])?;
        Ok(samples(&data))
    }

    /// What it was from second to second.
    pub(crate) fn range(&self, expr: &str, from: f64, to: f64) -> Result<Vec<Samples>, String> {
        let (from, to) = (from.to_string(), to.to_string());
        let query = [("query", expr), ("start", &from), ("end", &to), ("step", "1")];
        Ok(samples(&self.get("query_range", &query)?))
    }
}

fn samples(data: &Value) -> Vec<Samples> {
    let sample = |pair: &Value| {
        let value = pair[1].as_str().unwrap().parse().unwrap();
        (pair[0].as_f64().unwrap(), value)
    };
    if data["resultType"] == "scalar" {
        return vec![vec![sample(&data["result"])]];
    }
    let series = data["result"].as_array().unwrap().iter();
    series
        .map(|series| match series["values"].as_array() {
            Some(values) => values.iter().map(sample).collect(),
            None => vec![sample(&series["value"])],
        })
        .collect()
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ended_before = self.child.kill();
        let _reaped = self.child.wait();
    }
}
