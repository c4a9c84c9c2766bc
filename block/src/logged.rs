//! A disk of which is known which parts were written: what a mirror of it lacks.
//!
//! ```text
//! submit ──► inner disk ... done ──reap──► marked in the log ──► told to whom it was asked for
//! ```
//! Invariant: a write is marked when it is done, and before whoever asked for it hears of that. So who takes the log and
//! reads then either has read the write, or finds it in the log the next time.

use crate::backend::{Backend, Channel, Completion, Geometry, Operation};
use slab::Slab;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// The unit of a log, in bytes.
pub const LOG_PAGE: u64 = 4096;

/// Which pages of a disk were written since they were last taken out. It is off at first, and costs next to nothing then.
#[derive(Debug, Default)]
pub struct WriteLog {
    on: AtomicBool,
    /// A bit for each page, in words of 64.
    words: RwLock<Box<[AtomicU64]>>,
}

impl WriteLog {
    /// Notes writes from now on, to a disk of `capacity` bytes. What was done before is not in it.
    pub fn start(&self, capacity: u64) {
        let words = capacity.div_ceil(LOG_PAGE).div_ceil(64);
        *self.words.write().unwrap_or_else(PoisonError::into_inner) = (0..words).map(|_| AtomicU64::new(0)).collect();
        self.on.store(true, Ordering::Release);
    }

    /// Notes nothing any more, and forgets.
    pub fn stop(&self) {
        self.on.store(false, Ordering::Release);
        *self.words.write().unwrap_or_else(PoisonError::into_inner) = Box::default();
    }

    /// Takes out what was written: `each` gets the first page of 64, and a bit for each that was, the lowest for the first.
    pub fn take(&self, mut each: impl FnMut(u64, u64)) {
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        for (word, first) in words.iter().zip((0..).step_by(64)) {
            // Most are empty, and an exchange takes long. What is marked meanwhile is there the next time.
            if word.load(Ordering::Acquire) == 0 {
                continue;
            }
            match word.swap(0, Ordering::AcqRel) {
                0 => {}
                written => each(first, written),
            }
        }
    }

    fn mark(&self, offset: u64, length: u64) {
        if length == 0 || !self.on.load(Ordering::Acquire) {
            return;
        }
        let words = self.words.read().unwrap_or_else(PoisonError::into_inner);
        // A request that was refused may lie anywhere.
        let all = words.len() as u64 * 64;
        let (mut page, end) = (offset / LOG_PAGE, offset.saturating_add(length).div_ceil(LOG_PAGE).min(all));
        while page < end {
            let word_end = ((page / 64 + 1) * 64).min(end);
            let mask = (u64::MAX >> (64 - (word_end - page))) << (page % 64);
            let word = usize::try_from(page / 64).ok().and_then(|at| words.get(at));
            if let Some(word) = word {
                word.fetch_or(mask, Ordering::AcqRel);
            }
            page = word_end;
        }
    }
}

/// A disk whose writes are logged.
#[derive(Debug)]
pub struct LoggedBackend {
    inner: Arc<dyn Backend>,
    log: Arc<WriteLog>,
}

impl LoggedBackend {
    /// Logs what is written to `inner` through this.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        Self { inner, log: Arc::default() }
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Arc<WriteLog> {
        &self.log
    }
}

impl Backend for LoggedBackend {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        let (inner, log) = (self.inner.channel()?, Arc::clone(&self.log));
        Ok(Box::new(LoggedChannel { inner, log, open: Slab::new(), done: Vec::new() }))
    }

    fn grow(&self, capacity: u64) -> io::Result<u64> {
        self.inner.grow(capacity)
    }

    fn is_held_by_channels(&self) -> bool {
        self.inner.is_held_by_channels()
    }

    fn release(&self) {
        self.inner.release();
    }

    fn reacquire(&self) -> io::Result<()> {
        self.inner.reacquire()
    }
}

/// A request that is in flight.
#[derive(Debug)]
struct Open {
    tag: u64,
    /// What it writes, as offset and length; of length 0 if nothing.
    written: (u64, u64),
}

#[derive(Debug)]
struct LoggedChannel {
    inner: Box<dyn Channel>,
    log: Arc<WriteLog>,
    open: Slab<Open>,
    done: Vec<Completion>,
}

impl Channel for LoggedChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        let written = if operation.writes() { operation.range() } else { (0, 0) };
        let key = self.open.insert(Open { tag, written });
        self.inner.submit(key as u64, operation);
    }

    fn commit(&mut self) {
        self.inner.commit();
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.inner.event()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.inner.reap(&mut self.done);
        for Completion { tag, outcome } in self.done.drain(..) {
            let key = usize::try_from(tag).expect("it is a key of this address space");
            let Open { tag, written: (offset, length) } = self.open.remove(key);
            // One that failed may have written a part.
            self.log.mark(offset, length);
            done.push(Completion { tag, outcome });
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance;
    use crate::file::FileOptions;
    use crate::{Access, Blocking, Durability, FileBackend, Unmap};
    use tempfile::NamedTempFile;

    const CAPACITY: u64 = 1 << 20;

    fn file() -> (NamedTempFile, Arc<FileBackend>) {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(CAPACITY).unwrap();
        let disk = FileBackend::open(file.path(), FileOptions::new(Access::ReadWrite)).unwrap();
        (file, Arc::new(disk))
    }

    fn taken(log: &WriteLog) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        log.take(|first, written| all.push((first, written)));
        all
    }

    #[test]
    fn it_is_the_disk_that_it_logs() {
        let (_file, disk) = file();
        let logged = LoggedBackend::new(disk);
        logged.log().start(CAPACITY);
        conformance::holds(&logged);
    }

    #[test]
    fn what_is_written_in_any_way_is_marked_once() {
        let (_file, disk) = file();
        let logged = LoggedBackend::new(disk);
        let mut disk = Blocking::open(&logged).unwrap();
        disk.write(0, &[1; 512], Durability::Cached).unwrap();
        assert_eq!(taken(logged.log()), [], "it is off");
        logged.log().start(CAPACITY);
        disk.read(0, &mut [0; 4096]).unwrap();
        disk.flush().unwrap();
        assert_eq!(taken(logged.log()), []);
        disk.write(4096 * 63 + 4095 - 511, &[1; 1024], Durability::Cached).unwrap();
        disk.discard(4096 * 70, 4096 * 2).unwrap();
        disk.write_zeroes(4096 * 130, 512, Unmap::Allowed, Durability::Cached).unwrap();
        assert_eq!(taken(logged.log()), [(0, 1 << 63), (64, 1 | 0b11 << 6), (128, 0b100)]);
        assert_eq!(taken(logged.log()), []);
        disk.write(CAPACITY - 512, &[1; 512], Durability::Cached).unwrap();
        logged.log().stop();
        logged.log().start(CAPACITY);
        assert_eq!(taken(logged.log()), []);
    }

    #[test]
    fn a_write_that_failed_is_marked_too() {
        let (_file, disk) = file();
        // Without its lock it is not written.
        disk.release();
        let logged = LoggedBackend::new(disk);
        logged.log().start(CAPACITY);
        Blocking::open(&logged).unwrap().write(4096, &[1; 512], Durability::Cached).unwrap_err();
        assert_eq!(taken(logged.log()), [(0, 0b10)]);
    }
}
