//! Why a migration did not go through, as the source tells it.

use crate::channel::ChannelError;
use crate::convergence::SwitchReason;
use crate::guest::HostError;
use crate::link::LinkError;
use crate::region::{PageIndex, RegionId};
use crate::wire::{FrameError, Kind};
use std::fmt;
use std::time::Duration;
use thiserror::Error;

/// What went wrong.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The guest, or this host, did not do its part.
    #[error("The guest at the source did not {step}")]
    Guest {
        /// What it was to do.
        step: &'static str,
        /// Why it did not.
        #[source]
        source: HostError,
    },
    /// What the guest says of itself does not fit into the protocol.
    #[error("{what} of the guest is {found}, and at most {max} can be migrated")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How large it is.
        found: u64,
        /// How large it may be.
        max: u64,
    },
    /// The target does not want the guest.
    #[error("The target refused the guest: {reason}")]
    Refused {
        /// The target's words.
        reason: String,
    },
    /// The target ended a migration that it had accepted.
    #[error("The target gave up: {reason}")]
    TargetGaveUp {
        /// The target's words.
        reason: String,
    },
    /// The guest's memory was to be passed, over a link that cannot.
    #[error(
        "Memory is passed over a Unix socket between two processes of one host, and here is none; copy it (--memory copy)"
    )]
    NotPassable,
    /// The target lacks what there is not.
    #[error("The target asks for {pages} pages from page {first} of region {region}, which the guest does not have")]
    NoSuchPages {
        /// The region.
        region: RegionId,
        /// The first page.
        first: PageIndex,
        /// How many.
        pages: u32,
    },
    /// The guest's memory was to be passed, and disks are to move with it.
    #[error(
        "Memory is not passed where disks move with the guest: copy it (--memory copy), or leave the disks where they are"
    )]
    PassedWithDisks,
    /// The guest's memory was passed and did not arrive.
    #[error(
        "The guest's memory was passed and did not arrive, as where something forwards the socket to another host; copy it \
         (--memory copy)"
    )]
    NotPassed,
    /// The target says that it has got memory that was not passed.
    #[error("The target says that it maps the guest's memory, which was not passed to it")]
    NeverPassed,
    /// The target sent something that is no frame.
    #[error("The target does not keep to the migration protocol")]
    Frame(#[source] FrameError),
    /// The target sent a frame at the wrong time.
    #[error("The target sent {found} when {expected} was due")]
    OutOfTurn {
        /// What came.
        found: Kind,
        /// What should have come.
        expected: Kind,
    },
    /// The link failed.
    #[error("The link to the target failed")]
    Link(#[source] LinkError),
    /// Somebody wished to end it.
    #[error("The migration was cancelled")]
    Cancelled,
    /// It took too long.
    #[error("The migration was not done within its time limit of {} s", limit.as_secs_f64())]
    OutOfTime {
        /// The limit.
        limit: Duration,
    },
    /// The downtime goal cannot be reached, and the guest was not to be paused regardless.
    #[error("The downtime goal of {} ms cannot be reached: {} ms are predicted after {round} rounds ({why}), with {} to send; \
        the guest writes {}/s and the link takes {}/s",
        goal.as_millis(), predicted.as_millis(), Mib(*remaining), Mib(*dirtied_per_second), Mib(*bytes_per_second),
        why = words(*reason))]
    GoalUnreachable {
        /// The goal.
        goal: Duration,
        /// What was predicted last.
        predicted: Duration,
        /// How many rounds were sent.
        round: u32,
        /// Why no more are sent.
        reason: SwitchReason,
        /// Bytes that were left to send.
        remaining: f64,
        /// How many bytes to send the guest made in each second, by its writes.
        dirtied_per_second: f64,
        /// How fast bytes went, a second.
        bytes_per_second: f64,
    },
    /// The target was asked after a doubt and did not take the guest.
    #[error("The target did not take the guest over, and never will")]
    NotTaken,
    /// The operator decided after a doubt that the guest is here.
    #[error("The operator decided that the guest stays")]
    Settled,
}

/// A number of bytes, for people.
struct Mib(f64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB", self.0 / f64::from(1 << 20))
    }
}

fn words(reason: SwitchReason) -> &'static str {
    match reason {
        SwitchReason::GoalMet => "the goal is met",
        SwitchReason::RoundLimit => "no more are allowed",
        SwitchReason::Stalled => "more do not bring it nearer",
        SwitchReason::Deadline => "no time is left for more",
    }
}

impl From<ChannelError> for SourceError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Link(error) => Self::Link(error),
            ChannelError::Frame(error) => Self::Frame(error),
        }
    }
}

impl SourceError {
    /// Whether the target itself ended the migration. Before it says so, it lets go of what only one host may hold.
    pub(super) fn is_targets_word(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::TargetGaveUp { .. })
    }

    /// Whether the target waits to be told: it does not know yet, and can still hear.
    pub(super) fn is_news(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::TargetGaveUp { .. } | Self::NotTaken => false,
            Self::Link(LinkError::Closed | LinkError::Io(_)) => false,
            Self::Link(LinkError::TimedOut { .. })
            | Self::Guest { .. }
            | Self::TooLarge { .. }
            | Self::NotPassable
            | Self::PassedWithDisks
            | Self::NoSuchPages { .. }
            | Self::NotPassed
            | Self::NeverPassed
            | Self::Frame(_)
            | Self::OutOfTurn { .. }
            | Self::Cancelled
            | Self::OutOfTime { .. }
            | Self::GoalUnreachable { .. }
            | Self::Settled => true,
        }
    }
}
