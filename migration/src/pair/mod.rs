//! Whole migrations in memory: a fake guest, a fake host, and a link with virtual time and bandwidth and a fault wherever
//! a test wants one. The source runs in the test's thread and the target in another; neither ever waits for real time.

mod codecs;
mod faults;
mod goals;
mod link;
mod moves;
mod old_copies;
mod passed;
mod strangers;
mod streams;
pub(crate) mod world;

use crate::link::Link;
use crate::progress::{Observer, Progress};
use crate::source::{self, InDoubt, Outcome, Plan, Surroundings};
use crate::target::{self, Arrival, Fault, Reception, receive};
use crate::{CancelToken, Codecs, Goal, MemoryPolicy, Mode};
use link::{Door, End, FaultAt, VirtualClock, connect};
use std::num::NonZeroU16;
use std::time::Duration;
use uuid::Uuid;
use world::{FakeGuest, FakeHost, MemoryClaims, World};

/// An onlooker that remembers.
#[derive(Debug, Default)]
pub(super) struct Diary(pub(super) Vec<Progress>);

impl Observer for Diary {
    fn on(&mut self, news: Progress) {
        self.0.push(news);
    }
}

/// What a migration is to meet with.
#[derive(Debug, Default)]
pub(super) struct Weather {
    pub(super) faults: Vec<FaultAt>,
    pub(super) cancel_at: Option<usize>,
    pub(super) round_trip: Option<Duration>,
    /// How long the target needs for each page.
    pub(super) page_time: Duration,
    /// What becomes of handles to memory.
    pub(super) handles: Handles,
    /// Whether only one stream more can be had.
    pub(super) no_more_links: bool,
    /// Links at the target's door that are none of its streams; the first says nothing, the others nonsense.
    pub(super) strangers: usize,
}

/// What becomes of handles to memory between two ends.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handles {
    /// They arrive.
    #[default]
    Arrive,
    /// They get lost on the way, without a word.
    GetLost,
    /// The link takes none.
    AreNotTaken,
}

/// What became of one attempt.
pub(super) struct Attempt {
    pub(super) outcome: Outcome<FakeGuest>,
    pub(super) arrival: Result<Arrival, Fault>,
    pub(super) source_diary: Diary,
    pub(super) target_diary: Diary,
    /// Frames that the source and the target have tried to send.
    pub(super) frames: [usize; 2],
    /// When the source began to send how many bytes, over all links.
    pub(super) traffic: Vec<(Duration, usize)>,
}

pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn plan(mode: Mode) -> Plan {
    let (memory, goal) = (MemoryPolicy::Copy, Goal { max_rounds: 4, ..Goal::default() });
    let (codecs, streams) = (Some(Codecs::ZERO), Some(NonZeroU16::MIN));
    Plan { memory, goal, patience: PATIENCE, codecs, streams, ..Plan::new(Uuid::new_v4(), mode) }
}

/// Migrates `guest` into `host` with both ends of the real engine.
pub(super) fn migrate(
    guest: FakeGuest,
    host: &mut FakeHost,
    claims: &MemoryClaims,
    plan: &Plan,
    weather: Weather,
) -> Attempt {
    let cancel = CancelToken::new();
    let strangers = weather.strangers;
    let (mut near, far, [near_clock, far_clock], door) = connect(weather, &cancel);
    for stranger in 0..strangers {
        let mut link = door.dial().unwrap();
        if stranger > 0 {
            link.send(b"GET / HTTP/1.1\r\n\r\n", &[]).unwrap();
        }
        link.abandon();
    }
    let mut source_diary = Diary::default();
    let (outcome, (arrival, target_diary)) = std::thread::scope(|scope| {
        let inside = door.clone();
        let target = scope.spawn(move || serve(far, host, claims, &far_clock, &inside));
        let around = Surroundings { clock: &near_clock, cancel: &cancel, observer: &mut source_diary };
        let further = source::Further { dial: &mut |_| door.dial(), thread: &|| {} };
        let outcome = source::run(guest, &mut near, plan, around, further);
        near.hang_up();
        (outcome, target.join().unwrap())
    });
    let (frames, traffic) = (near.frames(), near.traffic());
    Attempt { outcome, arrival, source_diary, target_diary, frames, traffic }
}

fn serve(
    mut link: End,
    host: &mut FakeHost,
    claims: &MemoryClaims,
    clock: &VirtualClock,
    door: &Door,
) -> (Result<Arrival, Fault>, Diary) {
    let mut diary = Diary::default();
    let around = Reception { clock, observer: &mut diary, patience: PATIENCE };
    let further = target::Further { accept: &mut |limit| Ok(door.accept(limit)), thread: &|| {} };
    let arrival = receive(&mut link, host, claims, around, further);
    (arrival, diary)
}

/// Asks after a guest in doubt, over a link without faults.
pub(super) fn ask(doubt: InDoubt<FakeGuest>, world: &World, claims: &MemoryClaims) -> Outcome<FakeGuest> {
    let (mut near, far, [near_clock, far_clock], door) = connect(Weather::default(), &CancelToken::new());
    std::thread::scope(|scope| {
        scope.spawn(move || serve(far, &mut FakeHost::refusing(world), claims, &far_clock, &door));
        let outcome = doubt.ask(&mut near, &near_clock);
        near.hang_up();
        outcome
    })
}
