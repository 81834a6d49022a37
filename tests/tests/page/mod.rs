//! A page in a real browser: what it draws, what it asks the network for, how it reads on small and dark screens.

mod browser;

use serde_json::Value;

pub(crate) use browser::Browser;

/// A screen: width in CSS pixels, and whether the reader prefers dark pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    pub(crate) width: u32,
    pub(crate) dark: bool,
}

/// All that a page on any screen must not do; a line each, none where all is well.
pub(crate) fn faults(browser: &Browser, screen: Screen) -> Vec<String> {
    browser.screen(screen);
    let faults = browser.ask(include_str!("faults.js"));
    let faults = faults.as_array().unwrap().iter();
    faults
        .map(|fault| format!("{screen:?}: {}", fault.as_str().unwrap()))
        .collect()
}

/// Console messages, and what the page asks for beside itself, since it was opened.
pub(crate) fn outside(browser: &Browser, page: &str) -> Vec<String> {
    let mut found: Vec<String> = browser
        .log("browser")
        .iter()
        .map(|entry| format!("console: {}", entry["message"]))
        .collect();
    for entry in browser.log("performance") {
        let event: Value = serde_json::from_str(entry["message"].as_str().unwrap()).unwrap();
        let event = &event["message"];
        // The browser's own first page asks for this and that.
        if event["method"] == "Network.requestWillBeSent"
            && event["params"]["documentURL"] == page
            && let Some(url) = event["params"]["request"]["url"].as_str()
            && url != page
            && !url.starts_with("data:")
        {
            found.push(format!("request: {url}"));
        }
    }
    found
}
