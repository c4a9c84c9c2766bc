//! The initramfs of every Linux guest: busybox, the kernel's virtio modules, the verifier, and our `/init`.
//!
//! Called by the `tiny` recipe, whose whole user space this is, and by `debian`, whose disk it mounts. Kernel
//! parameters that `/init` obeys:
//!
//! - `godwit.run="COMMAND"` runs a shell command on ttyS0 (raw, without echo) and prints `godwit-guest: exit STATUS`;
//! - `godwit.poweroff` powers off after it; otherwise a shell follows, as it does without a command;
//! - `godwit.net=ADDRESS/PREFIX[,GATEWAY]` configures the first network card;
//! - `godwit.root=/dev/vda` mounts this disk and starts its `/sbin/init`; the verifier lies in `/run/godwit` then.
//!
//! The first line on the console is `godwit-guest: init SECONDS`, with the kernel's uptime.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};

use crate::kernel::Kernel;
use crate::newc::Newc;

const INIT: &str = include_str!("init.sh");
const POWER_BUTTON: &str = include_str!("power.sh");
/// Where busybox's acpid looks for what to do at a press of the power button.
const POWER_BUTTON_AT: &str = "etc/acpi/PWRF/00000080";

/// What a guest of Godwit needs: its devices, the power button (`evdev` brings the press to user space), and the
/// report of a panic to the VMM.
const MODULES: &[&str] =
    &["virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "pvpanic_mmio", "button", "evdev"];

/// What goes into an initramfs.
#[derive(Debug)]
pub(crate) struct Initramfs<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) busybox: &'a Path,
    pub(crate) verifier: &'a Path,
}

/// The part of the content that stands in this folder, for the cache's key.
pub(crate) fn ingredients() -> String {
    [INIT, POWER_BUTTON, POWER_BUTTON_AT].into_iter().chain(MODULES.iter().copied()).collect::<Vec<_>>().join("\0")
}

impl Initramfs<'_> {
    /// Writes it, uncompressed: unpacking costs an emulated guest more time than reading.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let file = File::create_new(path).with_context(|| format!("Cannot create {}", path.display()))?;
        let mut archive = Newc::new(BufWriter::new(file));
        archive.character_device("dev/console", 0o600, (5, 1))?;
        for mount_point in ["proc", "sys", "root", "run", "tmp"] {
            archive.directory(mount_point, 0o755)?;
        }
        archive.file("init", 0o755, INIT.as_bytes())?;
        archive.file(POWER_BUTTON_AT, 0o755, POWER_BUTTON.as_bytes())?;
        archive.file_from("bin/busybox", self.busybox)?;
        archive.symlink("bin/sh", "busybox")?;
        archive.file_from("bin/verifier", self.verifier)?;
        for (number, module) in self.kernel.modules(MODULES)?.iter().enumerate() {
            // `/init` loads them by the order of their names.
            archive.file_from(&format!("modules/{number:02}-{}.ko", module.name), &module.path)?;
        }
        archive.finish()?;
        Ok(())
    }
}
