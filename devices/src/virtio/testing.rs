//! The driver's side of virtio for tests: memory, rings, and the registers of a transport. Hostile drivers are made by
//! writing raw descriptors and indices.

use super::{Interrupt, Io, Mmio, VirtioDevice, Virtq};
use crate::{BusDevice, Gpa, GuestRam};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueState};
use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Where the second of the two regions of [`ram`] begins.
pub(crate) const REGION_BORDER: u64 = 0x8_0000;
/// The length of both together.
pub(crate) const RAM_BYTES: u64 = 0x10_0000;
/// From here on the memory of [`ram`] is free of rings.
pub(crate) const FREE: u64 = 0x4_0000;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

/// 1 MiB in two regions without a gap.
pub(crate) fn ram() -> GuestRam {
    let region = usize::try_from(REGION_BORDER).unwrap();
    GuestRam::from_ranges(&[(Gpa::default(), region), (vm_memory::GuestAddress(REGION_BORDER), region)]).unwrap()
}

fn at(address: u64) -> Gpa {
    vm_memory::GuestAddress(address)
}

/// The driver's view of one split queue.
#[derive(Debug)]
pub(crate) struct DriverRing {
    ram: GuestRam,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl DriverRing {
    /// An empty ring for queue `index`, whose size is at most 256.
    pub(crate) fn new(ram: &GuestRam, index: u64, size: u16) -> Self {
        let base = 0x1000 + index * 0x3000;
        assert!(size <= 256 && base + 0x3000 <= FREE);
        Self {
            ram: ram.clone(),
            size,
            descriptors: base,
            available: base + 0x1000,
            used: base + 0x2000,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// Writes a descriptor as it is.
    pub(crate) fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        write_descriptor(&self.ram, self.descriptors + 16 * u64::from(index), address, length, flags, next);
    }

    /// Puts `head` into the available ring.
    pub(crate) fn make_available(&mut self, head: u16) {
        let entry = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.ram.write_obj(head, at(entry)).unwrap();
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Sets the available index as it is.
    pub(crate) fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.ram.write_obj(index, at(self.available + 2)).unwrap();
    }

    /// Sets the flags of the available ring.
    pub(crate) fn set_available_flags(&self, flags: u16) {
        self.ram.write_obj(flags, at(self.available)).unwrap();
    }

    /// Sets `used_event`: the driver wants an interrupt when the used index passes it.
    pub(crate) fn set_used_event(&self, index: u16) {
        self.ram.write_obj(index, at(self.available + 4 + 2 * u64::from(self.size))).unwrap();
    }

    /// The flags of the used ring.
    pub(crate) fn used_flags(&self) -> u16 {
        self.ram.read_obj(at(self.used)).unwrap()
    }

    /// Offers a good chain of buffers, each with whether the device may write it; its head.
    pub(crate) fn offer(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (position, &(address, length, writable)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = if position + 1 < buffers.len() { NEXT } else { 0 };
            let write = if writable { WRITE } else { 0 };
            self.descriptor(index, address, length, more | write, self.next_descriptor);
        }
        self.make_available(head);
        head
    }

    /// The entries of the used ring since the last call: head and bytes written.
    pub(crate) fn completed(&mut self) -> Vec<(u32, u32)> {
        let index: u16 = self.ram.read_obj(at(self.used + 2)).unwrap();
        let mut out = Vec::new();
        while self.next_used != index {
            let entry = self.used + 4 + 8 * u64::from(self.next_used % self.size);
            out.push((self.ram.read_obj(at(entry)).unwrap(), self.ram.read_obj(at(entry + 4)).unwrap()));
            self.next_used = self.next_used.wrapping_add(1);
        }
        out
    }

    fn state(&self, event_idx_enabled: bool) -> QueueState {
        QueueState {
            max_size: self.size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        }
    }
}

/// Writes a descriptor at an address; for indirect tables.
pub(crate) fn write_descriptor(ram: &GuestRam, place: u64, address: u64, length: u32, flags: u16, next: u16) {
    ram.write_obj(address, at(place)).unwrap();
    ram.write_obj(length, at(place + 8)).unwrap();
    ram.write_obj(flags, at(place + 12)).unwrap();
    ram.write_obj(next, at(place + 14)).unwrap();
}

/// A device's queues without a transport: all are ready, and interrupts are live.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) io: Io,
    pub(crate) rings: Vec<DriverRing>,
    pub(crate) irq: EventFd,
}

impl Bench {
    /// Queues of `sizes`, with `features` negotiated.
    pub(crate) fn new(sizes: &[u16], features: u64) -> Self {
        let ram = ram();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(irq.try_clone().unwrap());
        interrupt.set_live(true);
        let rings: Vec<_> = (0..).zip(sizes).map(|(index, &size)| DriverRing::new(&ram, index, size)).collect();
        let queues = rings.iter().enumerate().map(|(index, ring)| {
            let queue = Queue::try_from(ring.state(features & EVENT_IDX != 0)).unwrap();
            Virtq::new(index, queue, ram.clone(), EventFd::new(EFD_NONBLOCK).unwrap(), Arc::default())
        });
        Self { io: Io { queues: queues.collect(), ram, features, interrupt }, rings, irq }
    }

    /// Whether the device raised an interrupt since the last call.
    pub(crate) fn interrupted(&self) -> bool {
        self.irq.read().is_ok()
    }
}

/// A driver at the registers of a transport.
#[derive(Debug)]
pub(crate) struct Driver<'a, D> {
    pub(crate) mmio: &'a Mmio<D>,
}

impl<D: VirtioDevice> Driver<'_, D> {
    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(0x70)
    }

    /// Sets `bits` in `Status`, as drivers do; whether all of it took.
    pub(crate) fn add_status(&self, bits: u32) -> bool {
        let status = self.status() | bits;
        self.write(0x70, status);
        self.status() == status
    }

    /// What the device offers.
    pub(crate) fn offered(&self) -> u64 {
        self.write(0x14, 1);
        let high = self.read(0x10);
        self.write(0x14, 0);
        u64::from(high) << 32 | u64::from(self.read(0x10))
    }

    /// From reset to `FEATURES_OK`; whether the device agreed.
    pub(crate) fn negotiate(&self, features: u64) -> bool {
        self.write(0x70, 0);
        self.add_status(1);
        self.add_status(2);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x24, select);
            self.write(0x20, u32::try_from(half).unwrap());
        }
        self.add_status(8)
    }

    /// Describes queue `index`, and declares it ready.
    pub(crate) fn set_up(&self, index: u32, ring: &DriverRing) {
        self.write(0x30, index);
        self.write(0x38, ring.size.into());
        for (register, address) in [(0x80, ring.descriptors), (0x90, ring.available), (0xa0, ring.used)] {
            self.write(register, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write(register + 4, u32::try_from(address >> 32).unwrap());
        }
        self.write(0x44, 1);
    }

    /// From reset to `DRIVER_OK`, with all `rings`.
    pub(crate) fn bring_up(&self, features: u64, rings: &[DriverRing]) {
        assert!(self.negotiate(features));
        for (index, ring) in (0..).zip(rings) {
            self.set_up(index, ring);
        }
        assert!(self.add_status(4), "status {:#x}", self.status());
    }

    pub(crate) fn kick(&self, queue: u32) {
        self.write(0x50, queue);
    }
}

/// Waits until `holds`, or fails the test.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
