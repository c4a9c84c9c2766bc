//! The same NIC with its frames moved by the kernel (vhost-net): the rings go to the kernel when the device starts and
//! come back when it stops; the control queue stays here.
//!
//! ```text
//! open -> start: features, memory, rings, backend -> stop: no backend, indices back -> start ...
//! ```
//!
//! The kernel writes guest memory behind the VMM's back. While the log is on it marks each page that it writes, used
//! rings included. Invariant: the log outlives every feature set that names it.

use super::dirty_log::DirtyLog;
use super::{RECEIVE, TRANSMIT};
use crate::virtio::{Fault, Io, Virtq};
use crate::{Gpa, GuestRam};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use thiserror::Error;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as Kernel;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a driver may have negotiated that concerns who moves the frames. The rest, such as checksums, is the tap's.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// `VHOST_F_LOG_ALL` (linux/vhost_types.h): log all writes.
const LOG_ALL: u64 = 1 << 26;

/// `VHOST_VRING_F_LOG` (linux/vhost_types.h): log the writes to the used ring.
const LOG_USED_RING: u32 = 1;

/// Whether a NIC's frames are moved by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VhostMode {
    /// Yes, if the kernel can.
    #[default]
    Auto,
    /// Yes; it is an error if the kernel cannot.
    On,
    /// No.
    Off,
}

/// Why vhost-net cannot be used.
#[derive(Debug, Error)]
pub enum VhostError {
    /// It is not there, or not for this user.
    #[error("vhost-net was asked for, but /dev/vhost-net cannot be opened: run `modprobe vhost_net`, or do without it")]
    Open {
        /// What the host said.
        #[source]
        source: vhost::Error,
    },
    /// The kernel refused to set it up.
    #[error("vhost-net was asked for, but the kernel does not set it up")]
    SetUp {
        /// What the host said.
        #[source]
        source: vhost::Error,
    },
    /// The kernel's vhost-net is older than this program.
    #[error("vhost-net was asked for, but this kernel's lacks the features {missing:#x}: do without it")]
    Lacks {
        /// The feature bits that it lacks.
        missing: u64,
    },
}

/// An opened vhost-net for one NIC.
pub struct Vhost {
    // Dropped first: closing it ends the kernel's use of the log and of guest memory.
    kernel: Kernel<Arc<GuestRam>>,
    log: Option<DirtyLog>,
    call: EventFd,
    ram: GuestRam,
    running: Option<Running>,
}

/// What the kernel works with between `start` and `stop`.
#[derive(Debug, Clone, Copy)]
struct Running {
    features: u64,
}

impl fmt::Debug for Vhost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vhost")
            .field("running", &self.running)
            .field("logs", &self.log.is_some())
            .finish_non_exhaustive()
    }
}

impl Vhost {
    /// Opens vhost-net for a guest with this memory, or not, as `mode` says.
    ///
    /// # Errors
    /// [`VhostError`] if it must be there and is not.
    pub fn open(mode: VhostMode, ram: &GuestRam) -> Result<Option<Self>, VhostError> {
        match mode {
            VhostMode::Off => Ok(None),
            VhostMode::On => Self::new(ram).map(Some),
            VhostMode::Auto => {
                let without = |error: &_| tracing::debug!(%error, "This process moves the NIC's frames");
                Ok(Self::new(ram).inspect_err(without).ok())
            }
        }
    }

    fn new(ram: &GuestRam) -> Result<Self, VhostError> {
        let set_up = |source| VhostError::SetUp { source };
        let kernel = Kernel::new(Arc::new(ram.clone())).map_err(|source| VhostError::Open { source })?;
        kernel.set_owner().map_err(set_up)?;
        check_features(kernel.get_features().map_err(set_up)?)?;
        let call = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| set_up(vhost::Error::IOError(e)))?;
        Ok(Self { kernel, log: None, call, ram: ram.clone(), running: None })
    }

    /// What becomes ready when the kernel has used buffers.
    pub(super) fn call(&self) -> RawFd {
        self.call.as_raw_fd()
    }

    /// Passes an interrupt of the kernel on. It cannot go to the guest directly: the driver of virtio-mmio looks into
    /// `InterruptStatus` first (virtio 1.3, 4.2.3.4).
    pub(super) fn on_call(&self, io: &Io) {
        if self.call.read().is_ok() {
            io.interrupt.used_buffers();
        }
    }

    /// Gives the rings to the kernel.
    pub(super) fn start(&mut self, io: &Io, port: &File) -> Result<(), Fault> {
        let features = io.features & RING_FEATURES;
        let setting = Setting { features, log: self.log.as_ref() };
        hand_over(&self.kernel, io, &self.call, port, setting).map_err(|source| {
            // One of the queues may be at work already.
            let _ = part(&self.kernel, io);
            Fault::Host { what: "vhost-net does not take the rings", source: io_error(source) }
        })?;
        self.running = Some(Running { features });
        Ok(())
    }

    /// Takes the rings back. The kernel touches nothing from then on.
    ///
    /// # Errors
    /// How many rings stay with the kernel, if it does not give them back.
    pub(super) fn stop(&mut self, io: &mut Io) -> Result<(), usize> {
        if self.running.is_none() {
            return Ok(());
        }
        take_back(&self.kernel, io).map_err(|error| {
            tracing::error!(%error, "The rings of a NIC stay with the kernel");
            ready_queues(io).count()
        })?;
        self.running = None;
        // A call that is under way would be lost; one too many does no harm.
        let _ = self.call.read();
        io.interrupt.used_buffers();
        Ok(())
    }

    /// Switches the log of the pages that the kernel writes.
    pub(super) fn log_dirty(&mut self, io: &Io, on: bool) -> io::Result<()> {
        if on == self.log.is_some() {
            // A second log would lose what the first has not told yet.
            return Ok(());
        }
        let log = on.then(|| DirtyLog::new(self.ram.last_addr()));
        if let Some(Running { features }) = self.running {
            switch_log(&self.kernel, io, Setting { features, log: log.as_ref() }).map_err(io_error)?;
        }
        self.log = log;
        Ok(())
    }

    /// Takes the marks since the last time.
    pub(super) fn harvest_dirty(&self, mark: &mut dyn FnMut(Gpa)) {
        if let Some(log) = &self.log {
            log.harvest(mark);
        }
    }
}

/// How the kernel is to treat the rings.
#[derive(Debug, Clone, Copy)]
struct Setting<'a> {
    features: u64,
    log: Option<&'a DirtyLog>,
}

impl Setting<'_> {
    fn features(self) -> u64 {
        self.features | if self.log.is_some() { LOG_ALL } else { 0 }
    }

    fn ring(self, queue: &Virtq) -> VringConfigData {
        let state = queue.state();
        VringConfigData {
            queue_max_size: state.max_size,
            queue_size: state.size,
            flags: if self.log.is_some() { LOG_USED_RING } else { 0 },
            desc_table_addr: state.desc_table,
            used_ring_addr: state.used_ring,
            avail_ring_addr: state.avail_ring,
            log_addr: self.log.map(|_| state.used_ring),
        }
    }
}

fn check_features(offered: u64) -> Result<(), VhostError> {
    let missing = (RING_FEATURES | LOG_ALL) & !offered;
    if missing == 0 { Ok(()) } else { Err(VhostError::Lacks { missing }) }
}

/// The queues that the kernel works on, as far as the driver has set them up.
fn ready_queues(io: &Io) -> impl Iterator<Item = &Virtq> {
    [RECEIVE, TRANSMIT].into_iter().filter_map(|index| io.queues.get(index)).filter(|queue| queue.is_ready())
}

fn hand_over(
    kernel: &impl VhostNet,
    io: &Io,
    call: &EventFd,
    port: &File,
    setting: Setting<'_>,
) -> Result<(), vhost::Error> {
    if let Some(log) = setting.log {
        kernel.set_log_base(log.base(), None)?;
    }
    kernel.set_features(setting.features())?;
    kernel.set_mem_table(&memory_table(&io.ram))?;
    for queue in ready_queues(io) {
        let (index, state) = (queue.index(), queue.state());
        kernel.set_vring_num(index, state.size)?;
        kernel.set_vring_base(index, state.next_avail)?;
        kernel.set_vring_addr(index, &setting.ring(queue))?;
        kernel.set_vring_call(index, call)?;
        kernel.set_vring_kick(index, queue.notifier())?;
    }
    for queue in ready_queues(io) {
        kernel.set_backend(queue.index(), Some(port))?;
    }
    Ok(())
}

/// Ends the kernel's work on the queues.
fn part(kernel: &impl VhostNet, io: &Io) -> Result<(), vhost::Error> {
    ready_queues(io).try_for_each(|queue| kernel.set_backend(queue.index(), None))
}

/// Stops both queues before it asks for either's index: from then on nothing changes any more.
fn take_back(kernel: &impl VhostNet, io: &mut Io) -> Result<(), Fault> {
    let refused = |source| Fault::Host { what: "vhost-net does not give a ring back", source: io_error(source) };
    part(kernel, io).map_err(refused)?;
    for index in ready_queues(io).map(Virtq::index).collect::<Vec<_>>() {
        let next = kernel.get_vring_base(index).map_err(refused)?;
        let next = u16::try_from(next).map_err(|_| refused(vhost::Error::InvalidQueue))?;
        io.queues[index].take_back(next)?;
    }
    Ok(())
}

/// Switches the log while the kernel works: the log's place is known before a feature names it.
fn switch_log(kernel: &impl VhostNet, io: &Io, setting: Setting<'_>) -> Result<(), vhost::Error> {
    if let Some(log) = setting.log {
        kernel.set_log_base(log.base(), None)?;
    }
    kernel.set_features(setting.features())?;
    for queue in ready_queues(io) {
        kernel.set_vring_addr(queue.index(), &setting.ring(queue))?;
    }
    Ok(())
}

fn memory_table(ram: &GuestRam) -> Vec<VhostUserMemoryRegionInfo> {
    let regions = ram.iter().map(|region| VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        mmap_offset: 0,
        mmap_handle: -1,
    });
    regions.collect()
}

fn io_error(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(error) | vhost::Error::IOError(error) | vhost::Error::VhostOpen(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests;
