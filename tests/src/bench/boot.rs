//! How long a VMM takes from exec until its guest says something, and what its process weighs then.
//!
//! Godwit and QEMU take turns, so that what else the machine does hits both. The time is from just before the process is
//! made to the return of the `read` that brought the byte; the VMM's serial port is its standard output, a pipe.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Figure, Series, Vmm};

/// A VMM that has said nothing after this long never will.
const PATIENCE: Duration = Duration::from_secs(90);

/// How long a VMM may settle before its memory is counted: the first byte may come while it still starts threads.
const SETTLE: Duration = Duration::from_millis(50);

/// Memory of the micro guest.
const MICRO_MIB: u64 = 128;
/// Memory of the Linux guest.
const LINUX_MIB: u64 = 256;

/// What the first line of the guest's init begins with.
const INIT: &[u8] = b"godwit-guest: init";

/// The VMMs, and a folder for what they need.
#[derive(Debug, Clone)]
pub struct Contestants {
    /// The `godwit` binary.
    pub godwit: PathBuf,
    /// The `qemu-system-x86_64` binary.
    pub qemu: PathBuf,
    /// An empty folder.
    pub work: PathBuf,
}

/// The micro guest on this machine's KVM: time to the first byte and resident memory, of Godwit and QEMU.
pub fn micro(contestants: &Contestants, kernel: &Path, runs: usize) -> Result<Vec<Series>> {
    let (mut times, mut weights) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    // One run of each that does not count: the files come from the disk.
    for run in 0..=runs {
        for (index, vmm) in [Vmm::Godwit, Vmm::Qemu].into_iter().enumerate() {
            let started = start(micro_command(contestants, vmm, kernel), b"")?;
            sleep(SETTLE);
            let resident = resident_mib(started.vmm.0.id(), MICRO_MIB)?;
            if run > 0 {
                times[index].push(started.after.as_secs_f64() * 1e3);
                weights[index].push(resident);
            }
        }
    }
    let guest = format!("micro, {MICRO_MIB} MiB");
    Ok(series(Figure::FirstByteMs, &guest, times).chain(series(Figure::ResidentMib, &guest, weights)).collect())
}

/// The tiny Linux guest: time to its init, of Godwit and QEMU. `images` holds `vmlinux` and `initramfs`.
pub fn linux(contestants: &Contestants, images: &Path, runs: usize) -> Result<Vec<Series>> {
    let mut times = [Vec::new(), Vec::new()];
    for run in 0..=runs {
        for (index, vmm) in [Vmm::Godwit, Vmm::Qemu].into_iter().enumerate() {
            let started = start(linux_command(contestants, vmm, images), INIT)?;
            if run > 0 {
                times[index].push(started.after.as_secs_f64() * 1e3);
            }
        }
    }
    Ok(series(Figure::InitMs, &format!("Debian kernel and tiny initramfs, {LINUX_MIB} MiB"), times).collect())
}

fn series(figure: Figure, guest: &str, values: [Vec<f64>; 2]) -> impl Iterator<Item = Series> {
    let named = [Vmm::Godwit, Vmm::Qemu].into_iter().zip(values);
    named.filter_map(move |(vmm, values)| Series::new(figure, guest, vmm, values))
}

fn micro_command(contestants: &Contestants, vmm: Vmm, kernel: &Path) -> Command {
    // The guest says that it is there and halts.
    let words = "ws=0 tick=0";
    match vmm {
        Vmm::Godwit => godwit(contestants, MICRO_MIB, kernel, words),
        Vmm::Qemu => {
            let machine = ["microvm,x-option-roms=off,rtc=on", "host,-arch-capabilities"];
            qemu(contestants, machine, MICRO_MIB, kernel, words)
        }
    }
}

fn linux_command(contestants: &Contestants, vmm: Vmm, images: &Path) -> Command {
    let kernel = images.join("vmlinux");
    let words = "console=ttyS0 quiet panic=1";
    let mut command = match vmm {
        Vmm::Godwit => godwit(contestants, LINUX_MIB, &kernel, words),
        Vmm::Qemu => qemu(contestants, ["microvm,rtc=on", "host"], LINUX_MIB, &kernel, words),
    };
    command.arg(match vmm {
        Vmm::Godwit => "--initramfs",
        Vmm::Qemu => "-initrd",
    });
    command.arg(images.join("initramfs"));
    command
}

fn godwit(contestants: &Contestants, mib: u64, kernel: &Path, words: &str) -> Command {
    let mut command = Command::new(&contestants.godwit);
    command.args(["run", "--serial", "terminal", "--memory", &format!("{mib}M"), "--cmdline", words]);
    command.arg("--kernel").arg(kernel).arg("--state-dir").arg(contestants.work.join("state"));
    command
}

fn qemu(contestants: &Contestants, [machine, cpu]: [&str; 2], mib: u64, kernel: &Path, words: &str) -> Command {
    let mut command = Command::new(&contestants.qemu);
    command.args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"]);
    command.args(["-M", machine, "-accel", "kvm", "-cpu", cpu, "-m", &mib.to_string(), "-append", words]);
    command.arg("-kernel").arg(kernel);
    command
}

/// A VMM that runs. Killed on drop.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then there is only something to reap.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A VMM whose guest has said what was waited for.
#[derive(Debug)]
struct Started {
    vmm: Running,
    after: Duration,
}

/// Starts a VMM and waits until its output contains `awaited`; anything at all if that is empty.
fn start(mut command: Command, awaited: &[u8]) -> Result<Started> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let begun = Instant::now();
    let mut vmm = Running(command.spawn().with_context(|| format!("Cannot start {command:?}"))?);
    let mut output = vmm.0.stdout.take().context("Standard output is a pipe")?;
    let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let left = PATIENCE.saturating_sub(begun.elapsed());
        let timeout = Timespec::try_from(left).context("A patience of seconds fits")?;
        let ready = poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&timeout))?;
        ensure!(ready > 0, "Nothing after {PATIENCE:?}: {command:?} said {:?}", String::from_utf8_lossy(&said));
        let length = output.read(&mut buffer)?;
        let after = begun.elapsed();
        if length == 0 {
            let mut complaint = String::new();
            let mut errors = vmm.0.stderr.take().context("Standard error is a pipe")?;
            errors.read_to_string(&mut complaint)?;
            bail!("{command:?} ended at once: {complaint}{}", String::from_utf8_lossy(&said));
        }
        said.extend_from_slice(&buffer[..length]);
        if contains(&said, awaited) {
            // Kept open: a VMM that cannot write to its guest's console might end.
            vmm.0.stdout = Some(output);
            return Ok(Started { vmm, after });
        }
    }
}

fn contains(said: &[u8], awaited: &[u8]) -> bool {
    awaited.is_empty() || said.windows(awaited.len()).any(|window| window == awaited)
}

/// Resident memory of a process without the mapping that is the guest's memory.
fn resident_mib(pid: u32, guest_mib: u64) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
    let kib = resident_kib(&smaps, guest_mib << 10).with_context(|| format!("{path} has no guest memory"))?;
    #[expect(clippy::cast_precision_loss, reason = "a process of 2^53 KiB does not fit any machine")]
    Ok(kib as f64 / 1024.0)
}

/// Adds up `Rss` of all mappings but those of the guest's size or larger; `None` if there was none of them (proc(5)).
fn resident_kib(smaps: &str, guest_kib: u64) -> Option<u64> {
    let kib = |line: &str, name: &str| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    let (mut size, mut guest_seen, mut sum) = (0, false, 0);
    for line in smaps.lines() {
        if let Some(kib) = kib(line, "Size:") {
            size = kib;
        } else if let Some(rss) = kib(line, "Rss:") {
            // Reserved address space of that size, such as an allocator's arena, has next to nothing resident.
            let guest = size == guest_kib;
            guest_seen |= guest;
            sum += if guest { 0 } else { rss };
        }
    }
    guest_seen.then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_does_not_count() {
        let smaps = "55d0-55d1 r-xp 0 08:01 1 /bin/vmm\nSize:   1000 kB\nKernelPageSize: 4 kB\nRss:    300 kB\n\
            7f00-7f01 rw-s 0 00:01 2 /memfd:ram (deleted)\nSize:  131072 kB\nRss:   2048 kB\n\
            7fff-8000 rw-p 0 00:00 0 [stack]\nSize:    132 kB\nRss:    12 kB\n";
        assert_eq!(resident_kib(smaps, 131_072), Some(312));
        assert_eq!(resident_kib(smaps, 4096), None);
    }

    #[test]
    fn what_is_awaited_may_come_in_pieces() {
        let mut command = Command::new("sh");
        command.args(["-c", "printf 'noise godwit-'; sleep 0.02; printf 'guest: init 1.0'; sleep 5"]);
        let started = start(command, INIT).unwrap();
        assert!(started.after >= Duration::from_millis(20));
    }

    #[test]
    fn a_vmm_that_ends_is_told_with_its_complaint() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo no KVM >&2"]);
        assert!(start(command, b"").unwrap_err().to_string().contains("no KVM"));
    }
}
