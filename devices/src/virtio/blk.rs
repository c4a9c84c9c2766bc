//! virtio-blk (virtio 1.3, 5.2): one disk of the guest on a [`BlockBackend`].
//!
//! Requests are completed in the order of the queue, on the worker's thread, so nothing is in flight between two calls.
//! Invariant: what the driver asks for is checked against the capacity before the back end hears of it; whatever is
//! wrong with a request that has a status byte is answered there, and never harms the device.

pub mod backend;
mod counters;
pub mod file;
mod request;
#[cfg(test)]
mod tests;

pub use backend::{BlockBackend, Unmap};
pub use counters::{BlkCounters, BlkCounts};
pub use file::{Access, DiskError, FileBackend};

use self::request::{Request, Status};
use super::{BrokenRing, Fault, Io, MmioSavedV1, Progress, QueueOwner, RestoreError, Source, VirtioDevice, read_bytes};
use crate::Gpa;
use saved::Saved;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// The unit of every address and length of the protocol (virtio 1.3, 5.2.4), in bytes.
pub const SECTOR: u64 = 512;

const QUEUE_SIZE: u16 = 256;
/// A chain of a full queue holds this many data buffers beside header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The longest range of one discard, in sectors: 1 GiB. A driver splits longer ones.
const MAX_DISCARD: u32 = 1 << 21;
/// The longest range of one write of zeroes, in sectors: 32 MiB, which a back end without holes has to write out.
const MAX_WRITE_ZEROES: u32 = 1 << 16;
/// The most ranges in one discard or write of zeroes.
const MAX_RANGES: u32 = 16;

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
    fn new(capacity: u64) -> Self {
        Self {
            capacity: (capacity / SECTOR).into(),
            seg_max: SEGMENTS.into(),
            blk_size: 512.into(),
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

/// What the host gives a disk.
#[derive(Debug)]
pub struct BlkParts {
    /// Where the bytes are.
    pub backend: Box<dyn BlockBackend>,
    /// What the guest reads as the disk's serial number, cut to 20 bytes.
    pub serial: String,
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    backend: Box<dyn BlockBackend>,
    serial: String,
    config: Config,
    counters: Arc<BlkCounters>,
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
    /// A disk on `parts.backend`.
    #[must_use]
    pub fn new(parts: BlkParts) -> Self {
        let BlkParts { backend, serial } = parts;
        let config = Config::new(backend.capacity());
        Self { backend, serial, config, counters: Arc::default() }
    }

    /// Where the bytes are.
    #[must_use]
    pub fn backend(&self) -> &dyn BlockBackend {
        self.backend.as_ref()
    }

    /// What the driver did with it. They begin with the device: a move, which makes another, does not take them along.
    #[must_use]
    pub fn counters(&self) -> &Arc<BlkCounters> {
        &self.counters
    }

    fn serve(&mut self, io: &mut Io, queue: usize) -> Result<Progress, BrokenRing> {
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = io.queues[queue].pop()? else {
                if io.queues[queue].accept_kicks()? {
                    continue;
                }
                return Ok(Progress::Idle);
            };
            let request = Request::parse(&io.ram, &chain).ok_or_else(|| BrokenRing::Incomplete {
                queue,
                head: chain.head(),
                what: "a status byte",
            })?;
            let (mut status, data) = request.execute(&io.ram, self.backend.as_ref(), &self.serial);
            // Without the feature the driver cannot ask for durability, so every write has to be (virtio 1.3, 5.2.6.2).
            let must_flush = status == Status::Ok && request.writes() && !io.has(VIRTIO_BLK_F_FLUSH);
            if must_flush && self.backend.flush().is_err() {
                status = Status::IoError;
            }
            self.counters.note(request.counted(), status);
            let written = request.finish(&io.ram, status, data);
            io.queues[queue].push(&chain, written)?;
            // Not once per batch: the guest can go on with this one while the next waits for the disk.
            io.signal(queue)?;
        }
        Ok(Progress::More)
    }
}

impl VirtioDevice for Blk {
    type Saved = BlkSavedV1;
    type Parts = BlkParts;

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let both = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.backend.is_read_only() {
            both | 1 << VIRTIO_BLK_F_RO
        } else {
            both | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn queue_owner(&self, _: usize) -> QueueOwner {
        QueueOwner::Worker
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(self.config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, _: &mut Io, _: u64, _: &[u8]) {
        // Its one writable field, writeback, comes with a feature that is not offered.
    }

    fn start(&mut self, _: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn process(&mut self, io: &mut Io, queue: usize) -> Result<Progress, Fault> {
        io.queues[queue].suppress_kicks()?;
        Ok(self.serve(io, queue)?)
    }

    fn on_source(&mut self, _: &mut Io, _: u32) -> Result<(), Fault> {
        Ok(())
    }

    fn stop(&mut self, _: &mut Io, _: Duration) -> Result<(), usize> {
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.backend.is_read_only() { Ok(()) } else { self.backend.flush() }
    }

    fn reset(&mut self) {}

    fn release(&mut self) {
        self.backend.release();
    }

    fn reacquire(&mut self) -> std::io::Result<()> {
        self.backend.reacquire()
    }

    fn announce(&mut self, _: &mut Io) {}

    fn log_dirty(&mut self, _: &mut Io, _: bool) -> std::io::Result<()> {
        Ok(())
    }

    fn harvest_dirty(&mut self, _: &mut dyn FnMut(Gpa)) {}

    fn save(&self, transport: MmioSavedV1) -> BlkSavedV1 {
        // The serial, the back end and what was counted are the host's.
        let Self { backend, serial: _, config: _, counters: _ } = self;
        BlkSavedV1 { transport, capacity: backend.capacity() / SECTOR, read_only: backend.is_read_only() }
    }

    fn restore(id: &str, saved: BlkSavedV1, parts: BlkParts) -> Result<(Self, MmioSavedV1), RestoreError> {
        let BlkSavedV1 { transport, capacity, read_only } = saved;
        let differs = |field, saved, here| RestoreError::Differs { id: id.to_owned(), field, saved, here };
        let here = parts.backend.capacity() / SECTOR;
        if capacity != here {
            return Err(differs("a capacity in sectors of", capacity, here));
        }
        let here = parts.backend.is_read_only();
        if read_only != here {
            return Err(differs("read-only", read_only.into(), here.into()));
        }
        Ok((Self::new(parts), transport))
    }
}
