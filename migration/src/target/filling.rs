//! The target while memory comes in, and its check of the whole.

use super::error::Fault;
use super::intake::{Intake, compare, failed, same};
use crate::clock::Clock;
use crate::counts::PageCounts;
use crate::digest::{self, TranscriptDigest};
use crate::guest::GuestPages;
use crate::region::{Region, RegionId};
use crate::report::{CpuReport, Ending, PhaseReport, Report, Role, RoundReport, ms};
use crate::wire::{Hello, Mode, Records, RoundEnd, Running, Seal, Transfer};
use std::fmt;
use std::sync::Arc;
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
    transfer: Transfer,
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
pub struct Filling<M> {
    pub(super) incoming: Incoming,
    pub(super) intake: Arc<Intake<M>>,
    /// What the first stream has brought in the round under way.
    share: PageCounts,
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
    /// Processor time that this migration had taken here.
    pub cpu: Duration,
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

impl<M: GuestPages> Filling<M> {
    pub(super) fn new(hello: Hello<'_>, transfer: Transfer, memory: M, at: Moment<'_>) -> Self {
        let Hello { session, vm, mode, verify, streams, transfer: _, build: _, regions, machine: _ } = hello;
        let incoming = Incoming { session, vm, mode, transfer, verify, started: at.now, rounds: Vec::new() };
        let streams = match transfer {
            Transfer::Copied => streams,
            Transfer::Passed => 1,
        };
        let intake = Arc::new(Intake::new(memory, regions, streams));
        Self { incoming, intake, share: PageCounts::default(), started: at.now, bytes_before: at.bytes }
    }

    /// Takes the records of a frame of the first stream. What it holds is to be installed next.
    pub(super) fn pages(&mut self, records: Records<'_>) -> Result<(), Fault> {
        self.intake.take(records, &mut self.share)
    }

    /// The first stream has ended a round, and the source says what all of them brought. [`AwaitStreams::round_done`]
    /// is due when the others have ended it, too.
    pub(super) fn round_end(mut self: Box<Self>, end: RoundEnd) -> Result<AwaitStreams<M>, Fault> {
        if self.incoming.rounds.len() >= MAX_ROUNDS {
            return Err(Fault::TooManyRounds { limit: MAX_ROUNDS });
        }
        self.share = PageCounts::default();
        let round = self.intake.end_first();
        Ok(AwaitStreams { filling: self, round, end })
    }

    /// Since when the round under way is under way, and how many bytes had come before it.
    pub(super) fn since(&self) -> (Duration, u64) {
        (self.started, self.bytes_before)
    }

    /// Compares everything with the source's account of it.
    pub(super) fn check_seal(&self, seal: &Seal, at: Moment<'_>) -> Result<(), Fault> {
        let transcripts = self.intake.transcripts();
        same("The number of further streams", transcripts.len() as u64, seal.streams.len() as u64)?;
        for (here, there) in [at.before].iter().chain(&transcripts).zip([&seal.link].into_iter().chain(&seal.streams)) {
            same("The number of frames", here.frames, there.frames)?;
            same("The digest of all frames", here.digest, there.digest)?;
        }
        same("The number of pages after the last round", self.share.sent(), 0)?;
        let regions = self.intake.regions();
        let memory = regions.iter().filter(|region| matches!(region, Region::Ram(_))).count();
        let digests = if self.incoming.verify { memory } else { 0 };
        same("The number of digests of memory", digests as u64, seal.memory.len() as u64)?;
        if !self.incoming.verify {
            return Ok(());
        }
        let here = digest::of_memory(self.intake.memory(), regions).map_err(failed)?;
        match (0..).zip(here.iter().zip(&seal.memory)).find(|(_, (here, there))| here != there) {
            Some((region, _)) => Err(Fault::MemoryDiffers { region: RegionId(region) }),
            None => Ok(()),
        }
    }
}

/// The first stream is through with a round.
#[derive(Debug)]
pub struct AwaitStreams<M> {
    filling: Box<Filling<M>>,
    round: u32,
    end: RoundEnd,
}

impl<M: GuestPages> AwaitStreams<M> {
    pub(super) fn session(&self) -> Uuid {
        self.filling.incoming.session
    }

    /// Where the others are.
    pub(super) fn intake(&self) -> &Arc<Intake<M>> {
        &self.filling.intake
    }

    /// Whether the others are through, too.
    pub(super) fn is_over(&self) -> bool {
        self.intake().ended(self.round).is_some()
    }

    /// Compares the round with what the source says of it, and goes on to the next. `at` is when it was over.
    pub(super) fn round_done(self, at: Moment<'_>) -> Result<(Box<Filling<M>>, RoundReport), Fault> {
        let Self { mut filling, round, end } = self;
        let came = filling.intake.ended(round).unwrap_or_default();
        compare(came, end, round)?;
        let (pages, zero_pages) = (came.sent(), came.zero);
        let (bytes, ms) = (at.bytes - filling.bytes_before, ms(at.now - filling.started));
        let report = RoundReport { round, pages, zero_pages, kinds: came, bytes, ms, dirty_at_end: 0, chosen: None };
        filling.incoming.rounds.push(report);
        (filling.started, filling.bytes_before) = (at.now, at.bytes);
        Ok((filling, report))
    }
}

impl Arrived {
    /// What this end knows by itself, now that the guest runs.
    pub(super) fn report(self, now: Duration, bytes: u64, streams: u16, phases: Vec<PhaseReport>) -> Report {
        let Self { incoming: Incoming { session, vm, mode, transfer, verify, started, rounds }, part } = self;
        Report {
            role: Role::Target,
            session,
            vm,
            mode,
            transfer,
            ending: Ending::HandedOver,
            streams,
            bytes,
            total_ms: ms(now - started),
            downtime_ms: None,
            target_part: Some(part.into()),
            predicted_downtime_ms: None,
            predicted_total_ms: None,
            switched: None,
            stalled_in_round: None,
            guest_cost: None,
            cpu: CpuReport { source_ms: None, target_ms: Some(ms(part.cpu)) },
            verified: verify.then_some(true),
            bytes_per_second: Report::throughput(&rounds),
            rounds,
            phases,
        }
    }
}
