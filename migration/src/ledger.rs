//! The ledger of dirty pages: which pages the target does not have in their present content.
//!
//! The source marks pages here as it harvests them from the dirty log, and takes them out in runs as it sends them. One
//! bit per page, in words of 64, those of all regions one after the other. Invariants: `dirty` equals the number of set
//! bits; no bit beyond a region's end is ever set; no set bit is walked before `cursor`. Marks outside the guest's memory
//! are ignored and reported as `false`.
//!
//! **The walk.** Memory has long stretches of one kind: zeros, text, noise, copies of what lies elsewhere. Sent one after the
//! other, now the link waits for the processors and now they wait for the link, and what was measured of one stretch says
//! little of the next. So memory is taken as [`LANES`] lanes of equal length, and each gives a word in turn:
//!
//! ```text
//! words of the ledger   0  1  2  3 │ 4  5  6  7 │ 8  9  …        with 4 in a lane
//! are walked as         0  4  8  … │ 1  5  9  … │ 2  6  …
//! ```
//! What follows each other on the link is of many kinds then, each mebibyte of it is more like the whole, and the buffers of a
//! connection even out what differs.

use crate::region::{PageIndex, PageRun, RegionId};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many places of memory are walked at, in turn.
pub(crate) const LANES: usize = 16;

const WORD_BITS: u64 = 64;

/// A set of dirty pages of all regions of one guest.
#[derive(Debug, Clone)]
pub struct DirtyLedger {
    words: Vec<u64>,
    regions: Vec<Region>,
    /// Words of a lane. The last ones may have fewer.
    lane: usize,
    dirty: u64,
    cursor: Cursor,
}

/// Where a region's words begin, and how many pages it has.
#[derive(Debug, Clone, Copy)]
struct Region {
    start: usize,
    pages: u64,
}

/// The first place on the walk where a set bit can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cursor {
    /// Which word of each lane.
    row: usize,
    lane: usize,
}

impl Cursor {
    const START: Self = Self { row: 0, lane: 0 };
}

impl DirtyLedger {
    /// A ledger without dirty pages, for regions of these lengths in pages. [`RegionId`]s are indices into the slice.
    #[must_use]
    pub fn new(pages_per_region: &[u64]) -> Self {
        let mut words = 0;
        let place = |&pages: &u64| {
            let start = words;
            words += index(pages.div_ceil(WORD_BITS));
            Region { start, pages }
        };
        let regions = pages_per_region.iter().map(place).collect();
        Self { words: vec![0; words], regions, lane: words.div_ceil(LANES), dirty: 0, cursor: Cursor::START }
    }

    /// Marks one page. `false` if there is no such page.
    pub fn mark(&mut self, region: RegionId, page: u64) -> bool {
        self.mark_words(region, page / WORD_BITS * WORD_BITS, &[1 << (page % WORD_BITS)])
    }

    /// Marks every page whose bit is set in `words`: bit `b` of word `w` is page `first_page + 64 * w + b`, as in KVM's
    /// dirty log. `first_page` must be a multiple of 64. `false` if that is not so or a set bit lay outside the region;
    /// what lies inside is marked anyway.
    pub fn mark_words(&mut self, region: RegionId, first_page: u64, words: &[u64]) -> bool {
        let Some(region) = self.regions.get(usize::from(region.0)).copied() else {
            return words.iter().all(|&word| word == 0);
        };
        if !first_page.is_multiple_of(WORD_BITS) {
            return false;
        }
        let mut inside = true;
        for (&word, at) in words.iter().zip(first_page / WORD_BITS..).filter(|&(&word, _)| word != 0) {
            let valid = region.valid_bits(at);
            inside &= word & !valid == 0;
            if word & valid == 0 {
                continue;
            }
            let at = region.start + index(at);
            let slot = &mut self.words[at];
            self.dirty += u64::from((word & valid & !*slot).count_ones());
            *slot |= word & valid;
            self.cursor = self.cursor.min(Cursor { row: at % self.lane, lane: at / self.lane });
        }
        inside
    }

    /// Marks all pages of a run, such as the rest of one that was taken but not sent. `false` if a page is not there.
    pub fn put_back(&mut self, run: PageRun) -> bool {
        let (mut page, end) = (run.first.0, run.first.0.saturating_add(u64::from(run.pages)));
        let mut inside = end - page == u64::from(run.pages);
        while page < end {
            let word_end = (page / WORD_BITS + 1).saturating_mul(WORD_BITS).min(end);
            let mask = low_bits(word_end - page) << (page % WORD_BITS);
            inside &= self.mark_words(run.region, page / WORD_BITS * WORD_BITS, &[mask]);
            page = word_end;
        }
        inside
    }

    /// Marks every page of every region.
    pub fn mark_all(&mut self) {
        self.dirty = self.regions.iter().map(|region| region.pages).sum();
        self.cursor = Cursor::START;
        for region in &self.regions {
            let words = index(region.pages.div_ceil(WORD_BITS));
            for (word, at) in self.words[region.start..][..words].iter_mut().zip(0..) {
                *word = region.valid_bits(at);
            }
        }
    }

    /// How many pages are dirty.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.dirty
    }

    /// Whether a page is dirty; `false` for pages that do not exist.
    #[must_use]
    pub fn is_dirty(&self, region: RegionId, page: u64) -> bool {
        let exists = |region: &&Region| page < region.pages;
        let word = self.regions.get(usize::from(region.0)).filter(exists).and_then(|region| {
            let at = usize::try_from(page / WORD_BITS).ok()?;
            self.words.get(region.start + at)
        });
        word.is_some_and(|word| word & (1 << (page % WORD_BITS)) != 0)
    }

    /// Takes the first run of dirty pages on the walk out: of at most `max_pages` pages, all of one word of the ledger, which
    /// are 64. `None` when no page is dirty, or `max_pages` is 0.
    pub fn take_run(&mut self, max_pages: u32) -> Option<PageRun> {
        if max_pages == 0 {
            return None;
        }
        let at = self.seek()?;
        let word = &mut self.words[at];
        let bit = word.trailing_zeros();
        let pages = (*word >> bit).trailing_ones().min(max_pages);
        *word &= !(low_bits(pages.into()) << bit);
        self.dirty -= u64::from(pages);
        let region = self.regions.partition_point(|region| region.start <= at) - 1;
        let first = (at - self.regions[region].start) as u64 * WORD_BITS + u64::from(bit);
        let region = RegionId(u16::try_from(region).expect("a set bit lies in a region that a RegionId named"));
        Some(PageRun { region, first: PageIndex(first), pages })
    }

    /// Moves the cursor to the first word with a set bit; where that is.
    fn seek(&mut self) -> Option<usize> {
        while self.cursor.row < self.lane {
            let at = |lane: usize| lane * self.lane + self.cursor.row;
            let marked = |lane: &usize| self.words.get(at(*lane)).is_some_and(|&word| word != 0);
            if let Some(lane) = (self.cursor.lane..LANES).find(marked) {
                let at = at(lane);
                self.cursor.lane = lane;
                return Some(at);
            }
            self.cursor = Cursor { row: self.cursor.row + 1, lane: 0 };
        }
        None
    }
}

impl Region {
    /// The bits of this region's word `at` that stand for pages.
    fn valid_bits(&self, at: u64) -> u64 {
        low_bits(self.pages.saturating_sub(at.saturating_mul(WORD_BITS)).min(WORD_BITS))
    }
}

/// The ledger of a migration, out of which several streams take runs at once. It is locked for one run at a time.
#[derive(Debug)]
pub(crate) struct SharedLedger(Mutex<DirtyLedger>);

impl SharedLedger {
    pub(crate) fn new(ledger: DirtyLedger) -> Self {
        Self(Mutex::new(ledger))
    }

    /// The ledger, for as long as nobody else needs it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, DirtyLedger> {
        // A set of bits is whole after each call, whatever a thread that panicked was about to do with it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`DirtyLedger::take_run`].
    pub(crate) fn take_run(&self, max_pages: u32) -> Option<PageRun> {
        self.lock().take_run(max_pages)
    }

    /// See [`DirtyLedger::put_back`].
    pub(crate) fn put_back(&self, run: PageRun) -> bool {
        self.lock().put_back(run)
    }
}

/// A word with its lowest `count` bits set; `count` is at most 64.
fn low_bits(count: u64) -> u64 {
    if count >= WORD_BITS { u64::MAX } else { (1 << count) - 1 }
}

/// An index of a bitmap word as an index into memory. This VMM is 64-bit only.
fn index(word: u64) -> usize {
    usize::try_from(word).expect("usize has 64 bits on the one supported architecture")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const R0: RegionId = RegionId(0);
    const R1: RegionId = RegionId(1);

    fn run(region: RegionId, first: u64, pages: u32) -> PageRun {
        PageRun { region, first: PageIndex(first), pages }
    }

    fn drain(ledger: &mut DirtyLedger, max: u32) -> Vec<PageRun> {
        std::iter::from_fn(|| ledger.take_run(max)).collect()
    }

    #[test]
    fn runs_come_as_memory_is_walked_bounded_and_within_a_region() {
        // 3 words and 2, which are walked in their order.
        let mut ledger = DirtyLedger::new(&[130, 70]);
        ledger.mark_all();
        assert_eq!(ledger.dirty_pages(), 200);
        let runs = drain(&mut ledger, 50);
        let first = [run(R0, 0, 50), run(R0, 50, 14), run(R0, 64, 50), run(R0, 114, 14), run(R0, 128, 2)];
        assert_eq!(runs, [&first[..], &[run(R1, 0, 50), run(R1, 50, 14), run(R1, 64, 6)]].concat());
        assert_eq!((ledger.dirty_pages(), ledger.take_run(0)), (0, None));
    }

    #[test]
    fn lanes_take_turns() {
        // 40 words, of which each lane has 3.
        let mut ledger = DirtyLedger::new(&[64 * 20, 64 * 20]);
        ledger.mark_all();
        let walked: Vec<u64> =
            drain(&mut ledger, 64).into_iter().map(|run| u64::from(run.region.0) * 20 + run.first.0 / 64).collect();
        assert_eq!(walked[..9], [0, 3, 6, 9, 12, 15, 18, 21, 24]);
        assert_eq!(walked[13..17], [39, 1, 4, 7]);
        assert_eq!(walked.iter().collect::<BTreeSet<_>>().len(), 40);
    }

    #[test]
    fn a_mark_behind_the_cursor_is_found() {
        let mut ledger = DirtyLedger::new(&[256, 256]);
        assert!(ledger.mark(R1, 200));
        assert_eq!(ledger.take_run(9), Some(run(R1, 200, 1)));
        assert!(ledger.mark(R0, 3) && ledger.mark(R1, 0));
        assert_eq!(drain(&mut ledger, 9), [run(R0, 3, 1), run(R1, 0, 1)]);
    }

    #[test]
    fn marks_outside_are_refused_and_harmless() {
        let mut ledger = DirtyLedger::new(&[65]);
        assert!(!ledger.mark(R0, 65));
        assert!(!ledger.mark(R0, u64::MAX));
        assert!(!ledger.mark(R1, 0));
        assert!(!ledger.mark_words(R0, 1, &[1]));
        assert!(!ledger.mark_words(R0, u64::MAX - 63, &[u64::MAX, u64::MAX]));
        assert!(!ledger.put_back(run(R0, u64::MAX, u32::MAX)));
        assert_eq!(ledger.dirty_pages(), 0);
        assert!(!ledger.mark_words(R0, 64, &[0b11, 7]));
        assert_eq!(drain(&mut ledger, 9), [run(R0, 64, 1)]);
    }

    #[test]
    fn zero_words_beyond_the_end_are_padding() {
        let mut ledger = DirtyLedger::new(&[64]);
        assert!(ledger.mark_words(R0, 0, &[1, 0, 0]));
        assert_eq!(ledger.dirty_pages(), 1);
    }

    #[test]
    fn what_is_put_back_comes_again() {
        let mut ledger = DirtyLedger::new(&[300]);
        ledger.mark_all();
        let taken: Vec<_> = (0..4).map_while(|_| ledger.take_run(250)).collect();
        assert!(ledger.put_back(run(R0, 100, 156)));
        assert!(ledger.is_dirty(R0, 100) && !ledger.is_dirty(R0, 99) && !ledger.is_dirty(R0, 300));
        assert_eq!(taken.iter().map(PageRun::bytes).sum::<usize>(), 256 * 4096);
        assert_eq!(drain(&mut ledger, 1000).iter().map(|run| run.pages).sum::<u32>(), 200);
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_pages(
            lengths in prop::collection::vec(0u64..9000, 0..4),
            steps in prop::collection::vec((0u16..4, 0u64..9020, any::<u64>(), 0u32..700, 0u8..4), 0..40),
        ) {
            let mut ledger = DirtyLedger::new(&lengths);
            let mut model = BTreeSet::new();
            let exists = |region: u16, page: u64| lengths.get(usize::from(region)).is_some_and(|&len| page < len);
            let words = |lengths: &[u64]| lengths.iter().map(|pages| pages.div_ceil(64)).sum::<u64>();
            let lane = words(&lengths).div_ceil(LANES as u64);
            // When a page is walked, which is what the model is sorted by.
            let at = |region: u16, page: u64| {
                let word = words(&lengths[..usize::from(region)]) + page / 64;
                (word % lane, word / lane, region, page)
            };
            for (region, page, word, pages, step) in steps {
                match step {
                    0 => {
                        prop_assert_eq!(ledger.mark(RegionId(region), page), exists(region, page));
                        model.extend(exists(region, page).then(|| at(region, page)));
                    }
                    1 => {
                        let first = page / 64 * 64;
                        let marked = (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit);
                        let (good, bad): (Vec<u64>, Vec<u64>) = marked.partition(|&page| exists(region, page));
                        prop_assert_eq!(ledger.mark_words(RegionId(region), first, &[word]), bad.is_empty());
                        model.extend(good.into_iter().map(|page| at(region, page)));
                    }
                    2 => {
                        ledger.put_back(run(RegionId(region), page, pages));
                        model.extend((page..page + u64::from(pages)).filter(|&p| exists(region, p)).map(|p| at(region, p)));
                    }
                    _ => {
                        let Some(taken) = ledger.take_run(pages) else { continue };
                        prop_assert!(taken.pages <= pages);
                        let first = at(taken.region.0, taken.first.0);
                        prop_assert_eq!(model.first(), Some(&first));
                        for offset in 0..u64::from(taken.pages) {
                            prop_assert!(model.remove(&at(taken.region.0, taken.first.0 + offset)));
                        }
                    }
                }
                prop_assert_eq!(ledger.dirty_pages(), model.len() as u64);
            }
        }
    }
}
