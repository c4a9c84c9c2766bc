//! Backing guest memory ahead of what comes, in huge pages where the host has them.
//!
//! Memory that a page's bytes are the first to touch costs a fault, for each 4 KiB by itself: on a fast link more than all
//! the rest of receiving. So where much comes into an *extent*, the size of a huge page, the host is asked to back the
//! whole of it at once, and more of what follows it the longer that goes on, as a file is read ahead, in each of the lanes
//! that the source walks. An extent that gets few pages stays with small ones, so that a sparse guest stays sparse.

use crate::codec::PageCode;
use crate::guest::GuestPages;
use crate::ledger::LANES;
use crate::page_set::PageSet;
use crate::region::{PageIndex, PageRun, Region, RegionId};
use crate::wire::Records;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Pages of an extent: 2 MiB, which the page tables of x86-64 map by one entry.
const EXTENT_PAGES: u32 = 512;

/// So many pages of an extent must come in one frame, which holds pieces of 64 from here and there.
const MANY: u64 = 32;

/// The most extents that are backed at once. Linux flushes lists of all processors for each request, so one for four takes
/// half the time of four; and no more than three may turn out to be for nothing.
const MAX_WINDOW: u64 = 4;

/// How many requests are remembered.
const REMEMBERED: usize = 2 * LANES;

/// What has been asked of the host.
#[derive(Debug)]
pub(super) struct Backing {
    /// One member per extent.
    asked: PageSet,
    /// Extents of each region that are whole.
    extents: Vec<u64>,
    /// The last requests, oldest first: more than there are lanes, since one that skips extents leaves its last behind.
    ahead: Mutex<VecDeque<Ahead>>,
    /// The host cannot, or not any more.
    ended: AtomicBool,
}

/// Where a request has ended, and how many extents it could have been for.
#[derive(Debug, Clone, Copy)]
struct Ahead {
    region: RegionId,
    next: u64,
    window: u64,
}

impl Backing {
    pub(super) fn new(regions: &[Region]) -> Self {
        let extents: Vec<u64> = regions.iter().map(extents_of).collect();
        let asked = PageSet::new(extents.iter().copied());
        Self { asked, extents, ahead: Mutex::default(), ended: AtomicBool::new(false) }
    }

    /// Sees to memory for the pages of a frame before they are written.
    pub(super) fn expect<M: GuestPages>(&self, records: Records<'_>, memory: &M) {
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        let (mut extent, mut pages) = ((RegionId(0), 0), 0);
        let fresh = |&(_, code): &(PageRun, PageCode)| !matches!(code, PageCode::Zero | PageCode::Delta);
        for (region, number, more) in records.iter().filter(fresh).flat_map(|(run, _)| parts(run)) {
            if extent != (region, number) {
                (extent, pages) = ((region, number), 0);
            }
            pages += more;
            if pages >= MANY {
                self.back(region, number, memory);
            }
        }
    }

    fn back<M: GuestPages>(&self, region: RegionId, extent: u64, memory: &M) {
        let Some(run) = self.claim(region, extent) else { return };
        if !memory.populate(run) {
            self.ended.store(true, Ordering::Relaxed);
        }
    }

    /// The extents to ask for, from `extent` on; `None` if there is nothing to do.
    fn claim(&self, region: RegionId, extent: u64) -> Option<PageRun> {
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let end = self.extents.get(usize::from(region.0)).copied()?;
        let before = ahead.iter().position(|before| (before.region, before.next) == (region, extent));
        let window = before.and_then(|at| ahead.remove(at)).map_or(1, |before| (before.window * 2).min(MAX_WINDOW));
        let open =
            (extent..end.min(extent + window)).take_while(|&extent| !self.asked.contains(region, extent)).count();
        let extents = u32::try_from(open).ok().filter(|&extents| extents > 0)?;
        self.asked.add(PageRun { region, first: PageIndex(extent), pages: extents });
        ahead.push_back(Ahead { region, next: extent + u64::from(extents), window });
        if ahead.len() > REMEMBERED {
            ahead.pop_front();
        }
        let first = PageIndex(extent * u64::from(EXTENT_PAGES));
        Some(PageRun { region, first, pages: extents * EXTENT_PAGES })
    }
}

/// How many whole extents a region has. Disks are not memory.
fn extents_of(region: &Region) -> u64 {
    match region {
        Region::Ram(ram) => ram.pages / u64::from(EXTENT_PAGES),
        Region::Disk { .. } => 0,
    }
}

/// The extents that a run has pages in, and how many.
fn parts(run: PageRun) -> impl Iterator<Item = (RegionId, u64, u64)> {
    let (start, end, extent) = (run.first.0, run.first.0 + u64::from(run.pages), u64::from(EXTENT_PAGES));
    (start / extent..end.div_ceil(extent)).map(move |number| {
        let pages = end.min((number + 1) * extent) - start.max(number * extent);
        (run.region, number, pages)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::DiskPages;
    use crate::region::RamRegion;
    use crate::wire::PageRecord;
    use std::convert::Infallible;
    use std::sync::Arc;
    use vm_memory::{GuestAddress, VolatileSlice};

    const R: RegionId = RegionId(0);

    #[derive(Debug, Clone)]
    struct Asked {
        runs: Arc<Mutex<Vec<(u64, u32)>>>,
        can: bool,
    }

    impl GuestPages for Asked {
        type Error = Infallible;
        type Handle = ();

        fn handle(&self) -> Result<(), Infallible> {
            Ok(())
        }

        fn slice(&self, _run: PageRun) -> Result<VolatileSlice<'_>, Infallible> {
            unreachable!("backing touches no memory itself")
        }

        fn disk(&self, _region: RegionId) -> Option<&dyn DiskPages> {
            None
        }

        fn leading_hole(&self, _run: PageRun) -> u32 {
            0
        }

        fn populate(&self, run: PageRun) -> bool {
            self.runs.lock().unwrap().push((run.first.0, run.pages));
            self.can
        }
    }

    fn host(can: bool) -> Asked {
        Asked { runs: Arc::default(), can }
    }

    fn backing(pages: u64) -> Backing {
        Backing::new(&[Region::Ram(RamRegion { start: GuestAddress(0), pages })])
    }

    fn expect(backing: &Backing, host: &Asked, runs: &[(u64, u32, PageCode)]) {
        let record =
            |&(first, pages, code)| PageRecord::new(PageRun { region: R, first: PageIndex(first), pages }, code);
        let records: Vec<_> = runs.iter().map(record).collect();
        backing.expect(Records::new(&records), host);
    }

    #[test]
    fn many_pages_of_an_extent_back_it_once_and_few_do_not() {
        let (backing, host) = (backing(4096), host(true));
        expect(&backing, &host, &[(100, 31, PageCode::Raw), (1024, 256, PageCode::Zero), (1536, 90, PageCode::Delta)]);
        assert_eq!(*host.runs.lock().unwrap(), []);
        expect(&backing, &host, &[(100, 40, PageCode::Raw), (140, 30, PageCode::Plain), (1600, 64, PageCode::Copy)]);
        expect(&backing, &host, &[(300, 200, PageCode::Raw)]);
        assert_eq!(*host.runs.lock().unwrap(), [(0, 512), (1536, 512)]);
    }

    #[test]
    fn what_goes_on_is_backed_further_ahead() {
        let (backing, host) = (backing(512 * 20), host(true));
        for frame in 0..40 {
            expect(&backing, &host, &[(frame * 256, 256, PageCode::Raw)]);
        }
        let extents: Vec<_> =
            host.runs.lock().unwrap().iter().map(|(first, pages)| (first / 512, pages / 512)).collect();
        assert_eq!(extents, [(0, 1), (1, 2), (3, 4), (7, 4), (11, 4), (15, 4), (19, 1)]);
    }

    /// Two places that are filled in turn are each read ahead, and so are as many as are remembered, but no more.
    #[test]
    fn lanes_are_backed_ahead_each_by_itself() {
        let most = REMEMBERED as u64;
        for (lanes, last) in [(2, 4), (most, 4), (most + 1, 1)] {
            let (backing, host) = (backing(512 * 20 * lanes), host(true));
            for extent in 0..20 {
                for lane in 0..lanes {
                    expect(&backing, &host, &[((lane * 20 + extent) * 512, 256, PageCode::Raw)]);
                }
            }
            let longest = host.runs.lock().unwrap().iter().map(|(_, pages)| pages / 512).max();
            assert_eq!(longest, Some(last), "{lanes} lanes");
        }
    }

    /// A part of an extent at the end of a region is none, and what is backed is not asked for again.
    #[test]
    fn only_whole_extents_are_asked_for() {
        let (backing, host) = (backing(512 * 3 + 100), host(true));
        expect(&backing, &host, &[(512, 100, PageCode::Raw)]);
        expect(&backing, &host, &[(0, 256, PageCode::Raw)]);
        expect(&backing, &host, &[(1024, 612, PageCode::Raw)]);
        expect(&backing, &host, &[(1536, 100, PageCode::Raw)]);
        assert_eq!(*host.runs.lock().unwrap(), [(512, 512), (0, 512), (1024, 512)]);
    }

    #[test]
    fn a_host_that_cannot_is_asked_once() {
        let (backing, host) = (backing(4096), host(false));
        expect(&backing, &host, &[(0, 100, PageCode::Raw)]);
        expect(&backing, &host, &[(1024, 100, PageCode::Raw)]);
        assert_eq!(host.runs.lock().unwrap().len(), 1);
    }
}
