//! Copies of pages as they were last sent, for deltas.
//!
//! The cache has a set size, which counts its index too, and takes memory only as copies come in. Places are precious:
//! - In round 1 every page is sent, most of them never again. Such a copy takes a free place or none.
//! - Pages of later rounds were written since: they are of the guest's writable working set. They may evict, clock-wise,
//!   copies that were not sent again since round 1 or that sat out a round; a copy of this or the last round stays.
//!   So a working set larger than the cache keeps a part of it cached, where plain recency would cache nothing that is
//!   still there when its turn comes.
//!
//! A copy must be byte for byte what the target has. A page whose bytes this end does not know exactly, because they went
//! raw out of memory that the guest may be writing, or that went as zero, has to be forgotten.
//!
//! Several streams use the cache at once: neighbouring pages lie in different shards, each with a lock of its own.

use super::{Page, PageId};
use crate::region::PAGE_SIZE;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most shards: as many as there may be streams.
const MAX_SHARDS: usize = 64;

/// Copies that are allocated together. With the page that the allocator may add they are 256 KiB.
const SLAB_PAGES: usize = 63;

/// Memory for each copy, in bytes: the page, its entry, and at most two buckets.
const BYTES_PER_COPY: usize = PAGE_SIZE + size_of::<Entry>() + 2 * size_of::<u32>();

/// Memory for a slab of copies, in bytes.
const BYTES_PER_SLAB: usize = SLAB_PAGES * BYTES_PER_COPY + PAGE_SIZE;

/// A shard has at least as much, so that what is left over beside its slabs is little.
const MIN_SHARD_BYTES: usize = 4 * BYTES_PER_SLAB;

/// Entries that are looked at for one to evict, so that a cache full of the working set costs little.
const SEARCH: usize = 32;

/// Stands for no place in buckets and chains.
const NOWHERE: u32 = u32::MAX;

/// The key of an entry without a copy. No page has it: regions are few.
const VACANT: u64 = u64::MAX;

/// The number of the first round.
const FIRST_ROUND: u32 = 1;

/// The cache of all streams of one migration.
pub struct DeltaCache {
    shards: Box<[Mutex<Shard>]>,
}

/// Its copies are in slabs, in the order of their entries; an entry's number is its *place*. Each bucket is a chain of
/// entries through `next`, and so are the vacant ones.
struct Shard {
    places: usize,
    buckets: Vec<u32>,
    entries: Vec<Entry>,
    slabs: Vec<Vec<Page>>,
    vacant: u32,
    hand: usize,
}

#[derive(Clone, Copy)]
struct Entry {
    key: u64,
    next: u32,
    sent_in: u32,
}

impl fmt::Debug for DeltaCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeltaCache").field("shards", &self.shards.len()).finish_non_exhaustive()
    }
}

impl DeltaCache {
    /// A cache that takes at most `bytes` of memory. One that is too small for a page, as one of 0 bytes, keeps none.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let shards = (bytes / MIN_SHARD_BYTES).clamp(1, MAX_SHARDS);
        let (slabs, rest) = (bytes / shards / BYTES_PER_SLAB, bytes / shards % BYTES_PER_SLAB);
        let places = slabs * SLAB_PAGES + rest.saturating_sub(PAGE_SIZE) / BYTES_PER_COPY;
        // Places are numbered in 32 bits. A shard of 16 TiB is not a limit that anybody meets.
        let per_shard = places.min(NOWHERE as usize);
        Self { shards: (0..shards).map(|_| Mutex::new(Shard::new(per_shard))).collect() }
    }

    /// Puts `content` in place of the copy of a page, if the cache has a place for it. If there was a copy, `compare` sees
    /// it before, and what it says is returned: that is the time to encode a delta. Whatever comes of that, the page has to
    /// be sent with exactly this content in this round, or forgotten.
    pub fn exchange<R>(&self, page: PageId, content: &Page, round: u32, compare: impl FnOnce(&Page) -> R) -> Option<R> {
        let mut shard = self.shard(page);
        let found = shard.find(key(page));
        let compared = found.map(|place| compare(shard.copy(place)));
        if let Some(place) = found.or_else(|| shard.insert(key(page), round)) {
            shard.entries[place].sent_in = round;
            *shard.copy(place) = *content;
        }
        compared
    }

    /// Drops the copy of a page, if there is one.
    pub fn forget(&self, page: PageId) {
        self.shard(page).remove(key(page));
    }

    fn shard(&self, page: PageId) -> MutexGuard<'_, Shard> {
        let shards = self.shards.len() as u64;
        let shard = usize::try_from(page.page.0 % shards).expect("the remainder is less than the number of shards");
        // Whoever panicked had not got hold of a copy half written: a copy is written last.
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(PageId { region, page }: PageId) -> u64 {
    u64::from(region.0) << 48 | page.0
}

impl Shard {
    fn new(places: usize) -> Self {
        Self {
            places,
            buckets: vec![NOWHERE; places.next_power_of_two()],
            entries: Vec::with_capacity(places),
            slabs: Vec::with_capacity(places.div_ceil(SLAB_PAGES)),
            vacant: NOWHERE,
            hand: 0,
        }
    }

    /// The bucket of a key: the highest bits of its product with 2^64 divided by the golden ratio.
    fn bucket(&self, key: u64) -> usize {
        let bits = self.buckets.len().trailing_zeros();
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15).checked_shr(u64::BITS - bits).unwrap_or(0);
        usize::try_from(hash).expect("a bucket's number is less than the number of buckets")
    }

    fn find(&self, key: u64) -> Option<usize> {
        let mut at = self.buckets[self.bucket(key)];
        while at != NOWHERE {
            let entry = self.entries[at as usize];
            if entry.key == key {
                return Some(at as usize);
            }
            at = entry.next;
        }
        None
    }

    fn copy(&mut self, place: usize) -> &mut Page {
        &mut self.slabs[place / SLAB_PAGES][place % SLAB_PAGES]
    }

    /// Finds a place for a page that has none.
    fn insert(&mut self, key: u64, round: u32) -> Option<usize> {
        let place = self.free_place().or_else(|| self.evict(round))?;
        let bucket = self.bucket(key);
        let number = u32::try_from(place).expect("places are numbered in 32 bits");
        self.entries[place] = Entry { key, next: self.buckets[bucket], sent_in: round };
        self.buckets[bucket] = number;
        Some(place)
    }

    fn free_place(&mut self) -> Option<usize> {
        let place = match self.vacant {
            NOWHERE if self.entries.len() == self.places => return None,
            NOWHERE => {
                let place = self.entries.len();
                if place.is_multiple_of(SLAB_PAGES) {
                    self.slabs.push(Vec::with_capacity(SLAB_PAGES.min(self.places - place)));
                }
                // The memory of a slab is touched copy by copy: all of it at once would keep the link waiting.
                self.slabs[place / SLAB_PAGES].push([0; PAGE_SIZE]);
                self.entries.push(Entry { key: VACANT, next: NOWHERE, sent_in: 0 });
                place
            }
            vacant => {
                self.vacant = self.entries[vacant as usize].next;
                vacant as usize
            }
        };
        Some(place)
    }

    /// Takes the place of a copy that is not of the working set, as far as that is known.
    fn evict(&mut self, round: u32) -> Option<usize> {
        if round == FIRST_ROUND || self.entries.is_empty() {
            return None;
        }
        for _ in 0..SEARCH.min(self.entries.len()) {
            let Entry { key, sent_in, .. } = self.entries[self.hand];
            self.hand = (self.hand + 1) % self.entries.len();
            if sent_in == FIRST_ROUND || sent_in + 1 < round {
                self.remove(key);
                return self.free_place();
            }
        }
        None
    }

    fn remove(&mut self, key: u64) {
        let bucket = self.bucket(key);
        let (mut at, mut before) = (self.buckets[bucket], None::<usize>);
        while at != NOWHERE {
            let entry = self.entries[at as usize];
            if entry.key == key {
                match before {
                    None => self.buckets[bucket] = entry.next,
                    Some(before) => self.entries[before].next = entry.next,
                }
                self.entries[at as usize] = Entry { key: VACANT, next: self.vacant, sent_in: 0 };
                self.vacant = at;
                return;
            }
            (at, before) = (entry.next, Some(at as usize));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::samples::pattern;
    use crate::region::{PageIndex, RegionId};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn id(page: u64) -> PageId {
        PageId { region: RegionId(0), page: PageIndex(page) }
    }

    /// A cache with places for this many pages, all in one shard.
    fn cache(places: usize) -> DeltaCache {
        assert!(places < SLAB_PAGES);
        DeltaCache::new(PAGE_SIZE + places * BYTES_PER_COPY)
    }

    /// Sends a page; what the cache held of it.
    fn send(cache: &DeltaCache, page: u64, round: u32, content: u64) -> Option<Page> {
        cache.exchange(id(page), &pattern(content), round, |old| *old)
    }

    fn held(cache: &DeltaCache, pages: impl Iterator<Item = u64>) -> Vec<u64> {
        pages.filter(|page| cache.shard(id(*page)).find(key(id(*page))).is_some()).collect()
    }

    /// What all parts of a cache have allocated, in bytes.
    fn footprint(cache: &DeltaCache) -> usize {
        let shard = |shard: &Mutex<Shard>| {
            let Shard { places: _, buckets, entries, slabs, vacant: _, hand: _ } = &*shard.lock().unwrap();
            // The allocator may add a page.
            let slabs = slabs.iter().map(|slab| (slab.capacity() + 1) * PAGE_SIZE).sum::<usize>();
            buckets.capacity() * size_of::<u32>() + entries.capacity() * size_of::<Entry>() + slabs
        };
        cache.shards.iter().map(shard).sum()
    }

    #[test]
    fn a_page_is_compared_with_what_was_last_sent() {
        let cache = cache(8);
        assert_eq!(send(&cache, 3, 1, 30), None);
        assert_eq!(send(&cache, 3, 2, 31), Some(pattern(30)));
        assert_eq!(send(&cache, 3, 3, 32), Some(pattern(31)));
        cache.forget(id(3));
        cache.forget(id(4));
        assert_eq!(send(&cache, 3, 4, 33), None);
    }

    #[test]
    fn the_same_page_of_two_regions_is_two_pages() {
        let cache = cache(8);
        send(&cache, 3, 1, 30);
        let other = PageId { region: RegionId(1), ..id(3) };
        assert_eq!(cache.exchange(other, &pattern(9), 1, |old| *old), None);
        assert_eq!(send(&cache, 3, 2, 31), Some(pattern(30)));
    }

    #[test]
    fn the_first_round_takes_free_places_only() {
        let cache = cache(4);
        for page in 0..8 {
            send(&cache, page, 1, page);
        }
        assert_eq!(held(&cache, 0..8), [0, 1, 2, 3]);
    }

    #[test]
    fn pages_that_are_sent_again_evict_those_that_are_not() {
        let cache = cache(4);
        for page in 0..8 {
            send(&cache, page, 1, page);
        }
        for page in [2, 6, 7] {
            send(&cache, page, 2, page);
        }
        assert_eq!(held(&cache, 0..8), [2, 3, 6, 7]);
        // 3 was not sent since round 1, 7 sat out a round, 2 and 6 are of the last one.
        for (page, round) in [(2, 3), (6, 3), (4, 4), (5, 4), (1, 4)] {
            send(&cache, page, round, page);
        }
        assert_eq!(held(&cache, 0..8), [2, 4, 5, 6]);
    }

    /// The case in which plain recency would never find anything.
    #[test]
    fn of_a_working_set_twice_as_large_half_stays() {
        let cache = cache(40);
        for round in 1..6 {
            let hits = (0..80).filter(|page| send(&cache, *page, round, *page).is_some()).count();
            assert!(round < 3 || hits == 40, "{hits} in round {round}");
        }
    }

    #[test]
    fn memory_stays_within_the_set_size() {
        for bytes in [0, 100, BYTES_PER_COPY, 300_000, 1 << 20, 3_000_001, 40 << 20] {
            let cache = DeltaCache::new(bytes);
            let empty = footprint(&cache);
            assert!(empty <= bytes / 128 + size_of::<u32>(), "{empty} of {bytes} before the first page");
            for page in 0..12_000 {
                send(&cache, page, 1, page);
            }
            let full = footprint(&cache);
            assert!(full <= bytes.max(size_of::<u32>()), "{full} of {bytes}");
            assert!(bytes < 1 << 18 || full > bytes / 32 * 31, "{full} of {bytes} are used");
        }
    }

    #[test]
    fn a_cache_without_places_keeps_nothing() {
        let cache = DeltaCache::new(0);
        assert_eq!((send(&cache, 1, 1, 1), send(&cache, 1, 2, 1)), (None, None));
        cache.forget(id(1));
    }

    #[test]
    fn streams_share_it() {
        let cache = &DeltaCache::new(16 << 20);
        std::thread::scope(|scope| {
            for stream in 0..4 {
                scope.spawn(move || {
                    for round in 1..4 {
                        for page in (stream..2000).step_by(4) {
                            let old = send(cache, page, round, page + u64::from(round));
                            let expected = (round > 1).then(|| pattern(page + u64::from(round) - 1));
                            assert!(old == expected, "page {page} in round {round}");
                        }
                    }
                });
            }
        });
    }

    proptest! {
        /// Whatever is sent and forgotten: what the cache returns is what was last sent, and chains stay whole.
        #[test]
        fn a_copy_is_never_of_another_page_or_time(
            steps in vec((0..30_u64, 0..8_u8), 1..400),
            places in 0..20_usize,
        ) {
            let cache = cache(places);
            let (mut round, mut model) = (1, HashMap::new());
            for (number, (page, step)) in (0..).zip(steps) {
                match step {
                    0 => round += 1,
                    1 => {
                        cache.forget(id(page));
                        model.remove(&page);
                    }
                    _ => {
                        let old = send(&cache, page, round, number);
                        let last = model.insert(page, pattern(number));
                        prop_assert!(old.is_none() || old == last);
                        prop_assert!(old.is_some() || last.is_none() || held(&cache, 0..30).len() >= places.min(1));
                    }
                }
                prop_assert!(held(&cache, 0..30).len() <= places);
            }
        }
    }
}
