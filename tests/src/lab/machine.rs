//! The QEMU process of a lab: its command line, its life, and its certain end.
//!
//! A keeper thread per machine starts QEMU and waits for it, because the kernel's parent-death signal goes out when the
//! *thread* that started a process ends, not its process: a lab may be made in one thread and used in another. The
//! keeper kills QEMU when the machine is dropped or its lifetime is over; if this process dies without a word, the
//! parent-death signal does. The agent's port is QEMU's standard input and output, so there is no socket to leave behind.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest_images::Emulator;
use tempfile::TempDir;

use super::root::{BYSTANDER, ROOT_SERIAL};
use super::wire::PORT;
use crate::place::Accelerator;

/// How often the keeper looks whether QEMU has ended by itself.
const LOOK: Duration = Duration::from_millis(50);

/// What the lab's kernel is told. The lab is trusted and short-lived, and its processor is emulated: no mitigations.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=1 reboot=t quiet mitigations=off net.ifnames=0";

/// What QEMU is started with.
#[derive(Debug, Clone)]
pub(super) struct Hardware {
    pub(super) accelerator: Accelerator,
    pub(super) qemu: Emulator,
    pub(super) cpus: u8,
    pub(super) memory_mib: u32,
    pub(super) kernel: PathBuf,
    /// Image and serial number of each disk beside the root; what the lab writes to them is thrown away.
    pub(super) disks: Vec<(PathBuf, String)>,
    pub(super) lifetime: Duration,
}

/// A running machine. Dropping it kills and reaps QEMU.
#[derive(Debug)]
pub(super) struct Machine {
    stop: Option<Sender<()>>,
    keeper: Option<JoinHandle<()>>,
    folder: TempDir,
}

/// Names of the files in a machine's folder.
pub(super) const INITRAMFS: &str = "initramfs.cpio";
pub(super) const ROOT_IMAGE: &str = "root.ext4";
const CONSOLE: &str = "console.log";
const COMPLAINTS: &str = "qemu.log";

impl Machine {
    /// Starts QEMU on the files in `folder`; returns it with both directions of the agent's port.
    pub(super) fn start(hardware: &Hardware, folder: TempDir) -> Result<(Self, ChildStdin, ChildStdout)> {
        let mut command = command(hardware, folder.path())?;
        let lifetime = hardware.lifetime;
        let (stop, stopped) = mpsc::channel();
        let (started, starting) = mpsc::sync_channel(1);
        let keep = move || match command.spawn() {
            Ok(mut child) => {
                let streams = child.stdin.take().zip(child.stdout.take());
                // The receiver is the function below, which waits for exactly this.
                drop(started.send(streams.context("QEMU's streams are pipes")));
                keep(child, &stopped, lifetime);
            }
            Err(error) => {
                let hint = "Cannot start QEMU (packages qemu-system-x86 and util-linux)";
                drop(started.send(Err(anyhow::Error::new(error).context(hint))));
            }
        };
        let keeper = thread::Builder::new().name("lab-keeper".to_owned()).spawn(keep)?;
        let machine = Self { stop: Some(stop), keeper: Some(keeper), folder };
        let (input, output) = starting.recv().context("The keeper of the lab ended early")??;
        Ok((machine, input, output))
    }

    /// Removes the names of the images, which QEMU holds open now, so that not even a killed harness leaves them behind.
    pub(super) fn unlink_images(&self) -> Result<()> {
        for image in [INITRAMFS, ROOT_IMAGE] {
            fs::remove_file(self.folder.path().join(image))
                .with_context(|| format!("Cannot remove the lab's {image}"))?;
        }
        Ok(())
    }

    /// All that the lab's kernel and QEMU had to say: the last `lines` of each.
    pub(super) fn console_tail(&self, lines: usize) -> String {
        let console = text_of(&self.folder.path().join(CONSOLE));
        let complaints = text_of(&self.folder.path().join(COMPLAINTS));
        let own = |line: &&str| !line.contains("TCG doesn't support requested feature");
        let complaints: Vec<&str> = complaints.lines().filter(own).collect();
        let from = complaints.len().saturating_sub(lines);
        let console: Vec<&str> = console.lines().collect();
        let console_from = console.len().saturating_sub(lines);
        [&complaints[from..], &console[console_from..]].concat().join("\n")
    }

    /// Waits until QEMU has ended by itself; false when it has not by `deadline`.
    pub(super) fn await_end(&self, deadline: Instant) -> bool {
        let ended = || self.keeper.as_ref().is_none_or(JoinHandle::is_finished);
        while !ended() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        ended()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(panic)) = self.keeper.take().map(JoinHandle::join) {
            eprintln!("The keeper of the lab panicked: {panic:?}");
        }
    }
}

/// Waits until QEMU ends, its lifetime is over, or the machine is dropped; then it is dead and reaped.
fn keep(mut child: Child, stopped: &Receiver<()>, lifetime: Duration) {
    let start = Instant::now();
    loop {
        let asked = stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Disconnected);
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        let late = start.elapsed() > lifetime;
        if late {
            eprintln!("The lab was killed: its lifetime of {} s is over", lifetime.as_secs());
        }
        if asked || late {
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                eprintln!("QEMU of the lab could not be ended: {error}");
            }
            return;
        }
    }
}

fn command(hardware: &Hardware, folder: &Path) -> Result<Command> {
    let complaints = File::create(folder.join(COMPLAINTS)).context("Cannot make the log of QEMU")?;
    // setpriv sets the parent-death signal for what it becomes, which std can do only by unsafe code.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(hardware.qemu.program()).args(hardware.qemu.options());
    command.args(["-name", "godwit-lab"]);
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"]);
    command.args(["-machine", "q35", "-net", "none"]);
    match hardware.accelerator {
        Accelerator::Kvm(_) => command.args(["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"]),
    };
    // The emulator is sound on all processors but the first, which an emulated lab therefore has beside the others.
    let (bystanders, arguments) = match hardware.accelerator {
        Accelerator::Kvm(_) => (0, KERNEL_ARGUMENTS.to_owned()),
        Accelerator::Tcg => (1, format!("{KERNEL_ARGUMENTS} {BYSTANDER}=1")),
    };
    let cpus = hardware.cpus.saturating_add(bystanders);
    command.args(["-smp", &cpus.to_string(), "-m", &hardware.memory_mib.to_string()]);
    command.arg("-kernel").arg(&hardware.kernel).arg("-initrd").arg(folder.join(INITRAMFS));
    command.args(["-append", &arguments]);
    command.args(["-serial", &format!("file:{}", option_value(&folder.join(CONSOLE))?)]);
    command.args(["-chardev", "stdio,id=agent,signal=off", "-device", "virtio-serial-pci"]);
    command.args(["-device", &format!("virtserialport,chardev=agent,name={PORT}")]);
    let root = option_value(&folder.join(ROOT_IMAGE))?;
    attach(&mut command, ROOT_SERIAL, &format!("file={root},format=raw,cache=unsafe"));
    for (image, serial) in &hardware.disks {
        attach(&mut command, serial, &format!("file={},format=raw,snapshot=on", option_value(image)?));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(complaints);
    Ok(command)
}

fn attach(command: &mut Command, serial: &str, drive: &str) {
    command.args(["-drive", &format!("if=none,id={serial},{drive}")]);
    command.args(["-device", &format!("virtio-blk-pci,drive={serial},serial={serial}")]);
}

/// A path as the value of a QEMU option, where a comma is written twice.
fn option_value(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.replace(',', ",,"))
}

/// A log file as text; a kernel in trouble may print anything.
fn text_of(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(16 << 20).read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(cannot read {}: {error})", path.display()),
    }
}
