//! Where the pages of all streams come in: guest memory, the round that all streams are in, and what came.
//!
//! *Invariant*: no stream goes on to the next round before all have ended this one ([`Intake::end_round`]). So what a round
//! brings a page is never overtaken by an older content of the same page on another stream.

use super::backing::Backing;
use super::error::Fault;
use crate::bell::Bell;
use crate::channel::TICK;
use crate::counts::PageCounts;
use crate::digest::TranscriptDigest;
use crate::guest::{GuestPages, HostError};
use crate::link::Link;
use crate::page_set::PageSet;
use crate::region::{PageRun, Region, RegionId};
use crate::wire::{Records, RoundEnd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The memory of one incoming guest.
#[derive(Debug)]
pub(super) struct Intake<M> {
    memory: M,
    regions: Vec<Region>,
    backing: Backing,
    /// The pages that are not zero any more.
    pub(super) written: PageSet,
    /// The pages that an old copy of a disk does not have.
    pub(super) lacking: PageSet,
    /// The pages that came in a block in the round under way.
    pub(super) arrived: PageSet,
    round: Mutex<Round>,
    /// Rings when a round is over, or a stream has failed, or nothing more is expected.
    pub(super) news: Bell,
    /// What the streams have brought in the round under way, and what the further streams have taken in all.
    came: Came,
}

#[derive(Debug, Default)]
struct Came {
    pages: Mutex<PageCounts>,
    further_bytes: AtomicU64,
    further_cpu_ns: AtomicU64,
}

#[derive(Debug)]
struct Round {
    number: u32,
    /// Streams that have ended the round.
    ended: usize,
    /// What the round before has brought over all streams.
    last: PageCounts,
    /// No more is expected of the further streams.
    over: bool,
    failure: Option<Fault>,
    /// What came over each further stream up to the last round's end.
    transcripts: Vec<TranscriptDigest>,
}

impl<M: GuestPages> Intake<M> {
    /// Fresh memory, which `streams` streams will fill.
    pub(super) fn new(memory: M, regions: Vec<Region>, streams: u16) -> Self {
        let transcripts = vec![TranscriptDigest::default(); usize::from(streams) - 1];
        let round = Round { number: 1, ended: 0, last: PageCounts::default(), over: false, failure: None, transcripts };
        let written = PageSet::new(regions.iter().map(Region::pages));
        let arrived = PageSet::new(regions.iter().map(Region::pages));
        let lacking = PageSet::new(regions.iter().map(Region::pages));
        for (region, layout) in (0..).map(RegionId).zip(&regions) {
            if memory.disk(region).is_some_and(|disk| !disk.is_blank()) {
                written.add_all(region, layout.pages());
            }
        }
        let (backing, round, news, came) = (Backing::new(&regions), Mutex::new(round), Bell::new(), Came::default());
        Self { memory, regions, backing, written, lacking, arrived, round, news, came }
    }

    /// The regions of which there is an old copy, a bit for each.
    pub(super) fn old(&self) -> u64 {
        let is_old = |region: &u16| self.memory.disk(RegionId(*region)).is_some_and(|disk| !disk.is_blank());
        (0..).take(self.regions.len()).filter(is_old).fold(0, |all, region| all | 1 << region)
    }

    pub(super) fn memory(&self) -> &M {
        &self.memory
    }

    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many streams there are beside the first.
    pub(super) fn further_streams(&self) -> u16 {
        u16::try_from(self.lock().transcripts.len()).expect("a number of 16 bits less one")
    }

    /// Checks the records of one frame, counts its pages, and sees to memory for them.
    pub(super) fn take(&self, records: Records<'_>, share: &mut PageCounts) -> Result<(), Fault> {
        let mut frame = PageCounts::default();
        for (run, code) in records.iter() {
            self.check(run)?;
            frame.add(code, run.pages.into());
        }
        *share += frame;
        *self.pages() += frame;
        self.backing.expect(records, &self.memory);
        Ok(())
    }

    /// Whether the guest has the pages of a run.
    pub(super) fn check(&self, run: PageRun) -> Result<(), Fault> {
        let PageRun { region, first, pages } = run;
        let end = first.0.checked_add(u64::from(pages));
        match self.regions.get(usize::from(region.0)) {
            Some(layout) if end.is_some_and(|end| end <= layout.pages()) => Ok(()),
            _ => Err(Fault::NoSuchPages { region, first, pages }),
        }
    }

    fn pages(&self) -> MutexGuard<'_, PageCounts> {
        self.came.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The round under way, from 1, and how many pages it has brought.
    pub(super) fn progress(&self) -> (u32, u64) {
        (self.lock().number, self.pages().sent())
    }

    /// A further stream ends its share of a round: compares it with what the source says, and waits for the other streams.
    /// `false` if nothing more is expected.
    pub(super) fn end_round<L: Link>(
        &self,
        stream: u16,
        end: RoundEnd,
        share: PageCounts,
        transcript: TranscriptDigest,
        link: &mut L,
    ) -> Result<bool, Fault> {
        let mut round = self.lock();
        let number = round.number;
        compare(share, end, number)?;
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
    pub(super) fn ended(&self, number: u32) -> Option<PageCounts> {
        let round = self.lock();
        (round.number != number).then_some(round.last)
    }

    fn arrive(&self, round: &mut Round) {
        round.ended += 1;
        if round.ended > round.transcripts.len() {
            round.last = std::mem::take(&mut *self.pages());
            self.arrived.clear();
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

    /// Counts bytes of a further stream, and processor time of its thread.
    pub(super) fn count(&self, bytes: u64, cpu: Duration) {
        self.came.further_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.came.further_cpu_ns.fetch_add(u64::try_from(cpu.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Bytes of all further streams.
    pub(super) fn further_bytes(&self) -> u64 {
        self.came.further_bytes.load(Ordering::Relaxed)
    }

    /// Processor time of the threads of all further streams.
    pub(super) fn further_cpu(&self) -> Duration {
        Duration::from_nanos(self.came.further_cpu_ns.load(Ordering::Relaxed))
    }

    /// Notes why a further stream ended.
    pub(super) fn fail(&self, fault: Fault) {
        self.lock().failure.get_or_insert(fault);
        self.news.ring();
    }

    /// Whether a page that a stream waits for may still come.
    pub(super) fn is_alive(&self) -> bool {
        let round = self.lock();
        !round.over && round.failure.is_none()
    }

    /// Why a further stream ended, if one did.
    pub(super) fn take_failure(&self) -> Option<Fault> {
        self.lock().failure.take()
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Compares the pages of a round, the `number`th here, with what the source says of it.
pub(super) fn compare(pages: PageCounts, end: RoundEnd, number: u32) -> Result<(), Fault> {
    same("The number of a round", number.into(), end.round.into())?;
    same("The number of pages of a round", pages.sent(), end.pages)?;
    same("The number of zero pages of a round", pages.zero, end.zero_pages)
}

/// What went wrong with guest memory, or a disk.
pub(super) fn failed(source: HostError) -> Fault {
    Fault::Host { step: "give access to the guest's pages", source }
}

pub(super) fn same(what: &'static str, here: u64, there: u64) -> Result<(), Fault> {
    if here == there { Ok(()) } else { Err(Fault::Differs { what, here, there }) }
}
