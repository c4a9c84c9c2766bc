//! Digests that find accidents, not attacks: of the frames of one direction, and of guest memory. Both are XXH3-64.

use crate::guest::{GuestPages, HostError, exact_slice};
use crate::region::{PAGE_SIZE, PageIndex, PageRun, Region, RegionId};
use crate::zero::{is_zero, pages};
use std::fmt;
use std::hash::Hasher as _;
use twox_hash::xxhash3_64::Hasher;

/// Pages that are looked at in one go: 1 MiB.
const CHUNK_PAGES: u32 = 256;

/// The headers and bodies of all frames of one direction, in order, so that a lost, doubled or reordered frame shows.
pub(crate) struct Transcript {
    frames: u64,
    hasher: Hasher,
}

/// A transcript's content at some moment. The default is that of a stream that has not been heard of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TranscriptDigest {
    /// How many frames there were.
    pub frames: u64,
    /// The digest of their bytes.
    pub digest: u64,
}

impl Transcript {
    pub(crate) fn new() -> Self {
        Self { frames: 0, hasher: Hasher::new() }
    }

    /// Adds one frame, which may come in two parts.
    pub(crate) fn add(&mut self, head: &[u8], body: &[u8]) {
        self.frames += 1;
        self.hasher.write(head);
        self.hasher.write(body);
    }

    pub(crate) fn digest(&self) -> TranscriptDigest {
        TranscriptDigest { frames: self.frames, digest: self.hasher.finish() }
    }
}

impl fmt::Debug for Transcript {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.digest().fmt(f)
    }
}

/// One digest per region of RAM, of the pages that are not zero and their places. The guest must stand still; reading disks
/// would keep it for too long.
pub(crate) fn of_memory<G: GuestPages>(guest: &G, regions: &[Region]) -> Result<Vec<u64>, HostError> {
    let memory = (0..).zip(regions).filter(|(_, region)| matches!(region, Region::Ram(_)));
    memory.map(|(region, layout)| of_region(guest, RegionId(region), layout.pages())).collect()
}

fn of_region<G: GuestPages>(guest: &G, region: RegionId, end: u64) -> Result<u64, HostError> {
    let mut hasher = Hasher::new();
    let mut buffer = [0_u8; PAGE_SIZE];
    let mut first = 0;
    while first < end {
        let pages_left = u32::try_from(end - first).unwrap_or(u32::MAX).min(CHUNK_PAGES);
        let run = PageRun { region, first: PageIndex(first), pages: pages_left };
        let hole = guest.leading_hole(run).min(run.pages);
        if hole < run.pages {
            let run = PageRun { first: PageIndex(first + u64::from(hole)), pages: run.pages - hole, ..run };
            for (page, index) in pages(&exact_slice(guest, run)?).zip(run.first.0..).filter(|(page, _)| !is_zero(page))
            {
                page.copy_to(&mut buffer);
                hasher.write_u64(index);
                hasher.write(&buffer);
            }
        }
        first += u64::from(pages_left);
    }
    Ok(hasher.finish())
}
