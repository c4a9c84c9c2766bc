//! Filling a `Pages` frame: runs of dirty pages out of the ledger, each page in the first code that suits it.
//!
//! ```text
//! never backed ──► Zero        zero ──► Zero        nothing more to try ──► Raw, straight from guest memory or as read
//! a disk of which the target has an old copy, in the first round ──► Kept
//! else a copy of the page:  as last sent ──► nothing   little changed ──► Delta   few runs ──► Rle
//!                           as another page ──► Copy   more runs ──► Rle
//!                           else ──► Plain, or Raw if nothing has to remember the page
//! ```
//! What travels encoded goes into the block, which is packed as a whole at the end.

use crate::codec::block::{MAX_BLOCK, Packer};
use crate::codec::delta::Compared;
use crate::codec::kept;
use crate::codec::reference::REFERENCE_BYTES;
use crate::codec::{Codecs, Page, PageCode, PageId, Tried, rle};
use crate::counts::PageCounts;
use crate::guest::{GuestPages, HostError, exact_slice, whole_run};
use crate::history::History;
use crate::ledger::SharedLedger;
use crate::region::{PAGE_SIZE, PageIndex, PageRun};
use crate::wire::{MAX_PAGES, MAX_RAW_PAGES, MAX_RECORDS, PackedBlock, PageRecord, Pages, Records};
use crate::zero::{is_zero, pages};
use vm_memory::VolatileSlice;

/// Zero pages to look at before a frame goes out anyway: 16 MiB, so that an onlooker sees a large empty guest move, and a
/// wish to cancel is seen.
const SCAN_PAGES: u32 = 4096;

const _: () = assert!(SCAN_PAGES + MAX_RAW_PAGES <= MAX_PAGES, "a batch fits in a frame");

/// An encoding by runs of at most so many bytes is taken without a search for an equal page: that takes longer, and a
/// reference is not much shorter.
const SHORT_RLE: usize = 2 * REFERENCE_BYTES;

/// How pages are looked at and encoded, in one round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Method<'a> {
    pub(crate) codecs: Codecs,
    pub(crate) history: &'a History,
    pub(crate) round: u32,
    /// The most pages to take that are not zero, if there is a limit beside those of every frame.
    pub(crate) pages: Option<u32>,
    /// The regions of which the target may have what is sent, a bit for each: of those only digests go.
    pub(crate) old: u64,
}

/// The frame under way. Its buffers are used again for each frame.
#[derive(Debug)]
pub(crate) struct Batch {
    records: Vec<PageRecord>,
    block: Vec<u8>,
    packer: Packer,
    counts: PageCounts,
    most_pages: u32,
    encoded: Encoded,
    /// The raw pages that were read from disks, in the order of the records.
    stage: Vec<u8>,
}

/// Bytes in the block of the pages whose bytes are not known by their number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) rle: u64,
    pub(crate) delta: u64,
}

impl Batch {
    /// An empty batch, for at most so many pages with content.
    pub(crate) fn new(most_pages: u32) -> Self {
        let records = Vec::with_capacity(MAX_RECORDS);
        let (counts, encoded) = (PageCounts::default(), Encoded::default());
        let most_pages = most_pages.min(MAX_RAW_PAGES);
        Self { records, block: Vec::new(), packer: Packer::new(), counts, most_pages, encoded, stage: Vec::new() }
    }

    /// The records, in order.
    #[cfg(test)]
    pub(crate) fn records(&self) -> Records<'_> {
        Records::new(&self.records)
    }

    /// How many pages of each kind are in the batch.
    pub(crate) fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Bytes in the block by some kinds of pages.
    pub(crate) fn encoded(&self) -> Encoded {
        self.encoded
    }

    /// What the frame says, and the raw pages that follow it.
    pub(crate) fn pages<'a, G: GuestPages>(
        &'a mut self,
        codecs: &Codecs,
        guest: &'a G,
    ) -> Result<(Pages<'a>, Vec<VolatileSlice<'a>>), HostError> {
        let Self { records, block, packer, stage, .. } = self;
        let records = Records::new(records);
        let mut staged = stage.as_mut_slice();
        let raw = records.raw_runs().map(|run| match guest.disk(run.region) {
            None => exact_slice(guest, run),
            Some(_) => {
                let (pages, rest) = std::mem::take(&mut staged).split_at_mut(run.bytes());
                staged = rest;
                Ok(VolatileSlice::from(pages))
            }
        });
        let raw = raw.collect::<Result<_, _>>()?;
        let (code, bytes) = packer.pack(codecs.packing, block);
        Ok((Pages { records, block: PackedBlock { code, unpacked: block.len(), bytes } }, raw))
    }

    /// Begins anew and takes dirty pages out of the ledger until the batch is full. `false` if there were none.
    /// Several streams may do so at once.
    pub(crate) fn fill<G: GuestPages>(
        &mut self,
        ledger: &SharedLedger,
        guest: &G,
        method: Method<'_>,
    ) -> Result<bool, HostError> {
        self.records.clear();
        self.block.clear();
        self.stage.clear();
        (self.counts, self.encoded) = (PageCounts::default(), Encoded::default());
        while let Some(run) = ledger.take_run(self.room(method.pages)) {
            let taken = self.add(run, guest, method)?;
            if taken < run.pages {
                let first = PageIndex(run.first.0 + u64::from(taken));
                ledger.put_back(PageRun { first, pages: run.pages - taken, ..run });
                break;
            }
        }
        Ok(self.counts.all() > 0)
    }

    /// How many more pages may be looked at, whatever they turn out to be.
    fn room(&self, limit: Option<u32>) -> u32 {
        let scanned = self.counts.zero + self.counts.same;
        if scanned >= u64::from(SCAN_PAGES) || self.records.len() == MAX_RECORDS {
            return 0;
        }
        let in_block = (MAX_BLOCK - self.block.len()) / PAGE_SIZE;
        let with_content = self.counts.sent() - self.counts.zero;
        let looked_at = self.counts.all() - self.counts.zero;
        let left = limit.map_or(u64::MAX, |limit| u64::from(limit).saturating_sub(looked_at));
        u32::try_from(u64::from(self.most_pages).saturating_sub(with_content).min(in_block as u64).min(left))
            .expect("the minimum of some numbers, of which two are small")
    }

    /// Adds the pages of a run, as many as there are records for; returns how many.
    fn add<G: GuestPages>(&mut self, run: PageRun, guest: &G, method: Method<'_>) -> Result<u32, HostError> {
        let hole = guest.leading_hole(run).min(run.pages);
        if hole > 0 {
            if !self.record(PageRun { pages: hole, ..run }, PageCode::Zero) {
                return Ok(0);
            }
            method.history.forget(PageRun { pages: hole, ..run });
        }
        if hole == run.pages {
            return Ok(hole);
        }
        let rest = PageRun { first: PageIndex(run.first.0 + u64::from(hole)), pages: run.pages - hole, ..run };
        let on_disk = guest.disk(run.region).is_some();
        let mut stage = std::mem::take(&mut self.stage);
        let before = stage.len();
        if method.old >> run.region.0 & 1 == 1 {
            let taken = self.add_kept(guest, rest, &mut stage)?;
            self.stage = stage;
            return Ok(hole + taken);
        }
        let slice = whole_run(guest, rest, &mut stage)?;
        let (mut taken, mut kept) = (run.pages, 0);
        for (page, (offset, id)) in pages(&slice).zip((hole..).zip(rest.ids())) {
            // A page must not be looked up and then not be sent, so there must be a record for it, whatever it turns out to
            // be.
            if self.records.len() == MAX_RECORDS {
                taken = offset;
                break;
            }
            let raw = self.counts.raw;
            self.look_at(&page, id, method);
            if self.counts.raw > raw {
                // Read pages that are sent as they are move up to those before them.
                if on_disk && kept < (offset - hole) as usize {
                    page.copy_to_volatile_slice(slice.subslice(kept * PAGE_SIZE, PAGE_SIZE).map_err(Box::new)?);
                }
                kept += 1;
            }
        }
        if on_disk {
            stage.truncate(before + kept * PAGE_SIZE);
        }
        self.stage = stage;
        Ok(taken)
    }

    /// Adds the digests of a run, if there is a record for it; how many pages that were.
    fn add_kept<G: GuestPages>(&mut self, guest: &G, run: PageRun, stage: &mut Vec<u8>) -> Result<u32, HostError> {
        if !self.record(run, PageCode::Kept) {
            return Ok(0);
        }
        let before = stage.len();
        whole_run(guest, run, stage)?;
        kept::encode(&stage[before..], &mut self.block);
        stage.truncate(before);
        Ok(run.pages)
    }

    /// Adds one page, for which there is room.
    fn look_at(&mut self, page: &VolatileSlice<'_>, id: PageId, method: Method<'_>) {
        let Method { codecs, history, round, pages: _, old: _ } = method;
        let one = PageRun { region: id.region, first: id.page, pages: 1 };
        if codecs.zero && is_zero(page) {
            history.forget(one);
            self.record(one, PageCode::Zero);
            return;
        }
        if !codecs.delta {
            history.forget(one);
        }
        if codecs.leave_raw() && !codecs.rle {
            self.record(one, PageCode::Raw);
            return;
        }
        let mut content: Page = [0; PAGE_SIZE];
        page.copy_to(&mut content);
        let before = self.block.len();
        let compared =
            if codecs.delta { history.compare(id, &content, round, &mut self.block) } else { Compared::Declined };
        let code = match compared {
            Compared::Same => {
                self.counts.same += 1;
                return;
            }
            Compared::Written => PageCode::Delta,
            Compared::Declined => self.encode_whole(&content, id, method),
        };
        let bytes = (self.block.len() - before) as u64;
        match code {
            PageCode::Rle => self.encoded.rle += bytes,
            PageCode::Delta => self.encoded.delta += bytes,
            PageCode::Raw | PageCode::Zero | PageCode::Plain | PageCode::Copy | PageCode::Kept => {}
        }
        self.record(one, code);
    }

    /// Encodes a page without regard to what it was before.
    fn encode_whole(&mut self, content: &Page, id: PageId, method: Method<'_>) -> PageCode {
        let Method { codecs, history, round: _, pages: _, old: _ } = method;
        let before = self.block.len();
        let rle = codecs.rle && rle::encode(content, &mut self.block) == Tried::Written;
        let is_short = rle && self.block.len() - before <= SHORT_RLE;
        if codecs.dedup
            && !is_short
            && let Some(reference) = history.find(id, content)
        {
            self.block.truncate(before);
            reference.encode(&mut self.block);
            return PageCode::Copy;
        }
        if rle {
            return PageCode::Rle;
        }
        if codecs.leave_raw() {
            return PageCode::Raw;
        }
        self.block.extend(content);
        PageCode::Plain
    }

    /// Notes a run. `false` if it needs a record and there is none left.
    fn record(&mut self, run: PageRun, code: PageCode) -> bool {
        let extended = self.records.last_mut().is_some_and(|last| last.extend(run, code));
        if !extended {
            if self.records.len() == MAX_RECORDS {
                return false;
            }
            self.records.push(PageRecord::new(run, code));
        }
        self.counts.add(code, run.pages.into());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::SourceGuest;
    use crate::ledger::DirtyLedger;
    use crate::pair::world::{FakeGuest, HOLE, REGIONS, World};
    use crate::region::{Region, RegionId};
    use std::sync::LazyLock;

    fn fill(batch: &mut Batch, ledger: &SharedLedger, guest: &FakeGuest) -> Vec<(PageRun, PageCode)> {
        assert!(batch.fill(ledger, &guest.memory(), zeros()).unwrap());
        let records: Vec<_> = batch.records().iter().collect();
        let pages = |wanted: Option<PageCode>| {
            let fits = |code| wanted.is_none_or(|wanted| wanted == code);
            records.iter().filter(|record| fits(record.1)).map(|(run, _)| u64::from(run.pages)).sum::<u64>()
        };
        let counts = batch.counts();
        assert_eq!((counts.sent(), counts.zero), (pages(None), pages(Some(PageCode::Zero))));
        assert!(pages(Some(PageCode::Raw)) <= u64::from(MAX_RAW_PAGES) && records.len() <= MAX_RECORDS);
        records
    }

    static NONE: LazyLock<History> = LazyLock::new(|| History::new(0, &[]));

    fn zeros() -> Method<'static> {
        Method { codecs: Codecs::ZERO, history: &NONE, round: 1, pages: None, old: 0 }
    }

    fn still() -> (FakeGuest, SharedLedger) {
        let guest = FakeGuest { busy: 0, ..FakeGuest::new(&World::new()) };
        (guest, SharedLedger::new(DirtyLedger::new(&REGIONS.map(|region| region.pages()))))
    }

    #[test]
    fn all_dirty_pages_come_once_in_order_and_as_what_they_are() {
        let (guest, ledger) = still();
        ledger.lock().mark_all();
        let (mut batch, mut seen) = (Batch::new(MAX_RAW_PAGES), Vec::new());
        while ledger.lock().dirty_pages() > 0 {
            for (run, code) in fill(&mut batch, &ledger, &guest) {
                for page in run.first.0..run.first.0 + u64::from(run.pages) {
                    let hole = [HOLE, REGIONS[1].pages(), REGIONS[2].pages() / 2][usize::from(run.region.0)];
                    let zero = page % 5 == 3 || page >= hole;
                    assert_eq!(code == PageCode::Zero, zero, "page {page} of region {}", run.region);
                    seen.push((run.region.0, page));
                }
            }
        }
        let all =
            (0_u16..).zip(REGIONS).flat_map(|(region, layout)| (0..layout.pages()).map(move |page| (region, page)));
        assert_eq!(seen, all.collect::<Vec<_>>());
        assert!(!batch.fill(&ledger, &guest.memory(), zeros()).unwrap() && batch.counts().all() == 0);
    }

    #[test]
    fn neighbours_of_one_kind_share_a_record() {
        let (guest, ledger) = still();
        ledger.put_back(PageRun { region: RegionId(0), first: PageIndex(0), pages: 3 });
        ledger.put_back(PageRun { region: RegionId(0), first: PageIndex(4), pages: 2 });
        ledger.put_back(PageRun { region: RegionId(0), first: PageIndex(HOLE - 1), pages: 40 });
        let lengths: Vec<u32> =
            fill(&mut Batch::new(MAX_RAW_PAGES), &ledger, &guest).iter().map(|(run, _)| run.pages).collect();
        assert_eq!(lengths, [3, 2, 1, 39]);
    }

    #[test]
    fn what_a_full_frame_has_no_record_for_goes_back_into_the_ledger() {
        let (guest, ledger) = still();
        for page in (0..600).step_by(2) {
            ledger.lock().mark(RegionId(0), page);
        }
        let mut batch = Batch::new(MAX_RAW_PAGES);
        assert_eq!(fill(&mut batch, &ledger, &guest).len(), MAX_RECORDS);
        assert_eq!(ledger.lock().dirty_pages(), 300 - MAX_RECORDS as u64);
        assert_eq!(fill(&mut batch, &ledger, &guest).len(), 300 - MAX_RECORDS);
    }

    /// A run of pages that change their kind one by one needs more records than there are, in the middle of it.
    #[test]
    fn a_run_can_be_split_between_two_frames() {
        let (guest, ledger) = still();
        for page in 0..540 {
            guest.write(0, page, page % 2);
        }
        ledger.put_back(PageRun { region: RegionId(0), first: PageIndex(0), pages: 540 });
        let (mut batch, mut next) = (Batch::new(MAX_RAW_PAGES), 0);
        while ledger.lock().dirty_pages() > 0 {
            for (run, code) in fill(&mut batch, &ledger, &guest) {
                assert_eq!((run.first.0, run.pages, code == PageCode::Raw), (next, 1, next % 2 == 1));
                next += 1;
            }
        }
        assert_eq!(next, 540);
    }

    #[test]
    fn runs_that_are_short_are_no_references() {
        let (guest, ledger) = still();
        let pages: Vec<u64> = REGIONS.iter().map(Region::pages).collect();
        let history = History::new(0, &pages);
        let codecs = Codecs { rle: true, dedup: true, ..Codecs::ZERO };
        history.prepare(&codecs, 1).unwrap();
        let memory = guest.memory();
        let put = |page: u64, words: [u64; 2]| {
            let run = PageRun { region: RegionId(0), first: PageIndex(page), pages: 1 };
            let halves = words.map(|word| word.to_le_bytes().repeat(PAGE_SIZE / 16));
            exact_slice(&memory, run).unwrap().copy_from(&halves.concat());
            ledger.put_back(run);
        };
        // One word, twice; and two words, twice.
        [(0, [7, 7]), (1, [7, 7]), (2, [5, 6]), (3, [5, 6])].into_iter().for_each(|(page, words)| put(page, words));
        let mut batch = Batch::new(MAX_RAW_PAGES);
        let method = Method { codecs, history: &history, round: 1, pages: None, old: 0 };
        assert!(batch.fill(&ledger, &memory, method).unwrap());
        let codes: Vec<_> = batch.records().iter().map(|(run, code)| (run.pages, code)).collect();
        assert_eq!(codes, [(3, PageCode::Rle), (1, PageCode::Copy)]);
        let one_word = 2 + 2 + 8;
        assert_eq!(batch.block.len(), 2 * one_word + (one_word + 2 + 8) + REFERENCE_BYTES);
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        let (guest, ledger) = still();
        let guest = FakeGuest { fails: Some("slice"), ..guest };
        ledger.lock().mark_all();
        assert!(Batch::new(MAX_RAW_PAGES).fill(&ledger, &guest.memory(), zeros()).is_err());
    }
}
