//! The file back end on real files: data, holes, locks, and every refusal.

use super::*;
use crate::GuestRam;
use crate::virtio::Buffer;
use crate::virtio::queue::slices;
use crate::virtio::testing::{FREE, REGION_BORDER, ram};
use std::os::unix::fs::MetadataExt;
use tempfile::{NamedTempFile, TempDir};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const LENGTH: u64 = 1 << 20;

fn disk() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..LENGTH).map(|at| u8::try_from(at / 4096 % 251 + 1).unwrap()).collect();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn open(file: &NamedTempFile, access: Access) -> Result<FileBackend, DiskError> {
    FileBackend::open(file.path(), access)
}

fn pieces<'a>(ram: &'a GuestRam, buffers: &[(u64, u32)]) -> Vec<GuestSlice<'a>> {
    let buffers: Vec<_> =
        buffers.iter().map(|&(address, length)| Buffer { address: GuestAddress(address), length }).collect();
    slices(ram, &buffers, 0, usize::MAX)
}

fn is_dirty(ram: &GuestRam, address: u64) -> bool {
    GuestMemoryBackend::get_slices(ram, GuestAddress(address), 1).all(|slice| slice.unwrap().bitmap().dirty_at(0))
}

#[test]
fn what_is_written_is_read_across_pieces_and_regions() {
    let (file, ram) = (disk(), ram());
    let disk = open(&file, Access::ReadWrite).unwrap();
    assert_eq!((disk.capacity(), disk.is_read_only(), disk.path()), (LENGTH, false, file.path()));
    let pattern: Vec<u8> = (0..=255).cycle().take(3 * 512).collect();
    ram.write_slice(&pattern, GuestAddress(FREE)).unwrap();
    disk.write_vectored_at(&pieces(&ram, &[(FREE, 512), (FREE + 512, 1024)]), 512).unwrap();
    disk.flush().unwrap();
    assert_eq!(std::fs::read(file.path()).unwrap()[512..2048], pattern);

    let place = REGION_BORDER - 100;
    disk.read_vectored_at(&pieces(&ram, &[(place, 1000), (FREE + 0x3000, 536)]), 512).unwrap();
    let mut back = vec![0; 1536];
    ram.read_slice(&mut back[..1000], GuestAddress(place)).unwrap();
    ram.read_slice(&mut back[1000..], GuestAddress(FREE + 0x3000)).unwrap();
    assert_eq!(back, pattern);
}

#[test]
fn what_is_read_into_memory_is_marked_dirty_and_nothing_else() {
    let (file, ram) = (disk(), ram());
    let disk = open(&file, Access::ReadWrite).unwrap();
    disk.write_vectored_at(&pieces(&ram, &[(FREE, 0x1000)]), 0).unwrap();
    assert!(!is_dirty(&ram, FREE), "a write to the disk reads memory");
    disk.read_vectored_at(&pieces(&ram, &[(FREE + 0x1000, 0x1800)]), 0).unwrap();
    let dirty = [0, 0x1000, 0x2000, 0x3000].map(|offset| is_dirty(&ram, FREE + offset));
    assert_eq!(dirty, [false, true, true, false]);
}

#[test]
fn more_pieces_than_the_kernel_takes_at_once() {
    let (file, ram) = (disk(), ram());
    let disk = open(&file, Access::ReadWrite).unwrap();
    let buffers: Vec<_> = (0..2048).map(|at| (FREE + at * 16, 16)).collect();
    disk.read_vectored_at(&pieces(&ram, &buffers), 4096).unwrap();
    let mut back = vec![0; 2048 * 16];
    ram.read_slice(&mut back, GuestAddress(FREE)).unwrap();
    assert_eq!(back, std::fs::read(file.path()).unwrap()[4096..4096 + 2048 * 16]);
}

#[test]
fn a_file_that_was_cut_behind_our_back_is_an_error() {
    let (file, ram) = (disk(), ram());
    let disk = open(&file, Access::ReadWrite).unwrap();
    file.as_file().set_len(512).unwrap();
    let error = disk.read_vectored_at(&pieces(&ram, &[(FREE, 1024)]), 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn discarded_and_zeroed_ranges() {
    let file = disk();
    let disk = open(&file, Access::ReadWrite).unwrap();
    let blocks = std::fs::metadata(file.path()).unwrap().blocks();
    disk.discard(0, 64 << 10).unwrap();
    disk.discard(0, 0).unwrap();
    assert!(std::fs::metadata(file.path()).unwrap().blocks() < blocks, "a hole was made");
    disk.write_zeroes(128 << 10, 512, Unmap::Forbidden).unwrap();
    disk.write_zeroes(256 << 10, 4096, Unmap::Allowed).unwrap();
    disk.write_out_zeroes(512 << 10, 130 << 10).unwrap();
    disk.write_zeroes(0, 0, Unmap::Allowed).unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!(bytes.len() as u64, LENGTH);
    let expected = [(0, 64 << 10), (128 << 10, 512), (256 << 10, 4096), (512 << 10, 130 << 10)];
    for (at, byte) in bytes.iter().enumerate() {
        let zeroed = expected.iter().any(|&(start, length)| (start..start + length).contains(&at));
        assert_eq!(*byte == 0, zeroed, "at {at:#x}");
    }
}

#[test]
fn a_writer_is_alone_and_readers_are_not() {
    let file = disk();
    let writer = open(&file, Access::ReadWrite).unwrap();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let error = open(&file, access).unwrap_err();
        let fact = format!("Disk {} is locked by another writer; stop the guest", file.path().display());
        assert!(error.to_string().starts_with(&fact), "{error}");
    }
    drop(writer);
    let readers = [open(&file, Access::ReadOnly).unwrap(), open(&file, Access::ReadOnly).unwrap()];
    let error = open(&file, Access::ReadWrite).unwrap_err();
    assert!(matches!(error, DiskError::InUse { .. }), "{error}");
    drop(readers);
    open(&file, Access::ReadWrite).unwrap();
}

#[test]
fn the_lock_changes_hands() {
    let (file, ram) = (disk(), ram());
    let mut source = open(&file, Access::ReadWrite).unwrap();
    let mut target = FileBackend::open_unlocked(file.path(), Access::ReadWrite).unwrap();
    let pieces = pieces(&ram, &[(FREE, 512)]);
    assert!(target.reacquire().unwrap_err().to_string().contains("locked by another writer"));
    assert!(target.write_vectored_at(&pieces, 0).is_err() && target.discard(0, 512).is_err());
    target.read_vectored_at(&pieces, 0).unwrap();
    source.release();
    target.reacquire().unwrap();
    target.write_vectored_at(&pieces, 0).unwrap();
    assert!(source.write_vectored_at(&pieces, 0).is_err() && source.write_zeroes(0, 512, Unmap::Allowed).is_err());
    assert!(source.reacquire().is_err());
    target.release();
    source.reacquire().unwrap();
    source.write_vectored_at(&pieces, 0).unwrap();
}

#[test]
fn a_read_only_disk_is_never_written() {
    let (file, ram) = (disk(), ram());
    let disk = open(&file, Access::ReadOnly).unwrap();
    assert!(disk.is_read_only());
    let error = disk.write_vectored_at(&pieces(&ram, &[(FREE, 512)]), 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn refusals_name_the_disk_and_the_remedy() {
    let directory = TempDir::new().unwrap();
    let refusal = |path: &Path, access| FileBackend::open(path, access).unwrap_err().to_string();
    let missing = directory.path().join("missing.raw");
    let error = refusal(&missing, Access::ReadWrite);
    assert!(error.contains("missing.raw does not exist") && error.contains("truncate"), "{error}");
    for access in [Access::ReadOnly, Access::ReadWrite] {
        assert!(refusal(directory.path(), access).contains("neither a file nor a block device"));
    }
    assert!(refusal(Path::new("/dev/null"), Access::ReadWrite).contains("neither a file nor a block device"));
    for length in [0, 511, 1000] {
        let path = directory.path().join("odd.raw");
        std::fs::write(&path, vec![0; length]).unwrap();
        let error = refusal(&path, Access::ReadWrite);
        assert!(error.contains(&format!("{length} bytes long")) && error.contains("512"), "{error}");
    }
    let long = directory.path().join("x".repeat(300));
    assert!(refusal(&long, Access::ReadWrite).starts_with("Could not open disk"));
}

/// By the errors alone: the superuser, who may run the tests, is refused nothing.
#[test]
fn permissions_are_named() {
    let refused =
        |access, number| refusal(Path::new("/disks/a.raw"), access, io::Error::from_raw_os_error(number)).to_string();
    for number in [libc::EACCES, libc::EPERM, libc::EROFS] {
        let error = refused(Access::ReadWrite, number);
        assert_eq!(error, "Disk /disks/a.raw may not be written; give write permission, or attach it read-only");
    }
    let error = refused(Access::ReadOnly, libc::EACCES);
    assert!(error.starts_with("Disk /disks/a.raw may not be read; give read permission"), "{error}");
}
