//! Finds pages whose bytes were sent before, in another page.
//!
//! **Digest.** The target makes a page of a reference without comparing bytes, so two pages of one digest are one page in
//! the guest that arrives. A process in the guest must not be able to make such a pair. The digest is POLYVAL (RFC 8452), a
//! polynomial over GF(2^128) with the page's 256 blocks as coefficients, at a secret point drawn for each migration. Two
//! different pages collide at most at the 256 roots of their difference, so for any two pages, however they were chosen,
//! the chance is at most 256 / 2^128 = 2^-120. That holds without any assumption about ciphers, as long as point and
//! digests stay secret: both never leave this process, and all that the guest might learn, from times, is that pages which
//! it made did not collide, which excludes at most 256 points a pair. A guest of 16 TiB, all of whose 2^32 pages differ,
//! has a collision with a chance below 2^-57. Keyed BLAKE3 was the other choice: as safe, half as fast on 4 KiB.
//!
//! **Validity.** A reference is right only if the target's page holds these bytes when the reference is applied. A page
//! that is sent in round 1 and in no later round's set holds them for good. One that is sent in a later round may be
//! written again, so that it is referred to in that round only. The bytes must be *exactly* those that were sent: a page
//! that goes raw out of memory which the guest may be writing must not come here, unless it is read once and sent from that
//! copy. Nor should zero pages, which have a shorter code.
//!
//! **Table.** Digests in sets of 8, the least recently used of which goes when another comes. Its size is bounded, and
//! smaller for a guest that needs less. Several streams use it at once.

use super::reference::Reference;
use super::{Page, PageId};
use crate::ledger::DirtyLedger;
use crate::region::{MAX_REGION_PAGES, MAX_REGIONS, PageIndex, PageRun, RegionId};
use polyval::universal_hash::UniversalHash;
use polyval::{Block, Polyval};
use std::fmt;
use std::sync::{Mutex, PoisonError, RwLock};

/// The size of a table where nobody chooses one, in bytes: 2.7 GiB of different pages.
pub const DEFAULT_BYTES: usize = 16 << 20;

/// Entries of a set.
const WAYS: usize = 8;

/// Locks, each for a part of the sets: as many as there may be streams.
const SHARDS: usize = 64;

/// The number of the first round.
const FIRST_ROUND: u16 = 1;

const PAGE_BITS: u32 = MAX_REGION_PAGES.ilog2();
const REGION_BITS: u32 = MAX_REGIONS.ilog2();
const _: () = assert!(PAGE_BITS + REGION_BITS + u16::BITS <= u64::BITS, "an entry's place fits in one word");

/// The digest of a page, as secret as the key: whoever knows digests can compute the key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u64; 2]);

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Digest").finish_non_exhaustive()
    }
}

/// The pages that one migration has sent, by digest.
pub struct DedupTable {
    polyval: Polyval,
    shards: Box<[Mutex<Box<[Set]>>]>,
    now: RwLock<Now>,
}

/// The round under way.
struct Now {
    /// `None` beyond the rounds that an entry can name.
    round: Option<u16>,
    /// The pages that a later round than the first has sent or will send.
    resent: DirtyLedger,
}

/// The most recently used entry is first.
type Set = [Entry; WAYS];

/// Region, round and page in one word. The round of an entry that holds nothing is 0.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry {
    digest: Digest,
    place: u64,
}

impl fmt::Debug for DedupTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DedupTable").finish_non_exhaustive()
    }
}

impl DedupTable {
    /// A table in round 1, of at most `bytes`, for regions of these lengths in pages, with a key of its own.
    ///
    /// # Errors
    /// If the host gives no random bytes.
    pub fn new(bytes: usize, pages_per_region: &[u64]) -> Result<Self, getrandom::Error> {
        let mut key = [0; polyval::KEY_SIZE];
        getrandom::fill(&mut key)?;
        // Indices spread like random numbers: a quarter more entries than pages, and hardly a set is too small.
        let pages = usize::try_from(pages_per_region.iter().sum::<u64>()).unwrap_or(usize::MAX);
        let needed = pages.saturating_add(pages / 4).div_ceil(WAYS);
        let sets_per_shard = needed.div_ceil(SHARDS).min(bytes / size_of::<Set>() / SHARDS);
        let shard = || Mutex::new(vec![[Entry::EMPTY; WAYS]; sets_per_shard].into_boxed_slice());
        Ok(Self {
            polyval: Polyval::new(&key.into()),
            shards: (0..SHARDS).map(|_| shard()).collect(),
            now: RwLock::new(Now { round: Some(FIRST_ROUND), resent: DirtyLedger::new(pages_per_region) }),
        })
    }

    /// Begins a round after the first, whose set of pages is `set`. No page of it may have been sent yet, and all of the
    /// round before must have been looked up.
    pub fn begin_round(&self, round: u32, set: impl IntoIterator<Item = PageRun>) {
        let mut now = self.now.write().unwrap_or_else(PoisonError::into_inner);
        now.round = u16::try_from(round).ok();
        for run in set {
            now.resent.put_back(run);
        }
    }

    /// The digest of a page. This is the costly part, and takes no lock.
    #[must_use]
    pub fn digest(&self, page: &Page) -> Digest {
        let mut polyval = self.polyval.clone();
        polyval.update(Block::slice_as_chunks(page).0);
        let digest: [u8; 16] = polyval.finalize().into();
        Digest(zerocopy::transmute!(digest))
    }

    /// Says in which other page the target has or will have these bytes. If in none, `page` is remembered for them, and has
    /// to be sent with exactly these bytes in the round under way.
    pub fn look_up_or_insert(&self, digest: Digest, page: PageId) -> Option<Reference> {
        let now = self.now.read().unwrap_or_else(PoisonError::into_inner);
        let round = now.round?;
        let entry = Entry::new(digest, page, round);
        let [shard, set] = digest.0.map(spread);
        let mut sets = self.shards[index(shard, SHARDS)].lock().unwrap_or_else(PoisonError::into_inner);
        let set = index(set, sets.len());
        let set = sets.get_mut(set)?;
        let found = set.iter().position(|held| held.digest == digest && held.round() != 0);
        let reference = found.and_then(|at| set[at].reference(&now, round)).filter(|found| found.page != page);
        // The last one makes room where the digest is new.
        set[..=found.unwrap_or(WAYS - 1)].rotate_right(1);
        if reference.is_none() {
            set[0] = entry;
        }
        reference
    }
}

/// Mixes a word of a digest for use as an index. A digest is linear in the page (over GF(2)): the digests of pages that differ
/// in a few bits only, such as a counter, are a linear space, and some of their bits may always be the same. The carries
/// of a multiplication are not linear; the factor is 2^64 divided by the golden ratio (Knuth, TAOCP 3, 6.4).
fn spread(word: u64) -> u64 {
    let mixed = (word ^ word >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Spreads the values of a word evenly over `count` indices, by its highest bits.
fn index(word: u64, count: usize) -> usize {
    let product = u128::from(word) * count as u128;
    usize::try_from(product >> u64::BITS).expect("it is less than count")
}

impl Entry {
    const EMPTY: Self = Self { digest: Digest([0; 2]), place: 0 };

    fn new(digest: Digest, PageId { region, page }: PageId, round: u16) -> Self {
        let place = (u64::from(round) << REGION_BITS | u64::from(region.0)) << PAGE_BITS | page.0;
        Self { digest, place }
    }

    fn round(&self) -> u16 {
        u16::try_from(self.place >> (PAGE_BITS + REGION_BITS)).expect("16 bits are in use")
    }

    fn page(&self) -> PageId {
        let region = (self.place >> PAGE_BITS) & ((1 << REGION_BITS) - 1);
        let region = RegionId(u16::try_from(region).expect("the bits of a region fit in 16"));
        PageId { region, page: PageIndex(self.place & (MAX_REGION_PAGES - 1)) }
    }

    /// The reference to this entry's page, if the page holds in this round what it held when the entry was made.
    fn reference(&self, now: &Now, round: u16) -> Option<Reference> {
        let (page, same_round) = (self.page(), self.round() == round);
        let settled = self.round() == FIRST_ROUND && !now.resent.is_dirty(page.region, page.page.0);
        (same_round || settled).then_some(Reference { page, same_round })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::samples::{noise, pattern};

    fn id(page: u64) -> PageId {
        PageId { region: RegionId(1), page: PageIndex(page) }
    }

    fn run(first: u64, pages: u32) -> PageRun {
        PageRun { region: RegionId(1), first: PageIndex(first), pages }
    }

    fn table(bytes: usize) -> DedupTable {
        DedupTable::new(bytes, &[64, 1 << 16]).unwrap()
    }

    /// Asks for a page of a content; where the target has it.
    fn ask(table: &DedupTable, page: u64, content: u64) -> Option<(u64, bool)> {
        let reference = table.look_up_or_insert(table.digest(&pattern(content)), id(page))?;
        assert_eq!(reference.page.region, RegionId(1));
        Some((reference.page.page.0, reference.same_round))
    }

    /// RFC 8452, appendix A, has two blocks; the crate is tested with them. Here: a page is a polynomial.
    #[test]
    fn the_digest_is_of_every_byte_and_of_the_key() {
        let (one, other) = (table(0), table(0));
        let page = noise(1);
        assert!(one.digest(&page) == one.digest(&page));
        assert!(one.digest(&page) != other.digest(&page), "each migration has its own key");
        for at in [0, 1, 15, 16, 2047, 4095] {
            let mut changed = page;
            changed[at] ^= 0x10;
            assert!(one.digest(&page) != one.digest(&changed), "byte {at}");
        }
        let mut swapped = page;
        swapped[..16].copy_from_slice(&page[16..32]);
        swapped[16..32].copy_from_slice(&page[..16]);
        assert!(one.digest(&page) != one.digest(&swapped));
    }

    #[test]
    fn the_second_page_of_a_content_is_a_reference_to_the_first() {
        let table = table(DEFAULT_BYTES);
        assert_eq!(ask(&table, 10, 1), None);
        assert_eq!(ask(&table, 11, 2), None);
        assert_eq!(ask(&table, 12, 1), Some((10, true)));
        assert_eq!(ask(&table, 13, 1), Some((10, true)));
        assert_eq!(ask(&table, 10, 1), None, "a page is no copy of itself");
    }

    #[test]
    fn a_page_of_round_1_is_referred_to_until_it_is_in_a_later_set() {
        let table = table(DEFAULT_BYTES);
        for page in 10..13 {
            ask(&table, page, page);
        }
        table.begin_round(2, [run(11, 1), run(40, 9)]);
        assert_eq!(ask(&table, 40, 10), Some((10, false)));
        assert_eq!(ask(&table, 41, 11), None, "11 is written again");
        assert_eq!(ask(&table, 42, 11), Some((41, true)));
        table.begin_round(3, [run(10, 1), run(50, 9)]);
        assert_eq!(ask(&table, 50, 10), None, "10 is written again");
        assert_eq!(ask(&table, 51, 12), Some((12, false)));
    }

    #[test]
    fn a_page_of_a_later_round_is_referred_to_in_that_round_only() {
        let table = table(DEFAULT_BYTES);
        table.begin_round(2, [run(20, 9)]);
        assert_eq!(ask(&table, 20, 1), None);
        assert_eq!(ask(&table, 21, 1), Some((20, true)));
        table.begin_round(3, [run(30, 9)]);
        assert_eq!(ask(&table, 30, 1), None);
        assert_eq!(ask(&table, 31, 1), Some((30, true)));
    }

    #[test]
    fn rounds_that_entries_cannot_name_find_nothing() {
        let table = table(DEFAULT_BYTES);
        ask(&table, 10, 1);
        table.begin_round(u32::from(u16::MAX) + 2, []);
        assert_eq!(ask(&table, 11, 1), None);
    }

    #[test]
    fn its_size_is_bounded_and_old_entries_go() {
        let small = table(64 << 10);
        for page in 0..60_000 {
            assert_eq!(ask(&small, page, page), None);
        }
        let sets: usize = small.shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
        assert!(sets * size_of::<Set>() <= 64 << 10 && sets > 256);
        assert_eq!(ask(&small, 61_000, 0), None, "replaced long ago");
        assert_eq!(ask(&small, 61_001, 59_999), Some((59_999, true)));
        let recent = (0..1000).filter(|back| ask(&small, 62_000, 59_999 - back).is_some()).count();
        assert!(recent > 900, "{recent} of the last 1000 are found");
    }

    /// All of a guest's pages fit in a table that is large enough for them.
    #[test]
    fn a_table_for_the_guest_forgets_hardly_anything() {
        let table = table(DEFAULT_BYTES);
        for page in 0..60_000 {
            ask(&table, page, page);
        }
        let held = |set: &Set| set.iter().filter(|entry| entry.round() != 0).count();
        let found: usize = table.shards.iter().map(|shard| shard.lock().unwrap().iter().map(held).sum::<usize>()).sum();
        // Random places would hold 57,200, give or take 80.
        assert!(found > 56_500, "{found}");
    }

    #[test]
    fn a_table_without_room_finds_nothing() {
        let table = table(0);
        assert_eq!((ask(&table, 1, 1), ask(&table, 2, 1)), (None, None));
    }
}
