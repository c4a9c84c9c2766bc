//! The source drives a migration: [`run`] takes a guest and gives back who owns it now.
//!
//! ```text
//!         offer, open_streams   start_log, rounds     stop            seal             await_ready        go
//! guest ──► Precopy ─(live)─► Precopy ──────────────► Stopped ──────► Sealed ─────────► Ready ──────────► HandedOver
//!                └───(stop, or memory passed)────────────▲                                  └──────────► InDoubt
//!             any failure ──► StillOurs: every step taken back, the guest runs on, the target is told why
//! ```
//! Each state consumes the one before, and holds the guest. What must never happen is that two hosts run it. So before `Go`
//! the record says that the guest may be another's, and after `Go` has been tried nothing resumes the guest here but the
//! target's word, or the operator's: see [`InDoubt`]. The record is written before the guest is paused, since a disk takes
//! longer to make it durable than all the rest of a hand-over; until `Go` it says more than is true, which at worst has an
//! operator look at the target after a crash of this host.

mod custody;
mod doubt;
mod drive;
mod error;
mod plan;
mod sender;
mod steering;
mod streams;

pub use custody::Failed;
pub use doubt::{InDoubt, Owner};
pub use error::SourceError;
pub use plan::{MemoryPolicy, Plan};

use crate::cancel::CancelToken;
use crate::channel::host_error;
use crate::clock::Clock;
use crate::digest;
use crate::guest::{Description, GuestPages, HandleOf, SourceGuest};
use crate::link::{Link, LinkError};
use crate::pacer::Pacer;
use crate::progress::{Observer, Phase};
use crate::region::{MAX_REGION_PAGES, MAX_REGIONS, Region};
use crate::report::Report;
use crate::wire::{Frame, Hello, Kind, MAX_MACHINE, MAX_STATE, Mode, Seal, Transfer};
use custody::{Custody, Step};
use drive::{Answer, Drive};
use std::fmt;
use std::num::NonZeroU16;
use std::thread::{self, Scope};
use std::time::Duration;
use steering::Then;
use streams::{Crew, Streams, Terms};
use uuid::Uuid;

/// The name of this build, for the other end's messages.
const BUILD: &str = concat!("godwit ", env!("CARGO_PKG_VERSION"));

/// How long what a target has let go of may take to be free: its word may overtake the lock service of a file system.
const LET_GO: Duration = Duration::from_secs(1);

/// What a migration needs besides the guest and the link.
pub struct Surroundings<'a> {
    /// The time.
    pub clock: &'a dyn Clock,
    /// The wish to end it.
    pub cancel: &'a CancelToken,
    /// Who wants to know how it goes.
    pub observer: &'a mut dyn Observer,
}

impl fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").field("cancel", self.cancel).finish_non_exhaustive()
    }
}

/// How a migration gets streams beside the first, which is the link it begins on.
pub struct Further<'a, L> {
    /// Connects one more link to the target, within so long.
    pub dial: &'a mut dyn FnMut(Duration) -> Result<L, LinkError>,
    /// What the thread of each does first.
    pub thread: &'a (dyn Fn() + Sync),
}

impl<L> fmt::Debug for Further<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Further").finish_non_exhaustive()
    }
}

/// Who owns the guest after a migration.
#[derive(Debug)]
#[must_use = "the guest is in it, unless it was handed over"]
pub enum Outcome<G> {
    /// The target. There is no guest here any more: it was dropped.
    HandedOver(Report),
    /// This host, as before.
    StillOurs(Failed<G>),
    /// Nobody knows yet. The guest stays paused.
    InDoubt(InDoubt<G>),
}

/// The guest may run; the ledger has what the target lacks.
struct Precopy<G> {
    custody: Custody<G>,
    regions: Vec<Region>,
    /// The ledger is empty where memory was passed: the target has all of it, as it is at any moment.
    transfer: Transfer,
    round: u32,
    claims: Uuid,
}

/// The guest is paused, and its state is captured.
struct Stopped<G> {
    precopy: Precopy<G>,
    state: Vec<u8>,
}

/// The target has all of the guest and holds what only one host may hold.
struct Sealed<G> {
    custody: Custody<G>,
    claims: Uuid,
}

/// The target has restored the guest and could run it.
struct Ready<G> {
    custody: Custody<G>,
    claims: Uuid,
}

/// A transition to `T`, or the guest back.
type Next<T, G> = Result<T, Box<Failed<G>>>;

/// Migrates `guest` over `link`, and over the links that `further` gives where the plan has more streams. The caller should
/// close the link when this returns: a target that did not get the guest waits for that a while.
pub fn run<G: SourceGuest, L: Link<Handle = HandleOf<G::Memory>>>(
    guest: G,
    link: &mut L,
    plan: &Plan,
    around: Surroundings<'_>,
    further: Further<'_, L>,
) -> Outcome<G> {
    let count = plan.stream_count(link);
    let streams = Streams::new(count, plan.chooser(link, count), plan.bandwidth.map(|cap| Pacer::new(cap, count)));
    let Surroundings { clock, cancel, observer } = around;
    let Further { dial, thread } = further;
    thread::scope(|scope| {
        let mut drive = Drive::new(link, plan, &streams, Surroundings { clock, cancel, observer });
        let mut crew = Crew::new(&streams, clock);
        let ready = Precopy::offer(guest, &mut drive).and_then(|precopy| {
            let precopy = precopy.open_streams(&mut drive, &mut crew, scope, Further { dial, thread })?;
            let stopped = match (precopy.transfer, plan.mode) {
                (Transfer::Passed, _) | (Transfer::Copied, Mode::Stop) => precopy.stop(&mut drive)?,
                (Transfer::Copied, Mode::Live) => {
                    precopy.start_log(&mut drive)?.rounds(&mut drive)?.stop(&mut drive)?
                }
            };
            stopped.seal(&mut drive)?.await_ready(&mut drive)
        });
        match ready {
            Ok(ready) => ready.go(&mut drive), // the point of no return is in here
            Err(failed) => Outcome::StillOurs(*failed),
        }
    })
}

/// Gives a guest back. The target is told first if it holds what the guest needs, else last: that keeps the guest
/// waiting no longer than it must.
fn fail<G: SourceGuest, L: Link>(custody: Custody<G>, cause: SourceError, drive: &mut Drive<'_, L>) -> Box<Failed<G>> {
    let waits_for_target = custody.has_released();
    if waits_for_target {
        drive.tell(&cause);
    }
    // A target that does not say that it has let go notices when its patience ends, at about the same time as this end's.
    let until_noticed = drive.plan.patience * 2;
    let patience = if cause.is_targets_word() { until_noticed.min(LET_GO) } else { until_noticed };
    let failed = custody.hand_back(cause, drive.clock, patience);
    if !waits_for_target {
        drive.tell(&failed.cause);
    }
    Box::new(failed)
}

impl<G: SourceGuest> Precopy<G> {
    /// Offers the guest: `Hello` out, its memory with it if that can be, and `Accept` back.
    fn offer<L: Link<Handle = HandleOf<G::Memory>>>(guest: G, drive: &mut Drive<'_, L>) -> Next<Self, G> {
        drive.enter(Phase::Offering);
        let custody = Custody::new(guest, drive.plan.session);
        let offered = describe(&custody.guest).and_then(|description| {
            drive.is_about(description.vm);
            drive.check()?;
            let handle = handle_to_pass(&custody.guest, &description, drive)?;
            let offered = if handle.is_some() { Transfer::Passed } else { Transfer::Copied };
            drive.send(&Frame::Hello(hello(drive.plan, drive.streams.count, offered, &description)))?;
            handle.iter().try_for_each(|handle| drive.send_handle(handle))?;
            let (claims, transfer, old) = match drive.answer(Kind::Accept)? {
                Answer::Accept { claims, transfer, old } => (claims, transfer, old),
                other => return Err(SourceError::OutOfTurn { found: other.kind(), expected: Kind::Accept }),
            };
            check_transfer(drive.plan.memory, offered, transfer)?;
            drive.memory_goes(transfer, &description.regions, old);
            Ok((description, claims, transfer))
        });
        match offered {
            Ok((Description { regions, .. }, claims, transfer)) => {
                Ok(Self { custody, regions, transfer, round: 0, claims })
            }
            Err(cause) => Err(fail(custody, cause, drive)),
        }
    }

    /// Connects the further streams, each with its thread. Memory that was passed needs none.
    fn open_streams<'scope, L: Link>(
        self,
        drive: &mut Drive<'_, L>,
        crew: &mut Crew<'scope, L::Cutter>,
        scope: &'scope Scope<'scope, '_>,
        further: Further<'scope, L>,
    ) -> Next<Self, G> {
        let Further { dial, thread } = further;
        let terms = Terms { session: drive.plan.session, patience: drive.plan.patience, thread };
        let streams = match self.transfer {
            Transfer::Copied => drive.streams.count.get(),
            Transfer::Passed => 1,
        };
        let opened = (1..streams).try_for_each(|_| {
            drive.check()?;
            let link = match dial(drive.time_left()) {
                Ok(link) => link,
                Err(error) => return Err(drive.check().err().unwrap_or(SourceError::Link(error))),
            };
            crew.hire(scope, link, terms, self.custody.guest.memory()).map_err(|error| SourceError::Link(error.into()))
        });
        match opened {
            Ok(()) => Ok(self),
            Err(cause) => Err(fail(self.custody, cause, drive)),
        }
    }

    /// Logs changes from now on, and takes every page as changed.
    fn start_log<L: Link>(mut self, drive: &mut Drive<'_, L>) -> Next<Self, G> {
        match drive.log(|_| self.custody.take(Step::DirtyLog)) {
            Ok(()) => {
                drive.streams.ledger.lock().mark_all();
                Ok(self)
            }
            Err(cause) => Err(fail(self.custody, cause, drive)),
        }
    }

    /// Sends what changed, again and again, while the guest runs, until it is worth to pause it.
    fn rounds<L: Link>(mut self, drive: &mut Drive<'_, L>) -> Next<Self, G> {
        drive.enter(Phase::Rounds);
        loop {
            match self.round(drive) {
                Ok(true) => {}
                Ok(false) => return Ok(self),
                Err(cause) => return Err(fail(self.custody, cause, drive)),
            }
        }
    }

    fn round<L: Link>(&mut self, drive: &mut Drive<'_, L>) -> Result<bool, SourceError> {
        self.round += 1;
        let sent = drive.send_round(self.round, &self.custody.guest.memory(), drive.cut_at())?;
        if self.round == 1 {
            drive.hear_what_lacks()?;
        }
        let unsent = drive.streams.ledger.lock().dirty_pages();
        let dirty_at_end = drive.log(|drive| self.harvest(drive))?;
        drive.round_done(crate::RoundReport { dirty_at_end, ..sent });
        match drive.next(self.round, dirty_at_end - unsent, unsent)? {
            Then::Round => Ok(true),
            Then::SlowerRound => self.slow_down(drive).map(|()| true),
            Then::Pause if self.round < drive.plan.goal.max_rounds && drive.target_lags(self.round)? => {
                // What the guest has written meanwhile goes in another round.
                drive.log(|drive| self.harvest(drive))?;
                Ok(true)
            }
            Then::Pause => Ok(false),
        }
    }

    /// Takes the pages that changed into the ledger; how many are in it then.
    fn harvest<L: Link>(&mut self, drive: &Drive<'_, L>) -> Result<u64, SourceError> {
        let mut ledger = drive.streams.ledger.lock();
        let harvested = self.custody.guest.harvest_dirty(&mut ledger);
        harvested.map_err(|error| SourceError::Guest { step: "tell its dirty pages", source: host_error(error) })?;
        Ok(ledger.dirty_pages())
    }

    /// Takes more time from the vCPUs than before.
    fn slow_down<L: Link>(&mut self, drive: &mut Drive<'_, L>) -> Result<(), SourceError> {
        let guest = &self.custody.guest;
        let shares = drive.slow_down(guest.written_by_vcpu().as_deref(), &guest.time_taken());
        self.custody.throttle(shares)
    }

    /// Pauses the guest and captures its state, and only then learns the last dirty pages: capturing may touch memory.
    fn stop<L: Link>(mut self, drive: &mut Drive<'_, L>) -> Next<Stopped<G>, G> {
        drive.enter(Phase::Pausing);
        match self.capture(drive) {
            Ok(state) => Ok(Stopped { precopy: self, state }),
            Err(cause) => Err(fail(self.custody, cause, drive)),
        }
    }

    fn capture<L: Link>(&mut self, drive: &mut Drive<'_, L>) -> Result<Vec<u8>, SourceError> {
        drive.check()?;
        self.custody.take(Step::GivenAway)?;
        drive.pausing();
        self.custody.take(Step::Pause)?;
        if self.custody.unthrottle()? {
            drive.unthrottled(&self.custody.guest.time_taken());
        }
        let saved = self.custody.guest.save();
        let state = saved.map_err(|error| SourceError::Guest { step: "save its state", source: host_error(error) })?;
        fits("The state", state.len() as u64, MAX_STATE as u64)?;
        match (self.transfer, drive.plan.mode) {
            (Transfer::Passed, _) => {}
            (Transfer::Copied, Mode::Stop) => drive.streams.ledger.lock().mark_all(),
            (Transfer::Copied, Mode::Live) => drop(self.harvest(drive)?),
        }
        Ok(state)
    }
}

impl<G: SourceGuest> Stopped<G> {
    /// Sends the last pages and the state, gives up what only one host may hold, and seals it all.
    fn seal<L: Link>(mut self, drive: &mut Drive<'_, L>) -> Next<Sealed<G>, G> {
        let sealed = self.send_last_pages(drive).and_then(|()| self.send_state(drive));
        let Precopy { custody, claims, .. } = self.precopy;
        match sealed {
            Ok(()) => Ok(Sealed { custody, claims }),
            Err(cause) => Err(fail(custody, cause, drive)),
        }
    }

    fn send_last_pages<L: Link>(&self, drive: &mut Drive<'_, L>) -> Result<(), SourceError> {
        match self.precopy.transfer {
            Transfer::Passed => Ok(()),
            Transfer::Copied => {
                drive.enter(Phase::LastPages);
                let Precopy { custody, round, .. } = &self.precopy;
                let last = drive.send_round(round + 1, &custody.guest.memory(), None)?;
                drive.round_done(last);
                if *round == 0 && drive.hear_what_lacks()? {
                    let rest = drive.send_round(2, &custody.guest.memory(), None)?;
                    drive.round_done(rest);
                }
                Ok(())
            }
        }
    }

    fn send_state<L: Link>(&mut self, drive: &mut Drive<'_, L>) -> Result<(), SourceError> {
        let Self { precopy: Precopy { custody, regions, transfer: _, round: _, claims: _ }, state } = self;
        let memory = custody.guest.memory();
        drive.enter(Phase::Restoring);
        drive.send(&Frame::State(state))?;
        let digests = if drive.plan.verify { digest::of_memory(&memory, regions) } else { Ok(Vec::new()) };
        let memory = digests.map_err(|source| SourceError::Guest { step: "give access to its memory", source })?;
        custody.take(Step::Release)?;
        drive.check()?;
        let (link, streams) = (drive.sent(), drive.streams.transcripts());
        drive.send(&Frame::Seal(Seal { link, streams, memory }))
    }
}

impl<G: SourceGuest> Sealed<G> {
    /// Waits until the target has restored everything.
    fn await_ready<L: Link>(self, drive: &mut Drive<'_, L>) -> Next<Ready<G>, G> {
        let Self { custody, claims } = self;
        match drive.answer(Kind::Ready) {
            Ok(_) => Ok(Ready { custody, claims }),
            Err(cause) => Err(fail(custody, cause, drive)),
        }
    }
}

impl<G: SourceGuest> Ready<G> {
    /// Gives the guest away.
    fn go<L: Link>(self, drive: &mut Drive<'_, L>) -> Outcome<G> {
        drive.enter(Phase::HandingOver);
        if let Err(cause) = drive.check() {
            return Outcome::StillOurs(*fail(self.custody, cause, drive));
        }
        // No return. Even a `Go` that could not be sent may have arrived.
        match drive.send(&Frame::Go).and_then(|()| drive.answer_regardless(Kind::Running)) {
            Ok(Answer::Running(part)) => {
                let report = drive.report(Some(part));
                drive.tell_report(&report);
                Outcome::HandedOver(report)
            }
            other => {
                let out_of_turn =
                    |found: Answer| SourceError::OutOfTurn { found: found.kind(), expected: Kind::Running };
                let cause = other.map_or_else(|cause| cause, out_of_turn);
                let report = drive.report(None);
                Outcome::InDoubt(InDoubt::new(self.custody, self.claims, cause, report, drive.plan.patience))
            }
        }
    }
}

/// The guest's description, if it fits into the protocol.
fn describe<G: SourceGuest>(guest: &G) -> Result<Description, SourceError> {
    let described = guest.describe();
    let description =
        described.map_err(|error| SourceError::Guest { step: "describe itself", source: host_error(error) })?;
    fits("The description", description.machine.len() as u64, MAX_MACHINE as u64)?;
    fits("The number of regions", description.regions.len() as u64, MAX_REGIONS as u64)?;
    for region in &description.regions {
        fits("The number of pages in a region", region.pages(), MAX_REGION_PAGES)?;
    }
    Ok(description)
}

fn fits(what: &'static str, found: u64, max: u64) -> Result<(), SourceError> {
    if found <= max { Ok(()) } else { Err(SourceError::TooLarge { what, found, max }) }
}

fn hello<'a>(plan: &Plan, streams: NonZeroU16, transfer: Transfer, description: &'a Description) -> Hello<'a> {
    let Description { vm, regions, machine } = description;
    let Plan { session, mode, verify, .. } = *plan;
    let (vm, streams, regions) = (*vm, streams.get(), regions.clone());
    Hello { session, vm, mode, verify, streams, transfer, build: BUILD, regions, machine }
}

/// The handle to the guest's memory, if it is to be passed.
fn handle_to_pass<G: SourceGuest, L: Link>(
    guest: &G,
    description: &Description,
    drive: &mut Drive<'_, L>,
) -> Result<Option<HandleOf<G::Memory>>, SourceError> {
    let with_disks = description.regions.iter().any(|region| matches!(region, Region::Disk { .. }));
    match (drive.plan.memory, drive.carries_handles()) {
        (MemoryPolicy::Copy, _) | (MemoryPolicy::Auto, false) => Ok(None),
        (MemoryPolicy::Pass, false) => Err(SourceError::NotPassable),
        // Disks come in rounds, and the memory that belongs to them with them.
        (MemoryPolicy::Auto, true) if with_disks => Ok(None),
        (MemoryPolicy::Pass, true) if with_disks => Err(SourceError::PassedWithDisks),
        (MemoryPolicy::Auto | MemoryPolicy::Pass, true) => match guest.memory().handle() {
            Ok(handle) => Ok(Some(handle)),
            Err(error) => Err(SourceError::Guest { step: "pass its memory", source: host_error(error) }),
        },
    }
}

/// Whether what the target has got is what was passed, or may be less.
fn check_transfer(policy: MemoryPolicy, offered: Transfer, got: Transfer) -> Result<(), SourceError> {
    match (offered, got) {
        (Transfer::Copied, Transfer::Passed) => Err(SourceError::NeverPassed),
        (Transfer::Passed, Transfer::Copied) if policy == MemoryPolicy::Pass => Err(SourceError::NotPassed),
        _ => Ok(()),
    }
}
