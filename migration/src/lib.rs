//! The migration engine: moves a guest's memory, disks, state and *ownership* from one host to another.
//!
//! It knows no KVM and no sockets. A guest comes as a [`SourceGuest`], the place it goes to as a [`TargetHost`] with its
//! record of [`Claims`], and what is between them as a [`Link`]; the clock and the onlooker are traits too. So all of it
//! runs in plain unit tests, with a fault at every frame.
//!
//! - [`source::run`] drives a migration out, and says who owns the guest now.
//! - [`target::receive`] serves one incoming link.
//! - [`wire`] has the frames, [`ledger`] the dirty pages, [`convergence`] the decision to pause, [`report`] the results.
//! - [`codec`] makes pages smaller, and pages again.
//!
//! The invariant above all others: at most one host runs the guest, whatever is lost, killed or delayed in between.

pub mod bell;
pub mod cancel;
pub mod clock;
pub mod codec;
pub mod convergence;
pub mod feasibility;
pub mod guest;
pub mod ledger;
pub mod link;
pub mod progress;
pub mod region;
pub mod report;
pub mod source;
pub mod target;
pub mod throttling;
pub mod wire;

mod batch;
mod channel;
mod counts;
mod digest;
mod history;
mod pacer;
mod page_set;
mod policy;
mod stream_count;
mod zero;

#[cfg(test)]
mod pair;

pub use bell::Bell;
pub use cancel::CancelToken;
pub use channel::in_words;
pub use clock::{Clock, HostClock};
pub use codec::Codecs;
pub use convergence::{Goal, OnStall, SwitchReason};
pub use counts::PageCounts;
pub use digest::TranscriptDigest;
pub use guest::{
    Claim, Claims, Description, DiskPages, GuestPages, HandleOf, HostError, Offer, Refusal, SourceGuest, TargetHost,
};
pub use ledger::DirtyLedger;
pub use link::{Cutter, Link, LinkError};
pub use policy::{Chosen, Why};
pub use progress::{Moved, Observer, Phase, Progress, Unobserved};
pub use region::{
    MAX_REGION_PAGES, MAX_REGIONS, PAGE_SIZE, PageIndex, PageRun, RamRegion, Region, RegionId, total_pages,
};
pub use report::{CpuReport, Ending, PhaseReport, Report, Role, RoundReport, TargetPart};
pub use source::{Failed, Further, InDoubt, MemoryPolicy, Outcome, Owner, Plan, SourceError, Surroundings};
pub use target::{Arrival, Fault, Reception};
pub use throttling::GuestCost;
pub use wire::{Mode, Transfer};
