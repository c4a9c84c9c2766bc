//! Disks that come to the target before the guest, with its memory: the files that they come to there.
//!
//! ```text
//! make_room: note, file ──► open, hold ──► pages come ──► guest runs: the note goes
//!                   └── the offer is refused: file and note go     └── the move fails: both stay, for the next one
//! ```
//! A file is taken for a start if its note says that it is an old copy of the same disk.

use super::pages::MovingDisk;
use crate::config::{DiskPlace, MachineConfig, Places};
use crate::machine::Resources;
use crate::old_copy::{self, OldCopy};
use block::layered::MAX_CAPACITY;
use block::{Backend, SECTOR};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a disk does not find room at a target.
#[derive(Debug, Error)]
pub enum NoRoom {
    /// There is no file for it.
    #[error(
        "Disk {id:?} moves with the guest, and this host has no file for it: name one by `godwit receive --disk {id}=FILE`"
    )]
    NoFile {
        /// The disk.
        id: String,
    },
    /// The file system is too full.
    #[error(
        "There are {free} bytes free for disk {id:?} at {}, and it takes {space}: make room, or name another file",
        file.display()
    )]
    Full {
        /// The disk.
        id: String,
        /// The file.
        file: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that it takes.
        space: u64,
    },
    /// Something is in the way.
    #[error(
        "{} is there already, and nothing says that it is an old copy of disk {id:?}: remove it, or name another file",
        file.display()
    )]
    InTheWay {
        /// The disk.
        id: String,
        /// The file.
        file: PathBuf,
    },
    /// An old copy is of another length.
    #[error("{} is {found} bytes long, and disk {id:?} is {length}: remove it, or name another file", file.display())]
    Length {
        /// The disk.
        id: String,
        /// The file.
        file: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// The disk's length in bytes.
        length: u64,
    },
    /// The source says that a disk has an impossible length.
    #[error(
        "Disk {id:?} is {length} bytes long: it may be a whole number of sectors, and all disks together {MAX_CAPACITY} bytes"
    )]
    NoLength {
        /// The disk.
        id: String,
        /// Its length in bytes.
        length: u64,
    },
    /// The source names a disk twice.
    #[error("Disk {id:?} is offered twice")]
    Twice {
        /// The disk.
        id: String,
    },
    /// Anything else.
    #[error("Could not use {} for disk {id:?}", file.display())]
    Host {
        /// The disk.
        id: String,
        /// The file.
        file: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A disk that moves with its guest's memory, as a source tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirroredDisk {
    /// Its name in the machine.
    pub id: String,
    /// Its length in bytes.
    pub length: u64,
    /// How much space it takes, in bytes, where the source knows: holes take none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space: Option<u64>,
}

/// The files of such disks.
#[derive(Debug)]
pub(super) struct Room {
    files: Vec<RoomOfDisk>,
}

#[derive(Debug)]
struct RoomOfDisk {
    id: String,
    file: PathBuf,
    /// Whether this made it, and nothing has come to it yet.
    is_fresh: bool,
}

impl Drop for RoomOfDisk {
    fn drop(&mut self) {
        if self.is_fresh {
            let removed = std::fs::remove_file(&self.file).and_then(|()| old_copy::remove(&self.file));
            if let Err(error) = removed {
                tracing::warn!(%error, file = %self.file.display(), "A file that nothing came to stays");
            }
        }
    }
}

impl Room {
    /// Finds or makes a file for each of `disks` at `host`, and has `config` mean them.
    pub(super) fn make(config: &mut MachineConfig, disks: &[MirroredDisk], host: &str) -> Result<Self, NoRoom> {
        let mut room = Self { files: Vec::new() };
        let (machine, mut all) = (config.uuid, 0_u64);
        for MirroredDisk { id, length, space } in disks {
            let (id, length) = (id.clone(), *length);
            let Some(disk) = config.disks.iter_mut().find(|disk| disk.id == id) else {
                return Err(NoRoom::NoFile { id });
            };
            all = all.saturating_add(length);
            if length == 0 || !length.is_multiple_of(SECTOR) || all > MAX_CAPACITY {
                return Err(NoRoom::NoLength { id, length });
            }
            if room.has(&id) {
                return Err(NoRoom::Twice { id });
            }
            let file = match &disk.place {
                DiskPlace::File(file) => Some(file),
                // It is not there yet, as a file that is to be made should not be.
                DiskPlace::Nbd(_) | DiskPlace::Layered(_) => disk.places.local.get(host),
            };
            let Some(file) = file.cloned() else { return Err(NoRoom::NoFile { id }) };
            let is_fresh = prepare(&id, &file, length, *space, old_copy::identity(machine, &id))?;
            disk.place = DiskPlace::File(file.clone());
            // From the hand-over on no other place has what the guest writes.
            disk.places = Places::default();
            room.files.push(RoomOfDisk { id, file, is_fresh });
        }
        Ok(room)
    }

    /// Whether it has a disk of this name.
    pub(super) fn has(&self, id: &str) -> bool {
        self.files.iter().any(|room| room.id == id)
    }

    /// The disks in it as pages, to be written by nobody else from now on.
    pub(super) fn open(&self, config: &MachineConfig, resources: &Resources) -> Result<Vec<MovingDisk>, NoRoom> {
        let open = |room: &RoomOfDisk| {
            let failed = |source| NoRoom::Host { id: room.id.clone(), file: room.file.clone(), source };
            let place = config.disks.iter().position(|disk| disk.id == room.id);
            let backend = place.and_then(|place| resources.disks.backends.get(place));
            let backend = backend.ok_or_else(|| NoRoom::NoFile { id: room.id.clone() })?;
            backend.reacquire().map_err(failed)?;
            MovingDisk::open(&**backend, room.is_fresh).map_err(failed)
        };
        self.files.iter().map(open).collect()
    }

    /// Something may come now: the files stay, whatever happens.
    pub(super) fn keep(&mut self) {
        self.files.iter_mut().for_each(|room| room.is_fresh = false);
    }

    /// The guest runs on the disks in it from now on.
    pub(super) fn settle(self) {
        for room in &self.files {
            if let Err(error) = old_copy::remove(&room.file) {
                tracing::error!(%error, "{} stays, and must be removed before disk {} is used once more",
                    old_copy::place(&room.file).display(), room.id);
            }
        }
    }
}

/// Finds or makes the file of one disk; whether it was made.
fn prepare(id: &str, file: &Path, length: u64, space: Option<u64>, identity: uuid::Uuid) -> Result<bool, NoRoom> {
    let host = |source| NoRoom::Host { id: id.to_owned(), file: file.to_owned(), source };
    let there = match std::fs::symlink_metadata(file) {
        Ok(_) => Some(std::fs::metadata(file).map_err(host)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(host(error)),
    };
    if let Some(there) = there {
        let is_old = old_copy::read(file).map_err(host)?.is_some_and(|note| note.disk == identity);
        if !is_old {
            return Err(NoRoom::InTheWay { id: id.to_owned(), file: file.to_owned() });
        }
        if there.len() != length {
            let (id, file, found) = (id.to_owned(), file.to_owned(), there.len());
            return Err(NoRoom::Length { id, file, found, length });
        }
        return Ok(false);
    }
    if let (Some(space), Some(free)) = (space, room_for(file))
        && space > free
    {
        return Err(NoRoom::Full { id: id.to_owned(), file: file.to_owned(), free, space });
    }
    let made = OpenOptions::new().write(true).create_new(true).open(file).map_err(host)?;
    let why = "A move that brings the disk there may not have ended".to_owned();
    let noted = old_copy::write(file, &OldCopy { disk: identity, why }).and_then(|()| made.set_len(length));
    noted.map_err(|source| {
        // It was made here, and is empty. The failure that is told is the first.
        let _ = std::fs::remove_file(file);
        let _ = old_copy::remove(file);
        host(source)
    })?;
    Ok(true)
}

/// How many bytes may be written to a file that is to be made; `None` if the host does not tell.
pub(super) fn room_for(file: &Path) -> Option<u64> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let folder = File::open(folder).ok()?;
    let system = rustix::fs::fstatvfs(&folder).ok()?;
    system.f_bavail.checked_mul(system.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Disk, DiskCache, DiskLimits};
    use tempfile::TempDir;

    const LENGTH: u64 = 1 << 20;

    fn machine(file: &Path, uuid: &str) -> MachineConfig {
        let json = format!(
            r#"{{"version":1,"name":"m","uuid":"{uuid}","cpus":{{"count":1}},"memory":{{"bytes":33554432}},
                "boot":{{"kernel":"/k"}}}}"#
        );
        let mut config: MachineConfig = serde_json::from_str(&json).unwrap();
        config.disks.push(Disk {
            id: "data".into(),
            place: DiskPlace::File(file.to_owned()),
            read_only: false,
            cache: DiskCache::default(),
            queues: 1,
            timeout_ms: None,
            limits: DiskLimits::default(),
            places: Places::default(),
        });
        config
    }

    const ONE: &str = "00000000-0000-0000-0000-000000000001";
    const OTHER: &str = "00000000-0000-0000-0000-000000000002";

    fn make(file: &Path, uuid: &str, length: u64, space: Option<u64>) -> Result<Room, NoRoom> {
        let disk = MirroredDisk { id: "data".into(), length, space };
        Room::make(&mut machine(file, uuid), &[disk], "here")
    }

    #[test]
    fn a_file_is_made_and_goes_unless_something_comes() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("disk.img");
        let room = make(&file, ONE, LENGTH, Some(4096)).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().len(), LENGTH);
        assert!(room.has("data") && !room.has("date") && old_copy::read(&file).unwrap().is_some());
        drop(room);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

        let mut room = make(&file, ONE, LENGTH, None).unwrap();
        room.keep();
        drop(room);
        let told = make(&file, OTHER, LENGTH, None).unwrap_err().to_string();
        assert!(told.contains("nothing says that it is an old copy"), "{told}");
        let told = make(&file, ONE, LENGTH + 512, None).unwrap_err().to_string();
        assert!(told.contains("is 1048576 bytes long, and disk \"data\" is 1049088"), "{told}");
        let room = make(&file, ONE, LENGTH, Some(u64::MAX)).unwrap();
        room.settle();
        assert!(file.exists() && old_copy::read(&file).unwrap().is_none(), "the guest runs on it");
        let told = make(&file, ONE, LENGTH, None).unwrap_err().to_string();
        assert!(told.contains("is there already"), "{told}");
    }

    #[test]
    fn what_cannot_be_is_refused_and_leaves_nothing() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("disk.img");
        let told = make(&file, ONE, LENGTH, Some(u64::MAX)).unwrap_err().to_string();
        assert!(told.contains("bytes free for disk"), "{told}");
        for length in [0, 4097, MAX_CAPACITY + 512, u64::MAX] {
            assert!(matches!(make(&file, ONE, length, None), Err(NoRoom::NoLength { .. })), "{length}");
        }
        let disk = MirroredDisk { id: "data".into(), length: LENGTH, space: None };
        let twice = Room::make(&mut machine(&file, ONE), &[disk.clone(), disk], "here");
        assert!(matches!(twice, Err(NoRoom::Twice { .. })));
        // A link to what is not there now is not nothing.
        let link = folder.path().join("link.img");
        std::os::unix::fs::symlink(folder.path().join("volume"), &link).unwrap();
        assert!(matches!(make(&link, ONE, LENGTH, None), Err(NoRoom::Host { .. })));
        std::fs::remove_file(&link).unwrap();
        let nowhere = folder.path().join("no/such/folder");
        assert!(matches!(make(&nowhere, ONE, LENGTH, None), Err(NoRoom::Host { .. })));
        let disk = MirroredDisk { id: "date".into(), length: LENGTH, space: None };
        let unknown = Room::make(&mut machine(&file, ONE), &[disk], "here");
        assert!(matches!(unknown, Err(NoRoom::NoFile { id }) if id == "date"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
