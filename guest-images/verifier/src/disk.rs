//! The disk mode: every write that the disk acknowledged must be there afterwards.
//!
//! Writes pattern blocks to random places of a device or file, past the page cache where that is possible, and keeps
//! in memory which generation each block has. A block is read and verified before it is overwritten, and a report reads
//! all of them. A write that fails leaves its block unknown: neither the old nor the new content may be demanded.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use crate::fault::Faults;
use crate::pattern::{Page, Stream, scramble};
use crate::worker::Work;

/// Blocks between two flushes.
const STEP: u64 = 16;
/// The shortest rest between two steps.
const LEAST_REST: Duration = Duration::from_millis(2);
/// How many times as long as it works it rests, so that the guest has time for its other work on a disk of any speed.
const RESTS: u32 = 2;
const BLOCK: u64 = 4096;

/// Blocks that a report reads at once: it is mostly waiting for the disk.
const RUN: usize = 32;

/// What the disk mode found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// Blocks that are written to.
    pub blocks: u64,
    /// Whether writes go past the guest's page cache.
    pub direct: bool,
    /// Acknowledged writes.
    pub written: u64,
    /// Acknowledged flushes.
    pub flushes: u64,
    /// Blocks read back and compared.
    pub verified: u64,
    /// Wrong blocks, and errors of the disk.
    pub faults: Faults,
}

/// A writer and its memory of what it wrote.
#[derive(Debug)]
pub struct Disk {
    file: File,
    direct: bool,
    stream: Stream,
    /// The generation of each block; 0 means unknown.
    generations: Vec<u64>,
    next_generation: u64,
    /// What is read or written: one block, or in a report a run of them.
    pages: Box<[Page]>,
    written: u64,
    flushes: u64,
    verified: u64,
    faults: Faults,
}

impl Disk {
    /// Opens a device, or makes a file, and uses at most `size` bytes of it.
    pub fn open(path: &Path, size: u64) -> io::Result<Self> {
        let (mut file, direct) = open(path)?;
        let is_file = file.metadata()?.is_file();
        let end = file.seek(SeekFrom::End(0))?;
        let size = if is_file { size } else { size.min(end) };
        if is_file && end < size {
            file.set_len(size)?;
        }
        let blocks = usize::try_from(size / BLOCK).map_err(io::Error::other)?;
        if blocks == 0 {
            return Err(io::Error::other(format!("{} has not one block of {BLOCK} bytes", path.display())));
        }
        Ok(Self {
            file,
            direct,
            stream: Stream(u64::from(std::process::id())),
            generations: vec![0; blocks],
            next_generation: 1,
            pages: (0..RUN.min(blocks)).map(|_| Page::zeroed()).collect(),
            written: 0,
            flushes: 0,
            verified: 0,
            faults: Faults::default(),
        })
    }

    fn rewrite(&mut self, block: usize) {
        self.verify(block);
        let generation = self.next_generation;
        self.next_generation += 1;
        self.pages[0].fill(self.stream, block as u64, generation);
        self.generations[block] = 0;
        match self.file.write_all_at(self.pages[0].as_bytes(), block as u64 * BLOCK) {
            Ok(()) => {
                self.generations[block] = generation;
                self.written += 1;
            }
            Err(error) => self.faults.add(format!("writing block {block}: {error}")),
        }
    }

    fn verify(&mut self, block: usize) {
        if self.generations[block] == 0 {
            return;
        }
        if let Err(error) = self.read(block, 1) {
            self.faults.add(format!("reading block {block}: {error}"));
        }
    }

    fn verify_all(&mut self) {
        let blocks = self.generations.len();
        for first in (0..blocks).step_by(RUN) {
            let count = RUN.min(blocks - first);
            if self.read(first, count).is_err() {
                // One by one, to tell which of them cannot be read.
                (first..first + count).for_each(|block| self.verify(block));
            }
        }
    }

    /// Reads neighbouring blocks and compares them with what was written last, where that is known.
    fn read(&mut self, first: usize, count: usize) -> io::Result<()> {
        let pages = &mut self.pages[..count];
        self.file.read_exact_at(pages.as_mut_bytes(), first as u64 * BLOCK)?;
        for (page, block) in pages.iter().zip(first..) {
            let generation = &mut self.generations[block];
            if *generation == 0 {
                continue;
            }
            self.verified += 1;
            if let Err(mismatch) = page.check(self.stream, block as u64, *generation) {
                self.faults.add(format!("disk {mismatch}"));
                *generation = 0;
            }
        }
        Ok(())
    }

    fn flush(&mut self) {
        match self.file.sync_data() {
            Ok(()) => self.flushes += 1,
            Err(error) => self.faults.add(format!("flushing: {error}")),
        }
    }
}

impl Work for Disk {
    type Report = DiskReport;

    fn step(&mut self) -> Duration {
        let start = Instant::now();
        let blocks = self.generations.len() as u64;
        for _ in 0..STEP {
            let block = scramble(self.next_generation) % blocks;
            self.rewrite(usize::try_from(block).expect("less than the length of a vector"));
        }
        self.flush();
        (start.elapsed() * RESTS).max(LEAST_REST)
    }

    fn report(&mut self) -> DiskReport {
        self.flush();
        self.verify_all();
        DiskReport {
            blocks: self.generations.len() as u64,
            direct: self.direct,
            written: self.written,
            flushes: self.flushes,
            verified: self.verified,
            faults: self.faults.clone(),
        }
    }
}

/// Opens with `O_DIRECT` where the file system knows it; tmpfs, for one, may not.
fn open(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    match options.clone().custom_flags(libc::O_DIRECT).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok((options.open(path)?, false)),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(size: u64) -> (tempfile::TempDir, Disk) {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::open(&directory.path().join("disk"), size).unwrap();
        (directory, disk)
    }

    #[test]
    fn acknowledged_writes_are_there() {
        let (_directory, mut disk) = disk(1 << 18);
        (0..20).for_each(|_| assert!(disk.step() >= LEAST_REST));
        let report = disk.report();
        assert!(report.faults.none(), "{report:?}");
        assert_eq!((report.blocks, report.written, report.flushes), (64, 320, 21));
        assert!(report.verified > 300, "{report:?}");
    }

    #[test]
    fn a_lost_write_is_found_and_told_once() {
        let (directory, mut disk) = disk(1 << 16);
        disk.rewrite(3);
        disk.rewrite(5);
        let stale = directory.path().join("disk");
        let file = OpenOptions::new().write(true).open(stale).unwrap();
        file.write_all_at(&[0xee; 8], 3 * BLOCK + 4000).unwrap();
        let report = disk.report();
        assert_eq!((report.faults.count, report.verified), (1, 2));
        assert!(report.faults.first[0].starts_with("disk page 3 of generation 1 is wrong from word 500"), "{report:?}");
        assert_eq!(disk.report().faults.count, 1);
    }

    #[test]
    fn errors_of_the_disk_are_faults() {
        let (_directory, mut disk) = disk(1 << 16);
        disk.rewrite(1);
        disk.file = File::open("/proc/self/status").unwrap();
        disk.rewrite(1);
        let report = disk.report();
        assert_eq!(report.faults.count, 3, "{report:?}");
        let first = &report.faults.first;
        assert!(first[0].starts_with("reading block 1") && first[1].starts_with("writing block 1"), "{first:?}");
        assert!(first[2].starts_with("flushing"), "{first:?}");
    }

    #[test]
    fn what_is_too_small_or_missing_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        Disk::open(&directory.path().join("small"), 4095).unwrap_err();
        Disk::open(&directory.path().join("no/such/place"), 1 << 20).unwrap_err();
    }
}
