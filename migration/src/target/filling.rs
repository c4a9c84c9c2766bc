//! The target while memory comes in, and its check of the whole.

use super::error::Fault;
use crate::clock::Clock;
use crate::digest::{self, TranscriptDigest};
use crate::guest::{HostError, TargetHost, exact_slice};
use crate::ledger::DirtyLedger;
use crate::region::{PageIndex, PageRun, RamRegion, RegionId};
use crate::report::{Ending, PhaseReport, Report, Role, RoundReport, ms};
use crate::wire::{Hello, Mode, PageCode, Records, RoundEnd, Running, Seal};
use crate::zero::{clear, pages};
use std::fmt;
use std::time::Duration;
use uuid::Uuid;

/// The most rounds that are taken: far more than help, and their reports fit in some hundred KiB.
const MAX_ROUNDS: usize = 10_000;

/// The account of one incoming guest.
#[derive(Debug)]
pub struct Incoming {
    pub(super) session: Uuid,
    vm: Uuid,
    mode: Mode,
    verify: bool,
    started: Duration,
    rounds: Vec<RoundReport>,
}

/// The account of a guest that runs here.
#[derive(Debug)]
pub struct Arrived {
    pub(super) incoming: Incoming,
    pub(super) part: Running,
}

/// Memory under way.
#[derive(Debug)]
pub struct Filling {
    pub(super) incoming: Incoming,
    regions: Vec<RamRegion>,
    /// The pages that are not zero any more: "dirty" compared with the fresh memory that the host made.
    written: DirtyLedger,
    round: Tally,
}

/// What the round under way has brought.
#[derive(Debug)]
struct Tally {
    round: u32,
    pages: u64,
    zero_pages: u64,
    started: Duration,
    bytes_before: u64,
}

/// The moment in which a frame came, as the driver knows it.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    /// The time.
    pub now: Duration,
    /// The clock that it was read from.
    pub clock: &'a dyn Clock,
    /// Bytes that had gone over the link.
    pub bytes: u64,
    /// All frames that came before.
    pub before: TranscriptDigest,
}

impl fmt::Debug for Moment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Moment").field("now", &self.now).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Moment<'_> {
    /// How long ago it was.
    pub(super) fn elapsed(&self) -> Duration {
        self.clock.now() - self.now
    }
}

impl Filling {
    pub(super) fn new(hello: Hello<'_>, at: Moment<'_>) -> Self {
        let Hello { session, vm, mode, verify, build: _, regions, machine: _ } = hello;
        let written = DirtyLedger::new(&regions.iter().map(|region| region.pages).collect::<Vec<_>>());
        let incoming = Incoming { session, vm, mode, verify, started: at.now, rounds: Vec::new() };
        Self { incoming, regions, written, round: Tally::new(1, at) }
    }

    /// Checks the records, makes their zero pages zero, and expects the bytes of the raw ones.
    pub(super) fn pages<H: TargetHost>(&mut self, records: Records<'_>, host: &H) -> Result<(), Fault> {
        for (run, code) in records.iter() {
            self.check(run)?;
            match code {
                PageCode::Raw => {
                    self.written.put_back(run);
                }
                PageCode::Zero => {
                    self.clear(run, host)?;
                    self.round.zero_pages += u64::from(run.pages);
                }
            }
            self.round.pages += u64::from(run.pages);
        }
        Ok(())
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
    fn clear<H: TargetHost>(&self, run: PageRun, host: &H) -> Result<(), Fault> {
        let written = (0..u64::from(run.pages)).map(|offset| run.first.0 + offset);
        for page in written.filter(|&page| self.written.is_dirty(run.region, page)) {
            let one = PageRun { first: PageIndex(page), pages: 1, ..run };
            pages(&exact_slice(host, one).map_err(memory)?).for_each(|page| clear(&page));
        }
        Ok(())
    }

    /// Compares a round with what the source says of it, and begins the next.
    pub(super) fn round_end(&mut self, end: RoundEnd, at: Moment<'_>) -> Result<RoundReport, Fault> {
        if self.incoming.rounds.len() >= MAX_ROUNDS {
            return Err(Fault::TooManyRounds { limit: MAX_ROUNDS });
        }
        let Tally { round, pages, zero_pages, started, bytes_before } = self.round;
        same("The number of a round", round.into(), end.round.into())?;
        same("The number of pages of a round", pages, end.pages)?;
        same("The number of zero pages of a round", zero_pages, end.zero_pages)?;
        let bytes = at.bytes - bytes_before;
        let report = RoundReport { round, pages, zero_pages, bytes, ms: ms(at.now - started), dirty_at_end: 0 };
        self.incoming.rounds.push(report);
        self.round = Tally::new(round.saturating_add(1), at);
        Ok(report)
    }

    /// Which round is under way, and how many pages it has brought.
    pub(super) fn progress(&self) -> (u32, u64, Duration, u64) {
        (self.round.round, self.round.pages, self.round.started, self.round.bytes_before)
    }

    /// Compares everything with the source's account of it.
    pub(super) fn check_seal<H: TargetHost>(&self, seal: &Seal, host: &H, at: Moment<'_>) -> Result<(), Fault> {
        same("The number of frames", at.before.frames, seal.frames)?;
        same("The digest of all frames", at.before.digest, seal.transcript)?;
        same("The number of pages after the last round", self.round.pages, 0)?;
        let digests = if self.incoming.verify { self.regions.len() } else { 0 };
        same("The number of digests of memory", digests as u64, seal.memory.len() as u64)?;
        if !self.incoming.verify {
            return Ok(());
        }
        let here = digest::of_memory(host, &self.regions).map_err(memory)?;
        match (0..).zip(here.iter().zip(&seal.memory)).find(|(_, (here, there))| here != there) {
            Some((region, _)) => Err(Fault::MemoryDiffers { region: RegionId(region) }),
            None => Ok(()),
        }
    }
}

impl Tally {
    fn new(round: u32, at: Moment<'_>) -> Self {
        Self { round, pages: 0, zero_pages: 0, started: at.now, bytes_before: at.bytes }
    }
}

impl Arrived {
    /// What this end knows by itself, now that the guest runs.
    pub(super) fn report(self, now: Duration, bytes: u64, phases: Vec<PhaseReport>) -> Report {
        let Self { incoming: Incoming { session, vm, mode, verify, started, rounds }, part } = self;
        Report {
            role: Role::Target,
            session,
            vm,
            mode,
            ending: Ending::HandedOver,
            bytes,
            total_ms: ms(now - started),
            downtime_ms: None,
            target_part: Some(part.into()),
            predicted_downtime_ms: None,
            switched: None,
            verified: verify.then_some(true),
            bytes_per_second: Report::throughput(&rounds),
            rounds,
            phases,
        }
    }
}

/// What went wrong with guest memory.
pub(super) fn memory(source: HostError) -> Fault {
    Fault::Host { step: "give access to the guest's memory", source }
}

fn same(what: &'static str, here: u64, there: u64) -> Result<(), Fault> {
    if here == there { Ok(()) } else { Err(Fault::Differs { what, here, there }) }
}
