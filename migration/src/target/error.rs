//! Why a migration did not come through, as the target tells it. All but the source's own reasons are sent to the source
//! in these words.

use crate::channel::ChannelError;
use crate::codec::Malformed;
use crate::guest::{HostError, Refusal};
use crate::link::LinkError;
use crate::region::{PageIndex, RegionId};
use crate::wire::{FrameError, Kind};
use thiserror::Error;

/// What went wrong.
#[derive(Debug, Error)]
pub enum Fault {
    /// This host does not want the guest.
    #[error("The guest cannot run here")]
    Refused(#[source] Refusal),
    /// This host did not do its part.
    #[error("The target host did not {step}")]
    Host {
        /// What it was to do.
        step: &'static str,
        /// Why it did not.
        #[source]
        source: HostError,
    },
    /// The guest is this host's, but does not run.
    #[error("The guest was taken over, but does not run")]
    NotRunning(#[source] HostError),
    /// The record of claims failed, so nobody may run the guest here.
    #[error("The target cannot record whose the guest is")]
    Claims(#[source] HostError),
    /// The source asked in the meantime, and was told that the guest is not taken.
    #[error("The target has already said that it did not take the guest")]
    ClaimedNotMine,
    /// The question is for another record of claims.
    #[error("This is not the target of that migration, or it has lost its records")]
    NotAsked,
    /// The source sent something that is no frame.
    #[error("The source does not keep to the migration protocol")]
    Frame(#[source] FrameError),
    /// The source sent a frame at the wrong time.
    #[error("The source sent {found} {when}")]
    OutOfTurn {
        /// What came.
        found: Kind,
        /// What state it came in, in words.
        when: &'static str,
    },
    /// The source sent pages that the guest does not have.
    #[error("The source sent {pages} pages from page {first} of region {region}, where the guest has none")]
    NoSuchPages {
        /// The region.
        region: RegionId,
        /// The first page.
        first: PageIndex,
        /// How many.
        pages: u32,
    },
    /// The source sent digests where there is nothing that they could be of.
    #[error("The source sent digests of region {region}, of which there is no old copy here")]
    NoOldCopy {
        /// The region.
        region: RegionId,
    },
    /// The source sent pages in an encoding that is none.
    #[error("The source sent pages that cannot be decoded")]
    Malformed(#[source] Malformed),
    /// The source refers to a page of the round that does not come.
    #[error("The source refers to page {page} of region {region}, which does not come")]
    NoOriginal {
        /// The region.
        region: RegionId,
        /// The page.
        page: PageIndex,
    },
    /// The source does not come to an end.
    #[error("The source sent more than {limit} rounds; it should switch earlier (--max-rounds)")]
    TooManyRounds {
        /// How many are taken.
        limit: usize,
    },
    /// What came is not what was sent.
    #[error("{what} came as {here}, but the source says {there}")]
    Differs {
        /// What differs.
        what: &'static str,
        /// As this end has it.
        here: u64,
        /// As the source has it.
        there: u64,
    },
    /// Memory is not as it is at the source.
    #[error("Memory region {region} does not have the content that it has at the source")]
    MemoryDiffers {
        /// The region.
        region: RegionId,
    },
    /// The source ended it.
    #[error("The source gave up: {reason}")]
    SourceGaveUp {
        /// The source's words.
        reason: String,
    },
    /// The link failed.
    #[error("The link to the source failed")]
    Link(#[source] LinkError),
}

impl From<ChannelError> for Fault {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Link(error) => Self::Link(error),
            ChannelError::Frame(error) => Self::Frame(error),
        }
    }
}

impl Fault {
    /// Whether the source is still there to be told.
    pub(super) fn is_news(&self) -> bool {
        match self {
            Self::SourceGaveUp { .. } | Self::Link(LinkError::Closed | LinkError::Io(_)) => false,
            Self::Link(LinkError::TimedOut { .. })
            | Self::Refused(_)
            | Self::Host { .. }
            | Self::NotRunning(_)
            | Self::Claims(_)
            | Self::ClaimedNotMine
            | Self::NotAsked
            | Self::Frame(_)
            | Self::OutOfTurn { .. }
            | Self::NoSuchPages { .. }
            | Self::NoOldCopy { .. }
            | Self::Malformed(_)
            | Self::NoOriginal { .. }
            | Self::TooManyRounds { .. }
            | Self::Differs { .. }
            | Self::MemoryDiffers { .. } => true,
        }
    }

    /// Whether it is a "no" to the offer or to a question, rather than the end of something that had begun.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::NotAsked)
    }
}
