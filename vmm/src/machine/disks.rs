//! A machine's disks: where each is opened, and how those come that are partly elsewhere.

use super::ends::Ends;
use crate::config::{Disk, DiskCache, DiskLimits, DiskPlace, ExportUri, Layer, MachineConfig};
use crate::old_copy;
use crate::seccomp;
use block::file::{Engine, FileOptions, HostCache};
use block::layered::{LayeredError, OnceWhole, Pulled, Puller, is_partial};
use block::{Access, Backend, DiskError, FileBackend, LayeredBackend, LoggedBackend, NbdBackend, NbdError, NbdOptions};
use devices::virtio::blk::{BlkParts, Limits, WriteCache};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

/// Why a disk cannot be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// A file.
    #[error(transparent)]
    File(#[from] DiskError),
    /// An export.
    #[error(transparent)]
    Export(#[from] NbdError),
    /// A file over an export.
    #[error(transparent)]
    Layered(#[from] LayeredError),
    /// Its locks.
    #[error("Disk {id} is not to be had")]
    Held {
        /// The disk.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file is not all of a disk.
    #[error(
        "Disk {} is not all here: a move that brings it has not ended. Add base=URI to its path, with the export that has the rest",
        path.display()
    )]
    Partial {
        /// The file.
        path: PathBuf,
    },
    /// A file is an old copy of a disk.
    #[error("{} is an old copy of a disk: {why}. Remove {} to use it as it is", path.display(), note.display())]
    Old {
        /// The file.
        path: PathBuf,
        /// What says so.
        note: PathBuf,
        /// Why.
        why: String,
    },
    /// The base of a disk serves one connection, where the guest and what fetches the rest need one each.
    #[error(
        "{base} takes one connection at a time, and disk {id}, which comes from there, needs more: let its server share it"
    )]
    OneConnection {
        /// The disk.
        id: String,
        /// Where it comes from.
        base: String,
    },
    /// A disk that is written cannot be read-only.
    #[error("Disk {id} comes to its file while it is used, and cannot be read-only")]
    ReadOnly {
        /// The disk.
        id: String,
    },
    /// A disk has more queues than its server takes connections.
    #[error("Disk {id} has {queues} queues, but {place} takes {channels} connections: give it queues={channels}")]
    Queues {
        /// The disk.
        id: String,
        /// Its queues.
        queues: u16,
        /// Where it is.
        place: String,
        /// The connections.
        channels: usize,
    },
}

/// Whether the locks of disks are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskLocks {
    /// Take them now.
    Take,
    /// The source of a migration still holds them; they are taken with the guest.
    Leave,
}

/// The open disks of a machine.
#[derive(Debug)]
pub(crate) struct Disks {
    /// All of them, in the order of the configuration.
    pub(crate) backends: Vec<Arc<LoggedBackend>>,
    /// Those that are partly elsewhere.
    pub(super) coming: Vec<Coming>,
}

impl Disks {
    /// Opens the disks of `config`.
    pub(crate) fn open(config: &MachineConfig, locks: DiskLocks) -> Result<Self, OpenError> {
        let mut disks = Self { backends: Vec::new(), coming: Vec::new() };
        for disk in &config.disks {
            let backend = disks.open_one(config.uuid, disk, locks)?;
            let channels = backend.geometry().channels;
            if usize::from(disk.queues) > channels {
                let (id, place) = (disk.id.clone(), disk.place.to_string());
                return Err(OpenError::Queues { id, queues: disk.queues, place, channels });
            }
            disks.backends.push(Arc::new(LoggedBackend::new(backend)));
        }
        Ok(disks)
    }

    fn open_one(&mut self, machine: Uuid, disk: &Disk, locks: DiskLocks) -> Result<Arc<dyn Backend>, OpenError> {
        let access = if disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
        match &disk.place {
            DiskPlace::File(path) => {
                if is_partial(path) {
                    return Err(OpenError::Partial { path: path.clone() });
                }
                let options = file_options(disk, access);
                Ok(Arc::new(match locks {
                    DiskLocks::Take => FileBackend::open(path, options)?,
                    DiskLocks::Leave => FileBackend::open_unlocked(path, options)?,
                }))
            }
            DiskPlace::Nbd(uri) => Ok(Arc::new(open_export(uri, disk, access, locks)?)),
            DiskPlace::Layered(_) if disk.read_only => Err(OpenError::ReadOnly { id: disk.id.clone() }),
            DiskPlace::Layered(layer) => {
                if !layer.file.exists() {
                    // A note of a file that is not there says nothing of the one that is made.
                    old_copy::remove(&layer.file).map_err(|source| OpenError::Held { id: disk.id.clone(), source })?;
                }
                let layered = Arc::new(open_layered(layer, machine, disk)?);
                if locks == DiskLocks::Take {
                    layered.reacquire().map_err(|source| OpenError::Held { id: disk.id.clone(), source })?;
                }
                self.coming.push(Coming { id: disk.id.clone(), disk: Arc::clone(&layered), puller: None });
                Ok(layered)
            }
        }
    }
}

fn open_layered(layer: &Layer, machine: Uuid, disk: &Disk) -> Result<LayeredBackend, OpenError> {
    let Layer { file, base, lent } = layer;
    // What was begun for one disk is not gone on with for another; of what is done by hand nothing is known.
    let identity = lent.then(|| Uuid::new_v5(&machine, disk.id.as_bytes()).into_bytes());
    let (access, once_whole) =
        if *lent { (Access::ReadWrite, OnceWhole::GiveUp) } else { (Access::ReadOnly, OnceWhole::Keep) };
    let place = base.0.to_string();
    let base = Arc::new(open_export(base, disk, access, DiskLocks::Leave)?);
    if base.geometry().channels < 2 {
        return Err(OpenError::OneConnection { id: disk.id.clone(), base: place });
    }
    Ok(LayeredBackend::open(file, identity, base, once_whole, file_options(disk, Access::ReadWrite))?)
}

/// How the file of `disk` is opened.
pub(crate) fn file_options(disk: &Disk, access: Access) -> FileOptions {
    let host_cache = match disk.cache {
        DiskCache::Writeback | DiskCache::Writethrough => HostCache::Used,
        DiskCache::None => HostCache::Bypassed,
    };
    FileOptions { access, host_cache, engine: Engine::Auto, thread_start: seccomp::enter_worker }
}

fn open_export(uri: &ExportUri, disk: &Disk, access: Access, locks: DiskLocks) -> Result<NbdBackend, NbdError> {
    let fail_after = disk.timeout_ms.map(|ms| Duration::from_millis(ms.get().into()));
    let options = NbdOptions { fail_after, thread_start: seccomp::enter_dialler, ..NbdOptions::new(access) };
    match locks {
        DiskLocks::Take => NbdBackend::open(&uri.0, options),
        DiskLocks::Leave => NbdBackend::open_unlocked(&uri.0, options),
    }
}

/// What the disk `disk` needs, on its open back end.
pub(super) fn blk_parts(disk: &Disk, backend: Arc<dyn Backend>) -> BlkParts {
    let DiskLimits { bytes_per_second: bytes, requests_per_second: requests } = disk.limits;
    let write_cache = match disk.cache {
        DiskCache::Writeback | DiskCache::None => WriteCache::Back,
        DiskCache::Writethrough => WriteCache::Through,
    };
    BlkParts {
        backend,
        serial: disk.id.clone(),
        queues: disk.queues,
        write_cache,
        limits: Limits { bytes, requests },
        thread_start: seccomp::enter_worker,
    }
}

/// A disk that comes to its place while the guest uses it.
#[derive(Debug)]
pub(super) struct Coming {
    pub(super) id: String,
    pub(super) disk: Arc<LayeredBackend>,
    /// What fetches it, from the guest's first moment on.
    puller: Option<Puller>,
}

impl Coming {
    /// Begins to fetch the rest, if that has not begun. `ends` hears when all is here.
    pub(super) fn fetch(&mut self, ends: &Arc<Ends>) {
        if self.puller.is_some() {
            return;
        }
        self.disk.keep();
        // Weak, since this belongs to the machine that is told.
        let (ends, id) = (Arc::downgrade(ends), self.id.clone());
        let started = Puller::start(&self.disk, seccomp::enter_disk_puller, move |pulled| match pulled {
            Pulled::Whole => ends.upgrade().into_iter().for_each(|ends| ends.on_whole_disk(&id)),
            Pulled::Released => tracing::info!(disk = id, "Its base is not needed any more"),
        });
        match started {
            Ok(puller) => self.puller = Some(puller),
            Err(error) => tracing::warn!(%error, disk = self.id, "Only what the guest reads comes"),
        }
    }

    /// Whether there is nothing more to do for it.
    pub(super) fn is_over(&self) -> bool {
        self.disk.is_whole() && self.puller.as_ref().is_none_or(Puller::is_over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Places;

    fn disk(place: DiskPlace) -> Disk {
        Disk {
            id: "blk0".into(),
            place,
            read_only: false,
            cache: DiskCache::default(),
            queues: 1,
            timeout_ms: None,
            limits: DiskLimits::default(),
            places: Places::default(),
        }
    }

    fn open(disk: &Disk, locks: DiskLocks) -> Result<Arc<dyn Backend>, OpenError> {
        Disks { backends: Vec::new(), coming: Vec::new() }.open_one(Uuid::nil(), disk, locks)
    }

    #[test]
    fn a_disk_is_opened_with_and_without_its_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let disk = disk(DiskPlace::File(file.path().into()));
        let held = open(&disk, DiskLocks::Take).unwrap();
        assert!(matches!(open(&disk, DiskLocks::Take), Err(OpenError::File(DiskError::Locked { .. }))));
        open(&disk, DiskLocks::Leave).unwrap();
        drop(held);
        open(&disk, DiskLocks::Take).unwrap();
    }

    #[test]
    fn a_part_of_a_disk_is_no_disk() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("data.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        std::fs::write(folder.path().join("data.img.map"), []).unwrap();
        let error = open(&disk(DiskPlace::File(path.clone())), DiskLocks::Take).unwrap_err();
        assert!(error.to_string().contains("is not all here") && error.to_string().contains("base=URI"), "{error}");
        let base = ExportUri(format!("nbd+unix:///x?socket={}", folder.path().join("no").display()).parse().unwrap());
        let layer = DiskPlace::Layered(Layer { file: path, base, lent: false });
        let read_only = Disk { read_only: true, ..disk(layer.clone()) };
        assert!(matches!(open(&read_only, DiskLocks::Take), Err(OpenError::ReadOnly { .. })));
        assert!(matches!(open(&disk(layer), DiskLocks::Take), Err(OpenError::Export(_))));
    }
}
