//! The driver's side of a device's queues, for tests of device models without a transport.

use super::queue::Virtq;
use super::{Interrupt, Io};
use crate::{Gpa, GuestRam};
use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_oneof};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of guest memory.
pub(crate) const RAM: u64 = 8 << 20;
/// Where tests have their buffers; the rings are below.
pub(crate) const BUFFERS: u64 = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A buffer as a driver offers it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Offer {
    /// For the device to read.
    Read(u64, u32),
    /// For the device to write.
    Write(u64, u32),
}

/// Rings as no driver would write them.
#[derive(Debug, Clone)]
pub(crate) struct Scribble {
    /// Address, length, flags, next.
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
}

/// Any rings, of which many are almost right.
pub(crate) fn scribbles() -> impl Strategy<Value = Scribble> {
    let address = prop_oneof![4 => BUFFERS..RAM, 1 => any::<u64>(), 1 => 0..RAM + 0x1000];
    let length = prop_oneof![6 => 0..0x4000_u32, 1 => any::<u32>()];
    let descriptors = vec((address, length, 0..8_u16, 0..18_u16), 0..17);
    (descriptors, vec(0..18_u16, 0..20)).prop_map(|(descriptors, heads)| Scribble { descriptors, heads })
}

/// A driver that has accepted the features of `io` and set up all of its queues.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) io: Io,
    pub(crate) hold: Arc<AtomicBool>,
    irq: EventFd,
    size: u16,
    next_descriptor: Vec<u16>,
    used_seen: Vec<u16>,
}

impl Driver {
    pub(crate) fn new(queues: usize, size: u16, features: u64) -> Self {
        let ram = GuestRam::from_ranges(&[(Gpa::new(0), usize::try_from(RAM).unwrap())]).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(irq.try_clone().unwrap());
        interrupt.set_live(true);
        let hold = Arc::new(AtomicBool::new(false));
        let queue = |index| {
            let state = QueueState {
                max_size: size,
                next_avail: 0,
                next_used: 0,
                event_idx_enabled: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
                size,
                ready: true,
                desc_table: table(index),
                avail_ring: available(index),
                used_ring: used(index),
            };
            let notifier = EventFd::new(EFD_NONBLOCK).unwrap();
            Virtq::new(index, Queue::try_from(state).unwrap(), ram.clone(), notifier, Arc::clone(&hold))
        };
        let queues: Vec<_> = (0..queues).map(queue).collect();
        let (next_descriptor, used_seen) = (vec![0; queues.len()], vec![0; queues.len()]);
        let io = Io { ram, features, queues, interrupt };
        Self { io, hold, irq, size, next_descriptor, used_seen }
    }

    /// Offers a chain of these buffers and tells its head.
    pub(crate) fn offer(&mut self, queue: usize, chain: &[Offer]) -> u16 {
        let first = self.next_descriptor[queue];
        for (place, offer) in chain.iter().enumerate() {
            let at = (first + u16::try_from(place).unwrap()) % self.size;
            let next = (at + 1) % self.size;
            let more = if place + 1 < chain.len() { NEXT } else { 0 };
            let (address, length, flags) = match *offer {
                Offer::Read(address, length) => (address, length, more),
                Offer::Write(address, length) => (address, length, more | WRITE),
            };
            self.descriptor(queue, at, address, length, flags, next);
        }
        self.next_descriptor[queue] = (first + u16::try_from(chain.len()).unwrap()) % self.size;
        self.make_available(queue, first);
        first
    }

    pub(crate) fn descriptor(&self, queue: usize, at: u16, address: u64, length: u32, flags: u16, next: u16) {
        let place = table(queue) + 16 * u64::from(at);
        self.put(place, &address.to_le_bytes());
        self.put(place + 8, &length.to_le_bytes());
        self.put(place + 12, &flags.to_le_bytes());
        self.put(place + 14, &next.to_le_bytes());
    }

    pub(crate) fn make_available(&self, queue: usize, head: u16) {
        let index: u16 = self.io.ram.read_obj(Gpa::new(available(queue) + 2)).unwrap();
        self.put(available(queue) + 4 + 2 * u64::from(index % self.size), &head.to_le_bytes());
        self.put(available(queue) + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Fills the rings of `queue` with whatever these descriptors and heads are.
    pub(crate) fn scribble(&self, queue: usize, Scribble { descriptors, heads }: &Scribble) {
        for (at, &(address, length, flags, next)) in (0..self.size).zip(descriptors) {
            self.descriptor(queue, at, address, length, flags, next);
        }
        heads.iter().for_each(|&head| self.make_available(queue, head));
    }

    /// What the device has used since the last call: heads and lengths.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let index: u16 = self.io.ram.read_obj(Gpa::new(used(queue) + 2)).unwrap();
        let mut elements = Vec::new();
        while self.used_seen[queue] != index {
            let place = used(queue) + 4 + 8 * u64::from(self.used_seen[queue] % self.size);
            let element: [u32; 2] = [0, 4].map(|offset| self.io.ram.read_obj(Gpa::new(place + offset)).unwrap());
            elements.push(element.into());
            self.used_seen[queue] = self.used_seen[queue].wrapping_add(1);
        }
        elements
    }

    /// How far the device asks for kicks, by `RING_EVENT_IDX`.
    pub(crate) fn kick_event(&self, queue: usize) -> u16 {
        self.io.ram.read_obj(Gpa::new(used(queue) + 4 + 8 * u64::from(self.size))).unwrap()
    }

    /// Whether the device asked for no kicks, without `RING_EVENT_IDX`.
    pub(crate) fn kicks_are_suppressed(&self, queue: usize) -> bool {
        self.io.ram.read_obj::<u16>(Gpa::new(used(queue))).unwrap() & 1 == 1
    }

    /// Whether the device raised its interrupt since the last call.
    pub(crate) fn interrupted(&self) -> bool {
        self.irq.read().is_ok()
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.io.ram.write_slice(bytes, Gpa::new(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.io.ram.read_slice(&mut bytes, Gpa::new(address)).unwrap();
        bytes
    }

    pub(crate) fn clean(&self) {
        self.io.ram.iter().for_each(|region| (**region).bitmap().reset());
    }

    pub(crate) fn is_dirty(&self, address: u64) -> bool {
        let (region, offset) = self.io.ram.to_region_addr(Gpa::new(address)).unwrap();
        region.bitmap().dirty_at(usize::try_from(offset.raw_value()).unwrap())
    }

    pub(crate) fn set_hold(&self, hold: bool) {
        self.hold.store(hold, Ordering::Release);
    }
}

fn table(queue: usize) -> u64 {
    0x1_0000 * (queue as u64 + 1)
}

fn available(queue: usize) -> u64 {
    table(queue) + 0x8000
}

fn used(queue: usize) -> u64 {
    table(queue) + 0xa000
}
