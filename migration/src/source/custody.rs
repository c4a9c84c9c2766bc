//! The guest in the engine's hands: what was done to it, and how it is given back as it was.
//!
//! Each step is noted *before* it is tried, and a failure goes back through the notes, last step first. So disks are
//! locked again before the guest runs again, and the record is set right and the dirty log ended after, outside of the
//! guest's downtime.

use super::error::SourceError;
use crate::channel::{host_error, in_words};
use crate::clock::Clock;
use crate::guest::SourceGuest;
use std::time::Duration;
use uuid::Uuid;

/// How long to wait between two attempts to take back what was released.
const RETRY: Duration = Duration::from_millis(50);

/// What the way back from throttling is called.
const UNTHROTTLE: &str = "get all of its time again";

/// A step that has a way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    DirtyLog,
    Throttle,
    GivenAway,
    Pause,
    Release,
}

/// A guest, and the steps to take back if it stays.
#[derive(Debug)]
pub(super) struct Custody<G> {
    pub(super) guest: G,
    session: Uuid,
    steps: Vec<Step>,
    /// What [`Step::Throttle`] takes from each vCPU.
    shares: Vec<f64>,
}

/// A migration that failed, and the guest, which is still this host's.
#[derive(Debug)]
pub struct Failed<G> {
    /// What went wrong.
    pub cause: SourceError,
    /// The guest, running again if it ran before, unless `stuck` says otherwise.
    pub guest: G,
    /// Why the guest could not be brought back to where it was. It is this host's, but may be paused, without its disks,
    /// or logging dirty pages.
    pub stuck: Option<SourceError>,
}

impl<G: SourceGuest> Custody<G> {
    pub(super) fn new(guest: G, session: Uuid) -> Self {
        Self { guest, session, steps: Vec::new(), shares: Vec::new() }
    }

    /// Takes a step forth.
    pub(super) fn take(&mut self, step: Step) -> Result<(), SourceError> {
        self.steps.push(step);
        let (name, result) = match step {
            Step::DirtyLog => ("start its dirty log", self.guest.start_dirty_log()),
            Step::Throttle => ("get slower", self.guest.throttle(&self.shares)),
            Step::Pause => ("pause", self.guest.pause()),
            Step::Release => ("release its disks", self.guest.release()),
            Step::GivenAway => ("get recorded as given away", self.guest.record_given_away(self.session)),
        };
        result.map_err(|error| SourceError::Guest { step: name, source: host_error(error) })
    }

    /// Takes these shares of their time from the vCPUs, and no longer those of before.
    pub(super) fn throttle(&mut self, shares: Vec<f64>) -> Result<(), SourceError> {
        self.shares = shares;
        self.steps.retain(|step| *step != Step::Throttle);
        self.take(Step::Throttle)
    }

    /// Takes nothing from the vCPUs any more; whether anything was taken before.
    pub(super) fn unthrottle(&mut self) -> Result<bool, SourceError> {
        if !self.steps.contains(&Step::Throttle) {
            return Ok(false);
        }
        let unthrottled = self.guest.unthrottle();
        unthrottled.map_err(|error| SourceError::Guest { step: UNTHROTTLE, source: host_error(error) })?;
        self.steps.retain(|step| *step != Step::Throttle);
        Ok(true)
    }

    /// Whether the target may hold what the guest needs.
    pub(super) fn has_released(&self) -> bool {
        self.steps.contains(&Step::Release)
    }

    /// Goes all steps back and gives the guest up. The target may hold what was released until it notices that the
    /// migration has failed, so that is tried again for up to `patience`.
    pub(super) fn hand_back(mut self, cause: SourceError, clock: &dyn Clock, patience: Duration) -> Failed<G> {
        let mut stuck = None;
        while let Some(step) = self.steps.pop() {
            let Err(error) = self.take_back(step, clock, patience) else { continue };
            tracing::error!(error = in_words(&error), "the guest is not as it was before the failed migration");
            stuck.get_or_insert(error);
            if step == Step::Release {
                // A guest whose disks are another's must not run.
                break;
            }
        }
        Failed { cause, guest: self.guest, stuck }
    }

    fn take_back(&mut self, step: Step, clock: &dyn Clock, patience: Duration) -> Result<(), SourceError> {
        let (name, result) = match step {
            Step::DirtyLog => ("end its dirty log", self.guest.stop_dirty_log()),
            Step::Throttle => (UNTHROTTLE, self.guest.unthrottle()),
            Step::Pause => ("resume", self.guest.resume()),
            Step::Release => ("get its disks back", self.reacquire(clock, patience)),
            Step::GivenAway => ("get recorded as kept", self.guest.record_kept(self.session)),
        };
        result.map_err(|error| SourceError::Guest { step: name, source: host_error(error) })
    }

    fn reacquire(&mut self, clock: &dyn Clock, patience: Duration) -> Result<(), G::Error> {
        let end = clock.now() + patience;
        loop {
            match self.guest.reacquire() {
                Err(_) if clock.now() < end => clock.sleep(RETRY),
                result => return result,
            }
        }
    }
}
