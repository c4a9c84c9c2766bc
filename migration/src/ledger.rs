//! The ledger of dirty pages: which pages the target does not have in their present content.
//!
//! The source marks pages here as it harvests them from the dirty log, and takes them out in runs as it sends them. One
//! bit per page, one bitmap per region. Invariants: `dirty` equals the number of set bits; no bit beyond a region's end
//! is ever set; no set bit lies before `cursor`. Marks outside the guest's memory are ignored and reported as `false`.

use crate::region::{PageIndex, PageRun, RegionId};
use std::sync::{Mutex, MutexGuard, PoisonError};

const WORD_BITS: u64 = 64;

/// A set of dirty pages of all regions of one guest.
#[derive(Debug, Clone)]
pub struct DirtyLedger {
    regions: Vec<Bitmap>,
    dirty: u64,
    cursor: Cursor,
}

#[derive(Debug, Clone)]
struct Bitmap {
    pages: u64,
    words: Vec<u64>,
}

/// The first place where a set bit can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Cursor {
    region: usize,
    word: usize,
}

impl DirtyLedger {
    /// A ledger without dirty pages, for regions of these lengths in pages. [`RegionId`]s are indices into the slice.
    #[must_use]
    pub fn new(pages_per_region: &[u64]) -> Self {
        let regions = pages_per_region
            .iter()
            .map(|&pages| Bitmap { pages, words: vec![0; index(pages.div_ceil(WORD_BITS))] })
            .collect();
        Self { regions, dirty: 0, cursor: Cursor { region: 0, word: 0 } }
    }

    /// Marks one page. `false` if there is no such page.
    pub fn mark(&mut self, region: RegionId, page: u64) -> bool {
        self.mark_words(region, page / WORD_BITS * WORD_BITS, &[1 << (page % WORD_BITS)])
    }

    /// Marks every page whose bit is set in `words`: bit `b` of word `w` is page `first_page + 64 * w + b`, as in KVM's
    /// dirty log. `first_page` must be a multiple of 64. `false` if that is not so or a set bit lay outside the region;
    /// what lies inside is marked anyway.
    pub fn mark_words(&mut self, region: RegionId, first_page: u64, words: &[u64]) -> bool {
        let Some(bitmap) = self.regions.get_mut(usize::from(region.0)) else {
            return words.iter().all(|&word| word == 0);
        };
        if !first_page.is_multiple_of(WORD_BITS) {
            return false;
        }
        let mut inside = true;
        for (&word, at) in words.iter().zip(first_page / WORD_BITS..).filter(|&(&word, _)| word != 0) {
            let valid = bitmap.valid_bits(at);
            inside &= word & !valid == 0;
            if word & valid == 0 {
                continue;
            }
            let slot = &mut bitmap.words[index(at)];
            self.dirty += u64::from((word & valid & !*slot).count_ones());
            *slot |= word & valid;
            self.cursor = self.cursor.min(Cursor { region: usize::from(region.0), word: index(at) });
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
        self.dirty = 0;
        self.cursor = Cursor { region: 0, word: 0 };
        for bitmap in &mut self.regions {
            self.dirty += bitmap.pages;
            for at in 0..bitmap.words.len() {
                bitmap.words[at] = bitmap.valid_bits(at as u64);
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
        let word = self.regions.get(usize::from(region.0)).and_then(|bitmap| {
            let at = usize::try_from(page / WORD_BITS).ok()?;
            bitmap.words.get(at)
        });
        word.is_some_and(|word| word & (1 << (page % WORD_BITS)) != 0)
    }

    /// Takes the first run of dirty pages out, lowest region and page first, of at most `max_pages` pages.
    /// `None` when no page is dirty, or `max_pages` is 0.
    pub fn take_run(&mut self, max_pages: u32) -> Option<PageRun> {
        if max_pages == 0 {
            return None;
        }
        let first = self.seek()?;
        let region = self.cursor.region;
        let pages = self.regions[region].clear_run(first, max_pages);
        self.dirty -= u64::from(pages);
        self.cursor.word = index((first + u64::from(pages)) / WORD_BITS);
        let region = RegionId(u16::try_from(region).expect("a set bit lies in a region that a RegionId named"));
        Some(PageRun { region, first: PageIndex(first), pages })
    }

    /// Moves the cursor to the first word with a set bit and returns that bit's page.
    fn seek(&mut self) -> Option<u64> {
        while let Some(bitmap) = self.regions.get(self.cursor.region) {
            let rest = bitmap.words.get(self.cursor.word..).unwrap_or(&[]);
            if let Some(skip) = rest.iter().position(|&word| word != 0) {
                self.cursor.word += skip;
                let bit = u64::from(bitmap.words[self.cursor.word].trailing_zeros());
                return Some(self.cursor.word as u64 * WORD_BITS + bit);
            }
            self.cursor = Cursor { region: self.cursor.region + 1, word: 0 };
        }
        None
    }
}

impl Bitmap {
    /// The bits of word `at` that stand for pages of this region.
    fn valid_bits(&self, at: u64) -> u64 {
        low_bits(self.pages.saturating_sub(at.saturating_mul(WORD_BITS)).min(WORD_BITS))
    }

    /// Clears the set bits from `first` on, up to the first clear one or `max_pages`; returns how many.
    fn clear_run(&mut self, first: u64, max_pages: u32) -> u32 {
        let mut taken = 0;
        while taken < max_pages {
            let page = first + u64::from(taken);
            let Some(word) = self.words.get_mut(index(page / WORD_BITS)) else { break };
            let bit = page % WORD_BITS;
            let ones = (*word >> bit).trailing_ones().min(max_pages - taken);
            *word &= !(low_bits(u64::from(ones)) << bit);
            taken += ones;
            if u64::from(ones) + bit < WORD_BITS {
                break;
            }
        }
        taken
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
    fn runs_come_in_order_bounded_and_within_a_region() {
        let mut ledger = DirtyLedger::new(&[130, 70]);
        ledger.mark_all();
        assert_eq!(ledger.dirty_pages(), 200);
        let runs = drain(&mut ledger, 100);
        assert_eq!(runs, [run(R0, 0, 100), run(R0, 100, 30), run(R1, 0, 70)]);
        assert_eq!((ledger.dirty_pages(), ledger.take_run(0)), (0, None));
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
        let taken = ledger.take_run(250).unwrap();
        assert!(ledger.put_back(run(R0, 100, 150)));
        assert!(ledger.is_dirty(R0, 100) && !ledger.is_dirty(R0, 99) && !ledger.is_dirty(R0, 300));
        assert_eq!(taken.bytes(), 250 * 4096);
        assert_eq!(drain(&mut ledger, 1000), [run(R0, 100, 200)]);
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_pages(
            lengths in prop::collection::vec(0u64..300, 0..4),
            steps in prop::collection::vec((0u16..4, 0u64..320, any::<u64>(), 0u32..200, 0u8..4), 0..40),
        ) {
            let mut ledger = DirtyLedger::new(&lengths);
            let mut model = BTreeSet::new();
            let exists = |region: u16, page: u64| lengths.get(usize::from(region)).is_some_and(|&len| page < len);
            for (region, page, word, pages, step) in steps {
                match step {
                    0 => {
                        prop_assert_eq!(ledger.mark(RegionId(region), page), exists(region, page));
                        model.extend(exists(region, page).then_some((region, page)));
                    }
                    1 => {
                        let first = page / 64 * 64;
                        let marked = (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit);
                        let (good, bad): (Vec<u64>, Vec<u64>) = marked.partition(|&page| exists(region, page));
                        prop_assert_eq!(ledger.mark_words(RegionId(region), first, &[word]), bad.is_empty());
                        model.extend(good.into_iter().map(|page| (region, page)));
                    }
                    2 => {
                        ledger.put_back(run(RegionId(region), page, pages));
                        model.extend((page..page + u64::from(pages)).filter(|&p| exists(region, p)).map(|p| (region, p)));
                    }
                    _ => {
                        let Some(taken) = ledger.take_run(pages) else { continue };
                        prop_assert!(taken.pages <= pages);
                        prop_assert_eq!(model.first(), Some(&(taken.region.0, taken.first.0)));
                        for offset in 0..u64::from(taken.pages) {
                            prop_assert!(model.remove(&(taken.region.0, taken.first.0 + offset)));
                        }
                    }
                }
                prop_assert_eq!(ledger.dirty_pages(), model.len() as u64);
            }
        }
    }
}
