//! A raw file and what each request does to it, call by call.
//!
//! The threads of the pool do whole requests here; a ring does their reads, writes and flushes by itself and leaves here
//! what it need not do well.

#![expect(unsafe_code, reason = "preadv and pwritev reach memory by pointers")]

use super::lock::Lock;
use super::{Direct, DiskError};
use crate::backend::{Answer, Durability, Extent, ExtentKind, Operation, SECTOR, Unmap};
use crate::memory::{Buffers, Piece};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most pieces in one call of `preadv` and `pwritev` (`IOV_MAX` in linux/uio.h).
pub(super) const MAX_PIECES: usize = 1024;
/// The most extents in one answer.
const MAX_EXTENTS: usize = 256;

/// The mode of `fallocate` that gives up space, and those that make zeros.
pub(super) const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
pub(super) const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// How zeros are made in a file.
pub(super) fn zeroing_mode(unmap: Unmap) -> FallocateFlags {
    match unmap {
        Unmap::Allowed => PUNCH,
        Unmap::Forbidden => ZERO,
    }
}

#[derive(Debug)]
pub(super) struct RawFile {
    buffered: File,
    direct: Option<Direct>,
    lock: Lock,
    capacity: AtomicU64,
}

impl RawFile {
    pub(super) fn new(buffered: File, direct: Option<Direct>, lock: Lock, capacity: u64) -> Self {
        Self { buffered, direct, lock, capacity: AtomicU64::new(capacity) }
    }

    pub(super) fn lock(&self) -> &Lock {
        &self.lock
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// Makes the file as long as `wanted` bytes. Block devices, and files that are longer already, stay as they are.
    pub(super) fn grow(&self, wanted: u64) -> Result<u64, DiskError> {
        let path = || self.lock.path().to_owned();
        let host = |source| DiskError::Host { path: path(), source };
        if !wanted.is_multiple_of(SECTOR) {
            return Err(DiskError::BadSize { path: path(), length: wanted });
        }
        let was = self.capacity();
        if wanted < was {
            return Err(DiskError::Shrinks { path: path(), was, wanted });
        }
        self.lock.permits_writes().map_err(host)?;
        let length = || rustix::fs::seek(&self.buffered, SeekFrom::End(0)).map_err(|error| host(error.into()));
        if self.buffered.metadata().map_err(host)?.is_file() && length()? < wanted {
            self.buffered.set_len(wanted).map_err(host)?;
        }
        let length = length()?;
        if length < wanted {
            return Err(DiskError::Short { path: path(), length, wanted });
        }
        self.capacity.store(wanted, Ordering::Release);
        Ok(wanted)
    }

    /// The descriptor for a request with this memory at this place: past the page cache if it may go there.
    pub(super) fn descriptor(&self, memory: &Buffers, offset: u64) -> RawFd {
        match &self.direct {
            Some(Direct { file, memory_alignment, offset_alignment })
                if memory.is_aligned(*memory_alignment)
                    && offset.is_multiple_of(*offset_alignment)
                    && (memory.length() as u64).is_multiple_of(*offset_alignment) =>
            {
                file.as_raw_fd()
            }
            _ => self.buffered.as_raw_fd(),
        }
    }

    /// The descriptor for what has no memory.
    pub(super) fn plain_descriptor(&self) -> RawFd {
        self.buffered.as_raw_fd()
    }

    /// Whether a request may be done: it lies on the disk, and whoever writes has the lock.
    pub(super) fn admit(&self, operation: &Operation) -> io::Result<()> {
        operation.check(self.capacity())?;
        if operation.writes() { self.lock.permits_writes() } else { Ok(()) }
    }

    /// Does a request, and waits for its end.
    pub(super) fn execute(&self, operation: Operation) -> io::Result<Answer> {
        self.admit(&operation)?;
        match operation {
            Operation::Read { offset, into } => self.read(offset, into)?,
            Operation::Write { offset, from, durability } => {
                self.write(offset, from)?;
                self.make(durability)?;
            }
            Operation::Flush => self.buffered.sync_data()?,
            Operation::Discard { offset, length } => {
                self.discard(offset, length)?;
            }
            Operation::WriteZeroes { offset, length, unmap, durability } => {
                self.write_zeroes(offset, length, unmap)?;
                self.make(durability)?;
            }
            Operation::Status { offset, length } => return Ok(Answer::Extents(self.extents(offset, length)?)),
        }
        Ok(Answer::Done)
    }

    fn make(&self, durability: Durability) -> io::Result<()> {
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.buffered.sync_data(),
        }
    }

    fn read(&self, offset: u64, into: Buffers) -> io::Result<()> {
        let descriptor = self.descriptor(&into, offset);
        transfer(into, offset, |pieces, count, offset| {
            // SAFETY: each vector is a piece of memory that is mapped and writable as long as the buffers live, which is
            // beyond this call; no reference of Rust points to it. The descriptor is open as long as `self` is borrowed.
            unsafe { libc::preadv(descriptor, pieces, count, offset) }
        })
    }

    fn write(&self, offset: u64, from: Buffers) -> io::Result<()> {
        let descriptor = self.descriptor(&from, offset);
        transfer(from, offset, |pieces, count, offset| {
            // SAFETY: as for preadv above; the kernel only reads the pieces.
            unsafe { libc::pwritev(descriptor, pieces, count, offset) }
        })
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.fallocate(PUNCH, offset, length) {
            Err(error) if has_no_holes(error) => Ok(()),
            outcome => Ok(outcome?),
        }
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: Unmap) -> io::Result<()> {
        match self.fallocate(zeroing_mode(unmap), offset, length) {
            Err(error) if has_no_holes(error) => self.write_out_zeroes(offset, length),
            outcome => Ok(outcome?),
        }
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> Result<(), Errno> {
        // The kernel refuses nothing as a mistake.
        if length == 0 { Ok(()) } else { rustix::fs::fallocate(&self.buffered, mode, offset, length) }
    }

    pub(super) fn write_out_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeroes = [0; 64 << 10];
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).map_or(zeroes.len(), |rest| rest.min(zeroes.len()));
            self.buffered.write_all_at(&zeroes[..part], offset + done)?;
            done += part as u64;
        }
        Ok(())
    }

    /// What the file system knows of a range. A hole of a file reads as zeros; block devices know nothing.
    pub(super) fn extents(&self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        let (mut at, end) = (offset, offset + length);
        let mut extents = Vec::new();
        while at < end && extents.len() < MAX_EXTENTS {
            let data = match rustix::fs::seek(&self.buffered, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                // Nothing but holes until the end of the file.
                Err(Errno::NXIO) => end,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
                Err(error) => return Err(error.into()),
            };
            if data > at {
                extents.push(Extent { length: data - at, kind: ExtentKind::Hole });
                at = data;
                continue;
            }
            let hole = match rustix::fs::seek(&self.buffered, SeekFrom::Hole(at)) {
                Ok(hole) if hole > at => hole.min(end),
                Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => end,
                Err(error) => return Err(error.into()),
            };
            extents.push(Extent { length: hole - at, kind: ExtentKind::Data });
            at = hole;
        }
        Ok(extents)
    }
}

/// Whether the answer to a hole is that there is none: the file system makes none, or not one so short, as a block device
/// with sectors of 4096 bytes (blkdev_fallocate in the kernel's block/fops.c).
pub(super) fn has_no_holes(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::INVAL)
}

/// Moves all of `buffers` by calls of `step`, which takes some pieces, their count and an offset and says how many bytes it
/// moved, as preadv and pwritev do.
fn transfer(
    mut buffers: Buffers,
    offset: u64,
    mut step: impl FnMut(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut offset = offset;
    while buffers.length() > 0 {
        let (pieces, count) = vectors(buffers.pieces());
        let moved = step(pieces, count, file_offset(offset)?);
        match usize::try_from(moved) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => {
                offset += moved as u64;
                buffers.advance(moved);
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// As many of `pieces` as one call takes, as the kernel wants them.
pub(super) fn vectors(pieces: &[Piece]) -> (*const libc::iovec, libc::c_int) {
    let count = libc::c_int::try_from(pieces.len().min(MAX_PIECES)).expect("1024 at most");
    (pieces.as_ptr().cast(), count)
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}
