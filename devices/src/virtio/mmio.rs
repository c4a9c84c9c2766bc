//! The virtio-mmio transport, version 2 (virtio 1.3, 4.2): what the guest sees of a [`VirtioDevice`], and how the
//! machine leads it.
//!
//! Three parties meet here: vCPU threads (registers), the worker (kicks and the device's own sources), the machine
//! ([`Device`]). All but the hot registers go through one lock, so the device model sees one call at a time;
//! `QueueNotify`, `InterruptStatus` and `InterruptACK` never wait for it. Invariant: once `quiesce` has returned, nothing
//! here touches guest memory until `resume`.

mod core;
mod restore;
#[cfg(test)]
mod tests;

use self::core::{Core, Run};
use super::{Interrupt, Io, QueueOwner, RestoreError, VirtioDevice, Virtq};
use crate::worker::{Attachment, Polls, Task, Worker, WorkerError};
use crate::{BusDevice, Device, Gpa, GuestRam, QuiesceError};
use saved::{SavedError, SavedState};
use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Length of the register window of one device, in bytes.
pub const WINDOW: u64 = 0x1000;
/// Offset of `QueueNotify` in the window: the place for an ioeventfd with the queue's index as datamatch.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Offsets of the registers that are answered without the lock (virtio 1.3, 4.2.2).
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const CONFIG_GENERATION: u64 = 0xfc;
/// Where the device's configuration space begins.
const CONFIG: u64 = 0x100;

/// Tokens of the worker: the device's own sources are below these.
const QUEUE_TOKEN: u32 = 1 << 31;
const LOOK_TOKEN: u32 = u32::MAX;

/// Why a device could not be put behind its transport.
#[derive(Debug, Error)]
pub enum MmioError {
    /// A saved section that makes no device.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// No section, or one of another kind.
    #[error(transparent)]
    Section(#[from] SavedError),
    /// The host gives no event descriptor.
    #[error("Could not create an event descriptor")]
    Event(#[source] std::io::Error),
    /// The worker cannot poll for the device.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A queue of the device model has an impossible size. A bug.
    #[error("Queue {queue} of the device has the impossible size {size}")]
    QueueSize {
        /// The queue.
        queue: usize,
        /// Its largest size, as the model says.
        size: u16,
    },
}

/// What every virtio device is built of.
#[derive(Debug)]
pub struct MmioParts {
    /// Unique name in the machine, such as `blk0`.
    pub id: String,
    /// Guest memory.
    pub ram: GuestRam,
    /// The interrupt, to be bound as an edge-triggered irqfd.
    pub irq: EventFd,
    /// Whose thread the device works on.
    pub worker: Worker,
    /// Who is told when the device fails.
    pub on_failure: FailureListener,
}

/// Who is told why a device stands still until its driver resets it. A driver that brings that about again and again is
/// told of some times only.
pub struct FailureListener(Box<dyn Fn(&str) + Send + Sync>);

impl FailureListener {
    /// Has `told` called with the reason, from the device's worker or a vCPU's thread, which waits for it.
    pub fn new(told: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Box::new(told))
    }
}

impl fmt::Debug for FailureListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailureListener").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Shared<D> {
    id: String,
    interrupt: Interrupt,
    notifiers: Vec<EventFd>,
    /// Written to make the worker look at the device's own sources.
    look: EventFd,
    /// Set while the device is asked to stand still, so that it stops fetching before the lock is had.
    hold: Arc<AtomicBool>,
    core: Mutex<Core<D>>,
}

/// A virtio device in its MMIO window.
#[derive(Debug)]
pub struct Mmio<D> {
    shared: Arc<Shared<D>>,
    _polled: Attachment,
}

impl<D: VirtioDevice> Mmio<D> {
    /// Puts `device` behind a transport in its power-on state.
    ///
    /// # Errors
    /// [`MmioError`] if the host refuses descriptors or polling.
    pub fn new(device: D, parts: MmioParts) -> Result<Self, MmioError> {
        Self::build(device, parts, |_| Ok(()))
    }

    /// Takes the section of `parts.id` out of `state` and makes the device of it. It stands still until it is resumed.
    ///
    /// # Errors
    /// [`MmioError`] if the section is missing, of another kind, or not one of this device as it is configured here.
    pub fn restore(state: &mut SavedState, device_parts: D::Parts, parts: MmioParts) -> Result<Self, MmioError> {
        let saved = state.take::<D::Saved>(&parts.id)?;
        let (device, transport) = D::restore(&parts.id, saved, device_parts)?;
        let id = parts.id.clone();
        Self::build(device, parts, |core| core.restore(&id, &transport))
    }

    fn build(
        device: D,
        parts: MmioParts,
        prepare: impl FnOnce(&mut Core<D>) -> Result<(), RestoreError>,
    ) -> Result<Self, MmioError> {
        let MmioParts { id, ram, irq, worker, on_failure } = parts;
        let hold = Arc::new(AtomicBool::new(false));
        let interrupt = Interrupt::new(irq);
        let (mut queues, mut notifiers) = (Vec::new(), Vec::new());
        for (index, &size) in device.queue_max_sizes().iter().enumerate() {
            let queue = Queue::new(size).map_err(|_| MmioError::QueueSize { queue: index, size })?;
            let notifier = EventFd::new(EFD_NONBLOCK).map_err(MmioError::Event)?;
            notifiers.push(notifier.try_clone().map_err(MmioError::Event)?);
            queues.push(Virtq::new(index, queue, ram.clone(), notifier, Arc::clone(&hold)));
        }
        let look = EventFd::new(EFD_NONBLOCK).map_err(MmioError::Event)?;
        let io = Io { ram, features: 0, queues, interrupt: interrupt.clone() };
        let mut core = Core::new(id.clone(), device, io, look.try_clone().map_err(MmioError::Event)?, on_failure);
        prepare(&mut core)?;
        hold.store(core.run() == Run::Standing, Ordering::Release);
        let shared = Arc::new(Shared { id, interrupt, notifiers, look, hold, core: Mutex::new(core) });
        let polled = worker.attach(Box::new(Polling { shared: Arc::clone(&shared) }))?;
        Ok(Self { shared, _polled: polled })
    }

    /// The event of each queue, by index, to be bound as ioeventfds at [`QUEUE_NOTIFY`].
    ///
    /// # Errors
    /// The host's refusal to duplicate a descriptor.
    pub fn queue_notifiers(&self) -> std::io::Result<Vec<EventFd>> {
        self.shared.notifiers.iter().map(EventFd::try_clone).collect()
    }

    /// Calls `control` with the device, between its other calls: for what the machine asks of it beside [`Device`]. Work
    /// on a queue is not done here but by the worker, after a kick.
    pub fn with<R>(&self, control: impl FnOnce(&mut D, &mut Io) -> R) -> R {
        let mut core = self.shared.lock();
        let (device, io) = core.parts();
        control(device, io)
    }
}

impl<D: VirtioDevice> Shared<D> {
    fn lock(&self) -> MutexGuard<'_, Core<D>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_until(&self, deadline: Instant) -> Option<MutexGuard<'_, Core<D>>> {
        const PAUSE: Duration = Duration::from_micros(50);
        loop {
            match self.core.try_lock() {
                Ok(core) => return Some(core),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        }
    }
}

impl<D: VirtioDevice> BusDevice for Mmio<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.shared.lock().device().read_config(offset, data);
            return;
        }
        // Registers are read and written 32 bits wide and aligned (virtio 1.3, 4.2.2.2); all else reads as zeros.
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            INTERRUPT_STATUS => self.shared.interrupt.pending(),
            CONFIG_GENERATION => self.shared.interrupt.generation(),
            _ => self.shared.lock().read(offset),
        };
        *data = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.shared.lock().write_config(offset, data);
            return;
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(data);
        match offset {
            QUEUE_NOTIFY => {
                if let Some(notifier) = usize::try_from(value).ok().and_then(|queue| self.shared.notifiers.get(queue)) {
                    // The only refusal is a counter at its end, and then the kick is there already.
                    let _ = notifier.write(1);
                }
            }
            INTERRUPT_ACK => self.shared.interrupt.acknowledge(value),
            _ => self.shared.lock().write(offset, value),
        }
    }
}

impl<D: VirtioDevice> Device for Mmio<D> {
    fn id(&self) -> &str {
        &self.shared.id
    }

    fn quiesce(&self, within: Duration) -> Result<(), QuiesceError> {
        let shared = &self.shared;
        let deadline = Instant::now() + within;
        shared.hold.store(true, Ordering::Release);
        let busy = |in_flight| QuiesceError::StillBusy { id: shared.id.clone(), in_flight, waited: within };
        let Some(mut core) = shared.lock_until(deadline) else {
            shared.hold.store(false, Ordering::Release);
            for notifier in &shared.notifiers {
                let _ = notifier.write(1);
            }
            return Err(busy(1));
        };
        let outcome = core.quiesce(deadline).map_err(|refusal| match refusal {
            core::Refusal::Busy(in_flight) => busy(in_flight),
            core::Refusal::Flush(source) => QuiesceError::Flush { id: shared.id.clone(), source },
        });
        if outcome.is_err() {
            shared.hold.store(false, Ordering::Release);
            core.look_at_everything();
        }
        outcome
    }

    fn resume(&self) {
        let mut core = self.shared.lock();
        self.shared.hold.store(false, Ordering::Release);
        core.resume();
        self.shared.interrupt.raise_pending();
    }

    fn save(&self, state: &mut SavedState) -> Result<(), SavedError> {
        let core = self.shared.lock();
        state.put(&self.shared.id, &core.device().save(core.save()))
    }

    fn reset(&self) {
        self.shared.lock().power_on();
    }

    fn release(&self) {
        self.with(|device, _| device.release());
    }

    fn reacquire(&self) -> std::io::Result<()> {
        self.with(|device, _| device.reacquire())
    }

    fn announce(&self) {
        self.with(|device, io| device.announce(io));
    }

    fn log_dirty(&self, on: bool) -> std::io::Result<()> {
        self.with(|device, io| device.log_dirty(io, on))
    }

    fn harvest_dirty(&self, mark: &mut dyn FnMut(Gpa)) {
        self.with(|device, _| device.harvest_dirty(mark));
    }
}

/// The worker's end of a device.
struct Polling<D> {
    shared: Arc<Shared<D>>,
}

impl<D: VirtioDevice> Task for Polling<D> {
    fn begin(&mut self, polls: &mut Polls<'_, '_>) -> Result<(), WorkerError> {
        let core = self.shared.lock();
        let device = core.device();
        for (queue, notifier) in self.shared.notifiers.iter().enumerate() {
            if device.queue_owner(queue) == QueueOwner::Worker {
                polls.add(notifier.as_raw_fd(), queue_token(queue))?;
            }
        }
        polls.add(self.shared.look.as_raw_fd(), LOOK_TOKEN)?;
        device.sources().into_iter().try_for_each(|source| polls.add(source.fd, source.token))
    }

    fn ready(&mut self, token: u32, _: &mut Polls<'_, '_>) {
        match token {
            LOOK_TOKEN => {
                let _ = self.shared.look.read();
                self.shared.lock().on_every_source();
            }
            token if token & QUEUE_TOKEN != 0 => {
                let queue = (token ^ QUEUE_TOKEN) as usize;
                // Empty if an earlier look has drained it.
                let _ = self.shared.notifiers[queue].read();
                self.shared.lock().on_kick(queue);
            }
            token => self.shared.lock().on_source(token),
        }
    }
}

fn queue_token(queue: usize) -> u32 {
    QUEUE_TOKEN | u32::try_from(queue).expect("a device has a handful of queues")
}
