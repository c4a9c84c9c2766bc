//! The file back end on real files: the suite by each engine, holes, locks, and every refusal.

use super::*;
use crate::backend::{Durability, Extent, ExtentKind, Operation, Unmap};
use crate::blocking::Blocking;
use crate::conformance;
use crate::memory::{Buffers, Scratch};
use std::os::unix::fs::MetadataExt;
use tempfile::{NamedTempFile, TempDir};

const LENGTH: u64 = 1 << 20;

fn disk() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..LENGTH).map(|at| u8::try_from(at / 4096 % 251 + 1).unwrap()).collect();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn open(file: &NamedTempFile, access: Access) -> Result<FileBackend, DiskError> {
    FileBackend::open(file.path(), FileOptions::new(access))
}

fn open_with(file: &NamedTempFile, host_cache: HostCache, engine: Engine) -> FileBackend {
    let options = FileOptions { host_cache, engine, ..FileOptions::new(Access::ReadWrite) };
    FileBackend::open(file.path(), options).unwrap()
}

#[test]
fn the_suite_by_each_engine_and_cache() {
    for engine in [Engine::Uring, Engine::Threads, Engine::Auto] {
        for host_cache in [HostCache::Used, HostCache::Bypassed] {
            conformance::holds(&open_with(&disk(), host_cache, engine));
        }
    }
}

#[test]
fn more_pieces_than_the_kernel_takes_at_once() {
    let file = disk();
    for engine in [Engine::Uring, Engine::Threads] {
        let disk = open_with(&file, HostCache::Used, engine);
        let mut scratch = Scratch::new(3000 * 16);
        let parts: Vec<_> = (0..3000).map(|at| (at * 16, 16)).collect();
        let into = Buffers::scattered(&scratch, &parts);
        Blocking::open(&disk).unwrap().run(Operation::Read { offset: 4096, into }).unwrap();
        let expected = &std::fs::read(file.path()).unwrap()[4096..4096 + 3000 * 16];
        assert!(scratch.bytes().unwrap() == expected, "{engine:?}");
    }
}

#[test]
fn a_file_that_was_cut_behind_our_back_is_an_error() {
    for engine in [Engine::Uring, Engine::Threads] {
        let file = disk();
        let disk = open_with(&file, HostCache::Used, engine);
        file.as_file().set_len(512).unwrap();
        let error = Blocking::open(&disk).unwrap().read(0, &mut [0; 1024]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{engine:?}");
    }
}

#[test]
fn holes_are_made_and_told_of() {
    for engine in [Engine::Uring, Engine::Threads] {
        let file = disk();
        let disk = open_with(&file, HostCache::Used, engine);
        let mut one = Blocking::open(&disk).unwrap();
        let blocks = std::fs::metadata(file.path()).unwrap().blocks();
        one.discard(0, 64 << 10).unwrap();
        assert!(std::fs::metadata(file.path()).unwrap().blocks() < blocks, "a hole was made");
        one.write_zeroes(128 << 10, 512, Unmap::Forbidden, Durability::Cached).unwrap();
        one.write_zeroes(256 << 10, 64 << 10, Unmap::Allowed, Durability::Durable).unwrap();
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes.len() as u64, LENGTH);
        let expected = [(0, 64 << 10), (128 << 10, 512), (256 << 10, 64 << 10)];
        for (at, byte) in bytes.iter().enumerate() {
            let zeroed = expected.iter().any(|&(start, length)| (start..start + length).contains(&at));
            assert_eq!(*byte == 0, zeroed, "at {at:#x}");
        }
        let extent = |kind, kib: u64| Extent { length: kib << 10, kind };
        let (data, hole) = (ExtentKind::Data, ExtentKind::Hole);
        let all = [extent(hole, 64), extent(data, 192), extent(hole, 64), extent(data, 704)];
        assert_eq!(one.extents(0, LENGTH).unwrap(), all);
        assert_eq!(one.extents(32 << 10, 64 << 10).unwrap(), [extent(hole, 32), extent(data, 32)]);
    }
}

#[test]
fn zeros_are_written_out_where_there_are_no_holes() {
    let file = disk();
    let disk = open(&file, Access::ReadWrite).unwrap();
    disk.file.write_out_zeroes(512 << 10, 130 << 10).unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    assert!(bytes[512 << 10..642 << 10].iter().all(|byte| *byte == 0) && bytes[642 << 10] != 0);
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
    let file = disk();
    let source = open(&file, Access::ReadWrite).unwrap();
    let target = FileBackend::open_unlocked(file.path(), FileOptions::new(Access::ReadWrite)).unwrap();
    let write = |disk: &FileBackend| Blocking::open(disk).unwrap().write(0, &[1; 512], Durability::Cached);
    assert!(target.reacquire().unwrap_err().to_string().contains("locked by another writer"));
    assert!(write(&target).is_err());
    Blocking::open(&target).unwrap().read(0, &mut [0; 512]).unwrap();
    source.release();
    target.reacquire().unwrap();
    write(&target).unwrap();
    assert!(write(&source).is_err() && source.reacquire().is_err());
    target.release();
    source.reacquire().unwrap();
    write(&source).unwrap();
}

#[test]
fn a_read_only_disk_is_never_written() {
    let file = disk();
    let disk = open(&file, Access::ReadOnly).unwrap();
    assert_eq!(disk.geometry().access, Access::ReadOnly);
    let error = Blocking::open(&disk).unwrap().write(0, &[1; 512], Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn a_disk_grows_and_does_not_shrink() {
    let file = disk();
    let disk = open(&file, Access::ReadWrite).unwrap();
    assert_eq!(disk.grow(2 * LENGTH).unwrap(), 2 * LENGTH);
    assert_eq!((disk.geometry().capacity, file.as_file().metadata().unwrap().len()), (2 * LENGTH, 2 * LENGTH));
    let mut one = Blocking::open(&disk).unwrap();
    one.write(2 * LENGTH - 512, &[1; 512], Durability::Cached).unwrap();
    file.as_file().set_len(4 * LENGTH).unwrap();
    assert_eq!(disk.grow(3 * LENGTH).unwrap(), 3 * LENGTH, "it was longer already");
    let error = |length| disk.grow(length).unwrap_err().to_string();
    assert!(error(LENGTH).contains("can grow, but not shrink") && error(4 * LENGTH + 1).contains("multiple of 512"));
    disk.release();
    assert!(disk.grow(4 * LENGTH).is_err(), "it is another's now");
    assert_eq!(disk.geometry().capacity, 3 * LENGTH);
}

#[test]
fn refusals_name_the_disk_and_the_remedy() {
    let directory = TempDir::new().unwrap();
    let refusal = |path: &Path, access| FileBackend::open(path, FileOptions::new(access)).unwrap_err().to_string();
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
