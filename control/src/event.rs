//! What happens by itself: numbered events, kept for a while, and read by any number of subscribers.
//!
//! The VMM publishes from any thread and never waits. There is one bounded backlog and no queue per subscriber: a
//! subscriber is a number in the sequence, and one that falls behind the backlog learns how many events it missed.

use crate::address::PeerAddress;
use crate::dirty_rate::MeasurementStatus;
use crate::migration::{JobId, MigrationMode, MigrationRole, MigrationStatus, Progress, RoundInfo};
use crate::phase::Phase;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// How many events are kept for subscribers that come late or read slowly.
const BACKLOG: usize = 256;

/// How many events a subscriber takes at a time.
const BATCH: usize = 32;

/// Why a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset, and the VM was started to end then.
    Reboot,
    /// The guest's processor shut down.
    TripleFault,
    /// The guest's kernel said that it panicked.
    Panic,
    /// Someone ended it.
    Killed,
    /// The VMM could not go on.
    Failed,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Happening {
    /// The VM does something else now.
    PhaseChanged {
        /// What it did.
        from: Phase,
        /// What it does.
        to: Phase,
    },
    /// A migration began at this end.
    MigrationStarted {
        /// Its name.
        job: JobId,
        /// Which end this is.
        role: MigrationRole,
        /// The other end.
        peer: PeerAddress,
        /// Live or stopped.
        mode: MigrationMode,
    },
    /// A migration went on. Published a few times per second.
    MigrationProgress {
        /// Its name.
        job: JobId,
        /// How far it is.
        progress: Progress,
    },
    /// A round of a migration ended.
    RoundEnded {
        /// The migration's name.
        job: JobId,
        /// What the round did.
        round: RoundInfo,
    },
    /// A migration ended, or is in doubt.
    MigrationEnded {
        /// How, and all that is known of it.
        migration: Box<MigrationStatus>,
    },
    /// A measurement of the dirty rate ended.
    MeasurementEnded {
        /// How, and what it found.
        measurement: Box<MeasurementStatus>,
    },
    /// The guest ended; this Godwit ends too.
    GuestEnded {
        /// Why, for programs.
        reason: EndReason,
        /// Why, for people.
        message: String,
    },
    /// A device stands still until its driver resets it, because the driver broke a rule or the host failed.
    DeviceNeedsReset {
        /// The device's id.
        device: String,
        /// What was wrong.
        cause: String,
    },
    /// All of a disk has come to this host; nothing of it is needed elsewhere any more.
    DiskWhole {
        /// The disk's id.
        disk: String,
    },
    /// Events were lost to this subscriber because it was too slow, or asked for what is no longer kept. The event's
    /// own number is that of the last lost one.
    Lagged {
        /// How many.
        missed: u64,
    },
}

impl Happening {
    /// The `type` in the JSON and the `event` in the stream.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::PhaseChanged { .. } => "phase_changed",
            Self::MigrationStarted { .. } => "migration_started",
            Self::MigrationProgress { .. } => "migration_progress",
            Self::RoundEnded { .. } => "round_ended",
            Self::MigrationEnded { .. } => "migration_ended",
            Self::MeasurementEnded { .. } => "measurement_ended",
            Self::GuestEnded { .. } => "guest_ended",
            Self::DeviceNeedsReset { .. } => "device_needs_reset",
            Self::DiskWhole { .. } => "disk_whole",
            Self::Lagged { .. } => "lagged",
        }
    }
}

/// Something that happened, with its place in the order of all that happened in this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// From 1, without gaps.
    pub sequence: u64,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// What.
    pub what: Happening,
}

impl Event {
    fn now(sequence: u64, what: Happening) -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { sequence, at_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX), what }
    }
}

/// The events of one VM. Clones share the same events.
#[derive(Clone, Debug)]
pub struct Events {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    log: Mutex<Log>,
    published: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Log {
    newest: u64,
    kept: VecDeque<Arc<Event>>,
}

/// What a subscriber finds behind its place in the sequence.
#[derive(Debug, PartialEq)]
pub(crate) enum Found {
    /// Nothing new.
    Nothing,
    /// The next events.
    Events(Vec<Arc<Event>>),
    /// The next events are gone; the answer is a [`Happening::Lagged`].
    Lagged(Event),
}

impl Default for Events {
    fn default() -> Self {
        Self { shared: Arc::new(Shared { log: Mutex::default(), published: watch::Sender::new(()) }) }
    }
}

impl Events {
    /// Publishes what happened and wakes the subscribers. Never waits for them. Returns the event's number.
    pub fn publish(&self, what: Happening) -> u64 {
        let mut log = self.log();
        log.newest += 1;
        let sequence = log.newest;
        if log.kept.len() == BACKLOG {
            log.kept.pop_front();
        }
        log.kept.push_back(Arc::new(Event::now(sequence, what)));
        drop(log);
        self.shared.published.send_replace(());
        sequence
    }

    /// The number of the newest event; 0 before the first.
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.log().newest
    }

    /// What comes after the event numbered `sequence`. A number that was not given out yet, which a subscriber may
    /// bring from an earlier process, counts as "before everything".
    pub(crate) fn after(&self, sequence: u64) -> Found {
        let log = self.log();
        let sequence = if sequence > log.newest { 0 } else { sequence };
        let Some(oldest) = log.kept.front().map(|event| event.sequence).filter(|_| sequence < log.newest) else {
            return Found::Nothing;
        };
        let missed = (oldest - 1).saturating_sub(sequence);
        if missed > 0 {
            return Found::Lagged(Event::now(oldest - 1, Happening::Lagged { missed }));
        }
        let unread = log.kept.iter().skip_while(|event| event.sequence <= sequence);
        Found::Events(unread.take(BATCH).cloned().collect())
    }

    /// Changes at every publication.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.shared.published.subscribe()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // The log is whole after every statement under the lock, so a panic elsewhere does not spoil it.
        self.shared.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Happening {
        Happening::DeviceNeedsReset { device: "blk0".to_owned(), cause: "The queue loops".to_owned() }
    }

    fn sequences(found: &Found) -> Vec<u64> {
        match found {
            Found::Events(events) => events.iter().map(|event| event.sequence).collect(),
            Found::Nothing | Found::Lagged(_) => Vec::new(),
        }
    }

    #[test]
    fn events_are_numbered_and_read_in_batches() {
        let events = Events::default();
        assert_eq!((events.newest(), events.after(0)), (0, Found::Nothing));
        for expected in 1..=40 {
            assert_eq!(events.publish(failed()), expected);
        }
        assert_eq!(sequences(&events.after(0)), (1..=32).collect::<Vec<_>>());
        assert_eq!(sequences(&events.after(38)), [39, 40]);
        assert_eq!(events.after(40), Found::Nothing);
    }

    #[test]
    fn the_backlog_is_bounded_and_says_what_is_gone() {
        let events = Events::default();
        let extra = 10;
        for _ in 0..BACKLOG as u64 + extra {
            events.publish(failed());
        }
        let Found::Lagged(event) = events.after(3) else { panic!("events 4 to 10 are gone") };
        assert_eq!((event.sequence, event.what), (extra, Happening::Lagged { missed: 7 }));
        assert_eq!(sequences(&events.after(extra)).first(), Some(&(extra + 1)));
    }

    #[test]
    fn a_number_from_an_earlier_process_means_from_the_beginning() {
        let events = Events::default();
        assert_eq!(events.after(9), Found::Nothing);
        events.publish(failed());
        assert_eq!(sequences(&events.after(9)), [1]);
    }

    #[test]
    fn subscribers_wake_up() {
        let events = Events::default();
        let mut published = events.clone().subscribe();
        published.mark_unchanged();
        assert!(!published.has_changed().unwrap());
        events.publish(failed());
        assert!(published.has_changed().unwrap());
    }
}
