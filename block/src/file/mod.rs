//! A disk in a raw file or on a block device of the host.
//!
//! Its channels are rings of io_uring, or, where the kernel has none, threads of a pool. Either way the bytes go between the
//! file and the request's memory without a copy of this process in between.

mod error;
mod lock;
mod pool;
mod raw;
#[cfg(test)]
mod tests;
mod uring;

pub use error::DiskError;

use self::error::refusal;
use self::lock::Lock;
use self::pool::PoolChannel;
use self::raw::RawFile;
use self::uring::UringChannel;
use crate::backend::{Access, Backend, Channel, Geometry, SECTOR};
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// More than a machine can have queues: each has a channel, and so has each client of a server.
const CHANNELS: usize = 4096;

/// How the host's page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HostCache {
    /// Reads and writes go through it.
    #[default]
    Used,
    /// They go past it (`O_DIRECT`), as far as their memory and place are aligned as the disk needs it.
    Bypassed,
}

/// How requests reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// By io_uring where the kernel has it and permits it, otherwise by threads.
    #[default]
    Auto,
    /// By io_uring; a channel cannot be opened without it.
    Uring,
    /// By threads that make one call for each request.
    Threads,
}

/// How a file is to be opened.
#[derive(Debug, Clone, Copy)]
pub struct FileOptions {
    /// What may be done with it.
    pub access: Access,
    /// How the host's page cache is used.
    pub host_cache: HostCache,
    /// How requests reach the kernel.
    pub engine: Engine,
    /// What a thread does before anything else, where threads serve; its process's way to confine it.
    pub thread_start: fn(),
}

impl FileOptions {
    /// The usual way: by the page cache, with the best engine that the host has.
    #[must_use]
    pub fn new(access: Access) -> Self {
        Self { access, host_cache: HostCache::default(), engine: Engine::default(), thread_start: || {} }
    }
}

/// A raw file as a disk.
#[derive(Debug)]
pub struct FileBackend {
    file: Arc<RawFile>,
    engine: Engine,
    thread_start: fn(),
}

impl FileBackend {
    /// Opens and locks a disk.
    ///
    /// # Errors
    /// [`DiskError`] with the reason and the remedy.
    pub fn open(path: &Path, options: FileOptions) -> Result<Self, DiskError> {
        let disk = Self::open_unlocked(path, options)?;
        disk.file.lock().take()?;
        Ok(disk)
    }

    /// Opens and checks a disk whose lock another end of a migration still holds. [`Backend::reacquire`] takes the lock;
    /// until then nothing can be written.
    ///
    /// # Errors
    /// [`DiskError`] with the reason and the remedy.
    pub fn open_unlocked(path: &Path, options: FileOptions) -> Result<Self, DiskError> {
        let FileOptions { access, host_cache, engine, thread_start } = options;
        let owned = || path.to_owned();
        let host = |source| DiskError::Host { path: path.to_owned(), source };
        let mut file = with_access(access).open(path).map_err(|source| refusal(path, access, source))?;
        let kind = file.metadata().map_err(host)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path: owned() });
        }
        // The length in the metadata of a block device is 0.
        let capacity = file.seek(SeekFrom::End(0)).map_err(host)?;
        if capacity == 0 || !capacity.is_multiple_of(SECTOR) {
            return Err(DiskError::BadSize { path: owned(), length: capacity });
        }
        let direct = match host_cache {
            HostCache::Used => None,
            HostCache::Bypassed => Some(Direct::open(path, access)?),
        };
        let lock = Lock::of(file.try_clone().map_err(host)?, owned(), access);
        Ok(Self { file: Arc::new(RawFile::new(file, direct, lock, capacity)), engine, thread_start })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.lock().path()
    }
}

impl Backend for FileBackend {
    fn geometry(&self) -> Geometry {
        let access = self.file.lock().access();
        Geometry { capacity: self.file.capacity(), access, channels: CHANNELS }
    }

    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        let file = || Arc::clone(&self.file);
        match self.engine {
            Engine::Uring => Ok(Box::new(UringChannel::open(file())?)),
            Engine::Threads => Ok(Box::new(PoolChannel::open(file(), self.thread_start)?)),
            Engine::Auto => match UringChannel::open(file()) {
                Ok(channel) => Ok(Box::new(channel)),
                Err(error) => {
                    tracing::info!(%error, path = %self.path().display(), "No io_uring; threads serve the disk");
                    Ok(Box::new(PoolChannel::open(file(), self.thread_start)?))
                }
            },
        }
    }

    fn grow(&self, capacity: u64) -> io::Result<u64> {
        self.file.grow(capacity).map_err(io::Error::other)
    }

    fn is_held_by_channels(&self) -> bool {
        false
    }

    fn release(&self) {
        self.file.lock().release();
    }

    fn reacquire(&self) -> io::Result<()> {
        self.file.lock().take().map_err(io::Error::other)
    }
}

/// A second descriptor of the file, past the page cache.
#[derive(Debug)]
struct Direct {
    file: File,
    /// What addresses and lengths of memory must be a multiple of, in bytes.
    memory_alignment: usize,
    /// What offsets and lengths on the disk must be a multiple of, in bytes.
    offset_alignment: u64,
}

impl Direct {
    /// What every disk takes, where the kernel does not say what this one does.
    const SAFE_ALIGNMENT: u32 = 4096;

    fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let flags = i32::try_from(OFlags::DIRECT.bits()).expect("flags of open are few");
        let opened = with_access(access).custom_flags(flags).open(path);
        let file = opened.map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => DiskError::NoDirect { path: path.to_owned() },
            _ => refusal(path, access, source),
        })?;
        // Kernels before 6.1 leave the fields 0.
        let told = rustix::fs::statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
            .map_or((0, 0), |stat| (stat.stx_dio_mem_align, stat.stx_dio_offset_align));
        let or_safe = |told: u32| if told.is_power_of_two() { told } else { Self::SAFE_ALIGNMENT };
        Ok(Self { file, memory_alignment: or_safe(told.0) as usize, offset_alignment: or_safe(told.1).into() })
    }
}

fn with_access(access: Access) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::ReadWrite);
    options
}
