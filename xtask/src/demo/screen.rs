//! Where the demo is shown: on a terminal, in place; elsewhere, a plain line now and then.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two frames, and between two lines of a log.
const FRAME: Duration = Duration::from_millis(250);
const LINE: Duration = Duration::from_secs(10);

/// How a stretch of text looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Bold,
    Dim,
    Good,
    Warm,
    Hot,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Bold => "\x1b[1m",
            Self::Dim => "\x1b[2m",
            Self::Good => "\x1b[32m",
            Self::Warm => "\x1b[33m",
            Self::Hot => "\x1b[31m",
        }
    }
}

/// One line of a frame.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Line(pub(super) Vec<(Style, String)>);

impl Line {
    pub(super) fn plain(text: impl Into<String>) -> Self {
        Self(vec![(Style::Plain, text.into())])
    }

    pub(super) fn and(mut self, style: Style, text: impl Into<String>) -> Self {
        self.0.push((style, text.into()));
        self
    }

    /// Its text, without looks.
    #[cfg(test)]
    pub(super) fn text(&self) -> String {
        self.0.iter().map(|(_, text)| text.as_str()).collect()
    }

    /// As a terminal takes it, cut to `columns`: a line that wraps would break the frame. Every character used here
    /// is one column wide.
    fn render(&self, columns: usize, colours: bool) -> String {
        let mut out = String::new();
        let mut left = columns;
        for (style, text) in &self.0 {
            let cut: String = text.chars().take(left).collect();
            left -= cut.chars().count();
            match (colours, style.code()) {
                (true, code) if !code.is_empty() => {
                    out.push_str(code);
                    out.push_str(&cut);
                    out.push_str("\x1b[0m");
                }
                _ => out.push_str(&cut),
            }
        }
        out
    }
}

/// Standard output.
pub(super) struct Screen {
    terminal: bool,
    colours: bool,
    /// Lines of the frame that stands.
    drawn: usize,
    shown: Option<Instant>,
}

impl Screen {
    pub(super) fn new() -> Self {
        let terminal = io::stdout().is_terminal();
        Self {
            terminal,
            colours: terminal && std::env::var_os("NO_COLOR").is_none(),
            drawn: 0,
            shown: None,
        }
    }

    /// Whether frames are drawn; lines are said otherwise.
    pub(super) fn terminal(&self) -> bool {
        self.terminal
    }

    /// Whether it is time for another frame, or line.
    pub(super) fn due(&mut self) -> bool {
        let pause = if self.terminal { FRAME } else { LINE };
        if self.shown.is_some_and(|shown| shown.elapsed() < pause) {
            return false;
        }
        self.shown = Some(Instant::now());
        true
    }

    /// The next look is due, however short ago the last one was.
    pub(super) fn force(&mut self) {
        self.shown = None;
    }

    /// Puts `lines` where the frame before was.
    pub(super) fn draw(&mut self, lines: &[Line]) {
        let (columns, rows) = size();
        // A frame taller than the terminal could not be gone back to the top of.
        let lines = &lines[..lines.len().min(rows.saturating_sub(1))];
        let text = frame(self.drawn, lines, columns, self.colours);
        self.drawn = lines.len();
        let mut out = io::stdout().lock();
        // A terminal that has gone is no reason to fail: the figures follow.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    /// Says a line that stays.
    pub(super) fn say(&self, line: &Line) {
        let columns = if self.terminal { size().0 } else { usize::MAX };
        println!("{}", line.render(columns, self.colours));
    }
}

/// The bytes that replace a frame of `drawn` lines.
fn frame(drawn: usize, lines: &[Line], columns: usize, colours: bool) -> String {
    let mut text = String::new();
    if drawn > 0 {
        text.push_str(&format!("\x1b[{drawn}A\r"));
    }
    for line in lines {
        text.push_str(&line.render(columns, colours));
        text.push_str("\x1b[K\n");
    }
    // What the frame before had more.
    text.push_str("\x1b[J");
    text
}

fn size() -> (usize, usize) {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
    let or = |value: Option<u16>, other| value.filter(|&value| value > 0).map_or(other, usize::from);
    (or(size.map(|s| s.ws_col), 80), or(size.map(|s| s.ws_row), 24))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_cut_by_columns_and_not_by_bytes() {
        let line = Line::plain("▶ ab").and(Style::Hot, "██░░");
        assert_eq!(line.render(6, false), "▶ ab██");
        assert_eq!(line.render(6, true), "▶ ab\x1b[31m██\x1b[0m");
        assert_eq!(line.render(99, false), line.text());
    }

    #[test]
    fn a_frame_replaces_the_one_before() {
        let lines = [Line::plain("one"), Line::plain("two")];
        assert_eq!(frame(0, &lines, 80, false), "one\x1b[K\ntwo\x1b[K\n\x1b[J");
        assert!(frame(3, &lines, 80, false).starts_with("\x1b[3A\rone"));
    }
}
