//! One split virtqueue as a device uses it: chains come out checked, used buffers go in.
//!
//! The driver's rings are untrusted. [`Virtq::pop`] hands out only chains that end, whose buffers lie in guest memory,
//! with the readable ones first; all else is a [`BrokenRing`], after which the transport fails the device and nobody
//! touches its rings again until the driver resets it.

use crate::{Gpa, GuestRam};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

/// The most descriptors in one chain. Linux takes this many buffers in one `preadv` (`IOV_MAX`), and no driver that
/// keeps to `queue_max_sizes` (virtio 1.3, 2.7.5.3.1) needs more.
pub const MAX_CHAIN: usize = 1024;

/// A piece of guest memory; what is written through it is marked dirty.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// How a driver broke the rules of a queue.
#[derive(Debug, Error)]
pub enum BrokenRing {
    /// A ring lies outside of guest memory.
    #[error("A ring of queue {queue} lies outside of guest memory")]
    RingOutside {
        /// The queue.
        queue: usize,
    },
    /// The driver declared a queue ready with a size or an address that no queue has.
    #[error("Queue {queue} was set up with an impossible size or address")]
    Setup {
        /// The queue.
        queue: usize,
        /// What was found.
        #[source]
        source: virtio_queue::Error,
    },
    /// The available index is further ahead than the ring is long, or a ring could not be accessed.
    #[error("The rings of queue {queue} are broken")]
    Ring {
        /// The queue.
        queue: usize,
        /// What was found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A chain loops, leaves its table, or its indirect table is not one.
    #[error("The chain at descriptor {head} of queue {queue} does not end: it loops or leaves its table")]
    Endless {
        /// The queue.
        queue: usize,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A chain has more descriptors than [`MAX_CHAIN`].
    #[error("The chain at descriptor {head} of queue {queue} has more than {MAX_CHAIN} descriptors")]
    TooLong {
        /// The queue.
        queue: usize,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A buffer is empty or lies, in whole or part, outside of guest memory.
    #[error("A buffer of {length:#x} bytes at {address:#x} in queue {queue} is empty or outside of guest memory")]
    BadBuffer {
        /// The queue.
        queue: usize,
        /// Address of the buffer.
        address: u64,
        /// Length of the buffer in bytes.
        length: u32,
    },
    /// A readable buffer follows a writable one.
    #[error("The chain at descriptor {head} of queue {queue} has a readable buffer after a writable one")]
    Order {
        /// The queue.
        queue: usize,
        /// First descriptor of the chain.
        head: u16,
    },
    /// A request lacks a buffer that its kind cannot do without, such as the status byte of a disk request.
    #[error("The chain at descriptor {head} of queue {queue} lacks {what}")]
    Incomplete {
        /// The queue.
        queue: usize,
        /// First descriptor of the chain.
        head: u16,
        /// What is missing.
        what: &'static str,
    },
}

/// A buffer that lies in guest memory and is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Its address.
    pub address: Gpa,
    /// Its length in bytes.
    pub length: u32,
}

/// A chain of buffers, as the driver offered it and [`Virtq::pop`] checked it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    buffers: Vec<Buffer>,
    readable: usize,
}

impl Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for the device.
    #[must_use]
    pub fn readable(&self) -> &[Buffer] {
        &self.buffers[..self.readable]
    }

    /// Where the device may write.
    #[must_use]
    pub fn writable(&self) -> &[Buffer] {
        &self.buffers[self.readable..]
    }
}

/// The length of `buffers` in bytes.
#[must_use]
pub fn total_bytes(buffers: &[Buffer]) -> usize {
    buffers.iter().map(|buffer| buffer.length as usize).sum()
}

/// The guest memory of `buffers` without the first `skip` bytes and at most `take` bytes long, in order.
///
/// A buffer that crosses two regions of guest memory gives two slices, and buffers that end early give fewer bytes.
#[must_use]
pub fn slices<'a>(ram: &'a GuestRam, buffers: &[Buffer], skip: usize, take: usize) -> Vec<GuestSlice<'a>> {
    let (mut skip, mut take) = (skip, take);
    let mut out = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        for slice in GuestMemoryBackend::get_slices(ram, buffer.address, buffer.length as usize).flatten() {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            let length = (slice.len() - skipped).min(take);
            take -= length;
            if length > 0 {
                out.extend(slice.subslice(skipped, length));
            }
        }
    }
    out
}

/// Copies from `buffers`, without their first `skip` bytes, to `data`; the bytes copied.
#[must_use]
pub fn copy_from(ram: &GuestRam, buffers: &[Buffer], skip: usize, data: &mut [u8]) -> usize {
    let mut done = 0;
    for slice in slices(ram, buffers, skip, data.len()) {
        done += slice.copy_to(&mut data[done..]);
    }
    done
}

/// Copies `data` to `buffers`, without their first `skip` bytes; the bytes copied.
#[must_use]
pub fn copy_to(ram: &GuestRam, buffers: &[Buffer], skip: usize, data: &[u8]) -> usize {
    let mut done = 0;
    for slice in slices(ram, buffers, skip, data.len()) {
        let length = slice.len();
        slice.copy_from(&data[done..done + length]);
        done += length;
    }
    done
}

/// One virtqueue: the rings, their place, and the event by which the driver kicks it.
#[derive(Debug)]
pub struct Virtq {
    index: usize,
    queue: Queue,
    ram: GuestRam,
    notifier: EventFd,
    hold: Arc<AtomicBool>,
}

impl Virtq {
    pub(crate) fn new(index: usize, queue: Queue, ram: GuestRam, notifier: EventFd, hold: Arc<AtomicBool>) -> Self {
        Self { index, queue, ram, notifier, hold }
    }

    /// Its number at the device.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether the driver has set it up. A driver may leave some queues of a device alone.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// The event that the driver's kick writes; for an accelerator in the kernel.
    #[must_use]
    pub fn notifier(&self) -> &EventFd {
        &self.notifier
    }

    /// Size, ring addresses and indices; for an accelerator in the kernel and for saving.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// A second handle, for a thread of this process that serves the queue while this one is not used.
    ///
    /// # Errors
    /// The host's refusal to duplicate a descriptor.
    pub(crate) fn lend(&self) -> std::io::Result<Self> {
        let queue = Queue::try_from(self.queue.state()).expect("the state of a queue makes one");
        let notifier = self.notifier.try_clone()?;
        Ok(Self { index: self.index, queue, ram: self.ram.clone(), notifier, hold: Arc::clone(&self.hold) })
    }

    /// Goes on where the handle that was lent has stopped.
    pub(crate) fn take_back_lent(&mut self, lent: &Self) {
        self.queue.set_next_avail(lent.queue.next_avail());
        self.queue.set_next_used(lent.queue.next_used());
    }

    /// Takes the rings back from an accelerator that stopped at `next_avail`. Such a one completes in order, so the
    /// used index in guest memory is its last word.
    ///
    /// # Errors
    /// [`BrokenRing`] if the ring cannot be read.
    pub fn take_back(&mut self, next_avail: u16) -> Result<(), BrokenRing> {
        let used = self.queue.used_idx(&self.ram, Ordering::Acquire).map_err(|source| self.broken(source))?;
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(used.0);
        Ok(())
    }

    /// The next chain that the driver offers; `None` if there is none, or if the device is asked to stand still.
    ///
    /// # Errors
    /// [`BrokenRing`] if the ring or the chain breaks a rule.
    pub fn pop(&mut self) -> Result<Option<Chain>, BrokenRing> {
        if !self.queue.ready() || self.hold.load(Ordering::Acquire) {
            return Ok(None);
        }
        let queue = self.index;
        let mut heads = self.queue.iter(&self.ram).map_err(|source| BrokenRing::Ring { queue, source })?;
        let Some(descriptors) = heads.next() else { return Ok(None) };
        let head = descriptors.head_index();
        let mut chain = Chain { head, buffers: Vec::new(), readable: 0 };
        // The iterator stops at whatever it cannot follow, so a chain is whole if its last descriptor says that it ends.
        let mut ends = false;
        for descriptor in descriptors {
            let buffer = Buffer { address: descriptor.addr(), length: descriptor.len() };
            if chain.buffers.len() == MAX_CHAIN {
                return Err(BrokenRing::TooLong { queue, head });
            }
            self.check(buffer)?;
            if !descriptor.is_write_only() {
                if chain.readable != chain.buffers.len() {
                    return Err(BrokenRing::Order { queue, head });
                }
                chain.readable += 1;
            }
            chain.buffers.push(buffer);
            ends = !descriptor.has_next();
        }
        if ends { Ok(Some(chain)) } else { Err(BrokenRing::Endless { queue, head }) }
    }

    fn check(&self, Buffer { address, length }: Buffer) -> Result<(), BrokenRing> {
        let inside = length > 0 && GuestMemoryBackend::check_range(&self.ram, address, length as usize);
        if inside { Ok(()) } else { Err(BrokenRing::BadBuffer { queue: self.index, address: address.0, length }) }
    }

    /// Puts the chain that was popped last back, to be popped again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, with `written` bytes in its writable buffers. The driver learns of it by
    /// [`Io::signal`](super::Io::signal), once for many.
    ///
    /// # Errors
    /// [`BrokenRing`] if the used ring cannot be written.
    pub fn push(&mut self, chain: &Chain, written: u32) -> Result<(), BrokenRing> {
        self.queue.add_used(&self.ram, chain.head, written).map_err(|source| self.broken(source))
    }

    /// Asks the driver not to kick while the device looks at the ring anyway.
    ///
    /// # Errors
    /// [`BrokenRing`] if the ring cannot be written.
    pub fn suppress_kicks(&mut self) -> Result<(), BrokenRing> {
        self.queue.disable_notification(&self.ram).map_err(|source| self.broken(source))
    }

    /// Asks the driver to kick again, and looks once more: `true` if chains came in between, to be popped now.
    ///
    /// # Errors
    /// [`BrokenRing`] if the ring cannot be accessed.
    pub fn accept_kicks(&mut self) -> Result<bool, BrokenRing> {
        let more = self.queue.enable_notification(&self.ram).map_err(|source| self.broken(source))?;
        Ok(more && !self.hold.load(Ordering::Acquire))
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call.
    pub(crate) fn wants_interrupt(&mut self) -> Result<bool, BrokenRing> {
        if !self.queue.ready() {
            return Ok(false);
        }
        let needed = self.queue.needs_notification(&self.ram).map_err(|source| self.broken(source))?;
        if self.queue.event_idx_enabled() {
            return Ok(needed);
        }
        // virtio-queue leaves the older, cruder flag to its callers (virtio 1.3, 2.7.7).
        let avail = GuestAddress(self.queue.avail_ring());
        let flags: u16 = self
            .ram
            .load(avail, Ordering::Relaxed)
            .map_err(|source| self.broken(virtio_queue::Error::GuestMemory(source)))?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Whether the rings lie in guest memory, checked when the driver declares the queue ready.
    pub(crate) fn check_rings(&self) -> Result<(), BrokenRing> {
        let QueueState { size, desc_table, avail_ring, used_ring, .. } = self.queue.state();
        let size = usize::from(size);
        // Lengths of the three parts: virtio 1.3, 2.7.
        let parts = [(desc_table, 16 * size), (avail_ring, 6 + 2 * size), (used_ring, 6 + 8 * size)];
        let inside = |(base, length): (u64, usize)| {
            vm_memory::GuestMemory::check_range(&self.ram, GuestAddress(base), length, Permissions::ReadWrite)
        };
        if parts.into_iter().all(inside) { Ok(()) } else { Err(BrokenRing::RingOutside { queue: self.index }) }
    }

    pub(crate) fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
    }

    pub(crate) fn kick(&self) {
        // The only refusal is a counter at its end, and then the kick is there already.
        let _ = self.notifier.write(1);
    }

    fn broken(&self, source: virtio_queue::Error) -> BrokenRing {
        BrokenRing::Ring { queue: self.index, source }
    }
}

#[cfg(test)]
mod tests;
