//! Where the pages of all streams come in: guest memory, the round that all streams are in, and what came.
//!
//! *Invariant*: no stream goes on to the next round before all have ended this one ([`Intake::end_round`]). So what a round
//! brings a page is never overtaken by an older content of the same page on another stream.

use super::error::Fault;
use crate::bell::Bell;
use crate::channel::TICK;
use crate::digest::TranscriptDigest;
use crate::guest::{GuestPages, HostError, exact_slice};
use crate::link::Link;
use crate::page_set::PageSet;
use crate::region::{PageIndex, PageRun, RamRegion};
use crate::wire::{PageCode, Records, RoundEnd};
use crate::zero::{clear, pages};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_memory::VolatileSlice;

/// The memory of one incoming guest.
#[derive(Debug)]
pub(super) struct Intake<M> {
    memory: M,
    regions: Vec<RamRegion>,
    /// The pages that are not zero any more.
    written: PageSet,
    round: Mutex<Round>,
    /// Rings when a round is over, or a stream has failed, or nothing more is expected.
    pub(super) news: Bell,
    /// What the streams have brought in the round under way, and bytes of the further streams in all.
    came: Came,
}

#[derive(Debug, Default)]
struct Came {
    pages: AtomicU64,
    zero_pages: AtomicU64,
    further_bytes: AtomicU64,
}

#[derive(Debug)]
struct Round {
    number: u32,
    /// Streams that have ended the round.
    ended: usize,
    /// What the round before has brought over all streams.
    last: Share,
    /// No more is expected of the further streams.
    over: bool,
    failure: Option<Fault>,
    /// What came over each further stream up to the last round's end.
    transcripts: Vec<TranscriptDigest>,
}

/// Pages that came in a round, over one stream or all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
}

impl<M: GuestPages> Intake<M> {
    /// Fresh memory, which `streams` streams will fill.
    pub(super) fn new(memory: M, regions: Vec<RamRegion>, streams: u16) -> Self {
        let none = TranscriptDigest { frames: 0, digest: 0 };
        let transcripts = vec![none; usize::from(streams) - 1];
        let round = Round { number: 1, ended: 0, last: Share::default(), over: false, failure: None, transcripts };
        let written = PageSet::new(regions.iter().map(|region| region.pages));
        let (round, news, came) = (Mutex::new(round), Bell::new(), Came::default());
        Self { memory, regions, written, round, news, came }
    }

    pub(super) fn memory(&self) -> &M {
        &self.memory
    }

    pub(super) fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// How many streams there are beside the first.
    pub(super) fn further_streams(&self) -> u16 {
        u16::try_from(self.lock().transcripts.len()).expect("a number of 16 bits less one")
    }

    /// Checks the records of one frame and makes their zero pages zero. The bytes of the raw ones come next, into
    /// [`raw`](Self::raw).
    pub(super) fn take(&self, records: Records<'_>, share: &mut Share) -> Result<(), Fault> {
        let mut frame = Share::default();
        for (run, code) in records.iter() {
            self.check(run)?;
            match code {
                PageCode::Raw => self.written.add(run),
                PageCode::Zero => {
                    self.clear(run)?;
                    frame.zero_pages += u64::from(run.pages);
                }
            }
            frame.pages += u64::from(run.pages);
        }
        share.pages += frame.pages;
        share.zero_pages += frame.zero_pages;
        self.came.pages.fetch_add(frame.pages, Ordering::Relaxed);
        self.came.zero_pages.fetch_add(frame.zero_pages, Ordering::Relaxed);
        Ok(())
    }

    /// The memory of the raw runs of a frame that was taken.
    pub(super) fn raw(&self, records: Records<'_>) -> Result<Vec<VolatileSlice<'_>>, Fault> {
        records.raw_runs().map(|run| exact_slice(&self.memory, run).map_err(memory)).collect()
    }

    fn check(&self, run: PageRun) -> Result<(), Fault> {
        let PageRun { region, first, pages } = run;
        let end = first.0.checked_add(u64::from(pages));
        match self.regions.get(usize::from(region.0)) {
            Some(layout) if end.is_some_and(|end| end <= layout.pages) => Ok(()),
            _ => Err(Fault::NoSuchPages { region, first, pages }),
        }
    }

    /// Makes pages zero that were something else before. The others are not touched, so the host need not back them.
    fn clear(&self, run: PageRun) -> Result<(), Fault> {
        let all = (0..u64::from(run.pages)).map(|offset| run.first.0 + offset);
        for page in all.filter(|&page| self.written.contains(run.region, page)) {
            let one = PageRun { first: PageIndex(page), pages: 1, ..run };
            pages(&exact_slice(&self.memory, one).map_err(memory)?).for_each(|page| clear(&page));
        }
        Ok(())
    }

    /// The round under way, from 1, and how many pages it has brought.
    pub(super) fn progress(&self) -> (u32, u64) {
        (self.lock().number, self.came.pages.load(Ordering::Relaxed))
    }

    /// A further stream ends its share of a round: compares it with what the source says, and waits for the other streams.
    /// `false` if nothing more is expected.
    pub(super) fn end_round<L: Link>(
        &self,
        stream: u16,
        end: RoundEnd,
        share: Share,
        transcript: TranscriptDigest,
        link: &mut L,
    ) -> Result<bool, Fault> {
        let mut round = self.lock();
        let number = round.number;
        share.compare(end, number)?;
        if let Some(kept) = round.transcripts.get_mut(usize::from(stream) - 1) {
            *kept = transcript;
        }
        self.arrive(&mut round);
        drop(round);
        loop {
            let seen = self.news.rung();
            let round = self.lock();
            if round.over || round.number != number {
                return Ok(!round.over);
            }
            drop(round);
            link.idle(&self.news, seen, TICK);
        }
    }

    /// The first stream ends the round; its number.
    pub(super) fn end_first(&self) -> u32 {
        let mut round = self.lock();
        let number = round.number;
        self.arrive(&mut round);
        number
    }

    /// What a round has brought over all streams that the first has ended; `None` while others have not.
    pub(super) fn ended(&self, number: u32) -> Option<Share> {
        let round = self.lock();
        (round.number != number).then_some(round.last)
    }

    fn arrive(&self, round: &mut Round) {
        round.ended += 1;
        if round.ended > round.transcripts.len() {
            let [pages, zero_pages] =
                [&self.came.pages, &self.came.zero_pages].map(|came| came.swap(0, Ordering::Relaxed));
            round.last = Share { pages, zero_pages };
            (round.number, round.ended) = (round.number.saturating_add(1), 0);
            self.news.ring();
        }
    }

    /// Nothing more is expected: the further streams end.
    pub(super) fn close(&self) {
        self.lock().over = true;
        self.news.ring();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().over
    }

    /// What came over each further stream up to the end of the last round.
    pub(super) fn transcripts(&self) -> Vec<TranscriptDigest> {
        self.lock().transcripts.clone()
    }

    /// Counts bytes of a further stream.
    pub(super) fn count(&self, bytes: u64) {
        self.came.further_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of all further streams.
    pub(super) fn further_bytes(&self) -> u64 {
        self.came.further_bytes.load(Ordering::Relaxed)
    }

    /// Notes why a further stream ended.
    pub(super) fn fail(&self, fault: Fault) {
        self.lock().failure.get_or_insert(fault);
        self.news.ring();
    }

    /// Why a further stream ended, if one did.
    pub(super) fn take_failure(&self) -> Option<Fault> {
        self.lock().failure.take()
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Compares with what the source says of the round that is the `number`th here.
    pub(super) fn compare(self, end: RoundEnd, number: u32) -> Result<(), Fault> {
        same("The number of a round", number.into(), end.round.into())?;
        same("The number of pages of a round", self.pages, end.pages)?;
        same("The number of zero pages of a round", self.zero_pages, end.zero_pages)
    }
}

/// What went wrong with guest memory.
pub(super) fn memory(source: HostError) -> Fault {
    Fault::Host { step: "give access to the guest's memory", source }
}

pub(super) fn same(what: &'static str, here: u64, there: u64) -> Result<(), Fault> {
    if here == there { Ok(()) } else { Err(Fault::Differs { what, here, there }) }
}
