//! Registers, device and queues of one virtio-mmio device: what happens under the transport's lock.
//!
//! ```text
//! Status: 0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK        any --write 0--> 0
//!                                                         | fault
//!                                                         '--> DEVICE_NEEDS_RESET --write 0--> 0
//! Run:    Idle <--> Started     (Started needs DRIVER_OK without DEVICE_NEEDS_RESET)
//!         Idle, Started --quiesce--> Standing --resume--> Idle, Started
//! ```
//!
//! Invariant: the device model is called with work only while `Started`.

use super::super::{BrokenRing, Fault, Io, MmioSavedV1, Progress, QueueSavedV1, VirtioDevice};
use super::FailureListener;
use std::error::Error;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

/// "virt" (virtio 1.3, 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout.
const VERSION: u32 = 2;
/// "gdwt": drivers do not look at it.
const VENDOR: u32 = 0x7477_6467;

pub(super) const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(super) const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
pub(super) const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
pub(super) const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
pub(super) const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The features of the transport itself.
pub(super) const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// How long a device may take to stop when its driver resets it or breaks it: the vCPU waits that long.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// So many complaints about one driver are warnings, and told; a guest that goes on does not fill the host's log.
const LOUD_COMPLAINTS: u32 = 16;

/// Whether the device works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    /// No driver, or a broken one.
    Idle,
    /// Between `start` and `stop`.
    Started,
    /// Quiesced by the machine.
    Standing,
}

/// Why a device does not stand still.
#[derive(Debug)]
pub(super) enum Refusal {
    Busy(usize),
    Flush(std::io::Error),
}

/// What the driver wrote about a queue; checked when it declares the queue ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueSetup {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

#[derive(Debug)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueSetup>,
}

impl Registers {
    fn power_on(max_sizes: &[u16]) -> Self {
        let setup = |&size: &u16| QueueSetup { size, descriptors: 0, available: 0, used: 0 };
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: max_sizes.iter().map(setup).collect(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Core<D> {
    id: String,
    device: D,
    pub(super) io: Io,
    pub(super) registers: Registers,
    pub(super) run: Run,
    look: EventFd,
    on_failure: FailureListener,
    complaints: u32,
}

impl<D: VirtioDevice> Core<D> {
    pub(super) fn new(id: String, device: D, io: Io, look: EventFd, on_failure: FailureListener) -> Self {
        let registers = Registers::power_on(device.queue_max_sizes());
        Self { id, device, io, registers, run: Run::Idle, look, on_failure, complaints: 0 }
    }

    pub(super) fn run(&self) -> Run {
        self.run
    }

    pub(super) fn device(&self) -> &D {
        &self.device
    }

    pub(super) fn parts(&mut self) -> (&mut D, &mut Io) {
        (&mut self.device, &mut self.io)
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.registers.queue_select).ok().filter(|&queue| queue < self.io.queues.len())
    }

    /// Reads a register (virtio 1.3, 4.2.2); those that are not there or are write-only read as zero.
    pub(super) fn read(&self, offset: u64) -> u32 {
        let registers = &self.registers;
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.device_type(),
            0x0c => VENDOR,
            0x10 => half(self.offered(), registers.device_features_select),
            0x34 => self.selected().map_or(0, |queue| self.device.queue_max_sizes()[queue].into()),
            0x44 => self.selected().map_or(0, |queue| self.io.queues[queue].is_ready().into()),
            0x70 => registers.status,
            // Length and base of a shared memory region that is not there.
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            _ => 0,
        }
    }

    /// Writes a register; what is read-only, not there, or not allowed at this stage of the setup is ignored.
    pub(super) fn write(&mut self, offset: u64, value: u32) {
        let registers = &mut self.registers;
        match offset {
            0x14 => registers.device_features_select = value,
            0x20 if registers.status & (DRIVER | FEATURES_OK) == DRIVER => {
                set_half(&mut registers.driver_features, registers.driver_features_select, value);
            }
            0x24 => registers.driver_features_select = value,
            0x30 => registers.queue_select = value,
            0x38 | 0x80..=0xa4 => self.set_up_queue(offset, value),
            0x44 => self.declare_ready(value),
            0x70 => self.set_status(value),
            _ => tracing::trace!(id = self.id, offset, value, "Write to a register that takes none now"),
        }
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.selected().filter(|&queue| !self.io.queues[queue].is_ready()) else { return };
        let setup = &mut self.registers.queues[queue];
        match offset {
            // A size over 16 bits is as impossible as 0, and is refused with it once the queue is declared ready.
            0x38 => setup.size = u16::try_from(value).unwrap_or(0),
            0x80 => set_half(&mut setup.descriptors, 0, value),
            0x84 => set_half(&mut setup.descriptors, 1, value),
            0x90 => set_half(&mut setup.available, 0, value),
            0x94 => set_half(&mut setup.available, 1, value),
            0xa0 => set_half(&mut setup.used, 0, value),
            0xa4 => set_half(&mut setup.used, 1, value),
            _ => {}
        }
    }

    fn declare_ready(&mut self, value: u32) {
        let Some(queue) = self.selected() else { return };
        let ready = self.io.queues[queue].is_ready();
        if value == 0 && ready {
            self.withdraw(queue);
        } else if value == 1
            && !ready
            && self.registers.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK
            && let Err(broken) = self.make_ready(queue)
        {
            self.fail(&broken.into());
        }
    }

    fn withdraw(&mut self, queue: usize) {
        let started = self.run == Run::Started;
        if started && !self.stop() {
            return;
        }
        self.io.queues[queue].queue_mut().reset();
        if started {
            self.start();
        }
    }

    fn make_ready(&mut self, queue: usize) -> Result<(), BrokenRing> {
        let max_size = self.device.queue_max_sizes()[queue];
        let event_index = self.io.has(VIRTIO_RING_F_EVENT_IDX);
        let made = queue_from(self.registers.queues[queue], max_size, event_index)
            .map_err(|source| BrokenRing::Setup { queue, source })?;
        let place = &mut self.io.queues[queue];
        *place.queue_mut() = made;
        place.check_rings().inspect_err(|_| place.queue_mut().reset())
    }

    fn set_status(&mut self, value: u32) {
        let old = self.registers.status;
        if value == 0 {
            self.reset_by_driver();
            return;
        }
        if old & !value & !NEEDS_RESET != 0 {
            tracing::debug!(id = self.id, old, value, "The driver took back a status bit; only a reset does that");
            return;
        }
        let new = value & !old;
        self.registers.status |= new & (ACKNOWLEDGE | DRIVER | FAILED);
        if new & FEATURES_OK != 0 && self.registers.status & DRIVER != 0 {
            self.accept_features();
        }
        if new & DRIVER_OK != 0 && self.registers.status & (FEATURES_OK | NEEDS_RESET) == FEATURES_OK {
            self.registers.status |= DRIVER_OK;
            self.io.interrupt.set_live(true);
            self.start();
        }
    }

    fn accept_features(&mut self) {
        let wanted = self.registers.driver_features;
        let unknown = wanted & !self.offered();
        if unknown != 0 || wanted & (1 << VIRTIO_F_VERSION_1) == 0 {
            self.complain(format_args!("The driver's features {wanted:#x} are refused (unknown: {unknown:#x})"));
            return;
        }
        self.registers.status |= FEATURES_OK;
        self.io.features = wanted;
    }

    fn reset_by_driver(&mut self) {
        if self.run == Run::Started && !self.stop() {
            // The driver reads Status until it is 0, and may try again.
            self.registers.status |= NEEDS_RESET;
            return;
        }
        self.power_on();
    }

    /// Brings all but the back end to the state after power-on. The device must be stopped.
    pub(super) fn power_on(&mut self) {
        self.registers = Registers::power_on(self.device.queue_max_sizes());
        self.io.features = 0;
        for queue in &mut self.io.queues {
            queue.queue_mut().reset();
        }
        self.io.interrupt.set_live(false);
        self.io.interrupt.restore(0, self.io.interrupt.generation());
        self.device.reset();
    }

    fn is_live(&self) -> bool {
        self.registers.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    fn start(&mut self) {
        self.run = Run::Started;
        match self.device.start(&mut self.io) {
            Ok(()) => self.look_at_everything(),
            Err(fault) => self.fail(&fault),
        }
    }

    /// Has every ready queue and every source looked at by whoever does that.
    pub(super) fn look_at_everything(&self) {
        for queue in self.io.queues.iter().filter(|queue| queue.is_ready()) {
            queue.kick();
        }
        // The only refusal is a counter at its end, and then the look is due already.
        let _ = self.look.write(1);
    }

    fn stop(&mut self) -> bool {
        match self.device.stop(&mut self.io, STOP_WITHIN) {
            Ok(()) => self.run = Run::Idle,
            Err(in_flight) => {
                self.complain(format_args!("The device does not stop, {in_flight} requests are in flight"));
            }
        }
        self.run == Run::Idle
    }

    /// Logs what the driver can provoke as often as it likes.
    fn complain(&mut self, complaint: std::fmt::Arguments<'_>) {
        self.complaints = self.complaints.saturating_add(1);
        if self.is_loud() {
            tracing::warn!(id = self.id, "{complaint}");
        } else {
            tracing::debug!(id = self.id, "{complaint}");
        }
    }

    fn is_loud(&self) -> bool {
        self.complaints <= LOUD_COMPLAINTS
    }

    /// Stops all work until the driver resets the device, and tells it so (virtio 1.3, 2.1.2).
    fn fail(&mut self, fault: &Fault) {
        let cause = fault.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        let reason = format!("{fault}{cause}");
        self.complain(format_args!("The device needs a reset by its driver: {reason}"));
        if self.is_loud() {
            (self.on_failure.0)(&reason);
        }
        self.registers.status |= NEEDS_RESET;
        if self.run == Run::Started {
            self.stop();
        }
        self.io.interrupt.config_changed();
        self.io.interrupt.set_live(false);
    }

    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.registers.status & DRIVER != 0 {
            self.device.write_config(&mut self.io, offset, data);
        }
    }

    fn works(&self) -> bool {
        self.run == Run::Started && self.is_live()
    }

    pub(super) fn on_kick(&mut self, queue: usize) {
        if !self.works() || !self.io.queues[queue].is_ready() {
            return;
        }
        match self.device.process(&mut self.io, queue) {
            Ok(Progress::Idle) => {}
            Ok(Progress::More) => self.io.queues[queue].kick(),
            Err(fault) => self.fail(&fault),
        }
    }

    pub(super) fn on_source(&mut self, token: u32) {
        if self.works()
            && let Err(fault) = self.device.on_source(&mut self.io, token)
        {
            self.fail(&fault);
        }
    }

    pub(super) fn on_every_source(&mut self) {
        for source in self.device.sources() {
            self.on_source(source.token);
        }
    }

    pub(super) fn quiesce(&mut self, deadline: Instant) -> Result<(), Refusal> {
        let started = match self.run {
            Run::Standing => return Ok(()),
            Run::Started => true,
            Run::Idle => false,
        };
        if started {
            let within = deadline.saturating_duration_since(Instant::now());
            self.device.stop(&mut self.io, within).map_err(Refusal::Busy)?;
            self.run = Run::Idle;
        }
        if let Err(error) = self.device.flush() {
            if started {
                self.start();
            }
            return Err(Refusal::Flush(error));
        }
        self.run = Run::Standing;
        Ok(())
    }

    pub(super) fn resume(&mut self) {
        if self.run == Run::Standing {
            self.run = Run::Idle;
            self.io.interrupt.set_live(self.is_live());
            if self.is_live() {
                self.start();
            }
        }
    }

    pub(super) fn save(&self) -> MmioSavedV1 {
        let Registers {
            status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            queues: setups,
        } = &self.registers;
        MmioSavedV1 {
            device_status: *status,
            device_features_select: *device_features_select,
            driver_features_select: *driver_features_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            interrupt_status: self.io.interrupt.pending(),
            config_generation: self.io.interrupt.generation(),
            queues: self.io.queues.iter().zip(setups).map(|(queue, setup)| save_queue(queue.state(), *setup)).collect(),
        }
    }
}

/// The queue that the driver describes. Its rings are not checked yet.
pub(super) fn queue_from(setup: QueueSetup, max_size: u16, event_index: bool) -> Result<Queue, virtio_queue::Error> {
    let QueueSetup { size, descriptors, available, used } = setup;
    Queue::try_from(QueueState {
        max_size,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: event_index,
        size,
        ready: true,
        desc_table: descriptors,
        avail_ring: available,
        used_ring: used,
    })
}

fn save_queue(state: QueueState, setup: QueueSetup) -> QueueSavedV1 {
    let QueueState {
        max_size: _,
        next_avail,
        next_used,
        event_idx_enabled,
        size: _,
        ready,
        // While the queue is ready, its setup cannot change.
        desc_table: _,
        avail_ring: _,
        used_ring: _,
    } = state;
    let QueueSetup { size, descriptors, available, used } = setup;
    QueueSavedV1 {
        size,
        ready,
        descriptors,
        available,
        used,
        next_available: next_avail,
        next_used,
        event_index: event_idx_enabled,
    }
}

/// The 32 bits of `value` that `select` names.
fn half(value: u64, select: u32) -> u32 {
    let half = match select {
        0 => value & u64::from(u32::MAX),
        1 => value >> 32,
        _ => 0,
    };
    u32::try_from(half).expect("a half has 32 bits")
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !u64::from(u32::MAX) | u64::from(half),
        1 => *value = *value & u64::from(u32::MAX) | u64::from(half) << 32,
        _ => {}
    }
}
