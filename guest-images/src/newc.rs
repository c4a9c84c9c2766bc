//! Writer of cpio archives in the "newc" format, the one the kernel unpacks as an initramfs.
//!
//! Called by the initramfs recipe here and by the lab harness for its lab hosts. Streams to any [`Write`], so an
//! archive may hold files larger than anyone wants in memory. Output depends only on the calls made: times and owners
//! are zero, inode numbers count up. Missing parent directories are added by themselves, because the kernel silently
//! drops an entry whose directory does not exist yet.
//!
//! Format: Linux Documentation/driver-api/early-userspace/buffer-format.rst.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// File type bits of `st_mode`, as the format takes them over from stat(2).
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

const TRAILER: &str = "TRAILER!!!";

/// Why an entry cannot be archived.
#[derive(Debug, Error)]
pub enum NewcError {
    /// The archive itself cannot be written.
    #[error("Cannot write the cpio archive")]
    Write(#[from] io::Error),
    /// A file of the host that should go into the archive cannot be read.
    #[error("Cannot read {path} for the cpio archive")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The format has 32-bit sizes.
    #[error("{path} has {bytes} bytes, more than the 4 GiB that a cpio entry can hold")]
    TooLarge {
        /// Path inside the archive.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// A name that no path inside an archive can have.
    #[error("{0:?} is not a path for a cpio archive: it must be non-empty, without NUL bytes and without `..`")]
    Path(String),
}

/// A cpio archive being written to `W`.
#[derive(Debug)]
pub struct Newc<W: Write> {
    out: W,
    inode: u32,
    directories: BTreeSet<String>,
}

/// What distinguishes one entry's header from another's.
#[derive(Clone, Copy)]
struct Head {
    mode: u32,
    size: u32,
    device: (u32, u32),
}

impl<W: Write> Newc<W> {
    /// Begins an archive at the current position of `out`, which must be a multiple of 4 bytes from the start of the
    /// initramfs.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0, directories: BTreeSet::new() }
    }

    /// Adds a directory (and its parents); one that is there already is left alone.
    pub fn directory(&mut self, path: &str, permissions: u32) -> Result<(), NewcError> {
        let path = inner_path(path)?;
        self.parents(path)?;
        self.one_directory(path, permissions)
    }

    /// Adds a regular file with the given content.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> Result<(), NewcError> {
        self.stream(path, permissions, content.len() as u64, content)
    }

    /// Adds a regular file with the content and permissions of a file of this machine.
    pub fn file_from(&mut self, path: &str, source: &Path) -> Result<(), NewcError> {
        let cannot = |error| NewcError::Read { path: source.to_path_buf(), source: error };
        let file = File::open(source).map_err(cannot)?;
        let metadata = file.metadata().map_err(cannot)?;
        self.stream(path, metadata.permissions().mode() & 0o7777, metadata.len(), file)
    }

    /// Adds a symbolic link at `path` that points to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), NewcError> {
        let path = inner_path(path)?;
        self.parents(path)?;
        let size = size_of_entry(path, target.len() as u64)?;
        self.header(path, Head { mode: S_IFLNK | 0o777, size, device: (0, 0) })?;
        self.out.write_all(target.as_bytes())?;
        self.pad(u64::from(size))
    }

    /// Adds a character device. The kernel opens `/dev/console` for init before anything can mount devtmpfs.
    pub fn character_device(&mut self, path: &str, permissions: u32, device: (u32, u32)) -> Result<(), NewcError> {
        let path = inner_path(path)?;
        self.parents(path)?;
        self.header(path, Head { mode: S_IFCHR | permissions, size: 0, device })
    }

    /// Writes the trailer and gives the writer back.
    pub fn finish(mut self) -> Result<W, NewcError> {
        self.inode = 0;
        self.header(TRAILER, Head { mode: 0, size: 0, device: (0, 0) })?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn stream(&mut self, path: &str, permissions: u32, bytes: u64, content: impl Read) -> Result<(), NewcError> {
        let path = inner_path(path)?;
        self.parents(path)?;
        let size = size_of_entry(path, bytes)?;
        self.header(path, Head { mode: S_IFREG | permissions, size, device: (0, 0) })?;
        // A file that shrinks while it is copied would shift every later entry.
        let copied = io::copy(&mut content.take(bytes), &mut self.out)?;
        if copied != bytes {
            return Err(NewcError::Write(io::Error::other(format!("{path} shrank from {bytes} to {copied} bytes"))));
        }
        self.pad(bytes)
    }

    fn parents(&mut self, path: &str) -> Result<(), NewcError> {
        for (end, _) in path.match_indices('/') {
            self.one_directory(&path[..end], 0o755)?;
        }
        Ok(())
    }

    fn one_directory(&mut self, path: &str, permissions: u32) -> Result<(), NewcError> {
        if !self.directories.insert(path.to_owned()) {
            return Ok(());
        }
        self.header(path, Head { mode: S_IFDIR | permissions, size: 0, device: (0, 0) })
    }

    fn header(&mut self, name: &str, head: Head) -> Result<(), NewcError> {
        self.inode += 1;
        let (major, minor) = head.device;
        let links = if head.mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let name_bytes = size_of_entry(name, name.len() as u64 + 1)?;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.inode, head.mode, 0, 0, links, 0, head.size, 0, 0, major, minor, name_bytes, 0];
        let mut text = String::from("070701");
        for field in fields {
            text.push_str(&format!("{field:08x}"));
        }
        self.out.write_all(text.as_bytes())?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(text.len() as u64 + u64::from(name_bytes))
    }

    /// Pads what was `written` since the last multiple of 4.
    fn pad(&mut self, written: u64) -> Result<(), NewcError> {
        let rest = usize::try_from(written % 4).expect("a remainder by 4 fits");
        Ok(self.out.write_all(&[0; 3][..(4 - rest) % 4])?)
    }
}

/// The path as the archive stores it: relative to the root.
fn inner_path(path: &str) -> Result<&str, NewcError> {
    let inner = path.trim_matches('/');
    let escapes = inner.split('/').any(|part| part == ".." || part.is_empty());
    if inner.is_empty() || inner == TRAILER || inner.contains('\0') || escapes {
        return Err(NewcError::Path(path.to_owned()));
    }
    Ok(inner)
}

fn size_of_entry(path: &str, bytes: u64) -> Result<u32, NewcError> {
    u32::try_from(bytes).map_err(|_| NewcError::TooLarge { path: path.to_owned(), bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(entry: &[u8], number: usize) -> usize {
        let at = 6 + number * 8;
        usize::from_str_radix(std::str::from_utf8(&entry[at..at + 8]).unwrap(), 16).unwrap()
    }

    /// A reader by the format's text, independent of the writer: name, mode, content.
    fn entries(mut archive: &[u8]) -> Vec<(String, usize, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let (mode, size, name_size) = (field(archive, 1), field(archive, 6), field(archive, 11));
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(archive[110 + name_size - 1], 0);
            let data = (110 + name_size).next_multiple_of(4);
            let content = archive[data..data + size].to_vec();
            archive = &archive[(data + size).next_multiple_of(4)..];
            if name == TRAILER {
                assert!(archive.is_empty(), "{} bytes after the trailer", archive.len());
                return found;
            }
            found.push((name, mode, content));
        }
    }

    #[test]
    fn an_archive_reads_back_as_written() {
        let mut archive = Newc::new(Vec::new());
        archive.character_device("dev/console", 0o600, (5, 1)).unwrap();
        archive.file("/bin/tool", 0o755, b"abcde").unwrap();
        archive.symlink("bin/sh", "tool").unwrap();
        archive.directory("a/b", 0o700).unwrap();
        archive.file("a/b/empty", 0o644, b"").unwrap();
        let bytes = archive.finish().unwrap();
        let expected = [
            ("dev", 0o040_755, ""),
            ("dev/console", 0o020_600, ""),
            ("bin", 0o040_755, ""),
            ("bin/tool", 0o100_755, "abcde"),
            ("bin/sh", 0o120_777, "tool"),
            ("a", 0o040_755, ""),
            ("a/b", 0o040_700, ""),
            ("a/b/empty", 0o100_644, ""),
        ];
        let found = entries(&bytes);
        let found: Vec<_> = found.iter().map(|(n, m, c)| (n.as_str(), *m, std::str::from_utf8(c).unwrap())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_file_of_the_host_keeps_content_and_permissions() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 4097]).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o751)).unwrap();
        let mut archive = Newc::new(Vec::new());
        archive.file_from("x", file.path()).unwrap();
        let found = entries(&archive.finish().unwrap());
        assert_eq!(found, [("x".to_owned(), 0o100_751, vec![7; 4097])]);
    }

    #[test]
    fn impossible_names_are_refused() {
        let mut archive = Newc::new(Vec::new());
        for path in ["", "/", "a\0b", "../up", "a//b", TRAILER] {
            let refused = archive.file(path, 0o644, b"").unwrap_err();
            assert!(matches!(refused, NewcError::Path(p) if p == path));
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let refused = Newc::new(Vec::new()).file_from("x", Path::new("/nonexistent/file")).unwrap_err();
        assert_eq!(refused.to_string(), "Cannot read /nonexistent/file for the cpio archive");
    }

    #[test]
    fn a_file_over_four_gibibytes_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 32).unwrap();
        let refused = Newc::new(Vec::new()).file_from("big", file.path()).unwrap_err();
        assert!(matches!(refused, NewcError::TooLarge { bytes: 0x1_0000_0000, .. }));
    }

    #[test]
    fn a_full_disk_is_an_error() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::from(io::ErrorKind::StorageFull))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(matches!(Newc::new(Full).file("x", 0o644, b"x"), Err(NewcError::Write(_))));
    }
}
