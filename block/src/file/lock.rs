//! The lock that keeps a second writer away from a file.
//!
//! It is an open file description lock over the whole file: exclusive for a writer, shared for readers. It can be released
//! and taken again, because it changes hands with the guest. Invariant: nothing is written without it.

#![expect(unsafe_code, reason = "open file description locks have no safe wrapper")]

use super::DiskError;
use crate::backend::Access;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
    access: Access,
    held: AtomicBool,
}

impl Lock {
    /// The lock of an open `file`, not taken yet.
    pub(super) fn of(file: File, path: PathBuf, access: Access) -> Self {
        Self { file, path, access, held: AtomicBool::new(false) }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    /// Takes it.
    ///
    /// # Errors
    /// [`DiskError`] that tells who has it, as far as the host does.
    pub(super) fn take(&self) -> Result<(), DiskError> {
        let path = || self.path.clone();
        let kind = match self.access {
            Access::ReadWrite => libc::F_WRLCK,
            Access::ReadOnly => libc::F_RDLCK,
        };
        let Err(refused) = self.fcntl(libc::F_OFD_SETLK, kind) else {
            self.held.store(true, Ordering::Release);
            return Ok(());
        };
        if !matches!(refused.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
            return Err(DiskError::Host { path: path(), source: refused });
        }
        // Who has it? It may be gone by now, and then a writer is the better guess.
        match self.fcntl(libc::F_OFD_GETLK, kind) {
            Ok(libc::F_RDLCK) => Err(DiskError::InUse { path: path() }),
            _ => Err(DiskError::Locked { path: path() }),
        }
    }

    pub(super) fn release(&self) {
        self.held.store(false, Ordering::Release);
        if let Err(error) = self.fcntl(libc::F_OFD_SETLK, libc::F_UNLCK) {
            tracing::warn!(path = %self.path.display(), %error, "Could not unlock a disk");
        }
    }

    /// Whether the file may be written now.
    ///
    /// # Errors
    /// Why it may not.
    pub(super) fn permits_writes(&self) -> io::Result<()> {
        match (self.access, self.held.load(Ordering::Acquire)) {
            (Access::ReadWrite, true) => Ok(()),
            (Access::ReadWrite, false) => Err(io::Error::other("The disk's writer lock is not held")),
            (Access::ReadOnly, _) => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    /// Calls fcntl with a lock of `kind` over the whole file; the kind that it leaves there.
    fn fcntl(&self, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: flock is a plain C struct, for which zeros are a value.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = libc::c_short::try_from(kind).expect("lock kinds are 0, 1 and 2");
        lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).expect("SEEK_SET is 0");
        // SAFETY: the descriptor is open as long as `self` is borrowed; the kernel reads and writes one flock at the
        // address, which is a local of that type.
        let answer = unsafe { libc::fcntl(self.file.as_raw_fd(), command, &raw mut lock) };
        if answer == 0 { Ok(lock.l_type.into()) } else { Err(io::Error::last_os_error()) }
    }
}
