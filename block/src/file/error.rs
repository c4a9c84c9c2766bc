//! Why a file cannot be a disk, each with its remedy.

use crate::backend::Access;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a disk cannot be had.
#[derive(Debug, Error)]
pub enum DiskError {
    /// No such file.
    #[error("Disk {} does not exist; create it first, for instance with truncate -s 1G", path.display())]
    Missing {
        /// The disk.
        path: PathBuf,
    },
    /// The file may not be opened for writing.
    #[error("Disk {} may not be written; give write permission, or attach it read-only", path.display())]
    NotWritable {
        /// The disk.
        path: PathBuf,
    },
    /// The file may not be opened at all.
    #[error("Disk {} may not be read; give read permission to the user that runs the guest", path.display())]
    NotReadable {
        /// The disk.
        path: PathBuf,
    },
    /// A directory, a pipe, a terminal.
    #[error("Disk {} is neither a file nor a block device", path.display())]
    NotADisk {
        /// The disk.
        path: PathBuf,
    },
    /// Not whole sectors, or none.
    #[error("Disk {} is {length} bytes long; it must be a multiple of 512, and not 0: change it with truncate -s", path.display())]
    BadSize {
        /// The disk.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
    },
    /// It is to be shorter than it is.
    #[error("Disk {} is {was} bytes long and cannot become {wanted}: a disk can grow, but not shrink", path.display())]
    Shrinks {
        /// The disk.
        path: PathBuf,
        /// Its length in bytes.
        was: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// A block device is not as long as it is to be.
    #[error("Disk {} is {length} bytes long, and not {wanted}: make the device longer first", path.display())]
    Short {
        /// The disk.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// Its file system has no direct I/O.
    #[error("Disk {} is on a file system without direct I/O; leave out cache=none", path.display())]
    NoDirect {
        /// The disk.
        path: PathBuf,
    },
    /// Another guest, here or behind a shared file system, has the disk to itself.
    #[error(
        "Disk {} is locked by another writer; stop the guest that writes to it, or attach it read-only to every guest",
        path.display()
    )]
    Locked {
        /// The disk.
        path: PathBuf,
    },
    /// Others read the disk, so it cannot be had for writing.
    #[error("Disk {} is in use by a reader; stop it, or attach the disk read-only", path.display())]
    InUse {
        /// The disk.
        path: PathBuf,
    },
    /// Anything else.
    #[error("Could not open disk {}", path.display())]
    Host {
        /// The disk.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// What it means that a disk could not be opened.
pub(super) fn refusal(path: &Path, access: Access, source: io::Error) -> DiskError {
    let path = path.to_owned();
    match (source.kind(), access) {
        (io::ErrorKind::NotFound, _) => DiskError::Missing { path },
        (io::ErrorKind::IsADirectory, _) => DiskError::NotADisk { path },
        (io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem, Access::ReadWrite) => {
            DiskError::NotWritable { path }
        }
        (io::ErrorKind::PermissionDenied, Access::ReadOnly) => DiskError::NotReadable { path },
        _ => DiskError::Host { path, source },
    }
}
