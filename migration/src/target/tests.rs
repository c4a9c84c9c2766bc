//! The target's states, frame by frame, without a link; and what a stranger on the link is told.

use super::install::{Buffers, Wait, install};
use super::*;
use crate::codec::{BlockCode, PageCode};
use crate::digest::TranscriptDigest;
use crate::pair::world::{FakeHost, HostSide, MemoryClaims, REGIONS, STATE, World};
use crate::region::{MAX_REGIONS, PAGE_SIZE, PageIndex, PageRun, RegionId};
use crate::wire::{Join, Kind, Mode, PackedBlock, PageRecord, Pages, Records, RoundEnd};
use crate::{Clock, GuestPages, RamRegion, Region};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const SESSION: Uuid = Uuid::from_u128(1);
const BEFORE: TranscriptDigest = TranscriptDigest { frames: 4, digest: 77 };

/// A clock that goes on by a second each time it is read.
#[derive(Debug)]
struct Seconds(AtomicU64);

impl Clock for Seconds {
    fn now(&self) -> Duration {
        Duration::from_secs(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn sleep(&self, _: Duration) {}

    fn thread_cpu(&self) -> Duration {
        Duration::ZERO
    }
}

static CLOCK: Seconds = Seconds(AtomicU64::new(0));

fn at() -> Moment<'static> {
    Moment { now: Duration::ZERO, clock: &CLOCK, bytes: 0, cpu: Duration::ZERO, before: BEFORE }
}

fn hello() -> Hello<'static> {
    let regions = REGIONS.to_vec();
    let (mode, transfer, machine) = (Mode::Stop, Transfer::Copied, b"{}");
    Hello {
        session: SESSION,
        vm: Uuid::nil(),
        mode,
        verify: false,
        streams: 1,
        transfer,
        build: "test",
        regions,
        machine,
    }
}

fn seal() -> Seal {
    Seal { link: BEFORE, streams: Vec::new(), memory: Vec::new() }
}

fn record(region: u16, first: u64, pages: u32, code: PageCode) -> PageRecord {
    PageRecord::new(PageRun { region: RegionId(region), first: PageIndex(first), pages }, code)
}

/// A frame in which no page travels encoded.
fn runs(records: &[PageRecord]) -> Frame<'_> {
    let block = PackedBlock { code: BlockCode::Stored, unpacked: 0, bytes: &[] };
    Frame::Pages(Pages { records: Records::new(records), block })
}

/// A target that has been sent some frames.
struct Bench {
    target: Option<Target<HostSide>>,
    host: FakeHost,
    claims: MemoryClaims,
}

impl Bench {
    fn new() -> Self {
        let world = World::new();
        {
            let mut facts = world.facts();
            (facts.runs_at_source, facts.disk) = (false, crate::pair::world::Holder::Nobody);
        }
        Self { target: Some(Target::AwaitHello), host: FakeHost::new(&world), claims: MemoryClaims::default() }
    }

    fn send(&mut self, frame: Frame<'_>) -> Result<Reply, Fault> {
        let target = self.target.take().expect("no fault so far");
        let pages = if let Frame::Pages(pages) = &frame { Some(*pages) } else { None };
        let (target, reply) = target.on_frame(frame, None, at(), &mut self.host, &self.claims)?;
        if let (Target::Filling(filling), Some(pages)) = (&target, pages) {
            let wait = Wait { clock: &CLOCK, limit: Duration::from_secs(9), idle: &mut |_, _, _| {} };
            install(&filling.intake, pages, &mut Buffers::default(), wait)?;
        }
        self.target = Some(match target {
            // There are no other streams.
            Target::AwaitStreams(waiting) if waiting.is_over() => Target::Filling(waiting.round_done(at())?.0),
            next => next,
        });
        Ok(reply)
    }

    /// Leads a fresh target into the state before frame `next`.
    fn before(next: Kind) -> Self {
        let mut bench = Self::new();
        let script = [Frame::Hello(hello()), Frame::State(STATE), Frame::Seal(seal()), Frame::Go];
        for frame in script.into_iter().take_while(|frame| frame.kind() != next) {
            bench.send(frame).unwrap();
        }
        bench
    }
}

fn frames(records: &[PageRecord]) -> Vec<Frame<'_>> {
    vec![
        Frame::Hello(hello()),
        Frame::Accept { claims: Uuid::nil(), transfer: Transfer::Copied, old: 0 },
        Frame::Refuse { reason: "" },
        runs(records),
        Frame::RoundEnd(RoundEnd { round: 1, pages: 0, zero_pages: 0 }),
        Frame::State(STATE),
        Frame::Seal(seal()),
        Frame::Ready,
        Frame::Go,
        Frame::Running(Running { restore: Duration::ZERO, start: Duration::ZERO, cpu: Duration::ZERO }),
        Frame::Query { session: SESSION, claims: Uuid::from_u128(99) },
        Frame::Verdict(Claim::Mine),
        Frame::Report(b"{}"),
        Frame::Join(Join { session: SESSION, stream: 1 }),
        Frame::Installed { round: 1 },
    ]
}

#[test]
fn every_frame_is_taken_in_its_states_only() {
    let records = [record(0, 0, 1, PageCode::Zero)];
    let taken = |next: Kind| match next {
        Kind::Hello => vec![Kind::Hello, Kind::Query],
        Kind::State => vec![Kind::Pages, Kind::RoundEnd, Kind::State],
        Kind::Seal => vec![Kind::Seal],
        Kind::Go => vec![Kind::Go],
        _ => vec![],
    };
    // "Before Heartbeat" is never reached in the script: it is the state after Go.
    for next in [Kind::Hello, Kind::State, Kind::Seal, Kind::Go, Kind::Heartbeat] {
        for frame in frames(&records) {
            let (mut bench, kind) = (Bench::before(next), frame.kind());
            match bench.send(frame) {
                Ok(_) => assert!(taken(next).contains(&kind), "{kind} before {next}"),
                Err(Fault::OutOfTurn { found, .. }) => {
                    assert!(found == kind && !taken(next).contains(&kind), "{kind} before {next}");
                }
                Err(fault) => panic!("{kind} before {next}: {fault}"),
            }
        }
        let alive = Bench::before(next).send(Frame::Heartbeat);
        if next == Kind::Hello {
            // Who says nothing else would hold the target for ever.
            assert!(matches!(alive, Err(Fault::OutOfTurn { found: Kind::Heartbeat, .. })));
        } else {
            assert_eq!(alive.unwrap(), Reply::Silence);
        }
        let ended = Bench::before(next).send(Frame::Abort { reason: "enough" });
        assert!(matches!(ended, Err(Fault::SourceGaveUp { reason }) if reason == "enough"));
    }
}

/// A source that has passed the guest's memory cannot have pages written into it, too.
#[test]
fn after_memory_only_state_may_come() {
    let passed = || {
        let mut bench = Bench::new();
        let memory = std::sync::Arc::clone(&bench.host.memory);
        let target = bench.target.take().unwrap();
        let (hello, host) = (Frame::Hello(hello()), &mut bench.host);
        let (target, reply) = target.on_frame(hello, Some(memory), at(), host, &bench.claims).unwrap();
        assert!(matches!(reply, Reply::Send(Frame::Accept { transfer: Transfer::Passed, .. })));
        bench.target = Some(target);
        bench
    };
    for frame in frames(&[record(0, 0, 1, PageCode::Zero)]) {
        let (kind, result) = (frame.kind(), passed().send(frame));
        match kind {
            Kind::State | Kind::Heartbeat => assert_eq!(result.unwrap(), Reply::Silence),
            Kind::Abort => assert!(matches!(result, Err(Fault::SourceGaveUp { .. }))),
            _ => assert!(matches!(result, Err(Fault::OutOfTurn { found, .. }) if found == kind), "{kind}"),
        }
    }
}

#[test]
fn the_claim_stands_before_the_guest_runs() {
    let mut bench = Bench::before(Kind::Go);
    assert!(bench.claims.stand.lock().unwrap().is_empty() && !bench.host.world.facts().runs_at_target);
    let Reply::Last(Frame::Running(part)) = bench.send(Frame::Go).unwrap() else { panic!() };
    assert!(part.start > part.restore, "{part:?}");
    assert_eq!(bench.claims.stand.lock().unwrap()[&SESSION], Claim::Mine);
    assert!(bench.host.world.facts().runs_at_target);
}

/// The question overtakes Go on another link: what was answered stays true.
#[test]
fn a_go_after_the_answer_not_mine_does_not_run_the_guest() {
    let mut bench = Bench::before(Kind::Go);
    let query = Frame::Query { session: SESSION, claims: bench.claims.identity() };
    let (_, reply) =
        Target::AwaitHello.on_frame(query, None, at(), &mut FakeHost::refusing(&World::new()), &bench.claims).unwrap();
    assert_eq!(reply, Reply::Last(Frame::Verdict(Claim::NotMine)));
    assert!(matches!(bench.send(Frame::Go), Err(Fault::ClaimedNotMine)));
    assert!(!bench.host.world.facts().runs_at_target);
}

#[test]
fn an_answer_is_the_same_each_time() {
    let claims = MemoryClaims::default();
    claims.claim(SESSION, Claim::Mine).unwrap();
    for (session, stands) in [(SESSION, Claim::Mine), (Uuid::from_u128(2), Claim::NotMine)].repeat(2) {
        let query = Frame::Query { session, claims: claims.identity() };
        let mut host = FakeHost::refusing(&World::new());
        let (target, reply) = Target::AwaitHello.on_frame(query, None, at(), &mut host, &claims).unwrap();
        assert!(matches!(target, Target::Answered(claim) if claim == stands));
        assert_eq!(reply, Reply::Last(Frame::Verdict(stands)));
    }
}

#[test]
fn pages_outside_of_the_guest_are_a_fault() {
    for wrong in [
        record(3, 0, 1, PageCode::Raw),
        record(2, REGIONS[2].pages(), 1, PageCode::Raw),
        record(0, REGIONS[0].pages(), 1, PageCode::Zero),
        record(1, REGIONS[1].pages() - 1, 2, PageCode::Raw),
        record(u16::MAX, u64::MAX, u32::MAX, PageCode::Zero),
    ] {
        let mut bench = Bench::before(Kind::State);
        let right = record(1, REGIONS[1].pages() - 1, 1, PageCode::Raw);
        assert_eq!(bench.send(runs(&[right])).unwrap(), Reply::Fill);
        let fault = bench.send(runs(&[right, wrong])).unwrap_err();
        assert!(matches!(fault, Fault::NoSuchPages { .. }), "{wrong:?}: {fault}");
    }
}

#[test]
fn a_page_that_was_written_becomes_zero_again_and_its_neighbours_stay() {
    let mut bench = Bench::before(Kind::State);
    let run = |first, pages| PageRun { region: RegionId(0), first: PageIndex(first), pages };
    bench.send(runs(&[record(0, 4, 3, PageCode::Raw)])).unwrap();
    bench.host.side().slice(run(4, 3)).unwrap().copy_from(&[9_u8; 3 * PAGE_SIZE]);
    bench.send(runs(&[record(0, 5, 1, PageCode::Zero)])).unwrap();
    let mut bytes = vec![1_u8; 3 * PAGE_SIZE];
    bench.host.side().slice(run(4, 3)).unwrap().copy_to(&mut bytes);
    let expected = [[9_u8; PAGE_SIZE], [0; PAGE_SIZE], [9; PAGE_SIZE]].concat();
    assert!(bytes == expected);
}

#[test]
fn an_account_that_differs_is_a_fault() {
    let pages = [record(0, 0, 2, PageCode::Zero), record(0, 9, 1, PageCode::Raw)];
    let told = RoundEnd { round: 1, pages: 3, zero_pages: 2 };
    for (told, right) in [
        (told, true),
        (RoundEnd { round: 2, ..told }, false),
        (RoundEnd { pages: 2, ..told }, false),
        (RoundEnd { zero_pages: 1, ..told }, false),
    ] {
        let mut bench = Bench::before(Kind::State);
        bench.send(runs(&pages)).unwrap();
        let result = bench.send(Frame::RoundEnd(told));
        assert_eq!(matches!(result, Ok(Reply::Silence)), right, "{told:?}");
        assert!(right || matches!(result, Err(Fault::Differs { .. })));
    }
    for wrong in [
        Seal { link: TranscriptDigest { frames: 5, ..BEFORE }, ..seal() },
        Seal { link: TranscriptDigest { digest: 78, ..BEFORE }, ..seal() },
        Seal { streams: vec![BEFORE], ..seal() },
        Seal { memory: vec![1, 2], ..seal() },
    ] {
        let mut bench = Bench::before(Kind::Seal);
        assert!(matches!(bench.send(Frame::Seal(wrong.clone())), Err(Fault::Differs { .. })), "{wrong:?}");
        assert!(bench.host.state.is_none(), "nothing was restored");
    }
    let mut unfinished = Bench::before(Kind::State);
    unfinished.send(runs(&pages)).unwrap();
    unfinished.send(Frame::State(STATE)).unwrap();
    assert!(matches!(unfinished.send(Frame::Seal(seal())), Err(Fault::Differs { there: 0, here: 3, .. })));
}

#[test]
fn rounds_without_end_are_a_fault() {
    let mut bench = Bench::before(Kind::State);
    let fault = (1..=100_000).find_map(|round| {
        bench.send(Frame::RoundEnd(RoundEnd { round, pages: 0, zero_pages: 0 })).err().map(|fault| (round, fault))
    });
    assert!(matches!(fault, Some((10_001, Fault::TooManyRounds { limit: 10_000 }))), "{fault:?}");
}

#[test]
fn a_layout_that_is_not_the_hosts_is_refused() {
    let too_many = vec![REGIONS[0]; MAX_REGIONS];
    for regions in [Vec::new(), REGIONS[..1].to_vec(), vec![REGIONS[1], REGIONS[0], REGIONS[2]], too_many] {
        let fault = Bench::new().send(Frame::Hello(Hello { regions: regions.clone(), ..hello() })).unwrap_err();
        assert!(matches!(fault, Fault::Refused(_)), "{regions:?}");
    }
    let moved = Region::Ram(RamRegion { start: vm_memory::GuestAddress(4096), pages: 600 });
    let regions = vec![moved, REGIONS[1], Region::Disk { pages: 91 }];
    let fault = Bench::new().send(Frame::Hello(Hello { regions, ..hello() })).unwrap_err();
    let layout = "600 pages at 0x1000, 70 pages at 0x100000000, a disk of 91 pages";
    assert!(crate::channel::in_words(&fault).contains(layout), "{fault}");
}
