//! The `debian` recipe: an ext4 root disk with systemd and things to load a machine with.
//!
//! Made on demand in some minutes, then kept. Called through [`crate::Images::debian`]. The ways in are the root shell
//! on ttyS0 and ssh with a key that is made with the disk; there is no password. The disk boots with the initramfs of
//! the `tiny` recipe and `godwit.root=/dev/vda`, so a new verifier needs no new disk: `/init` brings it along.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::cache::{Cache, Key};
use crate::command;
use crate::kernel::Kernel;
use crate::mirror::Mirror;
use crate::tiny::Tiny;

/// Debian packages whose tools this recipe calls.
pub const PACKAGES: &[&str] = &["apt", "mmdebstrap", "e2fsprogs", "debian-archive-keyring"];

/// What the guest has installed, besides the essential packages.
const INCLUDE: &[&str] = &[
    "dbus",
    "fio",
    "iproute2",
    "kmod",
    "libmemcached-tools",
    "memcached",
    "ncbi-blast+",
    "openssh-server",
    "postgresql",
    "procps",
    "stress-ng",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
];

/// Documentation that nobody reads in a guest.
const EXCLUDE: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*"];

/// Files that make the system a guest: path, content.
const FILES: &[(&str, &str)] = &[
    ("etc/hostname", "godwit-guest\n"),
    ("etc/hosts", "127.0.0.1 localhost godwit-guest\n::1 localhost\n"),
    // Empty: systemd makes one up at each boot, so that copies of the disk are different machines.
    ("etc/machine-id", ""),
    // `/init` has mounted the root.
    ("etc/fstab", ""),
    // The root shell on the serial port is spoken to by programs, too: no greeting, no control sequences.
    ("root/.hushlogin", ""),
    ("root/.inputrc", "set enable-bracketed-paste off\n"),
    ("etc/systemd/network/80-dhcp.network", "[Match]\nDriver=virtio_net\n[Network]\nDHCP=yes\n"),
    (
        "etc/systemd/system/serial-getty@ttyS0.service.d/root.conf",
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - $TERM\n",
    ),
    // Nothing in a guest waits for a network that its host may not give.
    (
        "etc/systemd/system/systemd-networkd-wait-online.service.d/any.conf",
        "[Service]\nExecStart=\nExecStart=/bin/true\n",
    ),
];

/// Work that a guest of some minutes does not need, and that an emulated one cannot spare the time for.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-binfmt.service",
    "systemd-pstore.service",
];
const SERVICES: &[&str] = &["systemd-networkd", "systemd-resolved", "ssh", "serial-getty@ttyS0"];
const VERIFIER_LINK: (&str, &str) = ("usr/local/bin/verifier", "/run/godwit/verifier");
/// Apparent size of the disk; the file is sparse.
const DISK_SIZE: &str = "4G";
const REVISION: &str = "1";

/// A guest with a root disk.
#[derive(Clone, Debug)]
pub struct Debian {
    /// The kernel and the initramfs to boot it with.
    pub boot: Tiny,
    /// The raw ext4 disk, to be copied before it is written to.
    pub disk: PathBuf,
    /// The private key that root's account takes.
    pub ssh_key: PathBuf,
}

impl Debian {
    pub(crate) fn make(cache: &Cache, boot: Tiny) -> Result<Self> {
        let mirror = Mirror::of_this_machine()?;
        let kernel = &boot.kernel;
        let key = recipe_key().with(&mirror.codename).with(kernel.release()).with(kernel.package_version());
        let entry = cache.get("debian", &mirror.codename, key, |into| build(&mirror, kernel, into))?;
        Ok(Self { boot, disk: entry.join("disk.ext4"), ssh_key: entry.join("ssh-key") })
    }
}

fn recipe_key() -> Key {
    let lists = [INCLUDE, EXCLUDE, MASKED, SERVICES].concat();
    let files = FILES.iter().flat_map(|(path, content)| [*path, *content]);
    lists.into_iter().chain(files).fold(Key::new().with(REVISION).with(DISK_SIZE), Key::with)
}

fn build(mirror: &Mirror, kernel: &Kernel, into: &Path) -> Result<()> {
    let owner = fs::metadata("/proc/self").context("Cannot see this process in /proc")?.uid();
    ensure!(owner == 0, "The `debian` image needs root (a disk has files of many owners); run this with sudo");
    let root = into.join("root");
    debootstrap(mirror, &root)?;
    tracing::info!("configuring the Debian system");
    configure(&root, kernel)?;
    fs::rename(root.join("root/ssh-key"), into.join("ssh-key")).context("ssh-keygen left no key")?;
    tracing::info!("making the disk");
    let disk = into.join("disk.ext4");
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-t", "ext4", "-L", "godwit", "-d"]).arg(&root).arg(&disk).arg(DISK_SIZE);
    command::run(&mut mke2fs, "e2fsprogs")?;
    fs::remove_dir_all(&root).context("Cannot remove the unpacked system")
}

/// Installs the packages into `root`, and tells the log each step that mmdebstrap tells.
fn debootstrap(mirror: &Mirror, root: &Path) -> Result<()> {
    let sources = tempfile::NamedTempFile::new().context("Cannot make a temporary file")?;
    fs::write(sources.path(), &mirror.sources)?;
    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--format=directory", "--variant=minbase"]);
    command.arg(format!("--include={}", INCLUDE.join(",")));
    command.args(EXCLUDE.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.args(mirror.options.iter().map(|option| format!("--aptopt={option}")));
    // The options may hold a proxy's password, and a guest is no place for it.
    command.arg("--customize-hook=rm -f \"$1\"/etc/apt/apt.conf.d/99mmdebstrap");
    command.arg(&mirror.codename).arg(root).arg(sources.path());
    command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("Cannot start `mmdebstrap`; install the Debian package `mmdebstrap`")?;
    let printed = child.stderr.take().expect("the standard error was asked for as a pipe");
    let mut errors = Vec::new();
    for line in BufReader::new(printed).lines().map_while(Result::ok) {
        match line.strip_prefix("I: ") {
            Some(step) => tracing::info!("mmdebstrap: {step}"),
            None if line.starts_with("E:") || line.starts_with("W:") => errors.push(line),
            None => {}
        }
    }
    let status = child.wait().context("Cannot wait for `mmdebstrap`")?;
    if !status.success() {
        bail!("`mmdebstrap` failed ({status}):\n{}", errors.join("\n"));
    }
    Ok(())
}

fn configure(root: &Path, kernel: &Kernel) -> Result<()> {
    for (path, content) in FILES {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a file below a root has a directory"))?;
        fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    symlink(VERIFIER_LINK.1, root.join(VERIFIER_LINK.0)).context("Cannot link the verifier")?;
    let modules = root.join("lib/modules");
    fs::create_dir_all(&modules)?;
    command::run(
        Command::new("cp").arg("-r").arg(kernel.modules_tree()).arg(modules.join(kernel.release())),
        "coreutils",
    )?;
    inside(root, &["depmod", "-a", kernel.release()])?;
    inside(root, &[&["systemctl", "enable"], SERVICES].concat())?;
    inside(root, &[&["systemctl", "mask"], MASKED].concat())?;
    inside(root, &["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "godwit-guest", "-f", "/root/ssh-key"])?;
    let account = root.join("root/.ssh");
    fs::create_dir_all(&account)?;
    fs::rename(root.join("root/ssh-key.pub"), account.join("authorized_keys")).context("ssh-keygen left no public key")
}

fn inside(root: &Path, words: &[&str]) -> Result<String> {
    command::run(Command::new("chroot").arg(root).args(words), "coreutils")
}
