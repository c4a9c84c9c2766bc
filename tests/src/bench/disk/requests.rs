//! What a request costs: a disk's device model on the host, from its queue to the page cache and back, without a guest.
//!
//! Beside it, in the same turns, one thread that does nothing but `pread`: what the kernel takes for the same bytes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use block::file::{Engine, FileOptions};
use block::{Access, FileBackend};
use devices::virtio::FailureListener;
use devices::virtio::blk::{Blk, BlkParts, Limits, WriteCache};
use devices::virtio::mmio::{Mmio, MmioParts};
use devices::{Gpa, GuestRam, Worker};
use serde::Serialize;
use vm_memory::Address as _;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{BLOCK, Driver, MEMORY, SLOTS};
use crate::bench::Summary;

/// Bytes of the file: more than a processor's cache, less than any page cache.
const FILE: u64 = 256 << 20;
/// How long each measurement takes.
const LONG: Duration = Duration::from_secs(1);
/// What the disk is called, and its thread by it.
const NAME: &str = "bench";

/// Who reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reader {
    /// The device, by io_uring.
    Uring,
    /// The device, by threads.
    Threads,
    /// A thread that calls `pread`.
    Pread,
}

/// What was measured of one reader with so many requests in flight.
#[derive(Debug, Serialize)]
pub struct Cell {
    /// Who read.
    pub reader: Reader,
    /// Requests in flight.
    pub depth: u16,
    /// Reads of 4 KiB in a second.
    pub reads_per_second: Summary,
    /// Processor time of the reader's thread for each, in microseconds; of the pool's threads it is not told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_us: Option<Summary>,
}

impl Cell {
    /// Reads in a second that one processor would do if it did nothing else.
    pub fn reads_per_core(&self) -> Option<f64> {
        self.cpu_us.as_ref().map(|cpu| 1e6 / cpu.median)
    }
}

/// One measurement.
struct Turn {
    reads_per_second: f64,
    cpu_us: Option<f64>,
}

/// Measures all readers in turn, so many times, on a file in `work`.
pub fn measure(work: &Path, turns: usize) -> Result<Vec<Cell>> {
    let path = work.join("disk.raw");
    let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(&path, bytes.repeat(usize::try_from(FILE >> 20)?))?;
    let cells = [
        (Reader::Pread, 1),
        (Reader::Uring, 1),
        (Reader::Uring, 32),
        (Reader::Uring, SLOTS),
        (Reader::Threads, 1),
        (Reader::Threads, 32),
    ];
    let mut measured: Vec<Vec<Turn>> = cells.iter().map(|_| Vec::new()).collect();
    for _ in 0..turns {
        for ((reader, depth), turns) in cells.into_iter().zip(&mut measured) {
            turns.push(turn(&path, reader, depth)?);
        }
    }
    cells
        .into_iter()
        .zip(measured)
        .map(|((reader, depth), turns)| {
            let cpu: Option<Vec<f64>> = turns.iter().map(|turn| turn.cpu_us).collect();
            let reads = turns.iter().map(|turn| turn.reads_per_second).collect();
            let reads_per_second = Summary::of(reads).context("There was no turn")?;
            Ok(Cell { reader, depth, reads_per_second, cpu_us: cpu.and_then(Summary::of) })
        })
        .collect()
}

fn turn(path: &Path, reader: Reader, depth: u16) -> Result<Turn> {
    match reader {
        Reader::Pread => pread(path),
        Reader::Uring => through_device(path, Engine::Uring, depth),
        Reader::Threads => through_device(path, Engine::Threads, depth),
    }
}

/// Blocks of the file, one after the other as though at random (xorshift64, Marsaglia 2003).
struct Blocks(u64);

impl Blocks {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % (FILE / u64::from(BLOCK))
    }
}

fn pread(path: &Path) -> Result<Turn> {
    let (file, mut blocks, mut bytes) = (File::open(path)?, Blocks(1), [0; BLOCK as usize]);
    let (begun, cpu, mut reads) = (Instant::now(), rustix::time::clock_gettime(THREAD_CPU), 0_u32);
    while begun.elapsed() < LONG {
        for _ in 0..256 {
            file.read_exact_at(&mut bytes, blocks.next() * u64::from(BLOCK))?;
        }
        reads += 256;
    }
    let (elapsed, spent) = (begun.elapsed(), rustix::time::clock_gettime(THREAD_CPU) - cpu);
    let spent = Duration::new(u64::try_from(spent.tv_sec)?, u32::try_from(spent.tv_nsec)?);
    Ok(Turn::new(reads, elapsed, Some(spent)))
}

const THREAD_CPU: rustix::time::ClockId = rustix::time::ClockId::ThreadCPUTime;

impl Turn {
    fn new(reads: u32, elapsed: Duration, cpu: Option<Duration>) -> Self {
        let reads = f64::from(reads);
        let cpu_us = cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / reads);
        Self { reads_per_second: reads / elapsed.as_secs_f64(), cpu_us }
    }
}

fn through_device(path: &Path, engine: Engine, depth: u16) -> Result<Turn> {
    let backend = FileBackend::open(path, FileOptions { engine, ..FileOptions::new(Access::ReadOnly) })?;
    let parts = BlkParts {
        backend: Arc::new(backend),
        serial: NAME.to_owned(),
        queues: 1,
        write_cache: WriteCache::Back,
        limits: Limits::default(),
        thread_start: || {},
    };
    let ram = GuestRam::from_ranges(&[(Gpa::new(0), MEMORY)])?;
    let mmio = MmioParts {
        id: NAME.to_owned(),
        ram: ram.clone(),
        irq: EventFd::new(EFD_NONBLOCK)?,
        worker: Worker::spawn("bench", || {})?,
        on_failure: FailureListener::new(|cause| eprintln!("The device failed: {cause}")),
    };
    let device = Mmio::new(Blk::new(parts)?, mmio)?;
    let (mut driver, mut blocks) = (Driver::bring_up(&device, &ram)?, Blocks(1));
    for slot in 0..depth {
        driver.offer(slot, blocks.next())?;
    }
    driver.publish()?;
    let (begun, cpu, mut reads) = (Instant::now(), lane_cpu()?, 0_u32);
    let mut done = Vec::with_capacity(depth.into());
    while begun.elapsed() < LONG {
        driver.completed(|slot| done.push(slot))?;
        reads += u32::try_from(done.len())?;
        let any = !done.is_empty();
        for slot in done.drain(..) {
            driver.offer(slot, blocks.next())?;
        }
        if any { driver.publish()? } else { std::hint::spin_loop() }
    }
    let elapsed = begun.elapsed();
    let spent = lane_cpu()?.saturating_sub(cpu);
    ensure!(reads > 0, "The device reads nothing");
    Ok(Turn::new(reads, elapsed, (engine == Engine::Uring).then_some(spent)))
}

/// The processor time of the thread of the disk's queue so far.
fn lane_cpu() -> Result<Duration> {
    for task in fs::read_dir("/proc/self/task")? {
        let folder = task?.path();
        if fs::read_to_string(folder.join("comm"))?.trim() == format!("{NAME}/0") {
            let schedstat = fs::read_to_string(folder.join("schedstat"))?;
            let nanoseconds = schedstat.split(' ').next().context("There are no scheduler statistics")?;
            return Ok(Duration::from_nanos(nanoseconds.parse()?));
        }
    }
    anyhow::bail!("The disk's queue has no thread")
}
