//! How the guest's end becomes known: vCPU threads and power ports tell [`Ends`], which passes it on once.
//!
//! The first end counts: what follows it (a triple fault after a panic) is its consequence. A migration asks, after the
//! vCPUs stand, whether the guest has ended, so that a guest that powered off is never moved.

use crate::dirty::DirtyTracker;
use crate::vcpu::{GuestEnd, VcpuEvents};
use devices::power::PowerEvent;
use std::error::Error;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// Who is told of the guest's end. Called from a vCPU thread, which waits for it.
pub type EndListener = Arc<dyn Fn(GuestEnd) + Send + Sync>;

/// The guest's end, once it has come.
pub(crate) struct Ends {
    listener: EndListener,
    tracker: Arc<dyn DirtyTracker>,
    first: OnceLock<GuestEnd>,
}

impl Ends {
    pub(crate) fn new(listener: EndListener, tracker: Arc<dyn DirtyTracker>) -> Self {
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

    fn tell(&self, end: GuestEnd) {
        if self.first.set(end.clone()).is_ok() {
            (self.listener)(end);
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
