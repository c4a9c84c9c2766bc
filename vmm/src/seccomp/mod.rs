//! What each thread of a Godwit process may ask of the kernel: one seccomp filter per kind of thread.
//!
//! The service switches this on before it starts anything; each thread then calls [`enter`] as the first thing it does.
//! A guest that breaks out into a thread finds no way to run a program, to trace another process or to load code. The
//! lists are in [`calls`](self), and the handler that names a forbidden call is in `trap`. Rings of io_uring, whose work no
//! filter sees, are made by the threads that build machines or serve disks, and take nothing but reads and writes of a disk.
//! One thread goes without: `cpuid` asks KVM one question at the start, and is gone before the guest runs.
//!
//! | kind | may, beside what the Rust and C libraries need | why |
//! | --- | --- | --- |
//! | `vcpu` | KVM_RUN and the state of its vCPU; vhost, tap offloads, timers; flush a disk | a driver that starts a device does it on a vCPU |
//! | `worker` | epoll; disk reads, writes, holes; frames; vhost, tap offloads, timers | devices |
//! | `console` | epoll; accept and hear clients; remove its socket; terminal modes | the serial line's other end |
//! | `api` | epoll; accept and talk on sockets; start its helper threads | the HTTP server |
//! | `throttle` | nothing more | sends vCPUs to nap by a signal |
//! | `migrate-source` | all of `vcpu`, `worker`, `console` and `nbd-client`; any KVM call; dial, ask for a name's address; listen; files; threads | leads a machine, lends its disks, writes the ownership record |
//! | `migrate-target` | the same; accept; make a VM, memory, taps and threads | builds a machine |
//! | `migrate-stream` | all of `worker`; talk on sockets; accept; threads | one stream of a migration; the door that they come through |
//! | `service` | all of both migrations; take boot files and sockets away | leads, resets and pulses machines |
//! | `nbd-dial` | dial, ask for a name's address | connects to the servers of disks |
//! | `nbd-listen`, `nbd-client` | all of `worker`; accept and talk on sockets; threads; remove its socket | `disk serve`, disks that are lent |
//! | `disk-pull` | all of `worker`; take a map away | brings a disk to its file |
//! | `signals` | read its socket | waits for SIGTERM |
//!
//! A thread inherits its parent's filter and adds its own, and the kernel takes the stricter answer of the two. So
//! *invariant*: a kind permits all that the kinds of its children permit; a test compares them. The threads of the API
//! and of signals are started before the main thread becomes `service`. No kind may `execve`, `ptrace`, `kill`, open
//! namespaces or load kernel modules.
//!
//! A forbidden call ends the whole process with [`FORBIDDEN_STATUS`] and a line that names thread and call. Two things
//! are declined instead, for libraries that go on without: `clone3`, whose flags a filter cannot see (the C library
//! takes `clone`), and executable mappings in the threads that look up host names (the C library does without the name
//! service's plugin that it would load).

mod calls;
mod heap;
mod program;
#[cfg(test)]
mod tests;
mod trap;

pub use trap::FORBIDDEN_STATUS;

use calls::Permits;
use program::compile;
use seccompiler::{BpfProgram, SeccompAction, apply_filter};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Whether threads are confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seccomp {
    /// Yes.
    #[default]
    On,
    /// No, for tracing and for hosts whose kernel cannot.
    Off,
}

/// Why threads cannot be confined.
#[derive(Debug, Error)]
pub enum SeccompError {
    /// The kernel has no filters, or does not let this process use them.
    #[error("This host's kernel offers no seccomp filters; --seccomp off does without")]
    Unsupported(#[source] std::io::Error),
    /// The handler of forbidden calls could not be put in place.
    #[error("The handler of forbidden system calls could not be put in place")]
    Handler(#[source] vmm_sys_util::errno::Error),
    /// The kernel refused a filter.
    #[error("The kernel refused the seccomp filter of {kind:?} threads")]
    Refused {
        /// Whose filter.
        kind: ThreadKind,
        /// What it said.
        #[source]
        source: seccompiler::Error,
    },
}

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs one vCPU.
    Vcpu,
    /// Works for devices.
    Worker,
    /// Hears what is typed at the serial console.
    Console,
    /// Sends vCPUs to nap.
    Throttle,
    /// Serves the control API; its helper threads inherit the filter.
    Api,
    /// Moves a guest away, or asks whose it is.
    MigrateSource,
    /// Takes guests in.
    MigrateTarget,
    /// Moves pages over one stream of a migration, or lets streams in.
    MigrateStream,
    /// Connects to the servers of disks.
    Dialler,
    /// Serves disks to clients, or lets clients in.
    DiskServer,
    /// Brings a disk to its file.
    DiskPuller,
    /// The main thread, once everything has been started.
    Service,
    /// Waits for signals.
    Signals,
}

impl ThreadKind {
    const ALL: [Self; 13] = [
        Self::Vcpu,
        Self::Worker,
        Self::Console,
        Self::Throttle,
        Self::Api,
        Self::MigrateSource,
        Self::MigrateTarget,
        Self::MigrateStream,
        Self::Dialler,
        Self::DiskServer,
        Self::DiskPuller,
        Self::Service,
        Self::Signals,
    ];

    fn permits(self) -> Permits {
        match self {
            Self::Vcpu => Permits::vcpu(),
            Self::Worker => Permits::worker(),
            Self::Console => Permits::console(),
            Self::Throttle => Permits::throttle(),
            Self::Api => Permits::api(),
            Self::MigrateSource => Permits::migrate_source(),
            Self::MigrateTarget => Permits::migrate_target(),
            Self::MigrateStream => Permits::migrate_stream(),
            Self::Dialler => Permits::dialler(),
            Self::DiskServer => Permits::disk_server(),
            Self::DiskPuller => Permits::disk_puller(),
            Self::Service => Permits::service(),
            Self::Signals => Permits::signals(),
        }
    }

    /// What is declined with ENOSYS rather than forbidden.
    fn declines(self) -> Option<Permits> {
        match self {
            Self::Vcpu | Self::Worker | Self::Console | Self::Throttle | Self::DiskPuller | Self::Signals => None,
            Self::Api | Self::MigrateStream | Self::DiskServer => Some(Permits::unseen_clones()),
            Self::Dialler => Some(Permits::executable_mappings()),
            Self::MigrateSource | Self::MigrateTarget | Self::Service => {
                Some(Permits::unseen_clones().and(Permits::executable_mappings()))
            }
        }
    }
}

/// Whether this process confines its threads: a fact of the process, as its handler of SIGSYS is.
static ON: AtomicBool = AtomicBool::new(false);

/// The compiled filters, each made by the first thread of its kind: this program's start is short.
static PROGRAMS: [OnceLock<Programs>; ThreadKind::ALL.len()] = [const { OnceLock::new() }; ThreadKind::ALL.len()];

/// The filters of one kind of thread.
#[derive(Debug)]
struct Programs {
    /// What it may do; anything else ends the process.
    permits: BpfProgram,
    declines: Option<BpfProgram>,
}

impl Programs {
    fn compile(kind: ThreadKind) -> Self {
        let decline = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        Self {
            permits: compile(kind.permits(), &SeccompAction::Trap, &SeccompAction::Allow),
            declines: kind.declines().map(|calls| compile(calls, &SeccompAction::Allow, &decline)),
        }
    }
}

/// Has every thread of this process that is started from now on confine itself. Called once, before the first of them.
///
/// # Errors
/// [`SeccompError`] if the kernel cannot; nothing is confined then.
pub fn switch_on() -> Result<(), SeccompError> {
    trap::probe().map_err(SeccompError::Unsupported)?;
    trap::install().map_err(SeccompError::Handler)?;
    heap::open_no_files();
    ON.store(true, Ordering::Release);
    Ok(())
}

/// Confines the calling thread for the rest of its life, if this process does that. A thread that cannot be confined
/// ends the process: it must not go on without.
pub fn enter(kind: ThreadKind) {
    if ON.load(Ordering::Acquire)
        && let Err(error) = confine(kind)
    {
        eprintln!("godwit: {}", migration::in_words(&error));
        std::process::exit(FORBIDDEN_STATUS.into());
    }
}

/// [`enter`] for a device's worker, in the shape that `devices` takes.
pub fn enter_worker() {
    enter(ThreadKind::Worker);
}

/// [`enter`] for a thread that connects to the servers of disks, in the shape that `block` takes.
pub fn enter_dialler() {
    enter(ThreadKind::Dialler);
}

/// [`enter`] for a thread that serves disks, in the same shape.
pub fn enter_disk_server() {
    enter(ThreadKind::DiskServer);
}

/// [`enter`] for a thread that brings a disk, in the same shape.
pub fn enter_disk_puller() {
    enter(ThreadKind::DiskPuller);
}

/// [`enter`] for the thread of the serial console, in the same shape.
pub fn enter_console() {
    enter(ThreadKind::Console);
}

/// [`enter`] for the control API's thread, in the shape that `control` takes.
pub fn enter_api() {
    enter(ThreadKind::Api);
}

fn confine(kind: ThreadKind) -> Result<(), SeccompError> {
    let Programs { permits, declines } = PROGRAMS[kind as usize].get_or_init(|| Programs::compile(kind));
    // The second one is put in place while `seccomp` itself is still permitted.
    for program in declines.iter().chain([permits]) {
        apply_filter(program).map_err(|source| SeccompError::Refused { kind, source })?;
    }
    Ok(())
}
