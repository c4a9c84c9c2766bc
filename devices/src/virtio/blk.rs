//! virtio-blk (virtio 1.3, 5.2): one disk of the guest on a back end of [`block`].
//!
//! Each queue is a [`Lane`] with a thread and a channel of its own; requests are in flight side by side, and answered as
//! they are done. The transport's lock is not needed for any of it: while the device is started its lanes have the rings.
//! Invariant: what the driver asks for is checked against the capacity before the back end hears of it; whatever is wrong
//! with a request that has a status byte is answered there, and never harms the device.

mod counters;
mod lane;
mod limiter;
mod request;
#[cfg(test)]
mod tests;

pub use counters::{BlkCounters, BlkCounts};
pub use limiter::Limits;

use self::lane::{Common, Lane, Report, Ring};
use self::limiter::Limiter;
use super::{Fault, Io, MmioSavedV1, Progress, QueueOwner, RestoreError, Source, VirtioDevice, read_bytes};
use crate::Gpa;
use crate::worker::ThreadStart;
use block::{Access, Backend, Durability, SECTOR};
use saved::Saved;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

const QUEUE_SIZE: u16 = 256;
/// A chain of a full queue holds this many data buffers beside header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The longest data buffer in bytes. With [`SEGMENTS`] it bounds what one request can make a back end do.
const SEGMENT: u32 = 128 << 10;
/// The longest data of one request in bytes.
const MAX_TRANSFER: u64 = SEGMENTS as u64 * SEGMENT as u64;
/// The longest range of one discard, in sectors: 1 GiB. A driver splits longer ones.
const MAX_DISCARD: u32 = 1 << 21;
/// The longest range of one write of zeroes, in sectors: 32 MiB, which a back end without holes has to write out.
const MAX_WRITE_ZEROES: u32 = 1 << 16;
/// The most ranges in one discard or write of zeroes.
const MAX_RANGES: u32 = 16;
/// The token of the event by which lanes tell of broken rings.
const BROKEN: u32 = 0;

/// The configuration space (virtio 1.3, 5.2.4).
#[derive(Debug, Clone, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

impl Config {
    fn new(capacity: u64, queues: u16) -> Self {
        Self {
            capacity: (capacity / SECTOR).into(),
            size_max: SEGMENT.into(),
            seg_max: SEGMENTS.into(),
            blk_size: 512.into(),
            num_queues: queues.into(),
            max_discard_sectors: MAX_DISCARD.into(),
            max_discard_seg: MAX_RANGES.into(),
            discard_sector_alignment: 8.into(),
            max_write_zeroes_sectors: MAX_WRITE_ZEROES.into(),
            max_write_zeroes_seg: MAX_RANGES.into(),
            write_zeroes_may_unmap: 1,
            ..Self::default()
        }
    }
}

/// Whether the guest knows of a cache that it has to flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteCache {
    /// It does: a write may be lost with the power until a flush.
    #[default]
    Back,
    /// There is none that it would see: each write is durable when it succeeds.
    Through,
}

/// What the host gives a disk.
#[derive(Debug)]
pub struct BlkParts {
    /// Where the bytes are.
    pub backend: Arc<dyn Backend>,
    /// What the guest reads as the disk's serial number, cut to 20 bytes.
    pub serial: String,
    /// How many queues the guest may use, each with a thread; 1 at least.
    pub queues: u16,
    /// Whether the guest knows of a cache.
    pub write_cache: WriteCache,
    /// The most that is done in a second.
    pub limits: Limits,
    /// What each thread does before anything else.
    pub thread_start: ThreadStart,
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    common: Arc<Common>,
    lanes: Vec<Lane>,
    /// Which of them have a ring.
    started: Vec<bool>,
    queue_sizes: Vec<u16>,
    write_cache: WriteCache,
    config: Config,
}

/// The section of a disk, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkSavedV1 {
    /// Registers and queues.
    pub transport: MmioSavedV1,
    /// Capacity in sectors of 512 bytes; the disk at the other end must have the same.
    pub capacity: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
}

impl Saved for BlkSavedV1 {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
}

impl Blk {
    /// A disk on `parts.backend`, which is this guest's.
    ///
    /// # Errors
    /// The back end opens no channel, or the host gives no thread.
    pub fn new(parts: BlkParts) -> io::Result<Self> {
        let disk = Self::without_channels(parts)?;
        disk.open_channels()?;
        Ok(disk)
    }

    fn open_channels(&self) -> io::Result<()> {
        self.lanes.iter().try_for_each(|lane| lane.reopen(&*self.common.backend))
    }

    fn without_channels(parts: BlkParts) -> io::Result<Self> {
        let BlkParts { backend, serial, queues, write_cache, limits, thread_start } = parts;
        let capacity = backend.geometry().capacity;
        let config = Config::new(capacity, queues);
        let name = format!("{serial}/");
        let common = Arc::new(Common {
            backend,
            serial,
            capacity: AtomicU64::new(capacity),
            counters: Arc::default(),
            limiter: Limiter::new(limits, Instant::now()),
            fault: Mutex::default(),
            broken: EventFd::new(EFD_NONBLOCK)?,
        });
        let lane = |queue| Lane::new(&common, format!("{name}{queue}"), thread_start);
        let lanes: Vec<_> = (0..queues).map(lane).collect::<Result<_, _>>()?;
        let (started, queue_sizes) = (vec![false; lanes.len()], vec![QUEUE_SIZE; lanes.len()]);
        Ok(Self { common, lanes, started, queue_sizes, write_cache, config })
    }

    /// Where the bytes are.
    #[must_use]
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.common.backend
    }

    /// Length in bytes, as the guest knows it.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.common.capacity.load(Ordering::Acquire)
    }

    /// What the driver did with it. They begin with the device: a move, which makes another, does not take them along.
    #[must_use]
    pub fn counters(&self) -> &Arc<BlkCounters> {
        &self.common.counters
    }

    /// Makes the disk as long as `capacity` bytes, and tells the guest; how long it is then.
    ///
    /// # Errors
    /// The back end's refusal, with the reason.
    pub fn grow(&mut self, io: &mut Io, capacity: u64) -> io::Result<u64> {
        let capacity = self.common.backend.grow(capacity)?;
        self.common.capacity.store(capacity, Ordering::Release);
        self.config.capacity = (capacity / SECTOR).into();
        io.interrupt.config_changed();
        Ok(capacity)
    }

    /// What the driver expects of a write that succeeds: without the feature it cannot ask for durability, so every write
    /// has to be durable (virtio 1.3, 5.2.6.2).
    fn durability(io: &Io) -> Durability {
        if io.has(VIRTIO_BLK_F_FLUSH) { Durability::Cached } else { Durability::Durable }
    }

    /// Lends the ring of `queue` to its lane.
    fn lend(&mut self, io: &Io, queue: usize) -> Result<(), Fault> {
        let closed = |source| Fault::Host { what: "The disk cannot be reached", source };
        self.lanes[queue].reopen(&*self.common.backend).map_err(closed)?;
        let refused = |source| Fault::Host { what: "The host gives no descriptor for a queue", source };
        let ring = Ring {
            virtq: io.queues[queue].lend().map_err(refused)?,
            ram: Arc::new(io.ram.clone()),
            interrupt: io.interrupt.clone(),
            durability: Self::durability(io),
        };
        self.lanes[queue].start(Box::new(ring));
        self.started[queue] = true;
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        self.common.backend.geometry().access == Access::ReadOnly
    }
}

impl VirtioDevice for Blk {
    type Saved = BlkSavedV1;
    type Parts = BlkParts;

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if self.write_cache == WriteCache::Back {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        if self.lanes.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.is_read_only() {
            features | 1 << VIRTIO_BLK_F_RO
        } else {
            features | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queue_owner(&self, _: usize) -> QueueOwner {
        QueueOwner::Accelerator
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { token: BROKEN, fd: self.common.broken.as_raw_fd() }]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(self.config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, _: &mut Io, _: u64, _: &[u8]) {
        // Its one writable field, writeback, comes with a feature that is not offered.
    }

    fn start(&mut self, io: &mut Io) -> Result<(), Fault> {
        (0..io.queues.len()).filter(|&queue| io.queues[queue].is_ready()).try_for_each(|queue| self.lend(io, queue))
    }

    fn process(&mut self, _: &mut Io, _: usize) -> Result<Progress, Fault> {
        // Its lanes hear the kicks.
        Ok(Progress::Idle)
    }

    fn on_source(&mut self, _: &mut Io, _: u32) -> Result<(), Fault> {
        // Empty if it is looked at for no reason.
        let _ = self.common.broken.read();
        match self.common.fault.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(broken) => Err(broken.into()),
            None => Ok(()),
        }
    }

    fn stop(&mut self, io: &mut Io, within: Duration) -> Result<(), usize> {
        let deadline = Instant::now() + within;
        let started: Vec<usize> = (0..self.lanes.len()).filter(|&queue| self.started[queue]).collect();
        for &queue in &started {
            self.lanes[queue].stop(deadline);
        }
        let mut in_flight = 0;
        for &queue in &started {
            match self.lanes[queue].report() {
                Some(Report::Stopped(ring)) => {
                    io.queues[queue].take_back_lent(&ring.virtq);
                    self.started[queue] = false;
                }
                Some(Report::Busy(count)) => in_flight += count,
                Some(Report::Flushed(_) | Report::Closed) => {
                    tracing::error!("A disk's queue answers what it was not asked");
                }
                // Its thread has panicked, and has dropped the ring.
                None => self.started[queue] = false,
            }
        }
        if in_flight == 0 {
            return Ok(());
        }
        for queue in started {
            // The one way to fail is to have no descriptor: then its driver is not answered until the next start.
            if !self.started[queue] && self.lend(io, queue).is_ok() {
                io.queues[queue].kick();
            }
        }
        Err(in_flight)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        let Some(lane) = self.lanes.first() else { return Ok(()) };
        lane.flush();
        match lane.report() {
            Some(Report::Flushed(outcome)) => outcome,
            _ => Err(lane::gone()),
        }
    }

    fn reset(&mut self) {
        *self.common.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn release(&mut self) {
        if self.common.backend.is_held_by_channels() {
            self.lanes.iter().for_each(Lane::close);
        }
        self.common.backend.release();
    }

    fn reacquire(&mut self) -> io::Result<()> {
        self.common.backend.reacquire()?;
        self.open_channels()
    }

    fn announce(&mut self, _: &mut Io) {}

    fn log_dirty(&mut self, _: &mut Io, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn harvest_dirty(&mut self, _: &mut dyn FnMut(Gpa)) {}

    fn save(&self, transport: MmioSavedV1) -> BlkSavedV1 {
        // The serial, the back end, its lanes, how they may be used and what was counted are the host's.
        let Self { common: _, lanes: _, started: _, queue_sizes: _, write_cache: _, config: _ } = self;
        BlkSavedV1 { transport, capacity: self.capacity() / SECTOR, read_only: self.is_read_only() }
    }

    fn restore(id: &str, saved: BlkSavedV1, parts: BlkParts) -> Result<(Self, MmioSavedV1), RestoreError> {
        let BlkSavedV1 { transport, capacity, read_only } = saved;
        let differs = |field, saved, here| RestoreError::Differs { id: id.to_owned(), field, saved, here };
        let geometry = parts.backend.geometry();
        let here = geometry.capacity / SECTOR;
        if capacity != here {
            return Err(differs("a capacity in sectors of", capacity, here));
        }
        let here = geometry.access == Access::ReadOnly;
        if read_only != here {
            return Err(differs("read-only", read_only.into(), here.into()));
        }
        let refused = |error: io::Error| RestoreError::Host { id: id.to_owned(), reason: error.to_string() };
        let disk = Self::without_channels(parts).map_err(refused)?;
        // The other end may have it still; if not, this takes no time later.
        if !disk.common.backend.is_held_by_channels() {
            disk.open_channels().map_err(refused)?;
        }
        Ok((disk, transport))
    }
}
