//! Which pages the guest's vCPUs wrote: KVM's two ways to tell, behind one trait.
//!
//! The migration driver starts a tracker, marks every page in its ledger, and harvests before each round; vCPU threads
//! call [`DirtyTracker::ring_full`]. Pages that this process or vhost wrote come from elsewhere
//! ([`GuestMemory::harvest_writes`](crate::memory::GuestMemory::harvest_writes), devices) into the same ledger.
//!
//! The invariant of both trackers: a write that happens after [`start`](DirtyTracker::start) has returned is in the ledger
//! after the next harvest, and a page whose write was reported by a harvest may be copied as soon as that harvest
//! returns: KVM already watches it again, so no later write to it goes unseen.

mod log;
mod ring;

pub use log::DirtyLog;
pub use ring::DirtyRing;

use crate::memory::MemoryError;
use kvm_ioctls::VcpuFd;
use migration::DirtyLedger;
use std::fmt::Debug;
use thiserror::Error;
use vmm_sys_util::errno;

/// Why dirty pages could not be tracked.
#[derive(Debug, Error)]
pub enum DirtyError {
    /// KVM has no such tracker.
    #[error("The host's KVM has no {what}")]
    Unsupported {
        /// The tracker.
        what: &'static str,
    },
    /// KVM refused an operation.
    #[error("KVM could not {action}")]
    Refused {
        /// What was asked of it.
        action: &'static str,
        /// What it said.
        #[source]
        source: errno::Error,
    },
    /// KVM wrote more into a ring than there was room for, so pages are lost.
    #[error(
        "KVM overran its dirty ring of {entries} entries, as a KVM that emulates instructions may: use the dirty log"
    )]
    Overrun {
        /// Room in the ring.
        entries: u32,
    },
    /// KVM refused to switch logging of a memory slot.
    #[error("Dirty logging could not be switched")]
    Switch {
        /// What KVM said.
        #[source]
        source: MemoryError,
    },
}

impl DirtyError {
    fn refused(action: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Refused { action, source }
    }
}

/// One of KVM's ways to tell the pages that vCPUs wrote. All methods may be called while vCPUs run, from any thread.
pub trait DirtyTracker: Debug + Send + Sync {
    /// Tells the tracker of a new vCPU. Called for each one before it first runs.
    ///
    /// # Errors
    /// [`DirtyError`] if the vCPU cannot be tracked.
    fn attach(&self, vcpu: &VcpuFd) -> Result<(), DirtyError>;

    /// Starts tracking. What was written before is not known afterwards: the caller marks all pages.
    ///
    /// # Errors
    /// [`DirtyError`]; tracking is then off.
    fn start(&self) -> Result<(), DirtyError>;

    /// Moves the pages that were written since the last harvest into `ledger` and lets KVM watch them again.
    ///
    /// # Errors
    /// [`DirtyError`]; pages are then lost, so the caller gives up.
    fn harvest(&self, ledger: &mut DirtyLedger) -> Result<(), DirtyError>;

    /// How many pages each vCPU wrote, in the order of [`attach`](Self::attach), among those that the last harvest moved; a
    /// page that several wrote is one vCPU's. `None` if KVM does not tell.
    fn written_by_vcpu(&self) -> Option<Vec<u64>>;

    /// Makes room after KVM_EXIT_DIRTY_RING_FULL, on the thread of the vCPU that has no room left.
    ///
    /// # Errors
    /// [`DirtyError`]; the vCPU cannot go on.
    fn ring_full(&self) -> Result<(), DirtyError>;

    /// Stops tracking and forgets what was not harvested.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn stop(&self) -> Result<(), DirtyError>;
}

#[cfg(test)]
mod tests;
