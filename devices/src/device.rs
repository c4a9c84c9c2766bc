//! The life of a device as the machine leads it.
//!
//! ```text
//! new/restore -> running -> quiesce -> standing -> save* -> resume -> running
//!                                        |  \-> reset
//!                                        \-> dropped
//! ```

use crate::{BusDevice, Gpa};
use saved::{SavedError, SavedState};
use std::time::Duration;
use thiserror::Error;

/// Why a device could not stand still.
#[derive(Debug, Error)]
pub enum QuiesceError {
    /// Requests are still in flight at the deadline. The device goes on as before.
    #[error("Device {id} still has {in_flight} requests in flight after {waited:?}")]
    StillBusy {
        /// The device.
        id: String,
        /// How many requests were not completed.
        in_flight: usize,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The back end failed while it was flushed. The device goes on as before.
    #[error("Device {id} could not flush its back end")]
    Flush {
        /// The device.
        id: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// A device under the machine's lead. Methods take `&self`: vCPU threads, the device's worker and the machine all hold
/// it. There are no default implementations, so that a new device decides each point.
pub trait Device: BusDevice {
    /// The name of the device and of its saved section, such as `blk0`; unique in the machine.
    fn id(&self) -> &str;

    /// Stops fetching work, completes what is in flight and flushes the back end. From its return until [`resume`] no
    /// thread of the device touches guest memory or the back end; register accesses by a vCPU must not come (vCPUs are
    /// parked first).
    ///
    /// # Errors
    /// [`QuiesceError`] if it cannot within `within`; the device then runs as before.
    ///
    /// [`resume`]: Self::resume
    fn quiesce(&self, within: Duration) -> Result<(), QuiesceError>;

    /// Ends [`quiesce`](Self::quiesce), and starts a device that was just restored. Every active queue is looked at as
    /// though the driver had kicked it, and a pending interrupt is raised again, so that neither is lost by a move.
    fn resume(&self);

    /// Writes the device's section. Only between `quiesce` and `resume`.
    ///
    /// # Errors
    /// [`SavedError`] if the section does not fit its envelope.
    fn save(&self, state: &mut SavedState) -> Result<(), SavedError>;

    /// Brings the device to its power-on state; the back end stays open. Only between `quiesce` and `resume`.
    fn reset(&self);

    /// Gives up the exclusive hold on host resources that the new owner needs (a disk's writer lock), so that the other
    /// end can take it. Only between `quiesce` and `resume`.
    fn release(&self);

    /// Takes back what [`release`](Self::release) gave up. A device without such resources answers `Ok`.
    ///
    /// # Errors
    /// The host's refusal, such as a lock that someone else holds.
    fn reacquire(&self) -> std::io::Result<()>;

    /// Tells the world that the guest runs here now (a NIC announces its address). Called once, after a move.
    fn announce(&self);

    /// Switches the log of pages that an accelerator of this device (vhost) writes behind the VMM's back.
    ///
    /// # Errors
    /// The accelerator's refusal.
    fn log_dirty(&self, on: bool) -> std::io::Result<()>;

    /// Calls `mark` for each page that the accelerator wrote since the last harvest, by its address.
    fn harvest_dirty(&self, mark: &mut dyn FnMut(Gpa));
}
