//! A set of pages that several threads add to at once: one atomic bit per page.

use crate::region::{PageIndex, PageRun, RegionId};
use std::sync::atomic::{AtomicU64, Ordering};

const WORD_BITS: u64 = 64;

/// Pages of all regions of one guest. Pages that do not exist are never in it.
#[derive(Debug)]
pub(crate) struct PageSet(Vec<Box<[AtomicU64]>>);

impl PageSet {
    /// An empty set, for regions of these lengths in pages.
    pub(crate) fn new(pages_per_region: impl IntoIterator<Item = u64>) -> Self {
        let words = |pages: u64| (0..pages.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0)).collect();
        Self(pages_per_region.into_iter().map(words).collect())
    }

    /// Adds the pages of a run, which must exist.
    pub(crate) fn add(&self, run: PageRun) {
        let (mut page, end) = (run.first.0, run.first.0 + u64::from(run.pages));
        while page < end {
            let word_end = ((page / WORD_BITS + 1) * WORD_BITS).min(end);
            let mask = (u64::MAX >> (WORD_BITS - (word_end - page))) << (page % WORD_BITS);
            if let Some(word) = self.word(run.region, page) {
                word.fetch_or(mask, Ordering::Release);
            }
            page = word_end;
        }
    }

    /// Adds every page of a region, which has so many.
    pub(crate) fn add_all(&self, region: RegionId, pages: u64) {
        let most = u64::from(u32::MAX);
        for first in (0..pages).step_by(u32::MAX as usize) {
            let pages = u32::try_from((pages - first).min(most)).expect("it is no more than fits");
            self.add(PageRun { region, first: PageIndex(first), pages });
        }
    }

    /// Takes every page out, and tells of them in runs, none of them longer than 64 pages.
    pub(crate) fn take(&self) -> Vec<PageRun> {
        let mut runs = Vec::new();
        for (region, words) in (0..).map(RegionId).zip(&self.0) {
            for (word, start) in words.iter().zip((0..).step_by(64)) {
                // Most are empty, and an exchange takes long.
                let mut left = if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) };
                while left != 0 {
                    let bit = left.trailing_zeros();
                    let pages = (left >> bit).trailing_ones();
                    left &= !(u64::MAX >> (64 - pages) << bit);
                    runs.push(PageRun { region, first: PageIndex(start + u64::from(bit)), pages });
                }
            }
        }
        runs
    }

    /// Takes every page out.
    pub(crate) fn clear(&self) {
        self.0.iter().flatten().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Whether a page is in the set.
    pub(crate) fn contains(&self, region: RegionId, page: u64) -> bool {
        let word = self.word(region, page).map_or(0, |word| word.load(Ordering::Acquire));
        word & (1 << (page % WORD_BITS)) != 0
    }

    fn word(&self, region: RegionId, page: u64) -> Option<&AtomicU64> {
        self.0.get(usize::from(region.0))?.get(usize::try_from(page / WORD_BITS).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_does_not_exist_is_not_in_it() {
        let set = PageSet::new([65, 0]);
        for (region, page) in [(0, 128), (1, 0), (2, 0), (0, u64::MAX)] {
            assert!(!set.contains(RegionId(region), page));
        }
    }

    proptest! {
        #[test]
        fn exactly_the_pages_added_are_in_it(runs in prop::collection::vec((0u16..2, 0u64..200, 1u32..150), 0..6)) {
            let set = PageSet::new([400, 400]);
            set.add(PageRun { region: RegionId(0), first: PageIndex(0), pages: 1 });
            set.clear();
            for &(region, first, pages) in &runs {
                set.add(PageRun { region: RegionId(region), first: PageIndex(first), pages });
            }
            for (region, page) in (0..2).flat_map(|region| (0..400).map(move |page| (region, page))) {
                let added = runs.iter().any(|&(of, first, pages)| {
                    of == region && (first..first + u64::from(pages)).contains(&page)
                });
                prop_assert_eq!(set.contains(RegionId(region), page), added, "page {} of region {}", page, region);
            }
            let again = PageSet::new([400, 400]);
            for run in set.take() {
                again.add(run);
            }
            prop_assert!(set.take().is_empty());
            for (region, page) in (0..2).flat_map(|region| (0..400).map(move |page| (region, page))) {
                let added = runs.iter().any(|&(of, first, pages)| {
                    of == region && (first..first + u64::from(pages)).contains(&page)
                });
                prop_assert_eq!(again.contains(RegionId(region), page), added);
            }
        }
    }
}
