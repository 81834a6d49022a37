//! The load under way: clients, the watch beside them, and the screen.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cinch_tests::load::{self, Outcome, Patience};
use serde_json::Value;

use super::board::Board;
use super::figures::Figures;
use super::screen::{Line, Screen, Style};
use super::view::{CLASS, Moment, Scene};
use super::watch::{Seen, Watch};
use super::{Logged, TICK};

/// Between two readings of the engine, and of the controller.
const ENGINE: Duration = Duration::from_millis(200);
const CONTROLLER: Duration = Duration::from_millis(500);

/// What is sent, and how long new requests may take to be back at level 0 afterwards; none: not waited for.
pub(super) struct Load {
    pub(super) url: String,
    pub(super) bodies: Vec<Value>,
    pub(super) release_within: Option<Duration>,
}

/// What the user sees.
pub(super) struct Show {
    scene: Scene,
    screen: Screen,
    /// Moves that a log has been told of.
    said: usize,
}

impl Show {
    pub(super) fn new(scene: Scene) -> Self {
        Self {
            scene,
            screen: Screen::new(),
            said: 0,
        }
    }

    /// What it came to.
    pub(super) fn summary(&self, figures: &Figures) {
        for line in self.scene.summary(figures) {
            self.screen.say(&line);
        }
    }

    fn look(&mut self, board: &Board, seen: &Mutex<Seen>, note: &str) {
        if !self.screen.due() {
            return;
        }
        let seen = lock(seen).clone();
        let tally = board.tally();
        let now = Moment {
            elapsed: board.sent().elapsed(),
            tally: &tally,
            seen: &seen,
            note,
        };
        if self.screen.terminal() {
            self.screen.draw(&self.scene.frame(&now));
            return;
        }
        for moved in seen.moves.iter().skip(self.said) {
            self.screen.say(&self.scene.moved(moved));
        }
        self.said = seen.moves.len();
        self.screen
            .say(&Line::default().and(Style::Plain, self.scene.line(&now)));
    }
}

/// A load that is over.
pub(super) struct Over {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) seen: Seen,
    /// Seconds from first to last.
    pub(super) wall: f64,
    /// Seconds from its end until new requests were back at level 0, where that was waited for and came.
    pub(super) released_after: Option<f64>,
}

/// Sends the load and shows it until it is over; `None` on Ctrl-C.
pub(super) fn drive(
    load: &Load,
    watch: &Watch,
    services: &mut [Logged],
    signals: &Receiver<()>,
    show: &mut Show,
) -> anyhow::Result<Option<Over>> {
    let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let seen = Mutex::new(Seen::default());
    let board = Board::new(load.bodies.len());
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| observe(watch, &seen, &done));
        let clients = scope.spawn(|| {
            let patience = Patience::default();
            let outcomes = load::run(&load.url, &load.bodies, patience, &stop, &|i, event| {
                board.note(i, event);
            });
            (outcomes, board.sent().elapsed().as_secs_f64())
        });
        let mut interrupted = false;
        while !clients.is_finished() {
            if signals.try_recv().is_ok() {
                interrupted = true;
                stop.store(true, Ordering::Relaxed);
                // Streams end with the engine, and clients with their streams.
                for Logged { service, .. } in &mut *services {
                    service.interrupt()?;
                }
            }
            show.look(&board, &seen, "");
            std::thread::sleep(TICK);
        }
        let ended = Instant::now();
        let mut released_after = None;
        while !interrupted && released_after.is_none() && load.release_within > Some(ended.elapsed()) {
            interrupted = signals.try_recv().is_ok();
            if lock(&seen).levels.get(CLASS) == Some(&0) {
                released_after = Some(ended.elapsed().as_secs_f64());
            }
            show.look(&board, &seen, "the load is over; waiting for level 0");
            std::thread::sleep(TICK);
        }
        done.store(true, Ordering::Relaxed);
        let panicked = |_| anyhow::anyhow!("a thread of the load panicked");
        let (outcomes, wall) = clients.join().map_err(panicked)?;
        watching.join().map_err(panicked)?;
        if interrupted {
            return Ok(None);
        }
        show.screen.force();
        show.look(&board, &seen, "the load is over");
        let seen = lock(&seen).clone();
        Ok(Some(Over {
            outcomes,
            seen,
            wall,
            released_after,
        }))
    })
}

/// Every change leaves it whole, so a panic elsewhere does not make it wrong.
fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads both services until it is over, and once more then.
fn observe(watch: &Watch, seen: &Mutex<Seen>, done: &AtomicBool) {
    let mut next = Instant::now();
    loop {
        let last = done.load(Ordering::Relaxed);
        let mut now = lock(seen).clone();
        watch.engine(&mut now);
        if last || Instant::now() >= next {
            watch.controller(&mut now);
            next = Instant::now() + CONTROLLER;
        }
        *lock(seen) = now;
        if last {
            return;
        }
        std::thread::sleep(ENGINE);
    }
}
