//! Which policy a class of requests is served with: the configured one, or what the API put in its place.
//!
//! A class's version changes with every change and with every start of the process, so that an ETag of
//! before never matches what is there now. Leases end on time without a timer: every access looks.

mod book;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
pub use cinch_protocol::Choice;
use cinch_protocol::{ClassPolicies, ClassPolicy, Fence, Ladder, Origin, PolicyChange};
use tracing::warn;

use crate::config::Settings;
use crate::fields::FieldFault;
use crate::http::Refusal;
use book::{Book, Entry, Put, TTL_SECONDS, Write, check_fence};

/// A change of a class, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Change(Write);

/// What metrics say of a class.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassFigures {
    /// The class.
    pub class: String,
    /// The level of its next requests, if they get one.
    pub level: Option<u32>,
    /// Seconds its lease has left, if it has one.
    pub lease_seconds: Option<f64>,
    /// Leases that have run out while it was away from its configured policy.
    pub expired: u64,
}

/// All classes and the ladder.
#[derive(Debug)]
pub struct Classes {
    book: Mutex<Book>,
    ladder: Ladder,
    started: u64,
}

impl Classes {
    /// From checked settings.
    ///
    /// # Errors
    /// A class that the ladder does not have the level of, or that is given in several ways or in none.
    pub fn new(settings: &Settings) -> Result<Self, FieldFault> {
        let ladder = Ladder::from(&settings.ladder.content);
        let mut entries = BTreeMap::new();
        for (name, class) in &settings.class {
            let configured = class
                .choice(&ladder)
                .map_err(|err| FieldFault::from(err).within(&format!("class.{name}")))?;
            entries.insert(name.clone(), Entry::new(configured));
        }
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            book: Mutex::new(Book::new(entries)),
            started: started.as_micros() as u64,
            ladder,
        })
    }

    /// The book as of now. Who finds a lease at its end says so.
    fn book(&self) -> (MutexGuard<'_, Book>, Instant) {
        // Every write leaves the book whole, so a panic elsewhere does not make it wrong.
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        for ended in book.expire(now) {
            let (class, holder, epoch) = (ended.class, ended.fence.holder, ended.fence.epoch);
            warn!(class, holder, epoch, "lease ended: back to the configured policy");
        }
        (book, now)
    }

    /// The names, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.book().0.entries.keys().cloned().collect()
    }

    /// The ladder.
    #[must_use]
    pub fn ladder(&self) -> &Ladder {
        &self.ladder
    }

    /// Writes refused because a newer epoch was seen.
    #[must_use]
    pub fn stale_writes(&self) -> u64 {
        self.book().0.stale_writes
    }

    /// What metrics say, by class.
    #[must_use]
    pub fn figures(&self) -> Vec<ClassFigures> {
        let (book, now) = self.book();
        let of = |(class, entry): (&String, &Entry)| ClassFigures {
            class: class.clone(),
            level: entry.current().level,
            lease_seconds: entry.lease(now).map(|lease| lease.expires_in_seconds),
            expired: entry.expired,
        };
        book.entries.iter().map(of).collect()
    }

    /// What requests of `class` are served with now.
    ///
    /// # Errors
    /// The class is unknown; `field` is where it was named.
    pub fn current(&self, class: &str, field: &str) -> Result<Choice, FieldFault> {
        let (book, _) = self.book();
        match book.entries.get(class) {
            Some(entry) => Ok(entry.current().clone()),
            None => Err(unknown(&book.entries, class, field)),
        }
    }

    /// A change's meaning; `field` is where it lies in what the user wrote, empty for a whole body.
    ///
    /// # Errors
    /// None or more than one of policy, level and ratio; one out of range.
    pub fn resolve(&self, change: &PolicyChange, field: &str) -> Result<Choice, FieldFault> {
        let choice = change.given().and_then(|given| self.ladder.choice(given));
        choice.map_err(|err| {
            let mut fault = FieldFault::from(err).within(field);
            if fault.field.is_empty() {
                fault.field = "body".into();
            }
            fault
        })
    }

    /// A write's meaning: without a fence a person's, with one a lease.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve); a fence without `ttl_seconds` or the other way round; one out of range.
    pub fn change(&self, change: &PolicyChange) -> Result<Change, FieldFault> {
        let choice = self.resolve(change, "")?;
        let (low, high) = TTL_SECONDS;
        match (&change.fence, change.ttl_seconds) {
            (None, None) => Ok(Change(Write::Pin(choice))),
            (None, Some(_)) => Err(FieldFault::new(
                "fence",
                "nothing",
                "a holder and an epoch, with ttl_seconds",
            )),
            (Some(_), None) => Err(FieldFault::new(
                "ttl_seconds",
                "nothing",
                format!("{low} to {high}, with a fence"),
            )),
            (Some(_), Some(ttl)) if !(low..=high).contains(&ttl) => {
                Err(FieldFault::new("ttl_seconds", ttl, format!("{low} to {high}")))
            }
            (Some(fence), Some(ttl)) => {
                check_fence(fence)?;
                Ok(Change(Write::Lease {
                    choice,
                    fence: fence.clone(),
                    ttl: Duration::from_secs(ttl),
                }))
            }
        }
    }

    /// The change that gives a class its configured policy back.
    #[must_use]
    pub fn reset() -> Change {
        Change(Write::Reset)
    }

    /// Lets a fenced write to a request through.
    ///
    /// # Errors
    /// 400 for a fence out of range, 409 for one of an epoch that is over.
    pub fn pass(&self, fence: &Fence) -> Result<(), Refusal> {
        check_fence(fence)?;
        self.book().0.pass(fence, false)
    }

    /// All classes, and the highest epoch seen.
    #[must_use]
    pub fn all(&self) -> ClassPolicies {
        let (book, now) = self.book();
        let view = |(name, entry): (&String, &Entry)| self.view(name, entry, now);
        ClassPolicies {
            classes: book.entries.iter().map(view).collect(),
            epoch: book.epoch(),
        }
    }

    /// One class; its ETag is in it.
    ///
    /// # Errors
    /// 404 for an unknown class.
    pub fn get(&self, class: &str) -> Result<ClassPolicy, Refusal> {
        let (book, now) = self.book();
        let entry = book.entries.get(class);
        let entry = entry.ok_or_else(|| no_class(&book.entries, class))?;
        Ok(self.view(class, entry, now))
    }

    /// Changes what a class is served with.
    ///
    /// `if_match` is the header's value, if there was one. With `dry_run` the answer is the same, but for
    /// the ETag, which is the present one, and nothing changes.
    ///
    /// # Errors
    /// 404 for an unknown class; 409 for a lease of a pinned class or of an epoch that is over; 412 where
    /// `if_match` does not name the present ETag.
    pub fn put(
        &self,
        class: &str,
        change: Change,
        if_match: Option<&str>,
        dry_run: bool,
    ) -> Result<ClassPolicy, Refusal> {
        let (mut book, now) = self.book();
        let Some(entry) = book.entries.get(class).cloned() else {
            return Err(no_class(&book.entries, class));
        };
        let Change(write) = change;
        // First, whatever else is wrong with the write: that there is a newer writer is worth keeping.
        if let Write::Lease { fence, .. } = &write {
            book.pass(fence, dry_run)?;
        }
        let etag = self.etag(&entry);
        if let Some(given) = if_match.filter(|given| !names(given, &etag)) {
            let fault = FieldFault::new("if-match", given, etag);
            return Err(Refusal::new(
                StatusCode::PRECONDITION_FAILED,
                "changed",
                "The policy has changed",
                format!("the policy of class `{class}` is not the one `If-Match` names any more"),
            )
            .naming(fault));
        }
        let next = Book::after(class, &entry, write, now)?;
        let mut view = self.view(class, &next, now);
        if dry_run {
            view.etag = etag;
        } else {
            book.entries.insert(class.to_owned(), next);
        }
        Ok(view)
    }

    fn etag(&self, entry: &Entry) -> String {
        format!("\"{:x}-{}\"", self.started, entry.version)
    }

    fn view(&self, class: &str, entry: &Entry, now: Instant) -> ClassPolicy {
        let current = entry.current();
        ClassPolicy {
            class: class.to_owned(),
            level: current.level,
            policy: current.policy.clone(),
            origin: match &entry.put {
                None => Origin::Config,
                Some(Put::Pinned(_)) => Origin::Api,
                Some(Put::Leased { .. }) => Origin::Lease,
            },
            configured_level: entry.configured.level,
            etag: self.etag(entry),
            lease: entry.lease(now),
        }
    }
}

fn names(if_match: &str, etag: &str) -> bool {
    if_match
        .split(',')
        .map(str::trim)
        .any(|given| given == "*" || given == etag)
}

fn unknown(entries: &BTreeMap<String, Entry>, class: &str, field: &str) -> FieldFault {
    let known: Vec<&str> = entries.keys().map(String::as_str).collect();
    FieldFault::new(field, crate::fields::cut(class), known.join(", "))
}

fn no_class(entries: &BTreeMap<String, Entry>, class: &str) -> Refusal {
    let fault = unknown(entries, class, "class");
    Refusal::new(
        StatusCode::NOT_FOUND,
        "unknown-class",
        "No such class",
        fault.to_string(),
    )
    .naming(fault)
}
