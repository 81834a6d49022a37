//! Dashboards, rules and the scrape configuration hold together, as far as files alone can show: the queries
//! themselves are run by `dashboards`. Needs Prometheus' promtool.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod boards;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use boards::promql::{Selector, fill, selectors, variables};
use boards::{boards, files, read, root, rules, yaml};
use serde_json::Value;

/// Grafana's own variables.
const BUILT_IN: [&str; 2] = ["__rate_interval", "__range"];
/// What the `prometheus` crate says of a process.
const PROCESS: [&str; 7] = [
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
    "process_virtual_memory_bytes",
];

/// The string literals of a Rust file.
fn literals(path: &str) -> BTreeSet<String> {
    let text = read(path);
    text.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Whether the engine or the controller has it in its source; the end-to-end test asks the processes themselves.
fn exported(metric: &str) -> bool {
    let of_histogram = ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|end| metric.strip_suffix(end));
    let names: Vec<&str> = [Some(metric), of_histogram].into_iter().flatten().collect();
    if let Some(own) = metric.strip_prefix("cinch_controller_") {
        let literals = literals("controller/src/metrics.rs");
        let of_histogram = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| own.strip_suffix(end));
        return literals.contains(own)
            || of_histogram.is_some_and(|own| literals.contains(&format!("cinch_controller_{own}")));
    }
    metric == "up"
        || PROCESS.contains(&metric)
        || files("plugin/engine/src/metrics", ".rs").iter().any(|file| {
            let literals = literals(file);
            names.iter().any(|name| literals.contains(*name))
        })
}

fn recorded() -> BTreeSet<String> {
    rules().into_iter().filter_map(|rule| rule.record).collect()
}

fn text<'a>(value: &'a Value, what: &str) -> &'a str {
    let text = value.as_str().unwrap_or_default();
    assert!(!text.trim().is_empty(), "{what} is missing");
    text
}

#[test]
fn selectors_are_told_from_the_rest_of_an_expression() {
    let of = |expr: &str| -> Vec<String> { selectors(expr).iter().map(Selector::text).collect() };
    assert_eq!(
        of(
            r#"1 - sum by (le, class) (rate(a_bucket{le="5", x="}b("}[$__rate_interval])) / on (job) (c:d > 0) and e offset 5m"#
        ),
        [r#"a_bucket{le="5", x="}b("}"#, "c:d", "e"]
    );
    assert_eq!(of("time() - up == bool 1e3"), ["up"]);
    let values = [
        ("a".to_owned(), "1".to_owned()),
        ("ab".to_owned(), "2".to_owned()),
    ];
    assert_eq!(fill("$a $ab", &values), "1 2");
    assert_eq!(variables("x{a=~\"$b\"}[$__range]"), ["b", "__range"]);
}

#[test]
fn every_dashboard_is_whole() {
    let mut uids = BTreeSet::new();
    for board in boards() {
        let (file, json) = (&board.file, &board.json);
        assert_eq!(json["schemaVersion"], 39, "{file}");
        assert!(json["id"].is_null(), "{file}: an id is of one installation");
        text(&json["title"], &format!("{file}: title"));
        assert!(
            uids.insert(text(&json["uid"], &format!("{file}: uid")).to_owned()),
            "{file}: uid"
        );

        let list = json["templating"]["list"].as_array().unwrap();
        assert_eq!(
            (&list[0]["name"], &list[0]["type"], &list[0]["query"]),
            (&"datasource".into(), &"datasource".into(), &"prometheus".into()),
            "{file}"
        );
        let mut declared = vec!["datasource".to_owned()];
        for variable in &list[1..] {
            let name = text(&variable["name"], file);
            assert_eq!(variable["type"], "query", "{file}: ${name}");
            assert_eq!(variable["datasource"]["uid"], "${datasource}", "{file}: ${name}");
            assert!(
                variable["multi"] == true && variable["includeAll"] == true,
                "{file}: ${name}"
            );
            for used in variables(text(&variable["query"]["query"], file)) {
                assert!(
                    declared.contains(&used),
                    "{file}: ${name} needs ${used} before it"
                );
            }
            declared.push(name.to_owned());
        }

        let (mut ids, mut taken, mut used) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
        let mut titles = BTreeSet::new();
        for panel in board.panels() {
            let title = text(&panel["title"], &format!("{file}: a panel's title"));
            let place = format!("{file}: {title}");
            assert!(titles.insert(title), "{place}: twice");
            assert!(
                ids.insert(panel["id"].as_u64().unwrap()),
                "{place}: id {}",
                panel["id"]
            );
            let at = |field: &str| panel["gridPos"][field].as_u64().unwrap();
            let (x, y, w, h) = (at("x"), at("y"), at("w"), at("h"));
            assert!(w > 0 && h > 0 && x + w <= 24, "{place}: {}", panel["gridPos"]);
            for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
                if let Some(other) = taken.insert(cell, title) {
                    panic!("{place}: lies on {other}");
                }
            }
            if panel["type"] == "row" {
                continue;
            }
            text(&panel["description"], &format!("{place}: description"));
            text(
                &panel["fieldConfig"]["defaults"]["unit"],
                &format!("{place}: unit"),
            );
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{place}");
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{place}: no query");
            let mut refs = BTreeSet::new();
            for target in targets {
                assert!(refs.insert(text(&target["refId"], &place)), "{place}: refId");
                assert_eq!(target["datasource"]["uid"], "${datasource}", "{place}");
                text(&target["legendFormat"], &format!("{place}: legend"));
                assert_ne!(target["instant"], target["range"], "{place}: either");
                used.extend(variables(text(&target["expr"], &place)));
            }
        }
        for name in used.iter().filter(|name| !BUILT_IN.contains(&name.as_str())) {
            assert!(declared.contains(name), "{file}: ${name} is not declared");
        }
        for name in declared.iter().filter(|name| *name != "datasource") {
            assert!(used.contains(name), "{file}: ${name} has no effect");
        }
    }
}

#[test]
fn every_metric_that_is_read_is_there() {
    let recorded = recorded();
    let known = |selector: &Selector| recorded.contains(&selector.metric) || exported(&selector.metric);
    assert!(!exported("cinch_no_such_thing") && !exported("cinch_controller_kv_bytes"));
    for board in boards() {
        for target in board.targets() {
            let selectors = selectors(&target.expr);
            assert!(!selectors.is_empty(), "{}: no metric", target.place);
            for selector in selectors {
                assert!(known(&selector), "{}: unknown {}", target.place, selector.metric);
                let mine = "{job=~\"$job\",instance=~\"$instance\"";
                assert!(
                    selector.labels.starts_with(mine),
                    "{}: shows others too",
                    target.place
                );
            }
        }
        for variable in board.variables() {
            let selectors = selectors(&variable.selector);
            assert!(
                selectors.len() == 1 && exported(&selectors[0].metric),
                "{}",
                variable.selector
            );
        }
    }
    for rule in rules() {
        for selector in selectors(&rule.expr) {
            assert!(known(&selector), "{}: unknown {}", rule.name(), selector.metric);
        }
    }
}

#[test]
fn every_rule_is_tested_and_every_alert_says_what_and_how_bad() {
    let tests: Vec<Value> = files("dashboards/prometheus/tests", ".test.yml")
        .iter()
        .flat_map(|file| yaml::<Value>(file)["tests"].as_array().unwrap().clone())
        .collect();
    let all = |kind: &str| -> Vec<Value> {
        let lists = tests.iter().filter_map(|test| test[kind].as_array());
        lists.flatten().cloned().collect()
    };
    let (alerts, exprs) = (all("alert_rule_test"), all("promql_expr_test"));
    for rule in rules() {
        let name = rule.name();
        if rule.record.is_some() {
            let tested = exprs.iter().any(|test| {
                let reads = selectors(test["expr"].as_str().unwrap());
                reads.iter().any(|selector| selector.metric == name)
            });
            assert!(tested, "{name} is not tested");
            continue;
        }
        let severity = rule.labels.get("severity").map(String::as_str);
        assert!(
            matches!(severity, Some("critical" | "warning")),
            "{name}: {severity:?}"
        );
        for annotation in ["summary", "description"] {
            let text = rule.annotations.get(annotation).map_or("", String::as_str);
            assert!(text.ends_with('.'), "{name}: {annotation}: {text:?}");
        }
        // Of two of one name, as for a fast and a slow burn, each has to be seen firing.
        let of = |test: &&Value| test["alertname"] == name;
        let expected = |test: &Value| test["exp_alerts"].as_array().unwrap().clone();
        let quiet = alerts.iter().filter(of).any(|test| expected(test).is_empty());
        let fires = alerts.iter().filter(of).flat_map(expected).any(|fired| {
            let labels = rule.labels.iter();
            labels
                .into_iter()
                .all(|(label, value)| fired["exp_labels"][label] == value.as_str())
        });
        assert!(quiet, "{name} {:?}: no test where it does not fire", rule.labels);
        assert!(fires, "{name} {:?}: no test where it fires", rule.labels);
    }
}

#[test]
fn the_configurations_fit_together() {
    let prometheus: Value = yaml("configs/prometheus.yml");
    let jobs: BTreeMap<&str, &str> = prometheus["scrape_configs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|job| {
            let target = &job["static_configs"][0]["targets"][0];
            (job["job_name"].as_str().unwrap(), target.as_str().unwrap())
        })
        .collect();
    for (job, file) in [
        ("cinch-engine", "configs/engine.toml"),
        ("cinch-controller", "configs/controller.toml"),
    ] {
        let listen = format!("\nlisten = \"{}\"\n", jobs[job]);
        assert!(read(file).contains(&listen), "{job} is not where {file} has it");
    }
    for rule in rules() {
        for selector in selectors(&rule.expr)
            .iter()
            .filter(|selector| selector.metric == "up")
        {
            let job = selector
                .labels
                .strip_prefix("{job=\"")
                .and_then(|s| s.strip_suffix("\"}"));
            assert!(
                job.is_some_and(|job| jobs.contains_key(job)),
                "{}: {selector:?}",
                rule.name()
            );
        }
    }
    let source: Value = yaml("dashboards/grafana/provisioning/datasources/prometheus.yml");
    let source = &source["datasources"][0];
    assert_eq!(source["type"], "prometheus");
    assert_eq!(
        source["jsonData"]["timeInterval"], prometheus["global"]["scrape_interval"],
        "Grafana's $__rate_interval rests on it"
    );
    let provider: Value = yaml("dashboards/grafana/provisioning/dashboards/cinch.yml");
    assert_eq!(provider["providers"][0]["options"]["path"], "$CINCH_DASHBOARDS");
}

fn promtool(args: &[&str]) {
    let output = Command::new("promtool").args(args).current_dir(root()).output();
    let output =
        output.unwrap_or_else(|err| panic!("promtool: {err}; on Debian: apt-get install prometheus"));
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {args:?}:\n{said}");
}

#[test]
fn promtool_agrees() {
    // The configuration names the rule files, which are checked with it.
    promtool(&["check", "config", "configs/prometheus.yml"]);
    for file in files("dashboards/prometheus", ".rules.yml") {
        promtool(&["check", "rules", &file]);
    }
    for file in files("dashboards/prometheus/tests", ".test.yml") {
        promtool(&["test", "rules", &file]);
    }
}
