//! Regions of what a guest owns, pages in them, and runs of pages: the coordinates that every other module speaks in.
//!
//! A region is one contiguous piece of guest RAM (one KVM slot, one mapping), or a disk. A run never crosses a region, so
//! page data is always read from and written to exactly one mapping, or one disk.

use crate::codec::PageId;
use serde::{Deserialize, Serialize};
use std::fmt;
use vm_memory::GuestAddress;

/// Bytes in a page: the unit that is tracked and sent, also where the host backs guest memory with larger pages.
pub const PAGE_SIZE: usize = 4096;

/// The most regions of one guest. KVM guests of this project have one or two, and their disks.
pub const MAX_REGIONS: usize = 64;

const _: () = assert!(MAX_REGIONS <= u64::BITS as usize, "a word has a bit for each region");

/// The most pages of one region: 64 TiB, far from any overflow of byte counts.
pub const MAX_REGION_PAGES: u64 = 1 << 34;

/// Which region: regions are numbered from 0, first those of RAM, ascending by guest address, and then disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RegionId(pub u16);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which page of a region, counted from the region's first page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Contiguous pages of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The region of all the pages.
    pub region: RegionId,
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u32,
}

impl PageRun {
    /// Each of its pages.
    pub(crate) fn ids(self) -> impl Iterator<Item = PageId> {
        let Self { region, first, pages } = self;
        (first.0..first.0.saturating_add(pages.into())).map(move |page| PageId { region, page: PageIndex(page) })
    }

    /// Bytes in the run.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

/// One piece of guest RAM, as both ends must have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// The guest physical address of the first page.
    pub start: GuestAddress,
    /// Length in pages.
    pub pages: u64,
}

impl fmt::Display for RamRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages at {:#x}", self.pages, self.start.0)
    }
}

/// One piece of a guest that moves page by page, as both ends must have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// Of its RAM.
    Ram(RamRegion),
    /// A disk.
    Disk {
        /// Its length in pages, of which the last may be a part.
        pages: u64,
    },
}

impl Region {
    /// Its length in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        match self {
            Self::Ram(ram) => ram.pages,
            Self::Disk { pages } => *pages,
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ram(ram) => ram.fmt(f),
            Self::Disk { pages } => write!(f, "a disk of {pages} pages"),
        }
    }
}

/// The pages of all `regions` together.
#[must_use]
pub fn total_pages(regions: &[Region]) -> u64 {
    regions.iter().map(Region::pages).sum()
}
