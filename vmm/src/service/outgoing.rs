//! A migration out of this process: a thread that owns the machine until it is known who owns the guest.

use super::Message;
use super::board::Board;
use super::watcher::Watcher;
use crate::config::Disk;
use crate::machine::Machine;
use crate::migrate::address::{DIAL_WITHIN, Dialled, dial};
use crate::migrate::leaving::Leaving;
use crate::migrate::lending::{Lending, OnFree, space_of};
use crate::migrate::link::SocketCutter;
use crate::migrate::mirror::Mirror;
use crate::migrate::ownership::Ownership;
use crate::seccomp::{self, ThreadKind};
use control::{CodecChoice, CpuBudget, DiskPolicy, JobId, MigrationMode, PeerAddress, StartMigration};
use migration::codec::block::{Packing, ZstdLevel};
use migration::{
    CancelToken, Codecs, Cutter, Further, Goal, HostClock, HostError, InDoubt, Link, LinkError, MemoryPolicy, Mode,
    OnStall, Outcome, Plan, Surroundings, source,
};
use std::io;
use std::num::NonZeroU16;
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// The disks that go along with a guest.
#[derive(Debug, Default)]
pub(crate) struct MovingDisks {
    /// With its memory.
    before: Vec<Disk>,
    /// When it is there.
    after: Vec<Disk>,
}

impl MovingDisks {
    /// And this one.
    pub(crate) fn add(&mut self, disk: &Disk, policy: DiskPolicy) {
        match policy {
            DiskPolicy::Before => self.before.push(disk.clone()),
            DiskPolicy::After => self.after.push(disk.clone()),
        }
    }

    /// How much space those take that go with memory, in bytes, as far as it is known.
    pub(crate) fn space_before(&self) -> u64 {
        self.before.iter().filter_map(|disk| space_of(disk.place.file()?)).sum()
    }
}

/// How a migration out of here ended.
#[derive(Debug)]
pub(crate) enum Departure {
    /// The target could not be reached, or the disks not be lent; the machine never noticed.
    NotBegun(Box<Machine>, HostError),
    /// The engine's word, and what is lent from here on.
    Decided(Box<Outcome<Leaving>>, Option<Arc<Lending>>),
}

/// How long a cancelled migration may take to notice. It cannot while a target that hangs takes no more bytes.
const NOTICE: Duration = Duration::from_secs(1);

/// A migration that is under way.
#[derive(Debug)]
pub(crate) struct Outgoing {
    cancel: CancelToken,
    /// The link's, once there is one.
    cutter: Arc<OnceLock<SocketCutter>>,
    cut_at: Option<Instant>,
}

impl Outgoing {
    /// Gives `machine` to a thread that moves it as `request` says, and these disks with it; the end comes as
    /// [`Message::Left`]. If the host has no thread, the machine comes back at once.
    pub(crate) fn start(
        machine: Box<Machine>,
        request: &StartMigration,
        job: JobId,
        ownership: Ownership,
        disks: MovingDisks,
        board: Board,
        inbox: Sender<Message>,
    ) -> Result<Self, (Box<Machine>, io::Error)> {
        let cancel = CancelToken::new();
        let cutter = Arc::default();
        let journey = Journey {
            plan: plan(request, job),
            to: request.to.clone(),
            congestion: request.congestion.clone(),
            ownership,
            disks,
            inbox: inbox.clone(),
            cancel: cancel.clone(),
            cutter: Arc::clone(&cutter),
        };
        // The thread takes the machine from here, so that it is not lost with a thread that does not start.
        let (hand, take) = std::sync::mpsc::sync_channel(1);
        let spawned = thread::Builder::new().name("migrate-source".to_owned()).spawn(move || {
            seccomp::enter(ThreadKind::MigrateSource);
            if let Ok(machine) = take.recv() {
                // The service outlives its migrations.
                let _ = inbox.send(Message::Left(journey.make(machine, Watcher::new(board, job))));
            }
        });
        match spawned {
            Ok(_) => {
                hand.send(machine).expect("the thread waits for the machine");
                Ok(Self { cancel, cutter, cut_at: None })
            }
            Err(error) => Err((machine, error)),
        }
    }

    /// Asks it to end; the guest stays.
    pub(crate) fn cancel(&mut self) {
        self.cancel.cancel();
        self.cut_at.get_or_insert_with(|| Instant::now() + NOTICE);
    }

    /// When its link is to be cut, because it was cancelled and did not notice.
    pub(crate) fn cut_at(&self) -> Option<Instant> {
        self.cut_at
    }

    /// Takes back that its link is to be cut.
    pub(crate) fn let_come(&mut self) {
        self.cut_at = None;
    }

    /// Cuts its link if that is due.
    pub(crate) fn cut_if_due(&mut self) {
        if self.cut_at.is_some_and(|at| at <= Instant::now()) {
            self.cut_at = None;
            self.cutter.get().into_iter().for_each(Cutter::cut);
        }
    }
}

struct Journey {
    plan: Plan,
    to: PeerAddress,
    congestion: Option<String>,
    ownership: Ownership,
    disks: MovingDisks,
    inbox: Sender<Message>,
    cancel: CancelToken,
    cutter: Arc<OnceLock<SocketCutter>>,
}

impl Journey {
    fn make(self, machine: Box<Machine>, mut watcher: Watcher) -> Departure {
        let Self { plan, to, congestion, ownership, disks, inbox, cancel, cutter } = self;
        let dialled = dial(&to, congestion.as_deref(), plan.timeout.unwrap_or(DIAL_WITHIN));
        let Dialled { mut link, exactly, here } = match dialled {
            Ok(dialled) => dialled,
            Err(error) => return Departure::NotBegun(machine, error.into()),
        };
        let on_free: OnFree = Arc::new(move || {
            // Who has ended meanwhile lends nothing.
            let _ = inbox.send(Message::DiskFree);
        });
        let MovingDisks { before, after } = disks;
        let ids = |disks: &[Disk]| disks.iter().map(|disk| disk.id.clone()).collect::<Vec<_>>();
        let mirror = match Mirror::open(&machine, &ids(&before), &ids(&after)) {
            Ok(mirror) => mirror,
            Err(error) => return Departure::NotBegun(machine, error.into()),
        };
        let lending = (!after.is_empty()).then(|| Lending::start(&after, here, ownership.folder(), &on_free));
        let lending = match lending.transpose() {
            Ok(lending) => lending.map(Arc::new),
            Err(error) => return Departure::NotBegun(machine, error.into()),
        };
        match link.cutter() {
            Ok(new) => drop(cutter.set(new)),
            Err(error) => tracing::warn!(%error, "a cancel will have to wait for the target"),
        }
        let around = Surroundings { clock: &HostClock::new(), cancel: &cancel, observer: &mut watcher };
        let mut dial_again = |within| match dial(&exactly, congestion.as_deref(), within) {
            Ok(dialled) => Ok(dialled.link),
            Err(error) => Err(LinkError::Io(io::Error::other(error))),
        };
        let further = Further { dial: &mut dial_again, thread: &|| seccomp::enter(ThreadKind::MigrateStream) };
        let leaving = Leaving::new(*machine, ownership, to, mirror, lending.clone());
        Departure::Decided(Box::new(source::run(leaving, &mut link, &plan, around, further)), lending)
    }
}

/// Asks the target whose the guest is, in a thread; the answer comes as [`Message::Left`].
pub(crate) fn ask_target(doubt: Box<InDoubt<Leaving>>, to: PeerAddress, inbox: &Sender<Message>) {
    let (hand, take) = std::sync::mpsc::sync_channel::<Box<InDoubt<Leaving>>>(1);
    let asked = thread::Builder::new().name("migrate-ask".to_owned()).spawn({
        let inbox = inbox.clone();
        move || {
            seccomp::enter(ThreadKind::MigrateSource);
            let Ok(doubt) = take.recv() else { return };
            let outcome = match dial(&to, None, DIAL_WITHIN) {
                Ok(mut target) => doubt.ask(&mut target.link, &HostClock::new()),
                Err(error) => {
                    tracing::warn!(%error, "the target cannot be asked whose the guest is");
                    Outcome::InDoubt(*doubt)
                }
            };
            let _ = inbox.send(Message::Left(Departure::Decided(Box::new(outcome), None)));
        }
    });
    match asked {
        Ok(_) => hand.send(doubt).expect("the thread waits for the doubt"),
        Err(error) => {
            tracing::warn!(%error, "no thread to ask the target with");
            let _ = inbox.send(Message::Left(Departure::Decided(Box::new(Outcome::InDoubt(*doubt)), None)));
        }
    }
}

fn plan(request: &StartMigration, job: JobId) -> Plan {
    let mode = match request.mode {
        MigrationMode::Live => Mode::Live,
        MigrationMode::Stop => Mode::Stop,
    };
    let memory = match request.memory {
        control::MemoryPolicy::Auto => MemoryPolicy::Auto,
        control::MemoryPolicy::Copy => MemoryPolicy::Copy,
        control::MemoryPolicy::Pass => MemoryPolicy::Pass,
    };
    let cpus = cpus();
    Plan {
        verify: request.verify,
        memory,
        goal: Goal {
            max_downtime: request.max_downtime(),
            max_rounds: request.max_rounds.get(),
            deadline: request.deadline(),
            on_stall: match request.on_stall {
                control::OnStall::Cancel => OnStall::Cancel,
                control::OnStall::Throttle => OnStall::Throttle,
                control::OnStall::Stop => OnStall::Stop,
            },
            ..Goal::default()
        },
        timeout: request.timeout(),
        bandwidth: request.bandwidth_bytes_per_second,
        streams: request.streams.count(),
        codecs: codecs(request.codec),
        cpus,
        cpu_budget: request.cpu_budget.map_or_else(|| cpus.get().into(), CpuBudget::cores),
        delta_cache: usize::try_from(request.delta_cache_bytes).unwrap_or(usize::MAX),
        ..Plan::new(job.0, mode)
    }
}

/// The processors that this process may use.
fn cpus() -> NonZeroU16 {
    let cpus = thread::available_parallelism()
        .inspect_err(|error| tracing::warn!(%error, "one processor is taken to be there"));
    cpus.map_or(NonZeroU16::MIN, |cpus| NonZeroU16::try_from(cpus).unwrap_or(NonZeroU16::MAX))
}

pub(crate) fn codecs(choice: CodecChoice) -> Option<Codecs> {
    let CodecChoice::These(control::Codecs { zero, rle, delta, dedup, packing }) = choice else { return None };
    let packing = match packing {
        control::Packing::Stored => Packing::Stored,
        control::Packing::Lz4 => Packing::Lz4,
        // The API takes no other levels.
        control::Packing::Zstd(level) => Packing::Zstd(ZstdLevel::new(level).unwrap_or(ZstdLevel::MIN)),
    };
    Some(Codecs { zero, rle, delta, dedup, packing })
}
