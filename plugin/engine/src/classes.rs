//! Which policy a class of requests is served with: the configured one, or what the API put in its place.
//!
//! A class's version changes with every change and with every start of the process, so that an ETag of
//! before never matches what is there now.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use cinch_protocol::{ClassPolicy, Ladder, LadderLevel, Origin, Policy, PolicyChange};

use crate::config::Settings;
use crate::fields::FieldFault;
use crate::http::Refusal;

/// A policy, and the level it was given as.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The ladder level, if it was given as one.
    pub level: Option<u32>,
    /// The policy.
    pub policy: Policy,
}

#[derive(Debug, Clone)]
struct Entry {
    configured: Choice,
    put: Option<Choice>,
    version: u64,
}

impl Entry {
    fn current(&self) -> &Choice {
        self.put.as_ref().unwrap_or(&self.configured)
    }
}

/// All classes and the ladder.
#[derive(Debug)]
pub struct Classes {
    entries: RwLock<BTreeMap<String, Entry>>,
    ladder: Vec<LadderLevel>,
    started: u64,
}

impl Classes {
    /// From checked settings.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let ladder: Vec<LadderLevel> = (0..)
            .zip(&settings.ladder)
            .map(|(level, configured)| LadderLevel {
                level,
                name: configured.name.clone(),
                policy: configured.policy.clone(),
            })
            .collect();
        let entries = settings.class.iter().map(|(name, class)| {
            let at_level = |level: u32| ladder.get(level as usize).map(|entry| entry.policy.clone());
            let policy = class.policy.clone().or_else(|| class.level.and_then(at_level));
            let configured = Choice {
                level: class.level,
                policy: policy.unwrap_or_default(),
            };
            (
                name.clone(),
                Entry {
                    configured,
                    put: None,
                    version: 0,
                },
            )
        });
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            entries: RwLock::new(entries.collect()),
            started: started.as_micros() as u64,
            ladder,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Entry>> {
        // Every write leaves the map whole, so a panic elsewhere does not make it wrong.
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.read().keys().cloned().collect()
    }

    /// The ladder.
    #[must_use]
    pub fn ladder(&self) -> Ladder {
        Ladder {
            levels: self.ladder.clone(),
        }
    }

    /// What requests of `class` are served with now.
    ///
    /// # Errors
    /// The class is unknown; `field` is where it was named.
    pub fn current(&self, class: &str, field: &str) -> Result<Choice, FieldFault> {
        let entries = self.read();
        match entries.get(class) {
            Some(entry) => Ok(entry.current().clone()),
            None => Err(unknown(&entries, class, field)),
        }
    }

    /// A change's meaning; `field` is where it lies in what the user wrote, empty for a whole body.
    ///
    /// # Errors
    /// Neither or both of policy and level, or one out of range.
    pub fn resolve(&self, change: &PolicyChange, field: &str) -> Result<Choice, FieldFault> {
        match (&change.policy, change.level) {
            (Some(policy), None) => {
                policy
                    .validate()
                    .map_err(|err| FieldFault::from(err).within("policy").within(field))?;
                Ok(Choice {
                    level: None,
                    policy: policy.clone(),
                })
            }
            (None, Some(level)) => match self.ladder.get(level as usize) {
                Some(entry) => Ok(Choice {
                    level: Some(level),
                    policy: entry.policy.clone(),
                }),
                None => {
                    let allowed = format!("0 to {}", self.ladder.len() - 1);
                    Err(FieldFault::new("level", level, allowed).within(field))
                }
            },
            (given, _) => {
                let both = if given.is_some() { "both" } else { "neither" };
                let field = if field.is_empty() { "body" } else { field };
                let given = format!("{both} of `policy` and `level`");
                Err(FieldFault::new(
                    field,
                    given,
                    "exactly one of `policy` and `level`",
                ))
            }
        }
    }

    /// All classes.
    #[must_use]
    pub fn all(&self) -> Vec<ClassPolicy> {
        self.read()
            .iter()
            .map(|(name, entry)| view(name, entry))
            .collect()
    }

    /// One class, with its ETag.
    ///
    /// # Errors
    /// 404 for an unknown class.
    pub fn get(&self, class: &str) -> Result<(ClassPolicy, String), Refusal> {
        let entries = self.read();
        let entry = entries.get(class).ok_or_else(|| no_class(&entries, class))?;
        Ok((view(class, entry), self.etag(entry)))
    }

    /// Puts `choice` in place of a class's policy, or the configured one back for `None`.
    ///
    /// `if_match` is the header's value, if there was one. With `dry_run` the answer is the same and
    /// nothing changes.
    ///
    /// # Errors
    /// 404 for an unknown class, 412 where `if_match` does not name its present ETag.
    pub fn put(
        &self,
        class: &str,
        choice: Option<Choice>,
        if_match: Option<&str>,
        dry_run: bool,
    ) -> Result<(ClassPolicy, String), Refusal> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = entries.get(class) else {
            return Err(no_class(&entries, class));
        };
        let etag = self.etag(entry);
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
        let next = Entry {
            put: choice,
            version: entry.version + 1,
            configured: entry.configured.clone(),
        };
        if dry_run {
            return Ok((view(class, &next), etag));
        }
        let answer = (view(class, &next), self.etag(&next));
        entries.insert(class.to_owned(), next);
        Ok(answer)
    }

    fn etag(&self, entry: &Entry) -> String {
        format!("\"{:x}-{}\"", self.started, entry.version)
    }
}

fn view(class: &str, entry: &Entry) -> ClassPolicy {
    let current = entry.current();
    ClassPolicy {
        class: class.to_owned(),
        level: current.level,
        policy: current.policy.clone(),
        origin: if entry.put.is_some() {
            Origin::Api
        } else {
            Origin::Config
        },
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
