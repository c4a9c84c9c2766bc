//! What a driver did with a disk, and how long it waited, counted on the disk's threads and read by any other. Each number is right by itself; two
//! that are read together may be one request apart.

use super::request::Status;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The running counts of one disk.
#[derive(Debug, Default)]
pub struct BlkCounters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    errors: AtomicU64,
    read_ns: AtomicU64,
    write_ns: AtomicU64,
}

/// The counts at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlkCounts {
    /// Reads that succeeded.
    pub reads: u64,
    /// Bytes that they read.
    pub read_bytes: u64,
    /// Writes of data that succeeded.
    pub writes: u64,
    /// Bytes that they wrote.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Requests of any kind that failed, or that the device does not know.
    pub errors: u64,
    /// How long those reads took, from when they were found in the ring until they were answered, added up.
    pub read_time: Duration,
    /// How long those writes took.
    pub write_time: Duration,
}

/// A request, as far as it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Counted {
    Read(u64),
    Write(u64),
    Flush,
    Other,
}

impl BlkCounters {
    /// Counts a request that was answered after it `took` so long.
    pub(super) fn note(&self, request: Counted, status: Status, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let add = |counter: &AtomicU64, amount| counter.fetch_add(amount, Ordering::Relaxed);
        match (status, request) {
            (Status::IoError | Status::Unsupported, _) => {
                add(&self.errors, 1);
            }
            (Status::Ok, Counted::Read(bytes)) => {
                add(&self.reads, 1);
                add(&self.read_bytes, bytes);
                add(&self.read_ns, took);
            }
            (Status::Ok, Counted::Write(bytes)) => {
                add(&self.writes, 1);
                add(&self.written_bytes, bytes);
                add(&self.write_ns, took);
            }
            (Status::Ok, Counted::Flush) => {
                add(&self.flushes, 1);
            }
            (Status::Ok, Counted::Other) => {}
        }
    }

    /// The counts now.
    #[must_use]
    pub fn now(&self) -> BlkCounts {
        let Self { reads, read_bytes, writes, written_bytes, flushes, errors, read_ns, write_ns } = self;
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkCounts {
            reads: now(reads),
            read_bytes: now(read_bytes),
            writes: now(writes),
            written_bytes: now(written_bytes),
            flushes: now(flushes),
            errors: now(errors),
            read_time: Duration::from_nanos(now(read_ns)),
            write_time: Duration::from_nanos(now(write_ns)),
        }
    }
}
