//! The page that `cinch eval` writes, in Chromium: every figure of the report is drawn, it needs nothing but itself, and it
//! can be read on small and on dark screens.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;
mod page;

use std::collections::BTreeMap;
use std::fs;

use common::eval::{done, eval, report};
use page::{Browser, Screen, faults, outside};
use serde_json::Value;

const SCREENS: [Screen; 4] = [
    Screen {
        width: 1280,
        dark: false,
    },
    Screen {
        width: 1280,
        dark: true,
    },
    Screen {
        width: 400,
        dark: false,
    },
    Screen {
        width: 400,
        dark: true,
    },
];

/// The names of the marks of each plot, with the middles of what is drawn for them.
const MARKS: &str = "return [...document.querySelectorAll('svg[role=img]')].map((plot) => \
    [...plot.querySelectorAll('.mark')].map((mark) => { \
        const box = mark.getBoundingClientRect(); \
        return [mark.textContent, box.x + box.width / 2, box.y + box.height / 2, box.width]; \
    }));";
/// Of each table, by its class: the cells' texts, a row after the other.
const TABLES: &str = "return [...document.querySelectorAll('table')].map((table) => [table.className, \
    [...table.rows].map((row) => [...row.cells].map((cell) => cell.innerText))]);";
/// Headings, and whether the scheme follows the reader's.
const ABOUT: &str = "return [document.title, getComputedStyle(document.documentElement).colorScheme, \
    getComputedStyle(document.body).backgroundColor, \
    [...document.querySelectorAll('h1, h2, h3')].map((heading) => heading.innerText)];";

#[test]
fn everything_measured_is_on_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    done(eval(dir, "a", &[]));
    let report = report(dir, "a");
    let points = report["points"].as_array().unwrap();
    let browser = Browser::start();
    let page = browser.open(&dir.join("a/report.html"));

    let found: Vec<String> = SCREENS
        .iter()
        .flat_map(|&screen| faults(&browser, screen))
        .collect();
    assert!(found.is_empty(), "{found:#?}");
    let [light, dark] = [SCREENS[0], SCREENS[1]].map(|screen| {
        browser.screen(screen);
        browser.ask(ABOUT)
    });
    assert_eq!(light[1], "light dark");
    assert_ne!(light[2], dark[2], "a page of its own for dark screens");
    browser.screen(SCREENS[0]);
    let model = report["model"]["name"].as_str().unwrap();
    assert_eq!(light[0], format!("Cinch: {model}"));
    assert_eq!(light[3][0], format!("KV cache compression of {model}"));

    let number = |point: &Value, path: &str| point.pointer(path).and_then(Value::as_f64);
    let bytes = |point: &Value| number(point, "/bytes/ratio");
    let speed = |point: &Value| number(point, "/speed/decode_tps");
    let plots = browser.ask(MARKS);
    assert_eq!(plots.as_array().unwrap().len(), 2);
    drawn(&plots[0], points, bytes);
    drawn(&plots[1], points, speed);

    let tables = tables(&browser);
    let rows = |class: &str| &tables[class][0];
    // Titles, and a row a policy, most bytes first.
    let mut by_bytes: Vec<&Value> = points.iter().collect();
    by_bytes.sort_by(|a, b| bytes(b).unwrap().total_cmp(&bytes(a).unwrap()));
    let names: Vec<&str> = by_bytes
        .iter()
        .map(|point| point["name"].as_str().unwrap())
        .collect();
    for class in ["policies", "speeds"] {
        let shown: Vec<&str> = rows(class)[1..].iter().map(|row| row[0].as_str()).collect();
        assert_eq!(shown, names, "{class}");
    }
    for (row, point) in rows("policies")[1..].iter().zip(&by_bytes) {
        assert_eq!(row.len(), rows("policies")[0].len(), "{row:?}");
        assert_eq!(row[2], format!("{:.4}", bytes(point).unwrap()));
        let kl = format!("{:.4}", number(point, "/quality/kl_mean/value").unwrap());
        assert_eq!(row[5].lines().next().unwrap(), kl);
    }
    for (row, point) in rows("speeds")[1..].iter().zip(&by_bytes) {
        assert_eq!(row[2], format!("{:.1}", speed(point).unwrap()));
    }
    let levels = points.iter().filter(|point| point["level"].is_u64()).count();
    assert_eq!(rows("ladder").len(), 1 + levels);

    let tasks = points[0]["tasks"].as_array().unwrap();
    assert_eq!(tables["heat"].len(), tasks.len());
    for (i, map) in tables["heat"].iter().enumerate() {
        assert_eq!(map.len(), 1 + points.len());
        for (row, point) in map[1..].iter().zip(&by_bytes) {
            let task = &point["tasks"][i];
            let cells = task["cells"].as_array().unwrap();
            assert_eq!(row.len(), 2 + cells.len(), "{row:?}");
            for (shown, cell) in row[1..].iter().zip(std::iter::once(task).chain(cells)) {
                let exact = number(cell, "/exact").unwrap() * 100.0;
                assert_eq!(shown.lines().nth(1).unwrap(), format!("{exact:.0} %"));
                let change = number(cell, "/change/value").unwrap();
                let shown: f64 = shown.lines().next().unwrap().replace('−', "-").parse().unwrap();
                assert!((shown - change).abs() < 0.0051, "{shown} {change}");
            }
        }
    }

    let matrix = rows("matrix");
    assert_eq!(matrix.len(), 1 + points.len());
    for (row, point) in matrix[1..].iter().zip(&by_bytes) {
        assert_eq!(row[0], point["name"].as_str().unwrap());
        assert_eq!(row.len(), 3 + tasks.len(), "bytes, text and each task: {row:?}");
        let safe = row[2..].iter().filter(|verdict| *verdict == "safe").count();
        let kl = number(point, "/quality/kl_mean/value").unwrap();
        assert!(kl > 0.0 || safe == 1 + tasks.len(), "nothing is lost: {row:?}");
        assert!(kl < 0.1 || row[2] != "safe", "{kl}: {row:?}");
    }
    assert_eq!(outside(&browser, &page), [""; 0]);
}

/// Each point with a place has a mark, further right with more of `x`, lower with less divergence.
fn drawn(plot: &Value, points: &[Value], x: impl Fn(&Value) -> Option<f64>) {
    let mut marks: Vec<(f64, f64, f64, f64)> = Vec::new();
    for point in points {
        let kl = point["quality"]["kl_mean"]["value"].as_f64().unwrap();
        let Some(x) = x(point).filter(|_| kl > 0.0) else {
            continue;
        };
        let name = format!("{}: ", point["name"].as_str().unwrap());
        let mut found = plot.as_array().unwrap().iter();
        let mark = found
            .find(|mark| mark[0].as_str().unwrap().starts_with(&name))
            .unwrap_or_else(|| panic!("no mark of {name} in {plot}"));
        let [at_x, at_y, width] = [1, 2, 3].map(|i| mark[i].as_f64().unwrap());
        assert!(width > 3.0, "{mark}");
        marks.push((x, at_x, kl, at_y));
    }
    assert_eq!(marks.len(), plot.as_array().unwrap().len());
    assert_eq!(marks.len(), points.len() - 1, "all but the full cache");
    for a in &marks {
        for b in &marks {
            assert!(a.0 <= b.0 || a.1 > b.1, "{marks:?}");
            // Upwards is less on a screen.
            assert!(a.2 <= b.2 || a.3 < b.3, "{marks:?}");
        }
    }
}

/// The rows of each class of tables.
fn tables(browser: &Browser) -> BTreeMap<String, Vec<Vec<Vec<String>>>> {
    let mut tables: BTreeMap<String, Vec<Vec<Vec<String>>>> = BTreeMap::new();
    let all: Vec<(String, Vec<Vec<String>>)> = serde_json::from_value(browser.ask(TABLES)).unwrap();
    for (class, rows) in all {
        tables.entry(class).or_default().push(rows);
    }
    tables
}

#[test]
fn a_bad_page_is_noticed() {
    const BAD: &str = r##"<!DOCTYPE html><html><head><link rel="icon" href="data:,"></head>
        <body style="background:#fff; margin:0">
        <img src="http://127.0.0.1:9/outside.png" alt="">
        <p style="color:#999">faint</p>
        <p style="font-size:6px">tiny</p>
        <div style="width:900px">wide</div>
        <table><tr style="height:150px"><td>tall</td></tr></table>
        <svg role="img" viewBox="0 0 100 50" width="300">
          <text x="10" y="20">one</text><text x="12" y="22">other</text><text x="95" y="40">beyond</text>
          <path class="mark" d="M5 5h5v5h-5z" fill="#eee"><title>pale</title></path>
        </svg>
        <script>console.error("said")</script></body></html>"##;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bad.html");
    fs::write(&file, BAD).unwrap();
    let browser = Browser::start();
    let page = browser.open(&file);
    let found = faults(
        &browser,
        Screen {
            width: 400,
            dark: false,
        },
    );
    for wanted in [
        "900 pixels wide on 400",
        "contrast of 2.8: <p> faint",
        "letters of 6.0 pixels: <p> tiny",
        "150 pixels tall: <tr> tall",
        "contrast of 1.2: mark <path> pale",
        "one over the other: <text> one, <text> other",
        "cut off: <text> beyond",
    ] {
        assert!(
            found.iter().any(|fault| fault.ends_with(wanted)),
            "{wanted}: {found:#?}"
        );
    }
    assert_eq!(found.len(), 7, "{found:#?}");
    let found = outside(&browser, &page);
    for wanted in ["request: http://127.0.0.1:9/outside.png", "said"] {
        assert!(
            found.iter().any(|line| line.contains(wanted)),
            "{wanted}: {found:#?}"
        );
    }
}
