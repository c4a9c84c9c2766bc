//! The interrupt line of one virtio device: the pending bits that the driver reads, and the `EventFd` behind it.
//!
//! Held by the transport (which answers `InterruptStatus` and `InterruptACK` without a lock), by the device and by its
//! helpers. Invariant: a bit is set before the line is raised, so a driver that is interrupted finds the reason; and
//! nothing is raised for a driver that has not said `DRIVER_OK`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// `InterruptStatus` bit 0: the device has used a buffer (virtio 1.3, 4.2.2).
pub(crate) const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit 1: the configuration of the device has changed (virtio 1.3, 4.2.2).
pub(crate) const CONFIG_CHANGE: u32 = 2;

#[derive(Debug)]
struct Line {
    pending: AtomicU32,
    generation: AtomicU32,
    live: AtomicBool,
    event: EventFd,
}

/// A handle to the interrupt line of one device; clones share it.
#[derive(Debug, Clone)]
pub struct Interrupt {
    line: Arc<Line>,
}

impl Interrupt {
    /// A line behind `event`, with nothing pending.
    #[must_use]
    pub fn new(event: EventFd) -> Self {
        let line = Line { pending: AtomicU32::new(0), generation: AtomicU32::new(0), live: false.into(), event };
        Self { line: Arc::new(line) }
    }

    /// Tells the driver that there are used buffers. Whether it wants to know is asked before, by
    /// [`Io::signal`](super::Io::signal).
    pub fn used_buffers(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the configuration space changed. The change must be readable before the call.
    pub fn config_changed(&self) {
        self.line.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(CONFIG_CHANGE);
    }

    fn raise(&self, bit: u32) {
        if self.line.live.load(Ordering::Acquire) {
            self.line.pending.fetch_or(bit, Ordering::AcqRel);
            self.pull();
        }
    }

    fn pull(&self) {
        // The only refusal is a counter at its end, and then the line is up already.
        let _ = self.line.event.write(1);
    }

    pub(crate) fn set_live(&self, live: bool) {
        self.line.live.store(live, Ordering::Release);
    }

    pub(crate) fn pending(&self) -> u32 {
        self.line.pending.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, bits: u32) {
        self.line.pending.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn generation(&self) -> u32 {
        self.line.generation.load(Ordering::Acquire)
    }

    pub(crate) fn restore(&self, pending: u32, generation: u32) {
        self.line.pending.store(pending, Ordering::Release);
        self.line.generation.store(generation, Ordering::Release);
    }

    /// Raises the line once more if something is pending: the edge may have been lost in a move.
    pub(crate) fn raise_pending(&self) {
        if self.pending() != 0 {
            self.pull();
        }
    }
}
