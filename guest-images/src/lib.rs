//! Guest images and an emulator from Debian packages, and the micro guest.
//!
//! Called by the tests, the benches and xtask: [`Images::open`] names a cache directory, each of its methods gives one
//! image and builds it first when it is not there or its ingredients changed. Everything comes from packages and sources
//! that apt checks (or is assembled from this folder); nothing is installed, and no recipe needs the network once its
//! entry is in the cache, apart from what apt's own package lists say about the newest version.

mod apt;
mod cache;
mod command;
pub mod debian;
pub mod emulator;
mod initramfs;
pub mod kernel;
pub mod micro;
mod mirror;
pub mod newc;
pub mod tiny;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;

use cache::Cache;
pub use debian::Debian;
pub use emulator::Emulator;
pub use kernel::Kernel;
pub use kernel::modules::Module;
pub use tiny::Tiny;

/// Where images stay unless someone says otherwise, relative to the root of the workspace.
pub const DEFAULT_CACHE: &str = "target/guest-images";

/// The image cache of one directory.
#[derive(Debug)]
pub struct Images {
    cache: Cache,
    kernel: OnceLock<Kernel>,
}

impl Images {
    /// Opens the cache, and makes its directory when it is not there.
    pub fn open(directory: &Path) -> Result<Self> {
        Ok(Self { cache: Cache::open(directory)?, kernel: OnceLock::new() })
    }

    /// Debian's newest cloud kernel, as apt on this machine knows it.
    pub fn kernel(&self) -> Result<&Kernel> {
        if let Some(kernel) = self.kernel.get() {
            return Ok(kernel);
        }
        // Two threads may both get here: the cache builds once, and both find the same kernel.
        let kernel = Kernel::fetch(&self.cache)?;
        Ok(self.kernel.get_or_init(|| kernel))
    }

    /// A QEMU that can be relied on where it emulates several processors that run guests.
    pub fn emulator(&self) -> Result<Emulator> {
        Emulator::find(&self.cache)
    }

    /// A guest of a kernel and an initramfs; `verifier` is the static program to put into it.
    pub fn tiny(&self, verifier: &Path) -> Result<Tiny> {
        Tiny::make(&self.cache, self.kernel()?, verifier)
    }

    /// A guest with a Debian root disk. The first call takes minutes and tells its steps to the log.
    pub fn debian(&self, verifier: &Path) -> Result<Debian> {
        Debian::make(&self.cache, self.tiny(verifier)?)
    }

    /// The micro guest, an ELF file to be booted by PVH.
    pub fn micro(&self) -> Result<PathBuf> {
        micro::make(&self.cache)
    }
}
