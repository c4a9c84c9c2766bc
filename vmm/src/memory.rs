//! The guest's RAM: one memfd, mapped as one region, or two around the MMIO gap, and shown to KVM as one slot each.
//!
//! The machine creates it once, or takes it over from another process of this host (`adopted`). `boot` and the devices
//! reach it as [`GuestRam`], migration by [`GuestMemory::slice`] in whole pages of one region. Invariants: region `n` is
//! KVM slot `n` and `RegionId(n)`, ascending by address; the memfd holds the regions one after the other and never
//! shrinks; a slot never outlives its mapping ([`Slots`]).

#![expect(unsafe_code, reason = "memfd, madvise and KVM slots take raw descriptors and addresses")]

mod adopted;
mod huge;
#[cfg(test)]
mod tests;

pub use adopted::AdoptError;

use crate::layout::{HUGE_PAGE_SIZE, MMIO_GAP_END, MMIO_GAP_START, PAGE_SIZE};
use devices::{Gpa, GuestRam};
use huge::{Spacer, collapse};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use migration::{DirtyLedger, DiskPages, GuestPages, PageIndex, PageRun, RamRegion, RegionId};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
    VolatileSlice,
};
use vmm_sys_util::errno;

/// Guest memory of a run of pages, for reading and writing in place. What is written is marked dirty.
pub type PageSlice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// Why guest memory could not be made or reached.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size is 0, or not a multiple of the page that backs it.
    #[error("Memory of {bytes} bytes is not a positive multiple of {page} bytes")]
    Size {
        /// What was asked for.
        bytes: u64,
        /// The page size.
        page: u64,
    },
    /// The host gave no memory file.
    #[error("Could not create a memory file of {bytes} bytes")]
    File {
        /// What was asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host has not enough free huge pages.
    #[error("Could not map {bytes} bytes of huge pages: reserve {} of them with vm.nr_hugepages", bytes / HUGE_PAGE_SIZE)]
    HugePages {
        /// What was asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The memory file could not be mapped.
    #[error("Could not map {bytes} bytes of guest memory")]
    Map {
        /// What was asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A file that was passed is no guest memory.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The memory file cannot be passed.
    #[error("Could not get another descriptor of the memory file")]
    Handle(#[source] io::Error),
    /// KVM refused a memory slot.
    #[error("KVM refused memory slot {slot} of {pages} pages at {gpa:#x}")]
    Slot {
        /// Number of the slot.
        slot: u32,
        /// Its guest address.
        gpa: u64,
        /// Its length.
        pages: u64,
        /// What KVM said.
        #[source]
        source: errno::Error,
    },
    /// There are no such pages.
    #[error("The guest has no pages {first} to {} in memory region {region}", first.0.saturating_add(u64::from(*pages)))]
    NoSuchPages {
        /// The region.
        region: RegionId,
        /// First page.
        first: PageIndex,
        /// Number of pages.
        pages: u32,
    },
}

/// The guest's RAM. Clones share it.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    ram: GuestRam,
    regions: Vec<RamRegion>,
    file: Arc<File>,
    /// Whether it is made of reserved huge pages.
    huge_pages: bool,
}

impl GuestMemory {
    /// Maps `bytes` of zeroes, which the host backs page by page as they are touched.
    ///
    /// No advice about transparent huge pages is given: with it, the boot data alone would make megabytes resident, and
    /// the host's setting for shared memory decides otherwise. Who wants huge pages asks for reserved ones.
    ///
    /// # Errors
    /// [`MemoryError`] if the size is odd or the host has no room.
    pub fn create(bytes: u64, huge_pages: bool) -> Result<Self, MemoryError> {
        check_size(bytes, huge_pages)?;
        let file = memory_file(bytes, huge_pages).map_err(|source| MemoryError::File { bytes, source })?;
        Self::map(file, bytes, huge_pages)
    }

    /// Maps `bytes` of memory in which a guest runs in another process of this host, as `create` made them there. `file`
    /// may be anything.
    ///
    /// # Errors
    /// [`MemoryError`] if it is something else, or cannot be mapped.
    pub fn adopt(file: OwnedFd, bytes: u64, huge_pages: bool) -> Result<Self, MemoryError> {
        let page = check_size(bytes, huge_pages)?;
        adopted::check(file.as_fd(), bytes, page)?;
        Self::map(file.into(), bytes, huge_pages)
    }

    fn map(file: File, bytes: u64, huge_pages: bool) -> Result<Self, MemoryError> {
        let file = Arc::new(file);
        let regions = regions_of(bytes);
        let mut mapped = Vec::with_capacity(regions.len());
        let mut offset = 0;
        for region in &regions {
            mapped.push(map_region(&file, offset, region, huge_pages)?);
            offset += region.pages * PAGE_SIZE;
        }
        let ram = GuestRam::from_regions(mapped).expect("regions_of gives ascending regions apart from each other");
        Ok(Self { ram, regions, file, huge_pages })
    }

    /// The memory as devices see it.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The regions, in the order of their ids.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Lengths of the regions in pages, as [`DirtyLedger::new`] takes them.
    #[must_use]
    pub fn pages_per_region(&self) -> Vec<u64> {
        self.regions.iter().map(|region| region.pages).collect()
    }

    /// The memory file: regions one after the other, for those who map it too (vhost-user) or punch holes (balloon).
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Region and page of a guest address, or `None` outside of memory.
    #[must_use]
    pub fn page_at(&self, gpa: Gpa) -> Option<(RegionId, PageIndex)> {
        let (id, region) = self.ids().find(|(_, region)| {
            gpa.checked_sub(region.start.0).is_some_and(|offset| offset.0 / PAGE_SIZE < region.pages)
        })?;
        Some((id, PageIndex((gpa.0 - region.start.0) / PAGE_SIZE)))
    }

    /// The memory of a run of pages.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchPages`] if a page of the run does not exist.
    pub fn slice(&self, run: PageRun) -> Result<PageSlice<'_>, MemoryError> {
        let PageRun { region, first, pages } = run;
        let missing = || MemoryError::NoSuchPages { region, first, pages };
        let mapped = self.ram.iter().nth(region.0.into()).ok_or_else(missing)?;
        let offset = first.0.checked_mul(PAGE_SIZE).ok_or_else(missing)?;
        mapped.get_slice(MemoryRegionAddress(offset), run.bytes()).map_err(|_| missing())
    }

    /// A run of pages as plain memory, whose writes are not marked: for a migration, which marks every page by itself
    /// when it begins.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchPages`] if the run leaves its region.
    pub fn untracked_slice(&self, run: PageRun) -> Result<VolatileSlice<'_>, MemoryError> {
        let slice = self.slice(run)?;
        // SAFETY: `slice` says that these bytes are mapped; the mapping lives as long as `self`, which the result
        // borrows, and nobody holds Rust references into guest memory.
        Ok(unsafe { VolatileSlice::new(slice.ptr_guard_mut().as_ptr(), slice.len()) })
    }

    /// How many pages at the start of `run` were never backed by memory: they are zero, and reading them would back
    /// them. 0 where the host does not tell.
    #[must_use]
    pub fn leading_hole(&self, run: PageRun) -> u32 {
        let before = self.regions.iter().take(run.region.0.into()).map(|region| region.pages).sum::<u64>();
        let Some(start) = before.checked_add(run.first.0).and_then(|page| page.checked_mul(PAGE_SIZE)) else {
            return 0;
        };
        let Ok(offset) = libc::off_t::try_from(start) else { return 0 };
        // SAFETY: lseek works on the descriptor, whose position nobody uses, and on no memory.
        let data = unsafe { libc::lseek(self.file.as_raw_fd(), offset, libc::SEEK_DATA) };
        match u64::try_from(data) {
            Ok(data) => u32::try_from((data - start) / PAGE_SIZE).map_or(run.pages, |pages| pages.min(run.pages)),
            // ENXIO: no data from here to the end of the file (lseek(2)).
            Err(_) if io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO) => run.pages,
            Err(_) => 0,
        }
    }

    /// Moves the record of the pages that threads of this process wrote into `ledger`, leaving it empty.
    pub fn harvest_writes(&self, ledger: &mut DirtyLedger) {
        for ((id, _), mapped) in self.ids().zip(self.ram.iter()) {
            let inside = ledger.mark_words(id, 0, &mapped.get_mmap().bitmap().get_and_reset());
            debug_assert!(inside, "the bitmap has one bit per page of the region");
        }
    }

    /// Drops the record of the pages that threads of this process wrote so far.
    pub fn forget_writes(&self) {
        self.ram.iter().for_each(|mapped| mapped.get_mmap().bitmap().reset());
    }

    fn ids(&self) -> impl Iterator<Item = (RegionId, &RamRegion)> {
        (0..).map(RegionId).zip(&self.regions)
    }
}

impl GuestPages for GuestMemory {
    type Error = MemoryError;
    type Handle = OwnedFd;

    fn handle(&self) -> Result<OwnedFd, MemoryError> {
        self.file.as_fd().try_clone_to_owned().map_err(MemoryError::Handle)
    }

    fn slice(&self, run: PageRun) -> Result<VolatileSlice<'_>, MemoryError> {
        self.untracked_slice(run)
    }

    fn disk(&self, _: RegionId) -> Option<&dyn DiskPages> {
        None
    }

    fn leading_hole(&self, run: PageRun) -> u32 {
        self.leading_hole(run)
    }

    fn populate(&self, run: PageRun) -> bool {
        !self.huge_pages && self.untracked_slice(run).is_ok_and(|slice| collapse(&slice))
    }
}

/// The size of the pages that back so many bytes.
fn check_size(bytes: u64, huge_pages: bool) -> Result<u64, MemoryError> {
    let page = if huge_pages { HUGE_PAGE_SIZE } else { PAGE_SIZE };
    if bytes > 0 && bytes.is_multiple_of(page) { Ok(page) } else { Err(MemoryError::Size { bytes, page }) }
}

fn regions_of(bytes: u64) -> Vec<RamRegion> {
    let region = |start, bytes: u64| RamRegion { start, pages: bytes / PAGE_SIZE };
    let low = bytes.min(MMIO_GAP_START.0);
    let mut regions = vec![region(GuestAddress(0), low)];
    if bytes > low {
        regions.push(region(MMIO_GAP_END, bytes - low));
    }
    regions
}

fn memory_file(bytes: u64, huge_pages: bool) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | if huge_pages { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: the name is a C string that lives as long as the program; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(c"godwit-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create just gave us this descriptor, so nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    // A file that shrank under its mappings would turn accesses into SIGBUS, so nobody who is handed it may do that.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer and touches no memory of ours.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn map_region(
    file: &Arc<File>,
    offset: u64,
    region: &RamRegion,
    huge_pages: bool,
) -> Result<GuestRegionMmap<AtomicBitmap>, MemoryError> {
    let bytes = region.pages * PAGE_SIZE;
    let length = usize::try_from(bytes).expect("sizes have 64 bits on x86-64");
    // Huge pages are reserved here, so that too few of them are an error now and not a SIGBUS in the running guest.
    let flags = libc::MAP_SHARED | if huge_pages { 0 } else { libc::MAP_NORESERVE };
    let spacer = Spacer::before(length);
    let mapping = MmapRegionBuilder::new_with_bitmap(length, vm_memory::bitmap::NewBitmap::with_len(length))
        .with_file_offset(FileOffset::from_arc(file.clone(), offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .with_hugetlbfs(huge_pages)
        .build()
        .map_err(|source| {
            if huge_pages { MemoryError::HugePages { bytes, source } } else { MemoryError::Map { bytes, source } }
        })?;
    drop(spacer);
    // SAFETY: the range is the mapping that was just made; the advice changes only what a core dump holds. A host that
    // does not know it loses nothing but small core dumps, so its answer does not matter.
    unsafe { libc::madvise(mapping.as_ptr().cast(), length, libc::MADV_DONTDUMP) };
    Ok(GuestRegionMmap::new(mapping, region.start).expect("regions_of ends far below the last address"))
}

/// The guest's memory as slots of a VM. Dropping it takes the slots away, so that KVM never reaches unmapped memory.
#[derive(Debug)]
pub struct Slots {
    vm: Arc<VmFd>,
    memory: GuestMemory,
}

impl Slots {
    /// Gives the memory to the VM, one slot per region.
    ///
    /// # Errors
    /// [`MemoryError::Slot`].
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory) -> Result<Self, MemoryError> {
        let slots = Self { vm, memory };
        slots.log_dirty_pages(false)?;
        Ok(slots)
    }

    /// The VM that has the slots.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The memory in the slots.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Id, slot number and region of each slot.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, u32, &RamRegion)> {
        self.memory.ids().map(|(id, region)| (id, u32::from(id.0), region))
    }

    /// Lets KVM log which pages the guest writes, or not. May be called while vCPUs run.
    ///
    /// # Errors
    /// [`MemoryError::Slot`]; slots before the refused one are switched.
    pub fn log_dirty_pages(&self, on: bool) -> Result<(), MemoryError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.iter().try_for_each(|(_, slot, region)| self.set(slot, region, region.pages, flags))
    }

    fn set(&self, slot: u32, region: &RamRegion, pages: u64, flags: u32) -> Result<(), MemoryError> {
        let host = self.memory.ram.get_host_address(region.start).expect("each region has its mapping");
        let area = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start.0,
            memory_size: pages * PAGE_SIZE,
            userspace_addr: host as u64,
        };
        // SAFETY: the address is that of a mapping as long as the slot; `self` owns the mapping and takes the slot away
        // before it lets go of it. Regions do not overlap.
        unsafe { self.vm.set_user_memory_region(area) }.map_err(|source| MemoryError::Slot {
            slot,
            gpa: region.start.0,
            pages,
            source,
        })
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        for (_, slot, region) in self.iter() {
            if let Err(error) = self.set(slot, region, 0, 0) {
                // Fails only where the slot was never made, because `new` was refused.
                tracing::debug!(%error, slot, "could not remove a memory slot");
            }
        }
    }
}
