//! How the guest's end, and what becomes of its devices, becomes known: vCPU threads, power ports and devices tell
//! [`Ends`], which passes it on.
//!
//! The first end counts, and is told once: what follows it (a triple fault after a panic) is its consequence. A migration
//! asks, after the vCPUs stand, whether the guest has ended, so that a guest that powered off is never moved.

use crate::dirty::DirtyTracker;
use crate::vcpu::{GuestEnd, VcpuEvents};
use devices::power::PowerEvent;
use std::error::Error;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// What a machine tells of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The guest ended.
    Ended(GuestEnd),
    /// A device stands still until its driver resets it.
    DeviceFailed {
        /// Its id.
        device: String,
        /// What was wrong.
        cause: String,
    },
    /// All of a disk has come to its file.
    DiskWhole {
        /// Its id.
        disk: String,
    },
}

/// Who is told. Called from threads of vCPUs and devices, which wait for it.
pub type NoticeListener = Arc<dyn Fn(Notice) + Send + Sync>;

/// The guest's end, once it has come.
pub(crate) struct Ends {
    listener: NoticeListener,
    tracker: Arc<dyn DirtyTracker>,
    first: OnceLock<GuestEnd>,
}

impl Ends {
    pub(crate) fn new(listener: NoticeListener, tracker: Arc<dyn DirtyTracker>) -> Self {
        Self { listener, tracker, first: OnceLock::new() }
    }

    /// How the guest ended, if it has.
    pub(crate) fn first(&self) -> Option<&GuestEnd> {
        self.first.get()
    }

    /// Takes an end from a power port.
    pub(crate) fn on_power(&self, event: PowerEvent) {
        self.tell(match event {
            PowerEvent::PowerOff => GuestEnd::PowerOff,
            PowerEvent::Reset => GuestEnd::Reboot,
            PowerEvent::Panicked => GuestEnd::Panic,
        });
    }

    /// Passes on that a device failed.
    pub(crate) fn on_device_failure(&self, device: &str, cause: &str) {
        (self.listener)(Notice::DeviceFailed { device: device.to_owned(), cause: cause.to_owned() });
    }

    /// Passes on that a disk has come.
    pub(crate) fn on_whole_disk(&self, disk: &str) {
        (self.listener)(Notice::DiskWhole { disk: disk.to_owned() });
    }

    fn tell(&self, end: GuestEnd) {
        if self.first.set(end.clone()).is_ok() {
            (self.listener)(Notice::Ended(end));
        }
    }
}

impl fmt::Debug for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ends").field("first", &self.first).finish_non_exhaustive()
    }
}

impl VcpuEvents for Ends {
    fn ended(&self, vcpu: u8, end: GuestEnd) {
        tracing::debug!(vcpu, %end, "the guest ended");
        self.tell(end);
    }

    fn dirty_ring_full(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.tracker.ring_full()?)
    }
}
