//! A disk that is partly here: a local file over a base that may be far away.
//!
//! What is read is fetched from the base once, in clusters, and kept in the local file; what is written goes there alone. A
//! [`Puller`] fetches the rest in the background. So a guest runs at once at a place that its disk has not come to yet. Which
//! clusters are here is kept in a sidecar ([`sidecar`]), by which the disk outlives its process; when all are, the local file
//! is the whole disk, and nobody is connected to the base any more.

mod channel;
mod map;
mod pull;
mod sidecar;
#[cfg(test)]
mod tests;
mod window;

pub use map::CLUSTER;
pub use pull::{Pulled, Puller};
pub use sidecar::SidecarError;

use self::channel::LayeredChannel;
use self::map::{Map, Sleeper};
use self::sidecar::Sidecar;
use crate::backend::{Access, Backend, Channel, Geometry};
use crate::file::{DiskError, FileBackend, FileOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use thiserror::Error;

/// Why a layered disk cannot be had.
#[derive(Debug, Error)]
pub enum LayeredError {
    /// The local file.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What is said to be in it.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// A file that is not this disk's is in the way.
    #[error(
        "{} is there already, and nothing says that it is a part of this disk; if it is all of it, leave the base away, otherwise remove it or choose another path",
        path.display()
    )]
    InTheWay {
        /// The file.
        path: PathBuf,
    },
    /// The base is too long.
    #[error("The disk is {base} bytes long, and one that comes from elsewhere may have {MAX_CAPACITY}")]
    TooLong {
        /// The base's length in bytes.
        base: u64,
    },
    /// The local file is not as long as the base.
    #[error("{} is {length} bytes long, and the disk is {base}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// The base's length in bytes.
        base: u64,
    },
}

/// The longest disk, in bytes: 16 TiB, the longest file of ext4. The maps of one take 64 MiB of memory.
pub const MAX_CAPACITY: u64 = 16 << 40;

/// What becomes of the base when all of it is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnceWhole {
    /// It stays as it is: others use it.
    Keep,
    /// It was lent ([`crate::lent`]), and is given up.
    GiveUp,
}

/// What all channels share.
#[derive(Debug)]
struct Shared {
    local: FileBackend,
    base: Arc<dyn Backend>,
    once_whole: OnceWhole,
    map: Arc<Map>,
    sidecar: Sidecar,
    /// Whether the local file and its sidecar go with the disk: it was made by this process, and nobody has used it.
    is_tentative: AtomicBool,
    /// Whether the sidecar is gone: the local file is the disk.
    is_whole: AtomicBool,
    /// Whether the local file could not be made durable. The kernel says so once: what is lost then is not known, and the next
    /// flush succeeds. So nothing more is said to be here until the disk is opened anew.
    has_lost: AtomicBool,
    capacity: u64,
    /// The cluster at which the background should go on, because of what was asked for last.
    demanded: AtomicU64,
    /// Whether a puller brings the rest.
    is_pulled: AtomicBool,
    fetched_bytes: AtomicU64,
    /// How the channels that are open are woken.
    sleepers: Mutex<Vec<Weak<Sleeper>>>,
}

impl Shared {
    fn has_sidecar(&self) -> bool {
        !self.is_whole.load(Ordering::Acquire)
    }

    /// How long the disk is, in bytes: as long as the base, and what it has grown since it is all here.
    fn length(&self) -> u64 {
        if self.has_sidecar() { self.capacity } else { self.local.geometry().capacity }
    }

    /// Makes durable that clusters are here, which are durable themselves.
    fn keep(&self, here: &[u64]) -> io::Result<()> {
        if self.has_lost.load(Ordering::Acquire) {
            return Err(io::Error::other("The file has lost what was written to it"));
        }
        if self.has_sidecar() { self.sidecar.keep(here) } else { Ok(()) }
    }

    /// Takes note of what a flush of the local file came to.
    fn note_flush<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        outcome.inspect_err(|_| self.has_lost.store(true, Ordering::Release))
    }

    /// All of the disk is here and durable: does without sidecar and base from now on, and has all channels do so.
    fn become_whole(&self) -> io::Result<()> {
        self.keep(&self.map.bits())?;
        self.sidecar.remove()?;
        self.is_whole.store(true, Ordering::Release);
        self.sleepers().drain(..).filter_map(|sleeper| sleeper.upgrade()).for_each(|sleeper| sleeper.look());
        Ok(())
    }

    fn sleepers(&self) -> MutexGuard<'_, Vec<Weak<Sleeper>>> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_demand(&self, clusters: &[u64]) {
        if let Some(last) = clusters.last() {
            self.demanded.store(last + 1, Ordering::Relaxed);
        }
    }

    fn note_fetched(&self, bytes: u64) {
        self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if *self.is_tentative.get_mut() {
            let removed = std::fs::remove_file(self.local.path()).and_then(|()| self.sidecar.remove());
            if let Err(error) = removed {
                tracing::warn!(%error, path = %self.local.path().display(), "A disk that did not come stays");
            }
        }
    }
}

/// A disk that is partly here.
#[derive(Debug)]
pub struct LayeredBackend {
    shared: Arc<Shared>,
}

impl LayeredBackend {
    /// A disk over `base` whose clusters are kept in the file at `path`. That and its sidecar are made if they are not there,
    /// and go with the disk unless it is [kept](Self::keep); what was kept for the same `identity` before is gone on with. No
    /// lock is taken yet.
    ///
    /// # Errors
    /// [`LayeredError`] with what is in the way.
    pub fn open(
        path: &Path,
        identity: Option<[u8; 16]>,
        base: Arc<dyn Backend>,
        once_whole: OnceWhole,
        options: FileOptions,
    ) -> Result<Self, LayeredError> {
        let capacity = base.geometry().capacity;
        if capacity > MAX_CAPACITY {
            return Err(LayeredError::TooLong { base: capacity });
        }
        let (is_there, has_map) = (path.exists(), is_partial(path));
        if is_there && !has_map {
            return Err(LayeredError::InTheWay { path: path.to_owned() });
        }
        let (sidecar, mut here) = Sidecar::open(path, capacity, identity)?;
        if !is_there {
            // A map without its disk says nothing.
            here.fill(0);
            sidecar.forget()?;
            make(path, capacity).inspect_err(|_| drop(sidecar.remove()))?;
        }
        let opened = FileBackend::open_unlocked(path, options).inspect_err(|_| {
            if !is_there {
                drop(std::fs::remove_file(path).and_then(|()| sidecar.remove()));
            }
        });
        let local = opened?;
        let length = local.geometry().capacity;
        if length != capacity {
            return Err(LayeredError::Length { path: path.to_owned(), length, base: capacity });
        }
        let shared = Shared {
            local,
            base,
            once_whole,
            is_tentative: AtomicBool::new(!is_there),
            map: Arc::new(Map::new(capacity.div_ceil(CLUSTER), here)),
            sidecar,
            is_whole: AtomicBool::new(false),
            has_lost: AtomicBool::new(false),
            capacity,
            demanded: AtomicU64::new(0),
            is_pulled: AtomicBool::new(false),
            fetched_bytes: AtomicU64::new(0),
            sleepers: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Has the local file stay when this process ends, and its sidecar as long as that is needed.
    pub fn keep(&self) {
        self.shared.is_tentative.store(false, Ordering::Release);
    }

    /// Whether all of the disk is here and durable.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        !self.shared.has_sidecar()
    }

    /// How much of it is not here.
    #[must_use]
    pub fn missing(&self) -> Missing {
        Missing { map: Arc::clone(&self.shared.map), capacity: self.shared.capacity }
    }

    /// How many bytes were fetched since the disk was opened, in the background or not.
    #[must_use]
    pub fn fetched_bytes(&self) -> u64 {
        self.shared.fetched_bytes.load(Ordering::Relaxed)
    }
}

/// How much of a disk is not here, for those who only want to know that: the disk can end meanwhile.
#[derive(Debug, Clone)]
pub struct Missing {
    map: Arc<Map>,
    capacity: u64,
}

impl Missing {
    /// How many bytes that are now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.map.missing_bytes(self.capacity)
    }
}

/// Whether the file at `path` is a disk of which something is elsewhere, so that it is none by itself.
#[must_use]
pub fn is_partial(path: &Path) -> bool {
    sidecar::path_of(path).exists()
}

fn make(path: &Path, length: u64) -> Result<(), DiskError> {
    let host = |source| DiskError::Host { path: path.to_owned(), source };
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(host)?;
    file.set_len(length).map_err(host)
}

impl Backend for LayeredBackend {
    fn geometry(&self) -> Geometry {
        let Shared { local, base, .. } = &*self.shared;
        // One is the puller's.
        let channels = base.geometry().channels.saturating_sub(1).min(local.geometry().channels);
        Geometry { capacity: self.shared.length(), access: Access::ReadWrite, channels }
    }

    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(LayeredChannel::open(&self.shared)?))
    }

    fn grow(&self, capacity: u64) -> io::Result<u64> {
        if !self.shared.has_sidecar() {
            return self.shared.local.grow(capacity);
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "A disk that is partly elsewhere keeps its length"))
    }

    fn is_held_by_channels(&self) -> bool {
        self.shared.has_sidecar() && self.shared.base.is_held_by_channels()
    }

    fn release(&self) {
        self.shared.local.release();
        self.shared.base.release();
    }

    fn reacquire(&self) -> io::Result<()> {
        if self.shared.has_sidecar() {
            self.shared.base.reacquire()?;
        }
        self.shared.local.reacquire().inspect_err(|_| self.shared.base.release())
    }
}
