//! What of a guest goes over page by page before it runs at the target: its memory, and the disks that move with it.

use crate::memory::{GuestMemory, MemoryError};
use block::{Backend, Blocking, Durability, ExtentKind, LOG_PAGE, Unmap};
use migration::{DiskPages, GuestPages, HostError, PAGE_SIZE, PageIndex, PageRun, Region, RegionId};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::VolatileSlice;

const _: () = assert!(LOG_PAGE == PAGE_SIZE as u64, "what is logged is what moves");

/// So much may come of a disk before it is made durable, in bytes: what is left to do at the end of a round is done soon.
const SETTLE_EVERY: u64 = 64 << 20;

/// A guest's memory, and the disks that move with it. Clones share them.
#[derive(Debug, Clone)]
pub struct GuestPlaces {
    memory: GuestMemory,
    disks: Arc<[MovingDisk]>,
}

impl GuestPlaces {
    /// All of `memory`, and these disks.
    #[must_use]
    pub fn new(memory: GuestMemory, disks: Vec<MovingDisk>) -> Self {
        Self { memory, disks: disks.into() }
    }

    /// The regions, in the order of their ids.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        let memory = self.memory.regions().iter().copied().map(Region::Ram);
        memory.chain(self.disks.iter().map(|disk| Region::Disk { pages: disk.pages() })).collect()
    }

    /// Makes durable what was written to the disks.
    ///
    /// # Errors
    /// If the host cannot.
    pub fn settle(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(MovingDisk::settle)
    }
}

impl GuestPages for GuestPlaces {
    type Error = MemoryError;
    type Handle = OwnedFd;

    fn handle(&self) -> Result<OwnedFd, MemoryError> {
        self.memory.handle()
    }

    fn slice(&self, run: PageRun) -> Result<VolatileSlice<'_>, MemoryError> {
        self.memory.untracked_slice(run)
    }

    fn disk(&self, region: RegionId) -> Option<&dyn DiskPages> {
        let disk = usize::from(region.0).checked_sub(self.memory.regions().len())?;
        self.disks.get(disk).map(|disk| disk as &dyn DiskPages)
    }

    fn leading_hole(&self, run: PageRun) -> u32 {
        let disk = usize::from(run.region.0).checked_sub(self.memory.regions().len());
        match disk.and_then(|disk| self.disks.get(disk)) {
            None => self.memory.leading_hole(run),
            Some(disk) => disk.leading_hole(run.first, run.pages),
        }
    }

    fn populate(&self, run: PageRun) -> bool {
        self.memory.populate(run)
    }
}

/// A disk that moves with its guest, as pages. At the source it is read while the guest uses it.
pub struct MovingDisk {
    capacity: u64,
    channel: Mutex<Blocking>,
    /// Bytes that came since it was made durable.
    unsettled: AtomicU64,
    is_blank: bool,
}

impl fmt::Debug for MovingDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MovingDisk").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl MovingDisk {
    /// The disk that `backend` is, by a channel of its own. `is_blank` says whether all of it is zero.
    ///
    /// # Errors
    /// The back end opens none.
    pub fn open(backend: &dyn Backend, is_blank: bool) -> io::Result<Self> {
        let channel = Mutex::new(Blocking::open(backend)?);
        Ok(Self { capacity: backend.geometry().capacity, channel, unsettled: AtomicU64::new(0), is_blank })
    }

    fn pages(&self) -> u64 {
        self.capacity.div_ceil(LOG_PAGE)
    }

    fn channel(&self) -> MutexGuard<'_, Blocking> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where on the disk so many bytes from page `first` on lie, as offset and length, which ends with the disk.
    fn place(&self, first: PageIndex, bytes: u64) -> (u64, u64) {
        let offset = first.0.saturating_mul(LOG_PAGE);
        (offset, self.capacity.saturating_sub(offset).min(bytes))
    }

    /// How many pages from `first` on, of so many, are certainly zero.
    fn leading_hole(&self, first: PageIndex, pages: u32) -> u32 {
        let (offset, length) = self.place(first, u64::from(pages) * LOG_PAGE);
        let Ok(extents) = self.channel().extents(offset, length) else { return 0 };
        let empty = extents.iter().take_while(|extent| extent.kind != ExtentKind::Data);
        match empty.map(|extent| extent.length).sum::<u64>() {
            // The last page may be a part of one.
            zeros if zeros == length => pages,
            zeros => u32::try_from(zeros / LOG_PAGE).unwrap_or(pages).min(pages),
        }
    }

    fn settle(&self) -> io::Result<()> {
        self.unsettled.store(0, Ordering::Relaxed);
        self.channel().flush()
    }

    fn wrote(&self, bytes: u64) -> io::Result<()> {
        let unsettled = self.unsettled.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if unsettled >= SETTLE_EVERY { self.settle() } else { Ok(()) }
    }
}

/// A part of a buffer, which is as long as a disk's part that fits in memory.
fn index(length: u64) -> usize {
    usize::try_from(length).expect("a part of a buffer is no longer than memory")
}

impl DiskPages for MovingDisk {
    fn is_blank(&self) -> bool {
        self.is_blank
    }

    fn read(&self, first: PageIndex, into: &mut [u8]) -> Result<(), HostError> {
        let (offset, length) = self.place(first, into.len() as u64);
        let (on_disk, beyond) = into.split_at_mut(index(length));
        beyond.fill(0);
        Ok(self.channel().read(offset, on_disk)?)
    }

    fn write(&self, first: PageIndex, from: &[u8]) -> Result<(), HostError> {
        let (offset, length) = self.place(first, from.len() as u64);
        self.channel().write(offset, &from[..index(length)], Durability::Cached)?;
        Ok(self.wrote(length)?)
    }

    fn clear(&self, first: PageIndex, pages: u32) -> Result<(), HostError> {
        let (offset, length) = self.place(first, u64::from(pages) * LOG_PAGE);
        Ok(self.channel().write_zeroes(offset, length, Unmap::Allowed, Durability::Cached)?)
    }
}
