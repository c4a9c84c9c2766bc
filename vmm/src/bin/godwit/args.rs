//! The command line, as clap reads it, and the machine that its options describe.

mod disk;
mod disk_settings;
mod goals;

use crate::values::{MemoryArg, Settings, period, size};
use clap::{Args, Parser, Subcommand, ValueEnum};
use control::{CodecChoice, CpuBudget, Owner, PeerAddress, Streams, WithDisks};
pub(crate) use disk::{CacheArg, DiskCommand, ListExports, Serve};
use disk_settings::place;
use goals::Goals;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use uuid::Uuid;
use vmm::config::{
    Balloon, Boot, Cpus, DEFAULT_RING_ENTRIES, DirtyTracking, EntryKind, HostResources, MACHINE_VERSION, Mac,
    MachineConfig, Memory, Nic, Serial, Tap, Topology, Vhost,
};
use vmm::seccomp::Seccomp;

/// What the exit status of the process with the guest says; the numbers are those of [`vmm::vcpu::GuestEnd`].
const EXIT_STATUS: &str = "\
Exit status:
   0  the guest powered off, has moved away, or was ended on request (also by SIGTERM, SIGINT or SIGHUP)
   1  an error, also of KVM with the guest
   2  wrong usage
  20  the guest asked for a reboot
  21  the guest stopped by a triple fault
  22  the guest's kernel panicked";

/// Runs Linux guests on KVM and moves them, running or stopped, between hosts.
#[derive(Debug, Parser)]
#[command(name = "godwit", version, arg_required_else_help = true, propagate_version = true)]
pub(crate) struct CommandLine {
    /// How much to log on standard error: off, error, warn, info, debug, trace, or a filter such as vmm=debug
    #[arg(long, global = true, env = "GODWIT_LOG", default_value = "warn", value_name = "FILTER")]
    pub(crate) log: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
// Only the options of the command that was given are described to clap, which takes memory. They are described after the
// command itself, so the text above them must not be a doc comment: it would take the place of the command's.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(crate) enum Command {
    /// Boot a guest and run it until it ends or has moved away
    #[command(after_help = EXIT_STATUS)]
    Run(Box<Run>),
    /// Wait for a guest that migrates here, then run it until it ends or has moved away
    #[command(after_help = EXIT_STATUS)]
    Receive(Box<Receive>),
    /// Move a guest to another Godwit that waits with `receive`
    Migrate(Migrate),
    /// Cancel the migration that is running; the guest stays here
    Cancel(Client),
    /// Say who owns a guest whose migration is in doubt
    Resolve(Resolve),
    /// Show a guest, its phase and its last migration
    Status(Status),
    /// Show events as they come
    Watch(Status),
    /// Stop the vCPUs for a while
    Pause(Client),
    /// Let the vCPUs run again
    Resume(Client),
    /// Press the power button and wait until the guest has powered off
    Stop(Stop),
    /// End a guest at once, as by pulling the plug
    Kill(Client),
    /// Reset a guest, as by the reset button
    Reset(Client),
    /// Press the power button, and do not wait
    PowerButton(Client),
    /// Show the balloon, or set how much memory it should hold back
    Balloon(BalloonArgs),
    /// List the disks
    Disks(Status),
    /// Make a disk longer while the guest runs
    ResizeDisk(ResizeDiskArgs),
    /// Serve disks to other hosts, or see what they serve
    #[command(subcommand)]
    Disk(DiskCommand),
    /// List the network interfaces
    Nics(Status),
    /// Measure how fast a guest dirties its memory, and what is in it
    DirtyRate(DirtyRate),
    /// Print metrics for Prometheus
    Metrics(Client),
    /// Save, tear down and restore a guest in place, to test that nothing is lost
    Pulse(Pulse),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

// Where the control socket is.
#[derive(Debug, Args)]
pub(crate) struct Client {
    /// The guest's control socket
    #[arg(long, env = "GODWIT_API", value_name = "PATH")]
    pub(crate) api: PathBuf,
}

// A command that only reads.
#[derive(Debug, Args)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) client: Client,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

// `stop`.
#[derive(Debug, Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) client: Client,
    /// End the guest at once if it has not powered off after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) force_after: Option<NonZeroU32>,
}

// `resolve`.
#[derive(Debug, Args)]
pub(crate) struct Resolve {
    #[command(flatten)]
    pub(crate) client: Client,
    /// Who owns the guest: `source` resumes it here, `target` gives it up here. Look at the other host first: two owners
    /// destroy the guest's disks
    #[arg(long, value_enum)]
    pub(crate) owner: OwnerArg,
}

/// An owner on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum OwnerArg {
    /// This host
    Source,
    /// The other host
    Target,
}

impl From<OwnerArg> for Owner {
    fn from(owner: OwnerArg) -> Self {
        match owner {
            OwnerArg::Source => Self::Source,
            OwnerArg::Target => Self::Target,
        }
    }
}

// `balloon`.
#[derive(Debug, Args)]
pub(crate) struct BalloonArgs {
    #[command(flatten)]
    pub(crate) read: Status,
    /// Hold back this much of the guest's memory
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) target: Option<u64>,
}

// `resize-disk`.
#[derive(Debug, Args)]
pub(crate) struct ResizeDiskArgs {
    #[command(flatten)]
    pub(crate) client: Client,
    /// The disk, as `disks` lists it
    #[arg(long, value_name = "NAME")]
    pub(crate) id: String,
    /// How long it should be, no less than it is
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) size: u64,
}

// `dirty-rate`.
#[derive(Debug, Args)]
pub(crate) struct DirtyRate {
    #[command(flatten)]
    pub(crate) read: Status,
    /// How long to watch the guest's writes, from 100ms to 60s
    #[arg(long, value_name = "TIME", value_parser = period, default_value = "1s")]
    pub(crate) period: u32,
}

// `pulse`.
#[derive(Debug, Args)]
pub(crate) struct Pulse {
    #[command(flatten)]
    pub(crate) read: Status,
    /// How often
    #[arg(long, default_value = "1")]
    pub(crate) times: NonZeroU32,
}

// `migrate`.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    #[command(flatten)]
    pub(crate) read: Status,
    /// The Godwit that waits: tcp://HOST:PORT or unix:/PATH
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) to: PeerAddress,
    /// Whether the guest goes on while its memory moves
    #[arg(long, value_enum, default_value = "live")]
    pub(crate) mode: ModeArg,
    #[command(flatten)]
    pub(crate) goals: Goals,
    /// Give up after this many seconds; the guest stays here
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<NonZeroU32>,
    /// How memory gets to the target
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) memory: MemoryArg,
    /// Move memory over so many connections, 1 to 64, or auto
    #[arg(long, default_value_t, value_name = "N")]
    pub(crate) streams: Streams,
    /// Have TCP send by the congestion control of this name, such as bbr or cubic, and not by the host's usual one
    #[arg(long, value_name = "NAME")]
    pub(crate) congestion: Option<String>,
    /// Make pages smaller: auto, none, or some of zero, rle, delta, dedup, lz4, zstd, zstd:1 to zstd:9 with commas between
    #[arg(long, default_value_t, value_name = "LIST")]
    pub(crate) codec: CodecChoice,
    /// Let the codecs of auto take so many processors on average, such as 0.5; all of them if not given
    #[arg(long, value_name = "CORES", allow_negative_numbers = true)]
    pub(crate) cpu_budget: Option<CpuBudget>,
    /// Keep copies of sent pages, for the codec delta, in at most so much memory
    #[arg(long, default_value = "64M", value_name = "SIZE", value_parser = size)]
    pub(crate) delta_cache: u64,
    /// Compare a digest of the whole memory at both ends while the guest is paused
    #[arg(long)]
    pub(crate) verify: bool,
    /// Move disks along: before or after for all that the guest may write, or ID=before, ID=after for one, with commas between.
    /// Before: they go with its memory, and the guest moves when all is there; so it is without a word. After: the guest runs at
    /// the target at once, and they come after it
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_value_t, default_missing_value = "before")]
    pub(crate) with_disks: WithDisks,
}

/// A migration mode on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ModeArg {
    /// Pre-copy: the guest runs until the last pages
    Live,
    /// Pause, move, resume
    Stop,
}

impl From<ModeArg> for control::MigrationMode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Live => Self::Live,
            ModeArg::Stop => Self::Stop,
        }
    }
}

// What `run` and `receive` share.
#[derive(Debug, Args)]
pub(crate) struct Host {
    /// Serve the control API on this Unix socket
    #[arg(long, env = "GODWIT_API", value_name = "PATH")]
    pub(crate) api: Option<PathBuf>,
    /// Where ownership records of migrations are kept, across crashes of this host
    #[arg(long, env = "GODWIT_STATE_DIR", default_value = "/var/lib/godwit", value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// Admit test requests (`pulse`) on the control socket
    #[arg(long)]
    pub(crate) test_requests: bool,
    /// What this host is called where disks have several places; its node name if not given
    #[arg(long, value_name = "NAME")]
    pub(crate) host_name: Option<String>,
    /// Confine each thread to the system calls that it needs
    #[arg(long, value_enum, default_value = "on")]
    pub(crate) seccomp: SeccompArg,
}

impl Host {
    /// What this host is called.
    fn name(&self) -> String {
        let node_name = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        self.host_name.clone().unwrap_or_else(node_name)
    }
}

/// Whether threads are confined, on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SeccompArg {
    /// A thread that makes any other call ends the process with exit status 24
    On,
    /// For tracing, and for kernels without seccomp
    Off,
}

impl From<SeccompArg> for Seccomp {
    fn from(seccomp: SeccompArg) -> Self {
        match seccomp {
            SeccompArg::On => Self::On,
            SeccompArg::Off => Self::Off,
        }
    }
}

// `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The kernel: a bzImage or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial RAM file system
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, default_value = "console=ttyS0", value_name = "TEXT")]
    cmdline: String,
    /// How the kernel is entered
    #[arg(long, value_enum, default_value = "auto")]
    boot: BootArg,
    /// Memory
    #[arg(long, default_value = "512M", value_name = "SIZE", value_parser = size)]
    memory: u64,
    /// Back memory with huge pages
    #[arg(long)]
    huge_pages: bool,
    /// vCPUs, 1 to 32
    #[arg(long, default_value = "1", value_name = "N")]
    vcpus: u32,
    /// How the vCPUs are grouped: SOCKETSxCORESxTHREADS, such as 1x2x2
    #[arg(long, value_parser = topology, value_name = "SxCxT")]
    topology: Option<Topology>,
    /// A disk in a raw file or on an NBD server: path=FILE or nbd=URI[,id=NAME][,readonly]
    /// [,cache=writeback|writethrough|none][,queues=N][,timeout=TIME][,bps=RATE][,iops=N]; may be repeated
    #[arg(long = "disk", value_name = "SETTINGS")]
    disks: Vec<String>,
    /// A network interface: tap=NAME or create=NAME[,id=NAME][,mac=MAC][,vhost=auto|on|off]; may be repeated
    #[arg(long = "net", value_name = "SETTINGS")]
    nics: Vec<String>,
    /// Leave the entropy device out
    #[arg(long)]
    no_rng: bool,
    /// A balloon: on[,deflate-on-oom][,free-page-reporting]
    #[arg(long, value_name = "SETTINGS")]
    balloon: Option<String>,
    /// Where the serial console goes: terminal, file:PATH, unix:PATH or off
    #[arg(long, default_value = "terminal", value_parser = serial, value_name = "WHERE")]
    serial: Serial,
    /// How changed pages are found: log, or ring[:ENTRIES]
    #[arg(long, default_value = "log", value_parser = dirty, value_name = "TRACKER")]
    dirty: DirtyTracking,
    /// A name for people
    #[arg(long, default_value = "guest", value_name = "NAME")]
    name: String,
    /// The guest's identity, which stays when it moves; random if not given
    #[arg(long, value_name = "UUID")]
    pub(crate) uuid: Option<Uuid>,
    #[command(flatten)]
    pub(crate) host: Host,
}

/// How a kernel is entered, on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum BootArg {
    /// PVH if the kernel has the note, else the 64-bit protocol
    Auto,
    /// By the PVH note, in 32-bit protected mode
    Pvh,
    /// By Linux's 64-bit boot protocol
    Long64,
}

// `receive`.
#[derive(Debug, Args)]
pub(crate) struct Receive {
    /// Where to wait: tcp://HOST:PORT or unix:/PATH
    #[arg(value_name = "ADDRESS")]
    pub(crate) listen: PeerAddress,
    /// Use this file or export here for a disk: id=NAME,path=FILE or id=NAME,nbd=URI; may be repeated. Other disks are looked
    /// for where the source has them
    #[arg(long = "disk", value_name = "SETTINGS")]
    disks: Vec<String>,
    /// Use this tap here for an interface: id=NAME,tap=NAME or id=NAME,create=NAME; may be repeated
    #[arg(long = "net", value_name = "SETTINGS")]
    nics: Vec<String>,
    /// Where the serial console goes here: terminal, file:PATH, unix:PATH or off
    #[arg(long, default_value = "terminal", value_parser = serial, value_name = "WHERE")]
    serial: Serial,
    /// How changed pages are found here, for the next move: log, or ring[:ENTRIES]
    #[arg(long, value_parser = dirty, value_name = "TRACKER")]
    dirty: Option<DirtyTracking>,
    /// Exit after a migration that failed, instead of waiting for the next
    #[arg(long)]
    pub(crate) once: bool,
    #[command(flatten)]
    pub(crate) host: Host,
}

impl Run {
    /// The machine that the options describe, with the identity `uuid`.
    pub(crate) fn machine(&self, uuid: Uuid) -> Result<MachineConfig, String> {
        let numbered =
            |kind: &'static str| move |(index, text): (usize, &String)| (format!("{kind}{index}"), text.clone());
        let host = self.host.name();
        Ok(MachineConfig {
            version: MACHINE_VERSION,
            name: self.name.clone(),
            uuid,
            cpus: Cpus { count: self.vcpus, topology: self.topology },
            memory: Memory { bytes: self.memory, huge_pages: self.huge_pages },
            boot: Boot {
                kernel: whole(&self.kernel),
                initramfs: self.initramfs.as_deref().map(whole),
                command_line: self.cmdline.clone(),
                entry: match self.boot {
                    BootArg::Auto => EntryKind::Auto,
                    BootArg::Pvh => EntryKind::Pvh,
                    BootArg::Long64 => EntryKind::Long64,
                },
            },
            disks: self
                .disks
                .iter()
                .enumerate()
                .map(numbered("blk"))
                .map(|(id, text)| disk_settings::disk(&id, &text, self.vcpus, &host))
                .collect::<Result<_, _>>()?,
            nics: self.nics.iter().enumerate().map(|(index, text)| nic(uuid, index, text)).collect::<Result<_, _>>()?,
            rng: !self.no_rng,
            balloon: self.balloon.as_deref().map(balloon).transpose()?,
            serial: self.serial.clone(),
            dirty: self.dirty,
        })
    }
}

impl Receive {
    /// What this host puts in the place of the source's resources.
    pub(crate) fn resources(&self) -> Result<HostResources, String> {
        let mut resources = HostResources {
            name: self.host.name(),
            serial: Some(self.serial.clone()),
            dirty: self.dirty,
            ..HostResources::default()
        };
        for text in &self.disks {
            let mut settings = Settings::parse("--disk", text)?;
            let (id, place) = (settings.require("id")?, place(&mut settings)?);
            settings.finish("id, path, nbd, base")?;
            resources.disks.insert(id, place);
        }
        for text in &self.nics {
            let mut settings = Settings::parse("--net", text)?;
            let (id, tap) = (settings.require("id")?, tap(&mut settings)?);
            settings.finish("id, tap, create")?;
            resources.taps.insert(id, tap);
        }
        Ok(resources)
    }
}

/// A path that means the same to a process in another folder, such as the one that the guest moves to.
fn whole(path: &Path) -> PathBuf {
    // An empty path, which is not found later on, is the only one that has no whole form.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn nic(machine: Uuid, index: usize, text: &str) -> Result<Nic, String> {
    let mut settings = Settings::parse("--net", text)?;
    let mac = match settings.take("mac") {
        Some(mac) => mac.parse().map_err(|error| format!("{error}"))?,
        None => Mac::derived(machine, u8::try_from(index).map_err(|_| "Too many --net options".to_owned())?),
    };
    let vhost = match settings.take("vhost").as_deref() {
        None | Some("auto") => Vhost::Auto,
        Some("on") => Vhost::On,
        Some("off") => Vhost::Off,
        Some(other) => return Err(format!("--net vhost={other:?} is none of auto, on, off")),
    };
    let nic =
        Nic { id: settings.take("id").unwrap_or_else(|| format!("net{index}")), tap: tap(&mut settings)?, mac, vhost };
    settings.finish("tap, create, id, mac, vhost").map(|()| nic)
}

fn tap(settings: &mut Settings) -> Result<Tap, String> {
    match (settings.take("tap"), settings.take("create")) {
        (Some(name), None) => Ok(Tap::Existing(name)),
        (None, Some(name)) => Ok(Tap::Create(name)),
        _ => Err("--net needs tap=NAME for a tap that is there, or create=NAME for one to make".to_owned()),
    }
}

fn balloon(text: &str) -> Result<Balloon, String> {
    let mut settings = Settings::parse("--balloon", text)?;
    settings.flag("on")?;
    let balloon = Balloon {
        deflate_on_oom: settings.flag("deflate-on-oom")?,
        free_page_reporting: settings.flag("free-page-reporting")?,
    };
    settings.finish("on, deflate-on-oom, free-page-reporting").map(|()| balloon)
}

fn serial(text: &str) -> Result<Serial, String> {
    match text.split_once(':') {
        None if text == "terminal" => Ok(Serial::Terminal),
        None if text == "off" => Ok(Serial::Off),
        Some(("file", path)) if !path.is_empty() => Ok(Serial::File(path.into())),
        Some(("unix", path)) if !path.is_empty() => Ok(Serial::Socket(path.into())),
        _ => Err(format!("{text:?} is none of terminal, file:PATH, unix:PATH, off")),
    }
}

fn dirty(text: &str) -> Result<DirtyTracking, String> {
    match text.split_once(':') {
        None if text == "log" => Ok(DirtyTracking::Log),
        None if text == "ring" => Ok(DirtyTracking::Ring { entries: DEFAULT_RING_ENTRIES }),
        Some(("ring", entries)) => entries
            .parse()
            .map(|entries| DirtyTracking::Ring { entries })
            .map_err(|_| format!("{entries:?} is not a number of ring entries")),
        _ => Err(format!("{text:?} is none of log, ring, ring:ENTRIES")),
    }
}

fn topology(text: &str) -> Result<Topology, String> {
    let numbers: Vec<u32> = text.split('x').filter_map(|part| part.parse().ok()).collect();
    match numbers[..] {
        [sockets, cores, threads] if text.matches('x').count() == 2 => Ok(Topology { sockets, cores, threads }),
        _ => Err(format!("{text:?} is not SOCKETSxCORESxTHREADS, such as 1x2x2")),
    }
}

#[cfg(test)]
mod tests;
