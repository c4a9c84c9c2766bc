//! The `tiny` recipe: a kernel and an initramfs, for boot and migration tests.
//!
//! Made in seconds once the kernel is in the cache; boots in 128 MiB. Called through [`crate::Images::tiny`].

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Sources;
use crate::cache::{Cache, Key};
use crate::command;
use crate::initramfs::{self, Initramfs};
use crate::kernel::Kernel;

/// Debian packages whose tools this recipe calls (`strip` comes with the C linker that Rust uses).
pub const PACKAGES: &[&str] = &["apt", "dpkg", "binutils"];

/// Kernel parameters that every guest of this folder wants; `/init` reads more (see the `initramfs` folder).
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=1";

const BUSYBOX: &str = "busybox-static";
const REVISION: &str = "1";

/// A guest of a kernel and an initramfs only.
#[derive(Clone, Debug)]
pub struct Tiny {
    /// The kernel to boot.
    pub kernel: Kernel,
    /// Its initramfs, with the verifier as `/bin/verifier`.
    pub initramfs: PathBuf,
}

impl Tiny {
    pub(crate) fn make(cache: &Cache, kernel: &Kernel, verifier: &Path) -> Result<Self> {
        let busybox = busybox(cache)?;
        let program = fs::read(verifier).with_context(|| {
            format!("Cannot read the verifier {}; `cargo build --release -p verifier` makes it", verifier.display())
        })?;
        let key = Key::new()
            .with(REVISION)
            .with(kernel.package_version())
            .with(busybox.as_os_str().as_encoded_bytes())
            .with(initramfs::ingredients())
            .with(&program);
        let entry = cache.get("tiny", kernel.release(), key, |into| {
            let stripped = into.join("verifier");
            command::run(Command::new("strip").arg("-o").arg(&stripped).arg(verifier), "binutils")?;
            let content = Initramfs { kernel, busybox: &busybox, verifier: &stripped };
            content.write(&into.join("initramfs"))?;
            Ok(fs::remove_file(stripped)?)
        })?;
        Ok(Self { kernel: kernel.clone(), initramfs: entry.join("initramfs") })
    }
}

/// Debian's static busybox.
fn busybox(cache: &Cache) -> Result<PathBuf> {
    let sources = Sources::own();
    let candidate = sources.candidate(BUSYBOX)?;
    let key = Key::new().with(REVISION).with(&candidate.version);
    let label = candidate.version.replace([':', '/'], "_");
    let entry = cache.get("busybox", &label, key, |into| {
        let unpacked = tempfile::tempdir_in(into)?;
        sources.unpack(&candidate, unpacked.path())?;
        let places = ["bin/busybox", "usr/bin/busybox"].map(|place| unpacked.path().join(place));
        let found = places.iter().find(|place| place.is_file());
        Ok(fs::rename(found.with_context(|| format!("{BUSYBOX} has no busybox"))?, into.join("busybox"))?)
    })?;
    Ok(entry.join("busybox"))
}
