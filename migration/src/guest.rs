//! What the engine needs of a guest at the source, of a host at the target, and of the record of who owns the guest.
//!
//! `vmm` implements these traits over KVM; the tests implement them over plain memory.

use crate::ledger::DirtyLedger;
use crate::region::{PageIndex, PageRun, Region, RegionId};
use crate::wire::Mode;
use std::error::Error;
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;
use vm_memory::VolatileSlice;

/// Access to what a guest has in pages, at either end: its memory, and disks that move with it. Clones reach the same pages;
/// several threads use one each.
pub trait GuestPages: Clone + Send + Sync + 'static {
    /// Why memory did not do what was asked.
    type Error: Error + Send + Sync + 'static;

    /// What stands for all of this memory on its way to another process of the same host.
    type Handle: Send;

    /// A handle to the memory itself.
    ///
    /// # Errors
    /// If the host gives none.
    fn handle(&self) -> Result<Self::Handle, Self::Error>;

    /// The memory of a run of pages, which lies within the guest's regions of RAM.
    ///
    /// # Errors
    /// If there is no such memory.
    fn slice(&self, run: PageRun) -> Result<VolatileSlice<'_>, Self::Error>;

    /// The disk that is this region; `None` if the region is RAM.
    fn disk(&self, region: RegionId) -> Option<&dyn DiskPages>;

    /// How many pages at the start of the run the host has never backed with memory, or with space of a disk, so that they
    /// are zero and need not be read (reading would back memory). 0 where the host does not know.
    fn leading_hole(&self, run: PageRun) -> u32;

    /// Backs whole runs of pages with memory before they are written, in larger pages than they would get one by one, and
    /// keeps what they hold. Advice: a page that is not backed now is so when it is written. `false` if the host cannot, so
    /// that it need not be asked again.
    fn populate(&self, run: PageRun) -> bool {
        let _ = run;
        false
    }
}

/// A disk that moves page by page. The last page may lie in it only in part: the rest reads as zeros, and is not written.
/// Several threads use it at once.
pub trait DiskPages: Sync {
    /// At the target: whether all of it is zero before a page of it has come.
    fn is_blank(&self) -> bool;

    /// Fills `into`, which is whole pages, from page `first` on.
    ///
    /// # Errors
    /// If the host cannot.
    fn read(&self, first: PageIndex, into: &mut [u8]) -> Result<(), HostError>;

    /// Writes `from`, which is whole pages, from page `first` on.
    ///
    /// # Errors
    /// If the host cannot; any part of it may have been written.
    fn write(&self, first: PageIndex, from: &[u8]) -> Result<(), HostError>;

    /// Makes pages zero, and gives up their space where that is possible.
    ///
    /// # Errors
    /// If the host cannot.
    fn clear(&self, first: PageIndex, pages: u32) -> Result<(), HostError>;
}

/// The handle to a memory.
pub type HandleOf<M> = <M as GuestPages>::Handle;

/// Why a guest, its host or its record did not do what was asked, whatever type the implementation has for it.
pub type HostError = Box<dyn Error + Send + Sync>;

#[derive(Debug, Error)]
#[error("Memory of {} bytes was given for {} pages from page {} of region {}", found, run.pages, run.first, run.region)]
struct WrongLength {
    run: PageRun,
    found: usize,
}

/// The pages of a run: memory where it is, or a disk's as they are read to the end of `stage`.
pub(crate) fn whole_run<'a, G: GuestPages>(
    guest: &'a G,
    run: PageRun,
    stage: &'a mut Vec<u8>,
) -> Result<VolatileSlice<'a>, HostError> {
    let Some(disk) = guest.disk(run.region) else { return exact_slice(guest, run) };
    let before = stage.len();
    stage.resize(before + run.bytes(), 0);
    let pages = &mut stage[before..];
    disk.read(run.first, pages)?;
    Ok(VolatileSlice::from(pages))
}

/// The memory of a run, certainly of the run's length.
pub(crate) fn exact_slice<G: GuestPages>(guest: &G, run: PageRun) -> Result<VolatileSlice<'_>, HostError> {
    let slice = guest.slice(run)?;
    if slice.len() == run.bytes() { Ok(slice) } else { Err(WrongLength { run, found: slice.len() }.into()) }
}

/// What the target must know of a guest before it can take it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The guest's identity.
    pub vm: Uuid,
    /// What moves page by page: its memory, and then disks. [`RegionId`]s are indices into this list.
    pub regions: Vec<Region>,
    /// The machine, in JSON that the engine does not look into; at most
    /// [`MAX_MACHINE`](crate::wire::MAX_MACHINE) bytes.
    pub machine: Vec<u8>,
}

/// A running guest that is to leave.
///
/// Calls come in pairs of a step and its way back: `start_dirty_log`/`stop_dirty_log`, `throttle`/`unthrottle`,
/// `record_given_away`/`record_kept`, `pause`/`resume`, `release`/`reacquire`. When a migration fails, the engine calls the way back of
/// every step it has *tried*, last first; so a way back must also undo a step that failed halfway.
pub trait SourceGuest {
    /// Why the guest did not do what was asked.
    type Error: Error + Send + Sync + 'static;

    /// Its memory, and the disks that move with it.
    type Memory: GuestPages;

    /// The guest's memory, and the disks that move with it.
    fn memory(&self) -> Self::Memory;

    /// Describes the guest. Called first, while it runs.
    ///
    /// # Errors
    /// If the guest cannot be migrated at present.
    fn describe(&self) -> Result<Description, Self::Error>;

    /// Begins to log changed pages. The engine takes every page as changed at that moment.
    ///
    /// # Errors
    /// If the host refuses.
    fn start_dirty_log(&mut self) -> Result<(), Self::Error>;

    /// Marks every page that changed since the last harvest, whoever wrote it (the guest, this process, vhost), on disks
    /// too, and clears the log before it returns: a page that changes from now on is in the next harvest.
    ///
    /// # Errors
    /// If the log cannot be read.
    fn harvest_dirty(&mut self, ledger: &mut DirtyLedger) -> Result<(), Self::Error>;

    /// How many pages each vCPU wrote among those of the last harvest; `None` if the host does not tell.
    fn written_by_vcpu(&self) -> Option<Vec<u64>>;

    /// Takes a share of its time from each vCPU from now on, 0 to [`MOST_SHARE`](crate::throttling::MOST_SHARE).
    ///
    /// # Errors
    /// If the host cannot.
    fn throttle(&mut self, shares: &[f64]) -> Result<(), Self::Error>;

    /// Takes nothing from the vCPUs any more.
    ///
    /// # Errors
    /// If the host cannot.
    fn unthrottle(&mut self) -> Result<(), Self::Error>;

    /// How much time each vCPU lost so far to [`throttle`](Self::throttle).
    fn time_taken(&self) -> Vec<Duration>;

    /// Ends the logging.
    ///
    /// # Errors
    /// If the host refuses.
    fn stop_dirty_log(&mut self) -> Result<(), Self::Error>;

    /// Stops vCPUs and drains devices. When it returns, only [`save`](Self::save) may still change guest memory.
    ///
    /// # Errors
    /// If something does not stop in time.
    fn pause(&mut self) -> Result<(), Self::Error>;

    /// Captures the state of vCPUs, chips and devices. It may touch guest memory; the engine harvests afterwards.
    ///
    /// # Errors
    /// If a piece of state cannot be read.
    fn save(&mut self) -> Result<Vec<u8>, Self::Error>;

    /// Gives up what only one host may hold, such as locks of disk images, after making writes durable.
    ///
    /// # Errors
    /// If something cannot be given up.
    fn release(&mut self) -> Result<(), Self::Error>;

    /// Takes back what `release` gave up. The target may still hold it for a moment: the engine tries repeatedly.
    ///
    /// # Errors
    /// If something is still held elsewhere.
    fn reacquire(&mut self) -> Result<(), Self::Error>;

    /// Records durably that the guest may be another's from now on. Called before `pause`, so that the guest need not wait
    /// for a disk.
    ///
    /// # Errors
    /// If the record is not certainly durable.
    fn record_given_away(&mut self, session: Uuid) -> Result<(), Self::Error>;

    /// Records durably that the guest stayed here after all.
    ///
    /// # Errors
    /// If the record is not certainly durable. The guest runs, but will not be started here again before somebody looks.
    fn record_kept(&mut self, session: Uuid) -> Result<(), Self::Error>;

    /// Brings the guest back to the run state it had before `pause`.
    ///
    /// # Errors
    /// If the guest cannot run.
    fn resume(&mut self) -> Result<(), Self::Error>;
}

/// What the source offers.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// The migration session.
    pub session: Uuid,
    /// The guest's identity.
    pub vm: Uuid,
    /// Whether the guest runs while its memory moves.
    pub mode: Mode,
    /// The build of the source's engine, for messages.
    pub build: &'a str,
    /// What moves page by page.
    pub regions: &'a [Region],
    /// The machine in JSON, untrusted.
    pub machine: &'a [u8],
}

/// A target's "no", in words that reach the person at the source.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Why, and what would help.
    pub reason: String,
}

impl Refusal {
    /// Refuses with these words.
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into() }
    }
}

/// A host that is to receive one guest.
pub trait TargetHost {
    /// Why the host did not do what was asked.
    type Error: Error + Send + Sync + 'static;

    /// The memory of the machine that it builds.
    type Memory: GuestPages;

    /// Checks the offer and builds the machine, with no vCPU running; its memory, which is all zero.
    ///
    /// With `passed`, which is no more to be trusted than the offer, the machine is built around that memory instead, in
    /// which the guest still runs at the source. Until [`run`](Self::run) is called it must not be written: if the
    /// migration fails, the guest goes on in it.
    ///
    /// # Errors
    /// The refusal that the source is told.
    fn prepare(&mut self, offer: &Offer<'_>, passed: Option<HandleOf<Self::Memory>>) -> Result<Self::Memory, Refusal>;

    /// The regions of what [`prepare`](Self::prepare) made.
    fn regions(&self) -> Vec<Region>;

    /// Makes durable what has come of disks so far. Called after each round, and before the source is told that the round
    /// is installed: so there is little of it left to do while the guest stands still.
    ///
    /// # Errors
    /// If the host cannot.
    fn settle(&mut self) -> Result<(), Self::Error>;

    /// Restores the saved state and takes what only one host may hold. All that can fail must fail here: when this
    /// returns, `run` only has to let go.
    ///
    /// # Errors
    /// If the state does not fit this host.
    fn restore(&mut self, state: &[u8]) -> Result<(), Self::Error>;

    /// Lets the guest run. Called once at most, after the claim to it was recorded.
    ///
    /// # Errors
    /// If it does not run; the guest is this host's nevertheless.
    fn run(&mut self) -> Result<(), Self::Error>;

    /// The migration has failed; the guest will not come. Undoes `prepare`, which was called, though it may have refused,
    /// and `restore`, which may have been called, or have failed.
    fn abandon(&mut self, reason: &str);
}

/// Whose a guest is, as the target says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The target took the guest over.
    Mine,
    /// The target did not take it over, and never will in this session.
    NotMine,
}

/// The target's record of the sessions it has decided. What makes two owners impossible when `Go` and a question about
/// it overtake each other is that the first claim of a session stands.
///
/// That a session's claim may be `Mine` must survive a crash of the host, and be so before [`Ready`](crate::wire::Frame::Ready):
/// the guest's memory ends with the host, but what it did to its disks does not. `NotMine` need only last as long as the
/// process, because a link dies with it and `Go` with the link.
pub trait Claims {
    /// Why the record could not be kept.
    type Error: Error + Send + Sync + 'static;

    /// The identity of this record, which a question must name: another host, or another record on this one, knows
    /// nothing about a session and must not answer.
    fn identity(&self) -> Uuid;

    /// Records `claim` for the session unless it already has one; returns the one that stands. Atomic among threads.
    ///
    /// # Errors
    /// If it is not certain which claim stands.
    fn claim(&self, session: Uuid, claim: Claim) -> Result<Claim, Self::Error>;
}
