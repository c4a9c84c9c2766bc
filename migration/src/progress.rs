//! What an onlooker learns while a migration runs.

use crate::report::RoundReport;
use serde::{Deserialize, Serialize};

/// The phases of a migration as the source goes through them; the target shares some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Describing the guest; the target checks and prepares.
    Offering,
    /// The guest runs and its memory moves.
    Rounds,
    /// The guest is being paused and its state captured.
    Pausing,
    /// The guest is paused; the last pages move.
    LastPages,
    /// The state moves, and the target restores it.
    Restoring,
    /// From the record "given away" to the answer "running".
    HandingOver,
}

/// One piece of news.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// A phase began.
    Entered(Phase),
    /// More pages of a round were moved. Comes once a frame, about once a MiB.
    Moved(Moved),
    /// A round is over.
    RoundDone(RoundReport),
    /// This share of its time is taken from the guest from now on.
    Throttled(f64),
}

/// How far a round is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moved {
    /// The round, from 1.
    pub round: u32,
    /// Pages that the round has dealt with.
    pub pages: u64,
    /// Pages that it has to deal with. The target does not know, and says 0.
    pub of: u64,
    /// Bytes of the whole migration so far.
    pub bytes: u64,
    /// Bytes a second in this round so far.
    pub bytes_per_second: f64,
}

/// An onlooker. Called from the thread that drives the migration, which waits for it, so it should be quick.
pub trait Observer {
    /// Something happened.
    fn on(&mut self, news: Progress);
}

/// An onlooker that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn on(&mut self, _news: Progress) {}
}
