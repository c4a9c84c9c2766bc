//! A disk in a raw file or on a block device of the host, with a lock that keeps a second writer away.
//!
//! Data go between the file and guest memory without a copy in between. The lock is an open file description lock over
//! the whole file: exclusive for a writer, shared for readers. It can be released and taken again, because it changes
//! hands with the guest. Invariant: nothing is written without it.

#![expect(unsafe_code, reason = "preadv, pwritev, fallocate and fcntl have no safe wrapper here")]

use super::{BlockBackend, SECTOR, Unmap};
use crate::virtio::GuestSlice;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use thiserror::Error;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

/// The most pieces in one call of `preadv` and `pwritev` (`IOV_MAX` in linux/uio.h).
const MAX_PIECES: usize = 1024;

/// What the guest may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read and write; nobody else may use the file.
    ReadWrite,
    /// Read; so may others.
    ReadOnly,
}

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

/// A raw file as a disk.
#[derive(Debug)]
pub struct FileBackend {
    file: File,
    path: PathBuf,
    access: Access,
    capacity: u64,
    lock: Lock,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    Held,
    NotHeld,
}

impl FileBackend {
    /// Opens and locks a disk.
    ///
    /// # Errors
    /// [`DiskError`] with the reason and the remedy.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let mut disk = Self::open_unlocked(path, access)?;
        disk.lock()?;
        Ok(disk)
    }

    /// Opens and checks a disk whose lock another end of a migration still holds. [`BlockBackend::reacquire`] takes the
    /// lock; until then nothing can be written.
    ///
    /// # Errors
    /// [`DiskError`] with the reason and the remedy.
    pub fn open_unlocked(path: &Path, access: Access) -> Result<Self, DiskError> {
        let owned = || path.to_owned();
        let writable = access == Access::ReadWrite;
        let opened = OpenOptions::new().read(true).write(writable).open(path);
        let mut file = opened.map_err(|source| refusal(path, access, source))?;
        let host = |source| DiskError::Host { path: path.to_owned(), source };
        let kind = file.metadata().map_err(host)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path: owned() });
        }
        // The length in the metadata of a block device is 0.
        let capacity = file.seek(SeekFrom::End(0)).map_err(host)?;
        if capacity == 0 || !capacity.is_multiple_of(SECTOR) {
            return Err(DiskError::BadSize { path: owned(), length: capacity });
        }
        Ok(Self { file, path: owned(), access, capacity, lock: Lock::NotHeld })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn lock(&mut self) -> Result<(), DiskError> {
        let path = || self.path.clone();
        let kind = match self.access {
            Access::ReadWrite => libc::F_WRLCK,
            Access::ReadOnly => libc::F_RDLCK,
        };
        let Err(refused) = self.fcntl_lock(libc::F_OFD_SETLK, kind) else {
            self.lock = Lock::Held;
            return Ok(());
        };
        if !matches!(refused.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
            return Err(DiskError::Host { path: path(), source: refused });
        }
        // Who has it? It may be gone by now, and then a writer is the better guess.
        match self.fcntl_lock(libc::F_OFD_GETLK, kind) {
            Ok(libc::F_RDLCK) => Err(DiskError::InUse { path: path() }),
            _ => Err(DiskError::Locked { path: path() }),
        }
    }

    /// Calls fcntl with a lock of `kind` over the whole file; the kind that it leaves there.
    fn fcntl_lock(&self, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: flock is a plain C struct, for which zeros are a value.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::c_short::try_from(kind).expect("lock kinds are 0, 1 and 2");
        lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).expect("SEEK_SET is 0");
        // SAFETY: the descriptor is open as long as `self` is borrowed; the kernel reads and writes one flock at the
        // address, which is a local of that type.
        let answer = unsafe { libc::fcntl(self.file.as_raw_fd(), command, &raw mut lock) };
        if answer == 0 { Ok(lock.l_type.into()) } else { Err(io::Error::last_os_error()) }
    }

    fn must_hold_lock(&self) -> io::Result<()> {
        match (self.access, self.lock) {
            (Access::ReadWrite, Lock::Held) => Ok(()),
            (Access::ReadWrite, Lock::NotHeld) => Err(io::Error::other("The disk's writer lock is not held")),
            (Access::ReadOnly, _) => Err(io::Error::from(io::ErrorKind::PermissionDenied)),
        }
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        let (offset, length) = (file_offset(offset)?, file_offset(length)?);
        // SAFETY: fallocate works on the descriptor, which is open as long as `self` is borrowed, and on no memory.
        let answer = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) };
        if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn write_out_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let zeroes = [0; 64 << 10];
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).map_or(zeroes.len(), |rest| rest.min(zeroes.len()));
            self.file.write_all_at(&zeroes[..part], offset + done)?;
            done += part as u64;
        }
        Ok(())
    }
}

impl BlockBackend for FileBackend {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn read_vectored_at(&self, into: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        transfer(into, offset, |pieces, offset| {
            let pointers: Vec<_> = pieces.iter().map(VolatileSlice::ptr_guard_mut).collect();
            let vectors: Vec<_> = pointers
                .iter()
                .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
                .collect();
            let count = libc::c_int::try_from(vectors.len()).expect("at most MAX_PIECES");
            // SAFETY: each vector is a piece of guest memory that is mapped, and writable, as long as its slice and guard
            // live, which is beyond this call. The guest may access it meanwhile: it is shared memory that no Rust
            // reference points to. The descriptor is open as long as `self` is borrowed.
            let read = unsafe { libc::preadv(self.file.as_raw_fd(), vectors.as_ptr(), count, offset) };
            let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
            mark_dirty(pieces, read);
            Ok(read)
        })
    }

    fn write_vectored_at(&self, from: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        self.must_hold_lock()?;
        transfer(from, offset, |pieces, offset| {
            let pointers: Vec<_> = pieces.iter().map(VolatileSlice::ptr_guard).collect();
            let vectors: Vec<_> = pointers
                .iter()
                .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
                .collect();
            let count = libc::c_int::try_from(vectors.len()).expect("at most MAX_PIECES");
            // SAFETY: as for preadv above; the kernel only reads the pieces, in spite of the pointer's type.
            let written = unsafe { libc::pwritev(self.file.as_raw_fd(), vectors.as_ptr(), count, offset) };
            usize::try_from(written).map_err(|_| io::Error::last_os_error())
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.must_hold_lock()?;
        if length == 0 {
            return Ok(());
        }
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            outcome => outcome,
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: Unmap) -> io::Result<()> {
        self.must_hold_lock()?;
        if length == 0 {
            return Ok(());
        }
        let mode = match unmap {
            Unmap::Allowed => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Unmap::Forbidden => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        };
        match self.fallocate(mode, offset, length) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_out_zeroes(offset, length),
            outcome => outcome,
        }
    }

    fn release(&mut self) {
        self.lock = Lock::NotHeld;
        if let Err(error) = self.fcntl_lock(libc::F_OFD_SETLK, libc::F_UNLCK) {
            tracing::warn!(path = %self.path.display(), %error, "Could not unlock a disk");
        }
    }

    fn reacquire(&mut self) -> io::Result<()> {
        self.lock().map_err(io::Error::other)
    }
}

/// Moves all of `slices` by calls of `step`, which takes some pieces and an offset and says how many bytes it moved.
fn transfer<'a>(
    slices: &[GuestSlice<'a>],
    offset: u64,
    mut step: impl FnMut(&[GuestSlice<'a>], libc::off_t) -> io::Result<usize>,
) -> io::Result<()> {
    let mut offset = offset;
    let mut rest: Vec<_> = slices.iter().rev().cloned().collect();
    while !rest.is_empty() {
        let pieces: Vec<_> = rest.iter().rev().take(MAX_PIECES).cloned().collect();
        let mut moved = match step(&pieces, file_offset(offset)?) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        offset += moved as u64;
        while let Some(piece) = rest.pop() {
            if moved < piece.len() {
                rest.extend(piece.offset(moved));
                break;
            }
            moved -= piece.len();
        }
    }
    Ok(())
}

/// What it means that a disk could not be opened.
fn refusal(path: &Path, access: Access, source: io::Error) -> DiskError {
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

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Marks the first `length` bytes of `pieces`; after they were written, so that no harvest in between is believed.
fn mark_dirty(pieces: &[GuestSlice<'_>], length: usize) {
    let mut rest = length;
    for piece in pieces {
        let part = rest.min(piece.len());
        piece.bitmap().mark_dirty(0, part);
        rest -= part;
    }
}

#[cfg(test)]
mod tests;
