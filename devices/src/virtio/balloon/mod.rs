//! virtio-balloon (virtio 1.3, 5.5): memory that a guest lends back to the host, and what it tells of the rest.
//!
//! The driver hands over pages when it follows a target (inflate), and ranges that happen to be free (reporting); both
//! are discarded at once. It takes pages back by using them again (deflate), which needs no action here, for a
//! discarded page reads as zeros. `vmm` leads the device by [`Mmio::with`](super::mmio::Mmio::with) and the methods of
//! [`Balloon`]. Invariant: nothing outside of guest memory is discarded, and what is discarded is marked as changed.

mod discard;
mod saved;
mod statistics;

pub use saved::BalloonSavedV1;
pub use statistics::{Statistic, Statistics};

use super::queue::{BrokenRing, Buffer, Chain, copy_from};
use super::serve::serve;
use super::{Fault, Io, MmioSavedV1, Progress, QueueOwner, RestoreError, Source, VirtioDevice, read_bytes};
use crate::{Gpa, GuestRam};
use discard::{PAGE, discard};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::Address;
use vmm_sys_util::timerfd::TimerFd;

/// Feature bits (virtio 1.3, 5.5.3).
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

/// Queue indices (virtio 1.3, 5.5.2).
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
/// The place of the queue for free page hints, a feature that is not offered here. Linux numbers queues without gaps, so
/// its driver has the reporting queue in this place. What comes here can be nothing else, so both places report.
const REPORTING_WITHOUT_GAP: usize = 3;
const REPORTING: usize = 4;

const QUEUE_SIZES: [u16; 5] = [128; 5];

/// Offset of `actual`, all that the driver may write, in `struct virtio_balloon_config` (virtio 1.3, 5.5.4).
const ACTUAL: usize = 4;

/// The most pages that are taken from one chain. Linux puts 256 into one; with more than this a driver would only make
/// the device spend its turn on one chain, so the rest stays with the guest.
const MOST_PAGES: usize = 4096;

const STATISTICS_DUE: u32 = 0;

/// A target that a balloon cannot have.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("A balloon of {bytes} bytes is larger than the guest's memory of {ram_bytes} bytes")]
pub struct TargetError {
    /// The target.
    pub bytes: u64,
    /// What the guest has.
    pub ram_bytes: u64,
}

/// What a balloon is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonParts {
    /// How much memory the guest has.
    pub ram_bytes: u64,
    /// How often the guest is asked for statistics; not at all if zero.
    pub statistics_every: Duration,
    /// Whether the driver may take pages back by itself before the guest runs out of memory.
    pub deflate_on_oom: bool,
    /// Whether the driver may report pages that the guest does not use.
    pub free_page_reporting: bool,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    features: u64,
    ram_bytes: u64,
    target_pages: u32,
    actual_pages: u32,
    statistics: Statistics,
    /// The driver's buffer for statistics, which it gets back when it is asked for new ones.
    asked_with: Option<Chain>,
    timer: TimerFd,
    statistics_every: Duration,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// The host's refusal of a timer.
    pub fn new(parts: BalloonParts) -> io::Result<Self> {
        let BalloonParts { ram_bytes, statistics_every, deflate_on_oom, free_page_reporting } = parts;
        let offered = |wanted, feature| if wanted { feature } else { 0 };
        Ok(Self {
            features: STATS_VQ | offered(deflate_on_oom, DEFLATE_ON_OOM) | offered(free_page_reporting, PAGE_REPORTING),
            ram_bytes,
            target_pages: 0,
            actual_pages: 0,
            statistics: Statistics::default(),
            asked_with: None,
            timer: TimerFd::new()?,
            statistics_every,
        })
    }

    /// How large the balloon is asked to be.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.target_pages) * PAGE
    }

    /// How large the driver says that it is.
    #[must_use]
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.actual_pages) * PAGE
    }

    /// The last that the guest told of its memory.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Asks the driver for a balloon of `bytes` bytes, rounded down to whole pages.
    ///
    /// # Errors
    /// [`TargetError`] if the guest has not that much memory.
    pub fn set_target(&mut self, io: &mut Io, bytes: u64) -> Result<(), TargetError> {
        let error = TargetError { bytes, ram_bytes: self.ram_bytes };
        if bytes > self.ram_bytes {
            return Err(error);
        }
        self.target_pages = u32::try_from(bytes / PAGE).map_err(|_| error)?;
        io.interrupt.config_changed();
        Ok(())
    }

    fn config(&self) -> [u8; 8] {
        let [a, b, c, d] = self.target_pages.to_le_bytes();
        let [e, f, g, h] = self.actual_pages.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }

    /// Gives the driver its statistics buffer back, by which it is asked for new ones.
    fn ask(&mut self, io: &mut Io) -> Result<(), BrokenRing> {
        if let Some(chain) = self.asked_with.take() {
            io.queues[STATISTICS].push(&chain, 0)?;
            io.signal(STATISTICS)?;
        }
        Ok(())
    }

    /// Takes the statistics that came, and keeps their buffer. A second one, which no driver has, is given back.
    fn take_statistics(&mut self, io: &mut Io) -> Result<Progress, BrokenRing> {
        for _ in 0..QUEUE_SIZES[STATISTICS] {
            let Some(chain) = io.queues[STATISTICS].pop()? else {
                if io.queues[STATISTICS].accept_kicks()? {
                    continue;
                }
                return Ok(Progress::Idle);
            };
            let mut bytes = [0; statistics::LONGEST];
            let length = copy_from(&io.ram, chain.readable(), 0, &mut bytes);
            self.ask(io)?;
            self.statistics = Statistics::parse(&bytes[..length]);
            self.asked_with = Some(chain);
        }
        Ok(Progress::More)
    }

    fn start_timer(&mut self) -> io::Result<()> {
        if self.statistics_every.is_zero() {
            return Ok(());
        }
        Ok(self.timer.reset(self.statistics_every, Some(self.statistics_every))?)
    }
}

/// Discards the pages whose numbers the driver wrote, neighbours together.
fn inflate(ram: &GuestRam, chain: &Chain) {
    let mut bytes = vec![0; 4 * MOST_PAGES];
    let length = copy_from(ram, chain.readable(), 0, &mut bytes);
    let (numbers, _) = bytes[..length].as_chunks();
    let mut numbers: Vec<u32> = numbers.iter().copied().map(u32::from_le_bytes).collect();
    numbers.sort_unstable();
    numbers.dedup();
    for run in numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
        give_back(ram, Gpa::new(u64::from(run[0]) * PAGE), run.len() as u64 * PAGE);
    }
}

/// Discards the ranges that the driver reported as free.
fn report(ram: &GuestRam, chain: &Chain) {
    for &Buffer { address, length } in chain.writable() {
        give_back(ram, address, length.into());
    }
}

fn give_back(ram: &GuestRam, start: Gpa, bytes: u64) {
    if let Err(error) = discard(ram, start, bytes) {
        // The guest does not count on it: a page that stays is only not gained.
        tracing::debug!(%error, start = start.0, bytes, "The host did not take pages of a balloon back");
    }
}

impl VirtioDevice for Balloon {
    type Saved = BalloonSavedV1;
    type Parts = BalloonParts;

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_owner(&self, _: usize) -> QueueOwner {
        QueueOwner::Worker
    }

    fn sources(&self) -> Vec<Source> {
        // Polled for edges, and never read.
        vec![Source { token: STATISTICS_DUE, fd: self.timer.as_raw_fd() }]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, _: &mut Io, offset: u64, data: &[u8]) {
        let mut config = self.config();
        for (at, place) in (0_u64..).zip(&mut config).skip(ACTUAL) {
            let written = at.checked_sub(offset).and_then(|from| data.get(usize::try_from(from).ok()?));
            *place = written.copied().unwrap_or(*place);
        }
        let [.., a, b, c, d] = config;
        self.actual_pages = u32::from_le_bytes([a, b, c, d]);
    }

    fn start(&mut self, io: &mut Io) -> Result<(), Fault> {
        if self.target_pages != self.actual_pages {
            // Perhaps the target changed while no driver listened.
            io.interrupt.config_changed();
        }
        let what = "A balloon's timer could not be started";
        self.start_timer().map_err(|source| Fault::Host { what, source })
    }

    fn process(&mut self, io: &mut Io, queue: usize) -> Result<Progress, Fault> {
        let progress = match queue {
            INFLATE => serve(io, INFLATE, |ram, chain| {
                inflate(ram, chain);
                Ok(0)
            }),
            DEFLATE => serve(io, DEFLATE, |_, _| Ok(0)),
            STATISTICS => self.take_statistics(io),
            REPORTING_WITHOUT_GAP | REPORTING => serve(io, queue, |ram, chain| {
                report(ram, chain);
                Ok(0)
            }),
            _ => Ok(Progress::Idle),
        };
        Ok(progress?)
    }

    fn on_source(&mut self, io: &mut Io, _: u32) -> Result<(), Fault> {
        Ok(self.ask(io)?)
    }

    fn stop(&mut self, io: &mut Io, _: Duration) -> Result<(), usize> {
        // The buffer that is kept for the next question is not lost: it is found in the ring again.
        if self.asked_with.take().is_some() {
            io.queues[STATISTICS].unpop();
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        self.actual_pages = 0;
        self.statistics = Statistics::default();
        self.asked_with = None;
    }

    fn release(&mut self) {
        // Nothing of the host is held.
    }

    fn reacquire(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn announce(&mut self, _: &mut Io) {
        // Nobody outside knows of it.
    }

    fn log_dirty(&mut self, _: &mut Io, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn harvest_dirty(&mut self, _: &mut dyn FnMut(Gpa)) {
        // What is discarded is marked in the memory's own bitmap.
    }

    fn save(&self, transport: MmioSavedV1) -> BalloonSavedV1 {
        let Self {
            features: _,
            ram_bytes: _,
            target_pages,
            actual_pages,
            statistics: _,
            asked_with: _,
            timer: _,
            statistics_every: _,
        } = self;
        BalloonSavedV1 { transport, target_pages: *target_pages, actual_pages: *actual_pages }
    }

    fn restore(id: &str, saved: BalloonSavedV1, parts: BalloonParts) -> Result<(Self, MmioSavedV1), RestoreError> {
        let BalloonSavedV1 { transport, target_pages, actual_pages } = saved;
        let refused = |error: io::Error| RestoreError::Host { id: id.to_owned(), reason: error.to_string() };
        let mut balloon = Self::new(parts).map_err(refused)?;
        if u64::from(target_pages) * PAGE > balloon.ram_bytes {
            let (field, value) = ("target in pages", target_pages.into());
            return Err(RestoreError::BadField { id: id.to_owned(), field, value });
        }
        balloon.target_pages = target_pages;
        balloon.actual_pages = actual_pages;
        Ok((balloon, transport))
    }
}

#[cfg(test)]
mod tests;
