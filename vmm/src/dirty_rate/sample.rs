//! A sample of guest memory: how much of it is zero, how much the same, and how well the rest compresses.
//!
//! The pages are those at the multiples of the golden ratio, modulo 1, times the length of memory: however many of them
//! are looked at, they lie evenly, and no stride of the guest's own fits them (Knuth, The Art of Computer Programming,
//! volume 3, 6.4). A page that the host never backed is passed over, as reading would back it.
//!
//! Bounded by the sample and not by the guest: one block of pages, a hash of each page, and the compressor.

use super::MeasureError;
use crate::memory::GuestMemory;
use control::MemorySample;
use migration::{PAGE_SIZE, PageIndex, PageRun, RegionId};
use std::collections::HashSet;
use twox_hash::XxHash3_128;
use zstd::bulk::Compressor;

/// The most pages in a sample: enough for a share to be right within 2 % in 95 of 100 samples.
const MOST_PAGES: u64 = 4096;
/// The most places that are looked at for them, where much of the memory was never backed.
const MOST_TRIES: u64 = 16 * MOST_PAGES;
/// The most places that are looked at in one step.
const TRIES_PER_STEP: u64 = 1024;
/// The pages that are compressed together, as a stream of them would be.
const BLOCK_PAGES: usize = 64;
/// The golden ratio's part after the point, in 64 bits.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const ZSTD_LEVEL: i32 = 1;

/// A sample, as far as it was taken.
pub(super) struct Sample {
    tries: u64,
    picked: HashSet<u64>,
    /// Of the contents of pages: 128 bits, in which pages that differ are never the same by chance.
    contents: HashSet<u128>,
    /// Pages that wait for compression.
    block: Vec<u8>,
    compressor: Compressor<'static>,
    tally: MemorySample,
}

impl std::fmt::Debug for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sample").field("tries", &self.tries).field("tally", &self.tally).finish_non_exhaustive()
    }
}

impl Sample {
    pub(super) fn new() -> Result<Self, MeasureError> {
        Ok(Self {
            tries: 0,
            picked: HashSet::new(),
            contents: HashSet::new(),
            block: Vec::with_capacity(BLOCK_PAGES * PAGE_SIZE),
            compressor: Compressor::new(ZSTD_LEVEL)?,
            tally: MemorySample::default(),
        })
    }

    /// Takes up to one block of pages more, and says whether that was not yet all.
    pub(super) fn step(&mut self, memory: &GuestMemory) -> Result<bool, MeasureError> {
        let end = self.tries + TRIES_PER_STEP;
        while self.tries < end && !self.is_complete() {
            if let Some(run) = self.pick(memory) {
                self.add(memory, run)?;
                if self.block.len() == self.block.capacity() {
                    self.compress()?;
                    return Ok(!self.is_complete());
                }
            }
        }
        if self.is_complete() {
            self.compress()?;
        }
        Ok(!self.is_complete())
    }

    /// What was found so far.
    pub(super) fn tally(&self) -> MemorySample {
        self.tally
    }

    fn is_complete(&self) -> bool {
        self.tries >= MOST_TRIES || self.tally.pages >= MOST_PAGES
    }

    /// The next place, if there is a page that is new.
    fn pick(&mut self, memory: &GuestMemory) -> Option<PageRun> {
        let total: u64 = memory.pages_per_region().iter().sum();
        let place = (u128::from(self.tries.wrapping_mul(GOLDEN)) * u128::from(total)) >> u64::BITS;
        self.tries += 1;
        let place = u64::try_from(place).expect("a fraction of the number of pages");
        let run = page(memory, place)?;
        (!self.picked.contains(&place) && memory.leading_hole(run) == 0 && self.picked.insert(place)).then_some(run)
    }

    fn add(&mut self, memory: &GuestMemory, run: PageRun) -> Result<(), MeasureError> {
        let start = self.block.len();
        self.block.resize(start + PAGE_SIZE, 0);
        let page = &mut self.block[start..];
        memory.untracked_slice(run)?.copy_to(page);
        self.tally.pages += 1;
        if page.iter().all(|byte| *byte == 0) {
            self.tally.zero_pages += 1;
            self.block.truncate(start);
        } else if !self.contents.insert(XxHash3_128::oneshot(page)) {
            self.tally.duplicate_pages += 1;
        }
        Ok(())
    }

    fn compress(&mut self) -> Result<(), MeasureError> {
        if !self.block.is_empty() {
            self.tally.lz4_bytes += lz4_flex::block::compress(&self.block).len() as u64;
            self.tally.zstd_bytes += self.compressor.compress(&self.block)?.len() as u64;
            self.block.clear();
        }
        Ok(())
    }
}

/// The page that is number `place` of all regions together.
fn page(memory: &GuestMemory, mut place: u64) -> Option<PageRun> {
    for (id, pages) in (0..).map(RegionId).zip(memory.pages_per_region()) {
        if place < pages {
            return Some(PageRun { region: id, first: PageIndex(place), pages: 1 });
        }
        place -= pages;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::PAGE_SIZE;
    use vm_memory::{Bytes, GuestAddress};

    fn sample(memory: &GuestMemory) -> MemorySample {
        let mut sample = Sample::new().unwrap();
        let mut steps = 1;
        while sample.step(memory).unwrap() {
            steps += 1;
        }
        assert!(steps <= MOST_TRIES / TRIES_PER_STEP + MOST_PAGES / BLOCK_PAGES as u64, "{steps} steps");
        sample.tally()
    }

    /// Memory whose page `number` begins with what `content` makes for it; where that is empty, it is not touched.
    fn memory(pages: u64, content: impl Fn(u64) -> Vec<u8>) -> GuestMemory {
        let memory = GuestMemory::create(pages * PAGE_SIZE, false).unwrap();
        for number in 0..pages {
            let content = content(number);
            if !content.is_empty() {
                memory.ram().write_slice(&content, GuestAddress(number * PAGE_SIZE)).unwrap();
            }
        }
        memory
    }

    fn noise(seed: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(GOLDEN) | 1;
        let word = |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        (0..PAGE_SIZE / 8).flat_map(word).collect()
    }

    #[test]
    fn every_page_of_a_small_guest_is_in_the_sample_once() {
        // A quarter each: zero, noise of its own, the same noise, a word of its own.
        let memory = memory(2000, |number| match number % 4 {
            0 => vec![0],
            1 => noise(number),
            2 => noise(0),
            _ => number.to_le_bytes().to_vec(),
        });
        let tally = sample(&memory);
        assert_eq!((tally.pages, tally.zero_pages, tally.duplicate_pages), (2000, 500, 499));
        let data = tally.data_pages() * PAGE_SIZE;
        // Noise stays as it is, but for what is the same within a block, and words vanish.
        assert!((data / 3..data * 7 / 10).contains(&tally.lz4_bytes), "{tally:?}");
        assert!((data / 3..data * 7 / 10).contains(&tally.zstd_bytes), "{tally:?}");
    }

    #[test]
    fn a_large_guest_is_sampled_evenly() {
        // The first quarter is zero.
        let memory = memory(20_000, |number| if number < 5000 { vec![0] } else { number.to_le_bytes().to_vec() });
        let tally = sample(&memory);
        assert_eq!((tally.pages, tally.duplicate_pages), (MOST_PAGES, 0));
        assert!((1000..1050).contains(&tally.zero_pages), "{tally:?}");
    }

    #[test]
    fn memory_that_was_never_backed_is_not_looked_at() {
        let memory = memory(100_000, |number| if number % 8 == 0 { vec![1] } else { Vec::new() });
        let before = memory.leading_hole(PageRun { region: RegionId(0), first: PageIndex(1), pages: 99 });
        let tally = sample(&memory);
        assert_eq!(tally.zero_pages, 0);
        assert!(tally.pages > MOST_PAGES * 9 / 10, "{tally:?}");
        assert_eq!((before, tally.duplicate_pages), (7, tally.pages - 1));
        assert_eq!(memory.leading_hole(PageRun { region: RegionId(0), first: PageIndex(1), pages: 99 }), 7);
        let nothing = GuestMemory::create(5 << 30, false).unwrap();
        assert_eq!(sample(&nothing), MemorySample::default());
    }

    #[test]
    fn both_sides_of_the_gap_are_sampled() {
        let memory = GuestMemory::create(4 << 30, false).unwrap();
        let last = memory.pages_per_region().iter().sum::<u64>() - 1;
        let PageRun { region, first, pages } = page(&memory, last).unwrap();
        assert_eq!((region, first.0, pages), (RegionId(1), (1 << 30) / PAGE_SIZE - 1, 1));
        assert!(page(&memory, last + 1).is_none());
    }
}
