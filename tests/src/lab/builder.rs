//! What a lab is to be like, and its boot.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest_images::kernel::modules::Module;
use guest_images::newc::Newc;
use guest_images::{DEFAULT_CACHE, Emulator, Images, Kernel};
use tempfile::TempDir;
use thiserror::Error;

use super::channel::Channel;
use super::machine::{Hardware, INITRAMFS, Machine, ROOT_IMAGE};
use super::root::{DISKS_FILE, MODULES, RootTree};
use super::wire::Ready;
use super::{CONSOLE_LINES, Lab};
use crate::network::{HostName, MAX_HOSTS};
use crate::place::Accelerator;

/// Where the agent's binary is, when not beside the running one.
pub const AGENT_VARIABLE: &str = "GODWIT_LAB_AGENT";

/// What must be loaded before the root disk and the agent's port can be found.
const BUS_MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "virtio_console"];

/// What commands in a lab may want beside KVM: networks as in a data centre, taps, vhost, loop devices.
const FURTHER_MODULES: [&str; 8] = ["bridge", "veth", "sch_netem", "sch_tbf", "tun", "vhost_net", "virtio_net", "loop"];

/// The distribution's programs in every lab. Busybox's own `ip` knows no namespaces, and its shell prefers its own applets
/// to the programs in the path, so both shells come along too.
const PROGRAMS: [&str; 4] = ["/usr/sbin/ip", "/usr/sbin/tc", "/bin/dash", "/bin/bash"];

/// What the interactive shell knows of terminals.
const TERMINFO: &str = "/lib/terminfo";

/// The kernel, its modules and the agent fit, and a small command.
const MIN_MEMORY_MIB: u32 = 256;

const BUSYBOX: &str = "/bin/busybox";

/// Describes a lab; made by [`Lab::builder`].
#[derive(Debug, Clone)]
pub struct LabBuilder {
    memory_mib: u32,
    cpus: u8,
    free_mib: u32,
    lifetime: Duration,
    boot_timeout: Duration,
    files: Vec<(PathBuf, String)>,
    programs: Vec<PathBuf>,
    disks: Vec<(PathBuf, String)>,
    images: PathBuf,
}

impl LabBuilder {
    pub(super) fn new() -> Self {
        Self {
            memory_mib: 1024,
            cpus: 2,
            free_mib: 512,
            lifetime: Duration::from_secs(20 * 60),
            boot_timeout: Duration::from_secs(60),
            files: Vec::new(),
            programs: PROGRAMS.map(PathBuf::from).into(),
            disks: Vec::new(),
            images: Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(DEFAULT_CACHE),
        }
    }

    /// Memory of the machine; 1024 MiB without it.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Processors for what runs in it; 2 without it. An emulated machine has one more, which nothing runs on.
    pub fn cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// Room on its root for what it writes; 512 MiB without it.
    pub fn free_mib(mut self, free_mib: u32) -> Self {
        self.free_mib = free_mib;
        self
    }

    /// When it is killed at the latest; 20 minutes after its start without it.
    pub fn lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// How long it may take until it accepts commands; 60 s without it.
    pub fn boot_timeout(mut self, boot_timeout: Duration) -> Self {
        self.boot_timeout = boot_timeout;
        self
    }

    /// Brings a file or folder of this machine along, at a path of the lab.
    pub fn file(mut self, from: impl Into<PathBuf>, to: &str) -> Self {
        self.files.push((from.into(), to.to_owned()));
        self
    }

    /// Brings a program of this machine along with its libraries, all at the paths they have here.
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.programs.push(program.into());
        self
    }

    /// Attaches a disk image without copying it. The lab sees it as a block device linked at a path; what it writes
    /// there is thrown away.
    pub fn disk(mut self, image: impl Into<PathBuf>, to: &str) -> Self {
        self.disks.push((image.into(), to.to_owned()));
        self
    }

    /// Where guest images are kept; the workspace's own cache without it.
    pub fn images(mut self, folder: impl Into<PathBuf>) -> Self {
        self.images = folder.into();
        self
    }

    /// Boots it: on this machine's KVM where that can nest, else emulated.
    pub fn boot(self) -> Result<Lab> {
        ensure!(self.cpus > 0, "A lab needs at least one processor");
        let memory = self.memory_mib;
        ensure!(
            memory >= MIN_MEMORY_MIB,
            "A lab of {memory} MiB does not boot; it needs at least {MIN_MEMORY_MIB} MiB"
        );
        let mut candidates = Accelerator::candidates().into_iter().peekable();
        while let Some(accelerator) = candidates.next() {
            match self.boot_patiently(accelerator) {
                Err(error) if candidates.peek().is_some() => eprintln!("No lab by {accelerator}: {error:#}"),
                booted => return booted,
            }
        }
        bail!("There is no way to run a lab")
    }

    /// Boots an emulated lab a second time if it does not come up: one in some hundred hangs while its own kernel boots,
    /// with a processor that stands still.
    fn boot_patiently(&self, accelerator: Accelerator) -> Result<Lab> {
        match self.boot_by(accelerator) {
            Err(error) if accelerator == Accelerator::Tcg && error.is::<NotUp>() => {
                eprintln!("Booting the lab once more: {error:#}");
                self.boot_by(accelerator)
            }
            booted => booted,
        }
    }

    fn boot_by(&self, accelerator: Accelerator) -> Result<Lab> {
        let kernel = kernel(&self.images).context("The lab needs Debian's kernel")?;
        let folder = TempDir::with_prefix("godwit-lab-").context("Cannot make a folder for the lab")?;
        let bus = kernel.modules(&BUS_MODULES)?;
        write_initramfs(&folder.path().join(INITRAMFS), &agent()?, &bus)?;
        let wanted = [&[accelerator.virtualization().module()][..], &FURTHER_MODULES[..]].concat();
        let mut further = kernel.modules(&wanted)?;
        further.retain(|module| !bus.contains(module));
        let disks = self.numbered_disks();
        let tree = self.root_tree(&further, &disks)?;
        tree.into_image(&folder.path().join(ROOT_IMAGE), u64::from(self.free_mib) << 20)?;
        let qemu = match accelerator {
            Accelerator::Kvm(_) => Emulator::installed(),
            Accelerator::Tcg => Images::open(&self.images)?.emulator()?,
        };
        let hardware = Hardware {
            accelerator,
            qemu,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            kernel: kernel.bzimage(),
            disks: disks.into_iter().map(|(image, serial, _)| (image, serial)).collect(),
            lifetime: self.lifetime,
        };
        let start = Instant::now();
        let (machine, writer, reader) = Machine::start(&hardware, folder)?;
        let (channel, greeting) = Channel::open(writer, reader)?;
        let ready = self.await_greeting(&greeting, &machine)?;
        machine.unlink_images()?;
        Ok(Lab { channel, machine, ready, accelerator, boot_time: start.elapsed() })
    }

    fn await_greeting(&self, greeting: &Receiver<Ready>, machine: &Machine) -> Result<Ready> {
        let reason = match greeting.recv_timeout(self.boot_timeout) {
            Ok(ready) => return Ok(ready),
            Err(RecvTimeoutError::Timeout) => format!("did not start within {:?}", self.boot_timeout),
            Err(RecvTimeoutError::Disconnected) => "ended before it was up".to_owned(),
        };
        Err(NotUp { reason, console: machine.console_tail(CONSOLE_LINES) }.into())
    }

    /// Image, serial number and path of each disk.
    fn numbered_disks(&self) -> Vec<(PathBuf, String, String)> {
        let numbered = self.disks.iter().enumerate();
        numbered.map(|(number, (image, path))| (image.clone(), format!("lab-disk-{number}"), path.clone())).collect()
    }

    fn root_tree(&self, modules: &[Module], disks: &[(PathBuf, String, String)]) -> Result<RootTree> {
        let mut tree = RootTree::new(Path::new(BUSYBOX))?;
        for (number, module) in modules.iter().enumerate() {
            tree.add(&module.path, &module_path(number, module))?;
        }
        for program in &self.programs {
            tree.add_program(program)?;
        }
        tree.link("/bin/sh", "dash")?;
        tree.add(Path::new(TERMINFO), TERMINFO)?;
        for (from, to) in &self.files {
            tree.add(from, to)?;
        }
        let lines: String = disks.iter().map(|(_, serial, path)| format!("{serial} {path}\n")).collect();
        tree.write(DISKS_FILE, &lines, 0o644)?;
        let mut names = "127.0.0.1 localhost lab\n".to_owned();
        for host in HostName::first(MAX_HOSTS)? {
            names += &format!("{} {host}\n", host.address());
            let script = format!("#!/bin/sh\nexec {} \"$@\"\n", host.prefix().join(" "));
            tree.write(&format!("/usr/bin/host-{host}"), &script, 0o755)?;
        }
        tree.write("/etc/hosts", &names, 0o644)?;
        Ok(tree)
    }
}

/// A lab was started and does not answer.
#[derive(Debug, Error)]
#[error("The lab {reason}; its last lines:\n{console}")]
struct NotUp {
    reason: String,
    console: String,
}

/// The kernel of an image cache. apt takes a second or two to name the newest one; a process asks once per cache.
fn kernel(cache: &Path) -> Result<Kernel> {
    static KNOWN: Mutex<BTreeMap<PathBuf, Kernel>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernel) = known.get(cache) {
        return Ok(kernel.clone());
    }
    let kernel = Images::open(cache)?.kernel()?.clone();
    known.insert(cache.to_path_buf(), kernel.clone());
    Ok(kernel)
}

/// Where a module goes, so that the order of the names is the order of loading.
fn module_path(number: usize, module: &Module) -> String {
    format!("{MODULES}/{number:02}-{}.ko", module.name)
}

fn write_initramfs(path: &Path, agent: &Path, modules: &[Module]) -> Result<()> {
    let file = std::fs::File::create(path).with_context(|| format!("Cannot make {}", path.display()))?;
    let mut archive = Newc::new(std::io::BufWriter::new(file));
    // Opened for process 1 as its output, before anything is mounted: character device 5:1.
    archive.character_device("/dev/console", 0o600, (5, 1))?;
    archive.file_from("/init", agent)?;
    for (number, module) in modules.iter().enumerate() {
        archive.file_from(&module_path(number, module), &module.path)?;
    }
    archive.finish()?;
    Ok(())
}

/// The agent's binary: named by the environment, or built beside the running program or test.
fn agent() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(AGENT_VARIABLE) {
        return Ok(named.into());
    }
    let own = std::env::current_exe().context("Cannot find the running program")?;
    // Tests lie one folder deeper, in `deps`.
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join("lab-agent")).find(|path| path.is_file());
    let found = found.with_context(|| {
        format!(
            "There is no lab-agent beside {}; `cargo build --release -p godwit-tests` makes it, or {AGENT_VARIABLE} \
             names it",
            own.display()
        )
    })?;
    ensure!(found.is_absolute(), "{} is not absolute", found.display());
    Ok(found)
}
