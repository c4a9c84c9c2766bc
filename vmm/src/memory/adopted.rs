//! A memory file that another process of this host passed: looked at before it is mapped.
//!
//! Whoever passed it goes on to hold it, so only what cannot change counts. A file that is sealed against shrinking never
//! turns an access of the guest's into SIGBUS; its kind and page size are those of its file system.

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat, fstatfs};
use std::io;
use std::os::fd::BorrowedFd;
use thiserror::Error;

/// Why a file is not mapped as guest memory.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// It is something else.
    #[error("{found} was passed where guest memory should have been")]
    NotMemory {
        /// What it is.
        found: &'static str,
    },
    /// It could be cut off under the guest.
    #[error("The memory file that was passed is not sealed against shrinking and growing")]
    NotSealed,
    /// Nobody can write to it.
    #[error("The memory file that was passed is sealed against writing")]
    ReadOnly,
    /// It is not as long as the guest's memory.
    #[error("The memory file that was passed has {found} bytes, and the guest's memory {expected}")]
    Size {
        /// Its length.
        found: u64,
        /// The guest's.
        expected: u64,
    },
    /// It does not have the pages that the machine is described with.
    #[error("The memory file that was passed has pages of {found} bytes, and the machine's have {expected}")]
    PageSize {
        /// Its pages.
        found: u64,
        /// The machine's.
        expected: u64,
    },
    /// The host does not tell what it is.
    #[error("The host does not tell what was passed as guest memory")]
    Host(#[from] io::Error),
}

/// Checks that `file` is a memory file of `bytes` bytes in pages of `page` bytes that stays as it is.
pub(super) fn check(file: BorrowedFd<'_>, bytes: u64, page: u64) -> Result<(), AdoptError> {
    let stat = fstat(file).map_err(io::Error::from)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return Err(AdoptError::NotMemory { found: in_words(kind) });
    }
    // Only files in memory have seals (fcntl(2)).
    let seals = fcntl_get_seals(file).map_err(|_| AdoptError::NotMemory { found: "A file on a disk" })?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(AdoptError::NotSealed);
    }
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(AdoptError::ReadOnly);
    }
    let found = u64::try_from(stat.st_size).unwrap_or(0);
    if found != bytes {
        return Err(AdoptError::Size { found, expected: bytes });
    }
    // The block size of a file with transparent huge pages is theirs, that of its file system is not.
    let found = u64::try_from(fstatfs(file).map_err(io::Error::from)?.f_bsize).unwrap_or(0);
    if found == page { Ok(()) } else { Err(AdoptError::PageSize { found, expected: page }) }
}

fn in_words(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "A file",
        FileType::Directory => "A folder",
        FileType::Fifo => "A pipe",
        FileType::Socket => "A socket",
        FileType::CharacterDevice | FileType::BlockDevice => "A device",
        FileType::Symlink | FileType::Unknown => "Something without a name",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
    use std::fs::File;
    use std::os::fd::{AsFd, OwnedFd};

    const BYTES: u64 = 1 << 21;
    const PAGE: u64 = 4096;

    fn memory(bytes: u64, seals: SealFlags) -> OwnedFd {
        let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    fn sealed(bytes: u64) -> OwnedFd {
        memory(bytes, SealFlags::SHRINK | SealFlags::GROW)
    }

    fn refused(file: impl AsFd) -> String {
        check(file.as_fd(), BYTES, PAGE).unwrap_err().to_string()
    }

    #[test]
    fn a_sealed_memory_file_is_taken() {
        check(sealed(BYTES).as_fd(), BYTES, PAGE).unwrap();
    }

    #[test]
    fn what_is_no_memory_is_named() {
        let (pipe, _) = io::pipe().unwrap();
        assert_eq!(refused(pipe), "A pipe was passed where guest memory should have been");
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(refused(socket).starts_with("A socket"));
        assert!(refused(File::open("/dev/zero").unwrap()).starts_with("A device"));
        assert!(refused(File::open("/").unwrap()).starts_with("A folder"));
        // The file of this program lies on a disk; a temporary one may not.
        assert!(refused(File::open("/proc/self/exe").unwrap()).starts_with("A file on a disk"));
    }

    #[test]
    fn what_could_change_under_the_guest_is_refused() {
        for seals in [SealFlags::empty(), SealFlags::SHRINK, SealFlags::GROW] {
            assert!(
                matches!(check(memory(BYTES, seals).as_fd(), BYTES, PAGE), Err(AdoptError::NotSealed)),
                "{seals:?}"
            );
        }
        for no_more in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            let file = memory(BYTES, SealFlags::SHRINK | SealFlags::GROW | no_more);
            assert!(matches!(check(file.as_fd(), BYTES, PAGE), Err(AdoptError::ReadOnly)), "{no_more:?}");
        }
    }

    #[test]
    fn another_size_is_refused() {
        for bytes in [0, BYTES - PAGE, BYTES + PAGE] {
            let error = check(sealed(bytes).as_fd(), BYTES, PAGE).unwrap_err();
            assert!(matches!(error, AdoptError::Size { found, expected: BYTES } if found == bytes), "{error}");
        }
    }

    #[test]
    fn other_pages_are_refused() {
        let error = check(sealed(BYTES).as_fd(), BYTES, 2 << 20).unwrap_err();
        assert!(matches!(error, AdoptError::PageSize { found: PAGE, expected: 0x20_0000 }), "{error}");
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
        // Making one takes no huge page, only touching it would.
        let Ok(huge) = memfd_create("test", flags) else { return };
        ftruncate(&huge, BYTES).unwrap();
        fcntl_add_seals(&huge, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        check(huge.as_fd(), BYTES, 2 << 20).unwrap();
        assert!(matches!(check(huge.as_fd(), BYTES, PAGE), Err(AdoptError::PageSize { expected: PAGE, .. })));
    }
}
