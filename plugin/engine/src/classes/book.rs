//! What each class is served with, as a function of the writes and the time: no clock, no lock.
//!
//! A class has a configured policy; a person's write pins another one in its place, a leased write does
//! for as long as its lease. Writes that carry a fence are ordered by its epoch over the whole engine:
//! once an epoch was seen, nobody writes under a lower one. A version counts a class's changes, and a
//! lease that is renewed or taken over with the same choice is none.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use cinch_protocol::{Fence, Lease};

use super::Choice;
use crate::fields::FieldFault;
use crate::http::Refusal;

/// Seconds a lease may ask for. The upper end bounds how long a controller that died is obeyed.
pub(super) const TTL_SECONDS: (u64, u64) = (1, 3600);
/// The highest epoch: what every JSON decoder holds exactly.
const MAX_EPOCH: u64 = (1 << 53) - 1;
/// Longest name of a holder, in characters.
const MAX_HOLDER: usize = 128;

/// Where a class's present policy comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Put {
    /// A person's, until it is deleted.
    Pinned(Choice),
    /// A controller's, until then.
    Leased {
        choice: Choice,
        fence: Fence,
        until: Instant,
    },
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) configured: Choice,
    pub(super) put: Option<Put>,
    pub(super) version: u64,
    /// Leases of it that have run out while it was away from the configured policy.
    pub(super) expired: u64,
}

/// What is to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Write {
    /// Back to the configured policy.
    Reset,
    /// A person's choice.
    Pin(Choice),
    /// A controller's.
    Lease {
        choice: Choice,
        fence: Fence,
        ttl: Duration,
    },
}

/// A lease that ran out, and so changed what its class is served with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Expired {
    /// The class that is back at its configured policy.
    pub class: String,
    /// Who held it.
    pub fence: Fence,
}

#[derive(Debug)]
pub(super) struct Book {
    pub(super) entries: BTreeMap<String, Entry>,
    /// The highest epoch a write was fenced with, and whose it is.
    fence: Option<Fence>,
    /// Writes refused because a newer epoch was seen.
    pub(super) stale_writes: u64,
}

impl Entry {
    pub(super) fn new(configured: Choice) -> Self {
        Self {
            configured,
            put: None,
            version: 0,
            expired: 0,
        }
    }

    pub(super) fn current(&self) -> &Choice {
        match &self.put {
            Some(Put::Pinned(choice) | Put::Leased { choice, .. }) => choice,
            None => &self.configured,
        }
    }

    pub(super) fn lease(&self, now: Instant) -> Option<Lease> {
        match &self.put {
            Some(Put::Leased { fence, until, .. }) => Some(Lease {
                holder: fence.holder.clone(),
                epoch: fence.epoch,
                expires_in_seconds: until.saturating_duration_since(now).as_secs_f64(),
            }),
            _ => None,
        }
    }
}

impl Book {
    pub(super) fn new(entries: BTreeMap<String, Entry>) -> Self {
        Self {
            entries,
            fence: None,
            stale_writes: 0,
        }
    }

    /// The highest epoch a write was fenced with; 0 before the first.
    pub(super) fn epoch(&self) -> u64 {
        self.fence.as_ref().map_or(0, |fence| fence.epoch)
    }

    /// Ends the leases that have run out by `now`, and answers with those whose end changed a policy. Everything else
    /// here relies on it having been called.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Expired> {
        let mut ended = Vec::new();
        for (class, entry) in &mut self.entries {
            let over = matches!(&entry.put, Some(Put::Leased { until, .. }) if *until <= now);
            if let Some(Put::Leased { choice, fence, .. }) = entry.put.take_if(|_| over) {
                entry.version += 1;
                // One that ends at the configured policy changes nothing: that is how a controller lets go.
                if choice != entry.configured {
                    entry.expired += 1;
                    ended.push(Expired {
                        class: class.clone(),
                        fence,
                    });
                }
            }
        }
        ended
    }

    /// Lets a fenced write through, or says that a newer writer has been here.
    pub(super) fn pass(&mut self, fence: &Fence, dry_run: bool) -> Result<(), Refusal> {
        let fault = match &self.fence {
            Some(seen) if fence.epoch < seen.epoch => {
                FieldFault::new("fence.epoch", fence.epoch, format!("{} or more", seen.epoch))
            }
            Some(seen) if fence.epoch == seen.epoch && fence.holder != seen.holder => {
                let allowed = format!(
                    "{} or more: {} is held by {}",
                    seen.epoch + 1,
                    seen.epoch,
                    seen.holder
                );
                FieldFault::new("fence.epoch", fence.epoch, allowed)
            }
            _ => {
                if !dry_run {
                    self.fence = Some(fence.clone());
                }
                return Ok(());
            }
        };
        if !dry_run {
            self.stale_writes += 1;
        }
        let title = "A newer writer has been here";
        Err(Refusal::new(StatusCode::CONFLICT, "stale-epoch", title, fault.to_string()).naming(fault))
    }

    /// What the class of `entry` would be after `write`.
    pub(super) fn after(class: &str, entry: &Entry, write: Write, now: Instant) -> Result<Entry, Refusal> {
        let put = match write {
            Write::Reset => None,
            Write::Pin(choice) => Some(Put::Pinned(choice)),
            Write::Lease { choice, fence, ttl } => {
                if let Some(Put::Pinned(_)) = &entry.put {
                    let fault = FieldFault::new(
                        "fence",
                        format_args!("a lease of class `{class}`"),
                        "a class that nobody has pinned; DELETE its policy to unpin it",
                    );
                    let title = "The class is pinned";
                    return Err(
                        Refusal::new(StatusCode::CONFLICT, "pinned", title, fault.to_string()).naming(fault),
                    );
                }
                Some(Put::Leased {
                    choice,
                    fence,
                    until: now + ttl,
                })
            }
        };
        let renewed = match (&entry.put, &put) {
            (Some(Put::Leased { choice: old, .. }), Some(Put::Leased { choice: new, .. })) => old == new,
            _ => false,
        };
        Ok(Entry {
            configured: entry.configured.clone(),
            put,
            version: entry.version + u64::from(!renewed),
            expired: entry.expired,
        })
    }
}

/// Checks a fence's own fields.
pub(super) fn check_fence(fence: &Fence) -> Result<(), FieldFault> {
    let characters = fence.holder.chars().count();
    if !(1..=MAX_HOLDER).contains(&characters) || fence.holder.chars().any(char::is_control) {
        return Err(FieldFault::new(
            "fence.holder",
            format_args!("{characters} characters"),
            format!("1 to {MAX_HOLDER} printable characters"),
        ));
    }
    if !(1..=MAX_EPOCH).contains(&fence.epoch) {
        return Err(FieldFault::new(
            "fence.epoch",
            fence.epoch,
            format!("1 to {MAX_EPOCH}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use cinch_protocol::Policy;

    use super::*;

    fn choice(level: u32) -> Choice {
        Choice {
            level: Some(level),
            policy: Policy::default(),
        }
    }

    fn fence(holder: &str, epoch: u64) -> Fence {
        Fence {
            holder: holder.into(),
            epoch,
        }
    }

    fn lease(level: u32, holder: &str, epoch: u64, seconds: u64) -> Write {
        Write::Lease {
            choice: choice(level),
            fence: fence(holder, epoch),
            ttl: Duration::from_secs(seconds),
        }
    }

    struct World {
        book: Book,
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            let entry = Entry::new(choice(0));
            Self {
                book: Book::new(BTreeMap::from([("batch".to_owned(), entry)])),
                now: Instant::now(),
            }
        }

        fn write(&mut self, write: Write) -> Result<u64, Refusal> {
            if let Write::Lease { fence, .. } = &write {
                self.book.pass(fence, false)?;
            }
            let next = Book::after("batch", &self.book.entries["batch"], write, self.now)?;
            let version = next.version;
            self.book.entries.insert("batch".into(), next);
            Ok(version)
        }

        fn wait(&mut self, seconds: u64) -> Vec<Expired> {
            self.now += Duration::from_secs(seconds);
            self.book.expire(self.now)
        }

        fn level(&self) -> u32 {
            self.book.entries["batch"].current().level.unwrap()
        }
    }

    #[test]
    fn a_lease_ends_by_itself_and_once() {
        let mut world = World::new();
        let version = world.write(lease(3, "a", 7, 60)).unwrap();
        assert_eq!(world.wait(59), []);
        assert_eq!(world.level(), 3);
        let left = world.book.entries["batch"].lease(world.now).unwrap();
        assert!((left.expires_in_seconds - 1.0).abs() < 1e-6);
        let ended = world.wait(1);
        assert_eq!((ended.len(), ended[0].fence.epoch), (1, 7));
        assert_eq!(world.level(), 0);
        assert!(
            world.book.entries["batch"].version > version,
            "what is served has changed"
        );
        assert_eq!(world.wait(1000), []);
        assert_eq!(world.book.entries["batch"].expired, 1);
        assert_eq!(world.book.epoch(), 7, "an epoch is not forgotten with its lease");
    }

    #[test]
    fn a_lease_of_the_configured_policy_ends_unnoticed() {
        let mut world = World::new();
        world.write(lease(3, "a", 7, 60)).unwrap();
        world.write(lease(0, "a", 7, 60)).unwrap();
        assert_eq!(world.wait(60), []);
        assert_eq!(world.book.entries["batch"].expired, 0);
        assert!(world.book.entries["batch"].lease(world.now).is_none());
    }

    #[test]
    fn a_renewal_is_no_change_and_another_choice_is() {
        let mut world = World::new();
        let version = world.write(lease(3, "a", 7, 60)).unwrap();
        world.wait(45);
        assert_eq!(world.write(lease(3, "a", 7, 60)), Ok(version));
        assert_eq!(world.wait(45), [], "renewed");
        assert_eq!(world.write(lease(3, "b", 8, 60)), Ok(version), "taken over");
        assert_eq!(world.write(lease(2, "b", 8, 60)), Ok(version + 1));
    }

    #[test]
    fn lower_epochs_and_other_holders_of_the_same_are_refused() {
        let mut world = World::new();
        world.write(lease(3, "a", 7, 60)).unwrap();
        for (holder, epoch, allowed) in [
            ("a", 6, "7 or more"),
            ("b", 6, "7 or more"),
            ("b", 7, "8 or more: 7 is held by a"),
        ] {
            let refusal = world.write(lease(1, holder, epoch, 60)).unwrap_err();
            assert_eq!(refusal.0.kind, "urn:cinch:problem:stale-epoch");
            assert_eq!(refusal.0.allowed.as_deref(), Some(allowed));
        }
        assert_eq!((world.level(), world.book.stale_writes), (3, 3));
        world.wait(1000);
        assert!(
            world.write(lease(1, "a", 6, 60)).is_err(),
            "fencing outlives the lease"
        );
        assert!(world.write(lease(1, "b", 8, 60)).is_ok());
    }

    #[test]
    fn a_person_pins_and_unpins() {
        let mut world = World::new();
        world.write(lease(3, "a", 7, 60)).unwrap();
        world.write(Write::Pin(choice(1))).unwrap();
        assert_eq!(world.level(), 1);
        let refusal = world.write(lease(4, "a", 7, 60)).unwrap_err();
        assert_eq!(refusal.0.kind, "urn:cinch:problem:pinned");
        assert_eq!(world.wait(1000), []);
        assert_eq!(world.level(), 1, "a pin has no end");
        world.write(Write::Reset).unwrap();
        assert_eq!(world.level(), 0);
        assert!(world.write(lease(4, "a", 7, 60)).is_ok());
        world.write(Write::Reset).unwrap();
        assert_eq!(world.level(), 0, "a reset drops leases too");
    }

    #[test]
    fn a_dry_run_leaves_no_trace() {
        let mut world = World::new();
        world.write(lease(3, "a", 7, 60)).unwrap();
        assert!(world.book.pass(&fence("b", 9), true).is_ok());
        assert!(world.book.pass(&fence("b", 5), true).is_err());
        assert_eq!((world.book.epoch(), world.book.stale_writes), (7, 0));
    }
}
