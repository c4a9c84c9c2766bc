//! Filling a `Pages` frame: runs of dirty pages out of the ledger, split into zero and raw ones.

use crate::guest::{GuestPages, HostError, exact_slice};
use crate::ledger::SharedLedger;
use crate::region::{PageIndex, PageRun};
use crate::wire::{MAX_PAGES, MAX_RAW_PAGES, MAX_RECORDS, PageCode, PageRecord, Records};
use crate::zero::{is_zero, pages};

/// Zero pages to look at before a frame goes out anyway: 16 MiB, so that an onlooker sees a large empty guest move, and a
/// wish to cancel is seen.
const SCAN_PAGES: u32 = 4096;

const _: () = assert!(SCAN_PAGES + MAX_RAW_PAGES <= MAX_PAGES, "a batch fits in a frame");

/// The records of the frame under way. Its buffer is used again for each frame.
#[derive(Debug)]
pub(crate) struct Batch {
    records: Vec<PageRecord>,
    raw: u32,
    zero: u32,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Self { records: Vec::with_capacity(MAX_RECORDS), raw: 0, zero: 0 }
    }

    /// The records, in order.
    pub(crate) fn records(&self) -> Records<'_> {
        Records::new(&self.records)
    }

    /// Pages in the batch.
    pub(crate) fn pages(&self) -> u64 {
        u64::from(self.raw) + u64::from(self.zero)
    }

    /// Those of them that are zero.
    pub(crate) fn zero_pages(&self) -> u64 {
        u64::from(self.zero)
    }

    /// Begins anew and takes dirty pages out of the ledger until the batch is full. `false` if there were none.
    /// Several streams may do so at once.
    pub(crate) fn fill<G: GuestPages>(&mut self, ledger: &SharedLedger, guest: &G) -> Result<bool, HostError> {
        self.records.clear();
        (self.raw, self.zero) = (0, 0);
        while let Some(run) = ledger.take_run(self.room()) {
            let taken = self.add(run, guest)?;
            if taken < run.pages {
                let first = PageIndex(run.first.0 + u64::from(taken));
                ledger.put_back(PageRun { first, pages: run.pages - taken, ..run });
                break;
            }
        }
        Ok(!self.records.is_empty())
    }

    /// How many more pages may be looked at, whatever they turn out to be.
    fn room(&self) -> u32 {
        if self.zero < SCAN_PAGES && self.records.len() < MAX_RECORDS { MAX_RAW_PAGES - self.raw } else { 0 }
    }

    /// Adds the pages of a run, as many as there are records for; returns how many.
    fn add<G: GuestPages>(&mut self, run: PageRun, guest: &G) -> Result<u32, HostError> {
        let hole = guest.leading_hole(run).min(run.pages);
        for offset in 0..hole {
            if !self.push(run, offset, PageCode::Zero) {
                return Ok(offset);
            }
        }
        if hole == run.pages {
            return Ok(hole);
        }
        let rest = PageRun { first: PageIndex(run.first.0 + u64::from(hole)), pages: run.pages - hole, ..run };
        for (page, offset) in pages(&exact_slice(guest, rest)?).zip(hole..) {
            let code = if is_zero(&page) { PageCode::Zero } else { PageCode::Raw };
            if !self.push(run, offset, code) {
                return Ok(offset);
            }
        }
        Ok(run.pages)
    }

    /// Adds one page. `false` if it needs a record and there is none left.
    fn push(&mut self, run: PageRun, offset: u32, code: PageCode) -> bool {
        let page = PageIndex(run.first.0 + u64::from(offset));
        let extended = self.records.last_mut().is_some_and(|last| last.extend(run.region, page, code));
        if !extended {
            if self.records.len() == MAX_RECORDS {
                return false;
            }
            self.records.push(PageRecord::new(PageRun { first: page, pages: 1, ..run }, code));
        }
        match code {
            PageCode::Raw => self.raw += 1,
            PageCode::Zero => self.zero += 1,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::SourceGuest;
    use crate::ledger::DirtyLedger;
    use crate::pair::world::{FakeGuest, HOLE, REGIONS, World};
    use crate::region::RegionId;

    fn fill(batch: &mut Batch, ledger: &SharedLedger, guest: &FakeGuest) -> Vec<(PageRun, PageCode)> {
        assert!(batch.fill(ledger, &guest.memory()).unwrap());
        let records: Vec<_> = batch.records().iter().collect();
        let pages = |wanted: Option<PageCode>| {
            let fits = |code| wanted.is_none_or(|wanted| wanted == code);
            records.iter().filter(|record| fits(record.1)).map(|(run, _)| u64::from(run.pages)).sum::<u64>()
        };
        assert_eq!((batch.pages(), batch.zero_pages()), (pages(None), pages(Some(PageCode::Zero))));
        assert!(pages(Some(PageCode::Raw)) <= u64::from(MAX_RAW_PAGES) && records.len() <= MAX_RECORDS);
        records
    }

    fn still() -> (FakeGuest, SharedLedger) {
        let guest = FakeGuest { busy: 0, ..FakeGuest::new(&World::new()) };
        (guest, SharedLedger::new(DirtyLedger::new(&REGIONS.map(|region| region.pages))))
    }

    #[test]
    fn all_dirty_pages_come_once_in_order_and_as_what_they_are() {
        let (guest, ledger) = still();
        ledger.lock().mark_all();
        let (mut batch, mut seen) = (Batch::new(), Vec::new());
        while ledger.lock().dirty_pages() > 0 {
            for (run, code) in fill(&mut batch, &ledger, &guest) {
                for page in run.first.0..run.first.0 + u64::from(run.pages) {
                    let zero = page % 5 == 3 || (run.region == RegionId(0) && page >= HOLE);
                    assert_eq!(code == PageCode::Zero, zero, "page {page} of region {}", run.region);
                    seen.push((run.region.0, page));
                }
            }
        }
        let all = (0_u16..).zip(REGIONS).flat_map(|(region, layout)| (0..layout.pages).map(move |page| (region, page)));
        assert_eq!(seen, all.collect::<Vec<_>>());
        assert!(!batch.fill(&ledger, &guest.memory()).unwrap() && batch.pages() == 0);
    }

    #[test]
    fn neighbours_of_one_kind_share_a_record() {
        let (guest, ledger) = still();
        ledger.put_back(PageRun { region: RegionId(0), first: PageIndex(0), pages: 3 });
        ledger.put_back(PageRun { region: RegionId(0), first: PageIndex(4), pages: 2 });
        ledger.put_back(PageRun { region: RegionId(0), first: PageIndex(HOLE - 1), pages: 40 });
        let lengths: Vec<u32> = fill(&mut Batch::new(), &ledger, &guest).iter().map(|(run, _)| run.pages).collect();
        assert_eq!(lengths, [3, 2, 1, 39]);
    }

    #[test]
    fn what_a_full_frame_has_no_record_for_goes_back_into_the_ledger() {
        let (guest, ledger) = still();
        for page in (0..600).step_by(2) {
            ledger.lock().mark(RegionId(0), page);
        }
        let mut batch = Batch::new();
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
        let (mut batch, mut next) = (Batch::new(), 0);
        while ledger.lock().dirty_pages() > 0 {
            for (run, code) in fill(&mut batch, &ledger, &guest) {
                assert_eq!((run.first.0, run.pages, code == PageCode::Raw), (next, 1, next % 2 == 1));
                next += 1;
            }
        }
        assert_eq!(next, 540);
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        let (guest, ledger) = still();
        let guest = FakeGuest { fails: Some("slice"), ..guest };
        ledger.lock().mark_all();
        assert!(Batch::new().fill(&ledger, &guest.memory()).is_err());
    }
}
