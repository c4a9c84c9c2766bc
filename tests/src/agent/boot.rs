//! From the kernel's first instruction in user space to a machine that can run commands.
//!
//! The initramfs carries this agent and the modules for the virtio bus, nothing else. The root is an ext4 disk that the
//! harness made for this boot; it carries everything else, the other modules too. Called once, by process 1.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::lab::root::{DISKS_FILE, MODULES, ROOT_SERIAL};

/// How long a device may take to appear after its driver was loaded.
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// Brings the machine up; returns what did not work but does not stop it.
pub(super) fn boot() -> Result<Vec<String>> {
    for (source, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount_new(source, target, "")?;
    }
    let mut problems = load_modules(Path::new(MODULES))?;
    let root = await_path("the root disk", || block_device(ROOT_SERIAL))?;
    switch_root(&root)?;
    for (source, target, options) in
        [("tmpfs", "/run", "mode=755"), ("devpts", "/dev/pts", "ptmxmode=666"), ("tmpfs", "/dev/shm", "mode=1777")]
    {
        mount_new(source, target, options)?;
    }
    mount_new("tmpfs", "/tmp", "mode=1777")?;
    problems.extend(load_modules(Path::new(MODULES))?);
    problems.extend(link_disks());
    problems.extend(allow_huge_shared_pages().err().map(|error| format!("Guests have small pages only: {error:#}")));
    rustix::system::sethostname(b"lab").context("set the host name")?;
    let loopback = Command::new("/bin/busybox").args(["ip", "link", "set", "lo", "up"]).stdin(Stdio::null()).status();
    if !loopback.is_ok_and(|status| status.success()) {
        problems.push("The loopback interface did not come up".to_owned());
    }
    Ok(problems)
}

/// Mounts a file system that needs no device, named as its type.
fn mount_new(kind: &str, target: &str, options: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("make {target}"))?;
    let options = std::ffi::CString::new(options)?;
    mount(kind, target, kind, MountFlags::empty(), options.as_c_str()).with_context(|| format!("mount {target}"))
}

/// Loads every module of a folder in the order of the file names.
fn load_modules(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    let mut modules = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    modules.sort();
    let mut problems = Vec::new();
    for module in modules {
        match fs::File::open(&module).and_then(|file| Ok(rustix::system::finit_module(&file, c"", 0)?)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => problems.push(format!("Module {} was not loaded: {error}", module.display())),
        }
    }
    Ok(problems)
}

/// Makes the disk `/`: the usual steps of switch_root, without freeing the initramfs, which is small.
fn switch_root(disk: &Path) -> Result<()> {
    let new_root = "/root";
    fs::create_dir_all(new_root)?;
    mount(disk, new_root, "ext4", MountFlags::NOATIME, None).context("mount the root disk")?;
    for folder in ["/proc", "/sys", "/dev"] {
        mount_move(folder, format!("{new_root}{folder}")).with_context(|| format!("move {folder}"))?;
    }
    rustix::process::chdir(new_root)?;
    mount_move(".", "/").context("move the root")?;
    rustix::process::chroot(".").context("change the root")?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Finds the virtio disk with a serial number.
fn block_device(serial: &str) -> Option<PathBuf> {
    let disks = fs::read_dir("/sys/block").ok()?.flatten();
    let disk = disks
        .into_iter()
        .find(|disk| fs::read_to_string(disk.path().join("serial")).is_ok_and(|found| found.trim() == serial))?;
    Some(Path::new("/dev").join(disk.file_name())).filter(|device| device.exists())
}

/// Lets the memory of guests, which is a shared file, be made of huge pages. They halve the time of emulated guests: a
/// page that a guest touches for the first time costs an exit, and so does each page that was sent while it moves.
fn allow_huge_shared_pages() -> Result<()> {
    let setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    fs::write(setting, "always").with_context(|| format!("write {setting}"))
}

/// Gives each extra disk the path that the harness wants it at, as a symbolic link.
fn link_disks() -> Vec<String> {
    let wanted = fs::read_to_string(DISKS_FILE).unwrap_or_default();
    let link = |line: &str| -> Result<()> {
        let Some((serial, path)) = line.split_once(' ') else { bail!("{line:?} has no path") };
        let device = await_path("the disk", || block_device(serial))?;
        let path = Path::new(path);
        fs::create_dir_all(path.parent().context("it is the root")?)?;
        Ok(std::os::unix::fs::symlink(device, path)?)
    };
    let links = wanted.lines().map(|line| (line, link(line)));
    links.filter_map(|(line, done)| Some(format!("Disk {line}: {:#}", done.err()?))).collect()
}

/// Waits for something that a driver makes appear a moment after it was loaded.
pub(super) fn await_path(what: &str, find: impl Fn() -> Option<PathBuf>) -> Result<PathBuf> {
    let start = Instant::now();
    loop {
        if let Some(path) = find() {
            return Ok(path);
        }
        if start.elapsed() > DEVICE_WAIT {
            bail!("{what} did not appear within {DEVICE_WAIT:?}");
        }
        sleep(Duration::from_millis(2));
    }
}
