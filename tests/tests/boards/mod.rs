//! The dashboards, rules and scrape configuration as data: every query that a person's Grafana or Prometheus would
//! run is listed here, and nothing else is.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod promql;
pub(crate) mod server;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

pub(crate) fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

pub(crate) fn yaml<T: serde::de::DeserializeOwned>(path: impl AsRef<Path>) -> T {
    let text = read(&path);
    serde_norway::from_str(&text).unwrap_or_else(|err| panic!("{}: {err}", path.as_ref().display()))
}

/// Files below a folder of the repository whose names end so, in order.
pub(crate) fn files(folder: &str, end: &str) -> Vec<String> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut all: Vec<String> = names
        .filter(|name| name.ends_with(end))
        .map(|name| format!("{folder}/{name}"))
        .collect();
    all.sort();
    assert!(!all.is_empty(), "no {end} in {folder}");
    all
}

/// A dashboard file.
pub(crate) struct Board {
    pub(crate) file: String,
    pub(crate) json: Value,
}

/// A query of a panel.
pub(crate) struct Target {
    /// For people: file, panel, query.
    pub(crate) place: String,
    pub(crate) expr: String,
    /// Asked for one instant, not for a range of time.
    pub(crate) instant: bool,
}

/// A variable that is filled by a query: `label_values(selector, label)`.
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) selector: String,
    pub(crate) label: String,
    /// What `All` stands for; none for the list of all values.
    pub(crate) all: Option<String>,
}

pub(crate) fn boards() -> Vec<Board> {
    let all = files("dashboards/grafana", ".json").into_iter();
    all.map(|file| Board {
        json: serde_json::from_str(&read(&file)).unwrap_or_else(|err| panic!("{file}: {err}")),
        file,
    })
    .collect()
}

impl Board {
    /// Rows and panels, those inside of collapsed rows too.
    pub(crate) fn panels(&self) -> Vec<&Value> {
        let mut all = Vec::new();
        for panel in self.json["panels"].as_array().unwrap() {
            all.push(panel);
            all.extend(panel["panels"].as_array().into_iter().flatten());
        }
        all
    }

    pub(crate) fn targets(&self) -> Vec<Target> {
        let mut all = Vec::new();
        for panel in self.panels() {
            let title = panel["title"].as_str().unwrap_or_default();
            for target in panel["targets"].as_array().into_iter().flatten() {
                let (id, expr) = (
                    target["refId"].as_str().unwrap(),
                    target["expr"].as_str().unwrap(),
                );
                all.push(Target {
                    place: format!("{}: {title}: {id}: {expr}", self.file),
                    expr: expr.to_owned(),
                    instant: target["instant"] == true,
                });
            }
        }
        all
    }

    /// In the order in which they depend on one another.
    pub(crate) fn variables(&self) -> Vec<Variable> {
        let list = self.json["templating"]["list"].as_array().unwrap();
        let queries = list.iter().filter(|variable| variable["type"] == "query");
        queries
            .map(|variable| {
                let name = variable["name"].as_str().unwrap().to_owned();
                let query = variable["query"]["query"].as_str().unwrap();
                let inner = query
                    .strip_prefix("label_values(")
                    .and_then(|q| q.strip_suffix(')'));
                let (selector, label) = inner
                    .and_then(|inner| inner.rsplit_once(", "))
                    .unwrap_or_else(|| panic!("{}: ${name}: {query} is no label_values", self.file));
                Variable {
                    name,
                    selector: selector.to_owned(),
                    label: label.to_owned(),
                    all: variable["allValue"].as_str().map(str::to_owned),
                }
            })
            .collect()
    }
}

/// A recording rule or an alert.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rule {
    pub(crate) record: Option<String>,
    pub(crate) alert: Option<String>,
    pub(crate) expr: String,
    #[serde(default, rename = "for")]
    pub(crate) pending: Option<String>,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Rule {
    pub(crate) fn name(&self) -> &str {
        self.record.as_deref().or(self.alert.as_deref()).unwrap()
    }
}

pub(crate) fn rules() -> Vec<Rule> {
    #[derive(Deserialize)]
    struct Group {
        rules: Vec<Rule>,
    }
    #[derive(Deserialize)]
    struct File {
        groups: Vec<Group>,
    }
    let files = files("dashboards/prometheus", ".rules.yml").into_iter();
    let groups = files.flat_map(|file| yaml::<File>(file).groups);
    groups.flat_map(|group| group.rules).collect()
}
