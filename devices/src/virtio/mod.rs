//! Virtio devices: the contract between a device model and its transport.
//!
//! A device implements [`VirtioDevice`] and knows no registers; [`Mmio`] is the transport that the guest
//! sees and the [`Device`](crate::Device) that the machine leads. The transport owns device and queues behind one lock
//! and lends them out, so no call of this trait runs beside another of the same device:
//!
//! ```text
//!            DRIVER_OK, or resume           kick, source, after start
//! reset state ------------> start ------------> process / on_source ... ----> stop ---> flush ---> save
//!      ^                                                                       |
//!      '--------------------------- reset <--- driver or machine --------------'
//! ```
//!
//! - Kicks and sources arrive on the [`Worker`](crate::Worker) thread that the device was given at construction.
//! - After every `start`, each ready queue is processed as though kicked and each source is reported as though ready:
//!   a device needs no code of its own to survive a move.
//! - A [`Fault`] from any call makes the transport say `DEVICE_NEEDS_RESET`, log one line and call nothing but `stop`
//!   and `reset` until the driver resets the device.

pub mod balloon;
pub mod blk;
#[cfg(test)]
mod driver;
mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
mod serve;
#[cfg(test)]
pub(crate) mod testing;

pub use interrupt::Interrupt;
pub use mmio::{FailureListener, Mmio, MmioError, MmioParts};
pub use queue::{BrokenRing, Buffer, Chain, GuestSlice, Virtq};

use crate::{Gpa, GuestRam};
use saved::Saved;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::os::fd::RawFd;
use std::time::Duration;
use thiserror::Error;

/// Why a device cannot go on until its driver resets it.
#[derive(Debug, Error)]
pub enum Fault {
    /// The driver broke the rules.
    #[error(transparent)]
    Ring(#[from] BrokenRing),
    /// The host refused something that the device cannot do without.
    #[error("{what}")]
    Host {
        /// What was tried, as a sentence.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a saved section does not make a device.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RestoreError {
    /// A field has a value that no device saves.
    #[error("The saved {field} of device {id} cannot be {value:#x}")]
    BadField {
        /// The device.
        id: String,
        /// The field.
        field: &'static str,
        /// Its value, or length.
        value: u64,
    },
    /// The state comes from a device that is configured in another way than the one here.
    #[error("Device {id} was saved with {field} {saved:#x}, but here it has {here:#x}")]
    Differs {
        /// The device.
        id: String,
        /// What differs.
        field: &'static str,
        /// The saved value.
        saved: u64,
        /// The value here.
        here: u64,
    },
    /// The host refused something that the device needs.
    #[error("The host refused device {id} what it needs: {reason}")]
    Host {
        /// The device.
        id: String,
        /// What the host said.
        reason: String,
    },
}

/// Whether a queue may hold more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing to do until the next kick or source; kicks are accepted.
    Idle,
    /// The device gave up its turn; process this queue again soon.
    More,
}

/// Who answers the kicks of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueOwner {
    /// The worker, by [`VirtioDevice::process`].
    Worker,
    /// An accelerator that polls [`Virtq::notifier`] itself. `process` is never called; the notifier is written once
    /// after `start`, so that the accelerator looks at the ring.
    Accelerator,
}

/// A file descriptor of the device's own that the worker polls: a tap, a timer, an accelerator's call event.
///
/// Polled for input, edge-triggered: `on_source` must read until the descriptor has no more, so it must be nonblocking
/// (or be known to have one event). It must stay open as long as the device lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// What `on_source` is called with; unique in the device.
    pub token: u32,
    /// What is polled.
    pub fd: RawFd,
}

/// What the transport lends a device for the length of a call.
#[derive(Debug)]
pub struct Io {
    /// Guest memory.
    pub ram: GuestRam,
    /// The features that the driver accepted; 0 until `FEATURES_OK`.
    pub features: u64,
    /// All queues of the device, by index, whether ready or not.
    pub queues: Vec<Virtq>,
    /// The interrupt line.
    pub interrupt: Interrupt,
}

impl Io {
    /// Whether the driver accepted the feature with number `bit`.
    #[must_use]
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Interrupts the driver if it wants to know of what was pushed to `queue` since the last call. Call it after each
    /// batch of pushes.
    ///
    /// # Errors
    /// [`BrokenRing`] if the ring cannot be read.
    pub fn signal(&mut self, queue: usize) -> Result<(), BrokenRing> {
        if self.queues[queue].wants_interrupt()? {
            self.interrupt.used_buffers();
        }
        Ok(())
    }
}

/// A virtio device model behind a transport. See the module's page for the order of calls. There are no default
/// implementations, so that a new device decides each point.
pub trait VirtioDevice: Debug + Send + Sized + 'static {
    /// The section in a saved state: the transport's part and the device's own, in one frozen type.
    type Saved: Saved;
    /// What the host gives a device that is made or restored: open files, handles, settings.
    type Parts;

    /// The device type (virtio 1.3, 5).
    fn device_type(&self) -> u32;

    /// The device's own features. The transport adds `VERSION_1`, `RING_EVENT_IDX` and `INDIRECT_DESC`. Never changes.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two each. Never changes.
    fn queue_max_sizes(&self) -> &[u16];

    /// Who answers kicks of `queue`. Never changes.
    fn queue_owner(&self, queue: usize) -> QueueOwner;

    /// The descriptors to poll beside the queues. Never changes; asked once.
    fn sources(&self) -> Vec<Source>;

    /// Fills `data` from the configuration space at `offset`; zeros beyond its end ([`read_bytes`] does this).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes `data` into the configuration space at `offset`; ignored where it is read-only. The driver may write
    /// before `DRIVER_OK`.
    fn write_config(&mut self, io: &mut Io, offset: u64, data: &[u8]);

    /// The driver is ready, or the machine lets the device go on: take up work from the state of `io`.
    ///
    /// # Errors
    /// [`Fault`] if the device cannot work. `stop` follows, as after any fault.
    fn start(&mut self, io: &mut Io) -> Result<(), Fault>;

    /// Works on `queue`, at most as many chains as the queue is long before it returns [`Progress::More`].
    ///
    /// # Errors
    /// [`Fault`] if the device cannot go on.
    fn process(&mut self, io: &mut Io, queue: usize) -> Result<Progress, Fault>;

    /// The source `token` is ready, or was not looked at for a while.
    ///
    /// # Errors
    /// [`Fault`] if the device cannot go on.
    fn on_source(&mut self, io: &mut Io, token: u32) -> Result<(), Fault>;

    /// Stops: completes what is in flight to the used rings and lets nothing of the device touch guest memory from the
    /// return on. Only after a `start`.
    ///
    /// # Errors
    /// How many requests are still in flight after `within`; the device then goes on as before.
    fn stop(&mut self, io: &mut Io, within: Duration) -> Result<(), usize>;

    /// Makes durable what the device has written to its back end.
    ///
    /// # Errors
    /// The host's refusal.
    fn flush(&mut self) -> std::io::Result<()>;

    /// Forgets everything that a driver told the device. Never between `start` and `stop`.
    fn reset(&mut self);

    /// See [`Device::release`](crate::Device::release).
    fn release(&mut self);

    /// See [`Device::reacquire`](crate::Device::reacquire).
    ///
    /// # Errors
    /// The host's refusal.
    fn reacquire(&mut self) -> std::io::Result<()>;

    /// See [`Device::announce`](crate::Device::announce). Comes after the `start` at the new place, and also to a device
    /// that no driver uses.
    fn announce(&mut self, io: &mut Io);

    /// See [`Device::log_dirty`](crate::Device::log_dirty).
    ///
    /// # Errors
    /// The accelerator's refusal.
    fn log_dirty(&mut self, io: &mut Io, on: bool) -> std::io::Result<()>;

    /// See [`Device::harvest_dirty`](crate::Device::harvest_dirty).
    fn harvest_dirty(&mut self, mark: &mut dyn FnMut(Gpa));

    /// The section of this device; only after `stop`.
    fn save(&self, transport: MmioSavedV1) -> Self::Saved;

    /// Makes the device of a saved section from what the host has. Validates every field of its own; the transport
    /// validates its part, and calls `start` when the machine resumes.
    ///
    /// # Errors
    /// [`RestoreError`] if the section cannot be one of this device.
    fn restore(id: &str, saved: Self::Saved, parts: Self::Parts) -> Result<(Self, MmioSavedV1), RestoreError>;
}

/// Copies `config` from `offset` on to `data`, and zeros from its end on.
pub fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
    data[length..].fill(0);
}

/// The transport's part of a saved device: every register that the driver can have written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioSavedV1 {
    /// `Status`.
    pub device_status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_select: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_select: u32,
    /// What was written to `DriverFeatures`.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_select: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// Each queue, by index.
    pub queues: Vec<QueueSavedV1>,
}

/// One queue in a [`MmioSavedV1`]. Used buffers that were not yet signalled do not exist in it: a device signals before
/// it stands still.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSavedV1 {
    /// The size that the driver chose.
    pub size: u16,
    /// `QueueReady`.
    pub ready: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Index of the next chain to take from the available ring.
    pub next_available: u16,
    /// Index of the next entry to write in the used ring.
    pub next_used: u16,
    /// Whether `RING_EVENT_IDX` rules this queue.
    pub event_index: bool,
}
