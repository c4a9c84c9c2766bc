//! Disks that come to the target before the guest: what this host, the source, does with them.
//!
//! They are further regions of what moves page by page: read through the back end while the guest uses it, and what the guest
//! writes meanwhile is logged and sent again. From the moment on at which the guest may be the target's, their files here are
//! noted to be old copies ([`crate::old_copy`]); of exports and block devices nothing is noted.

use super::lending::space_of;
use super::mirrored::MirroredDisk;
use super::pages::{GuestPlaces, MovingDisk};
use crate::config::DiskPlace;
use crate::machine::Machine;
use crate::old_copy::{self, OldCopy};
use block::{Backend, LoggedBackend};
use control::PeerAddress;
use migration::{DirtyLedger, RegionId};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;
use uuid::Uuid;

/// Why disks do not move with their guest.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// A disk cannot be read beside the guest.
    #[error("Disk {id} cannot be read while the guest uses it")]
    Open {
        /// The disk.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What its file is cannot be noted.
    #[error("It cannot be noted beside {} whether it is an old copy", file.display())]
    Note {
        /// The file.
        file: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// The disks that come before the guest.
#[derive(Debug)]
pub struct Mirror {
    places: GuestPlaces,
    disks: Vec<Mirrored>,
    /// The files that the target will have in its own place, those of disks that come after the guest, too.
    files: Vec<File>,
    /// The region of the first disk.
    first: u16,
}

#[derive(Debug)]
struct Mirrored {
    id: String,
    backend: Arc<LoggedBackend>,
    space: Option<u64>,
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    disk: Uuid,
}

impl Mirror {
    /// Gets ready to send the disks of these names before `machine`, and notes which go `after` it.
    ///
    /// # Errors
    /// [`MirrorError`]; nothing has changed then.
    pub fn open(machine: &Machine, before: &[String], after: &[String]) -> Result<Self, MirrorError> {
        let config = machine.config();
        let (mut disks, mut moving, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for (disk, backend) in config.disks.iter().zip(machine.logged_disks()) {
            let (goes_before, goes_after) = (before.contains(&disk.id), after.contains(&disk.id));
            let file = match &disk.place {
                DiskPlace::File(path) => Some(path),
                DiskPlace::Nbd(_) | DiskPlace::Layered(_) => None,
            };
            if goes_before {
                let failed = |source| MirrorError::Open { id: disk.id.clone(), source };
                moving.push(MovingDisk::open(&**backend, false).map_err(failed)?);
                let space = file.and_then(|path| space_of(path));
                disks.push(Mirrored { id: disk.id.clone(), backend: Arc::clone(backend), space });
            }
            // What is beside a block device does not last.
            if let (Some(path), true) = (file.filter(|path| path.is_file()), goes_before || goes_after) {
                old_copy::try_write(path).map_err(|source| MirrorError::Note { file: path.clone(), source })?;
                files.push(File { path: path.clone(), disk: old_copy::identity(config.uuid, &disk.id) });
            }
        }
        let first = u16::try_from(machine.memory().regions().len()).expect("memory has one region or two");
        Ok(Self { places: GuestPlaces::new(machine.memory().clone(), moving), disks, files, first })
    }

    /// All that moves page by page.
    #[must_use]
    pub fn places(&self) -> &GuestPlaces {
        &self.places
    }

    /// What the target is told, in the order of the regions.
    #[must_use]
    pub fn offered(&self) -> Vec<MirroredDisk> {
        let tell = |disk: &Mirrored| MirroredDisk {
            id: disk.id.clone(),
            length: disk.backend.geometry().capacity,
            space: disk.space,
        };
        self.disks.iter().map(tell).collect()
    }

    /// Logs what the guest writes from now on.
    pub fn start_log(&self) {
        self.disks.iter().for_each(|disk| disk.backend.log().start(disk.backend.geometry().capacity));
    }

    /// Marks what the guest has written.
    pub fn harvest(&self, ledger: &mut DirtyLedger) {
        for (disk, region) in self.disks.iter().zip(self.first..) {
            disk.backend.log().take(|first, written| {
                let inside = ledger.mark_words(RegionId(region), first, &[written]);
                debug_assert!(inside, "the log has one bit per page of the disk");
            });
        }
    }

    /// Ends the log.
    pub fn stop_log(&self) {
        self.disks.iter().for_each(|disk| disk.backend.log().stop());
    }

    /// Notes that the disks may be at `to` from now on.
    ///
    /// # Errors
    /// [`MirrorError::Note`]; some may be noted.
    pub fn note_gone(&self, to: &PeerAddress) -> Result<(), MirrorError> {
        let why = format!("The disk may have moved with its guest to {to}");
        self.files.iter().try_for_each(|File { path, disk }| {
            let note = OldCopy { disk: *disk, why: why.clone() };
            old_copy::write(path, &note).map_err(|source| MirrorError::Note { file: path.clone(), source })
        })
    }

    /// Notes that the disks have stayed.
    ///
    /// # Errors
    /// [`MirrorError::Note`]; all were tried.
    pub fn note_kept(&self) -> Result<(), MirrorError> {
        let kept = self.files.iter().map(|File { path, .. }| {
            let removed = old_copy::remove(path).and_then(|()| old_copy::sync_folder(path));
            removed.map_err(|source| MirrorError::Note { file: path.clone(), source })
        });
        kept.fold(Ok(()), Result::and)
    }
}
