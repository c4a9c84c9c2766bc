//! Putting the pages of one frame where they belong.

use super::error::Fault;
use super::intake::{Intake, failed};
use crate::bell::Bell;
use crate::channel::{Channel, TICK};
use crate::clock::Clock;
use crate::codec::block::Unpacker;
use crate::codec::decode::{DecodeError, PageSink, decode};
use crate::codec::delta::Delta;
use crate::codec::kept::{Digest, digest};
use crate::codec::reference::Reference;
use crate::codec::{Page, PageId};
use crate::guest::{GuestPages, exact_slice};
use crate::link::Link;
use crate::region::{PAGE_SIZE, PageIndex, PageRun};
use crate::wire::{Pages, Records};
use crate::zero::{clear, pages};
use std::time::Duration;
use vm_memory::VolatileSlice;

/// How a stream waits for a page that another stream brings.
pub(super) struct Wait<'a> {
    pub(super) clock: &'a dyn Clock,
    /// For how long at most.
    pub(super) limit: Duration,
    /// Waits until the bell has rung more often than so many times, or for so long.
    pub(super) idle: &'a mut dyn FnMut(&Bell, u64, Duration),
}

/// The most bytes of a disk that are written at once.
const MOST_AT_ONCE: usize = 256 << 10;

/// What a stream needs to put pages where they belong, used again for each frame.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    unpacker: Unpacker,
    /// Pages on their way to a disk.
    stage: Vec<u8>,
}

/// Applies everything of a frame that travels in it. The bytes of its raw runs come next: see [`receive_raw`].
pub(super) fn install<M: GuestPages>(
    intake: &Intake<M>,
    frame: Pages<'_>,
    buffers: &mut Buffers,
    wait: Wait<'_>,
) -> Result<(), Fault> {
    let (Pages { records, block }, Buffers { unpacker, stage }) = (frame, buffers);
    let unpacked = unpacker.unpack(block.code, block.bytes, block.unpacked).map_err(Fault::Malformed)?;
    stage.clear();
    let mut installer = Installer { intake, wait, held: Held { run: None, bytes: stage } };
    let applied = decode(records.iter(), unpacked, &mut installer).map_err(|error| match error {
        DecodeError::Malformed(malformed) => Fault::Malformed(malformed),
        DecodeError::Sink(fault) => fault,
    });
    applied.and_then(|()| installer.store())?;
    if !unpacked.is_empty() {
        intake.news.ring();
    }
    records.raw_runs().for_each(|run| intake.written.add(run));
    Ok(())
}

/// Receives the bytes of a frame's raw runs, into memory where they belong there, and stores those of disks.
pub(super) fn receive_raw<M: GuestPages, L: Link>(
    intake: &Intake<M>,
    records: Records<'_>,
    buffers: &mut Buffers,
    channel: &mut Channel<'_, L>,
) -> Result<(), Fault> {
    let (memory, stage) = (intake.memory(), &mut buffers.stage);
    let of_disks = |run: &PageRun| memory.disk(run.region).is_some();
    stage.clear();
    stage.resize(records.raw_runs().filter(of_disks).map(|run| run.bytes()).sum(), 0);
    let mut staged = stage.as_mut_slice();
    let place = |run| {
        if !of_disks(&run) {
            return exact_slice(memory, run).map_err(failed);
        }
        let (pages, rest) = std::mem::take(&mut staged).split_at_mut(run.bytes());
        staged = rest;
        Ok(VolatileSlice::from(pages))
    };
    let slices = records.raw_runs().map(place).collect::<Result<Vec<_>, Fault>>()?;
    channel.receive_pages(&slices).map_err(Fault::Link)?;
    let mut staged = stage.as_slice();
    for run in records.raw_runs() {
        let Some(disk) = memory.disk(run.region) else { continue };
        let (pages, rest) = staged.split_at(run.bytes());
        disk.write(run.first, pages).map_err(failed)?;
        staged = rest;
    }
    Ok(())
}

struct Installer<'a, 'b, 'm, M> {
    intake: &'m Intake<M>,
    wait: Wait<'a>,
    held: Held<'b>,
}

/// Pages of a disk that follow each other, and are to be written at once.
struct Held<'a> {
    run: Option<PageRun>,
    bytes: &'a mut Vec<u8>,
}

impl Held<'_> {
    /// Adds a page, if it follows those that are held; whether it did.
    fn add(&mut self, page: PageId, content: &Page) -> bool {
        let run = match &mut self.run {
            None => self.run.insert(PageRun { pages: 0, ..one(page) }),
            Some(run) => run,
        };
        let follows = run.region == page.region && run.first.0 + u64::from(run.pages) == page.page.0;
        if !follows || self.bytes.len() >= MOST_AT_ONCE {
            return false;
        }
        run.pages += 1;
        self.bytes.extend(content);
        true
    }

    fn has(&self, PageId { region, page }: PageId) -> bool {
        let within = |run: PageRun| (run.first.0..run.first.0 + u64::from(run.pages)).contains(&page.0);
        self.run.is_some_and(|run| run.region == region && within(run))
    }
}

impl<'m, M: GuestPages> Installer<'_, '_, 'm, M> {
    fn slice(&self, page: PageId) -> Result<VolatileSlice<'m>, Fault> {
        exact_slice(self.intake.memory(), one(page)).map_err(failed)
    }

    /// Notes that pages have their content.
    fn came(&self, run: PageRun) {
        self.intake.written.add(run);
        self.intake.arrived.add(run);
    }

    fn read(&mut self, page: PageId) -> Result<Page, Fault> {
        let mut content = [0; PAGE_SIZE];
        match self.intake.memory().disk(page.region) {
            None => self.slice(page)?.copy_to(&mut content),
            Some(disk) => {
                if self.held.has(page) {
                    self.store()?;
                }
                disk.read(page.page, &mut content).map_err(failed)?;
                PAGE_SIZE
            }
        };
        Ok(content)
    }

    /// Writes what is held of a disk.
    fn store(&mut self) -> Result<(), Fault> {
        let Some(run) = self.held.run.take() else { return Ok(()) };
        if let Some(disk) = self.intake.memory().disk(run.region) {
            disk.write(run.first, self.held.bytes).map_err(failed)?;
        }
        self.held.bytes.clear();
        self.came(run);
        Ok(())
    }

    /// Waits for a page of the round under way.
    fn await_page(&mut self, page: PageId) -> Result<(), Fault> {
        // The others may wait for what this frame has brought so far.
        self.store()?;
        let Wait { clock, limit, idle } = &mut self.wait;
        let (intake, end) = (self.intake, clock.now() + *limit);
        if !intake.arrived.contains(page.region, page.page.0) {
            intake.news.ring();
        }
        loop {
            let seen = intake.news.rung();
            if intake.arrived.contains(page.region, page.page.0) {
                return Ok(());
            }
            if !intake.is_alive() || clock.now() >= end {
                return Err(Fault::NoOriginal { region: page.region, page: page.page });
            }
            idle(&intake.news, seen, TICK);
        }
    }
}

impl<M: GuestPages> PageSink for Installer<'_, '_, '_, M> {
    type Error = Fault;

    /// Pages that are zero already are not touched, so the host need not back them.
    fn clear(&mut self, run: PageRun) -> Result<(), Fault> {
        self.store()?;
        let intake = self.intake;
        let written = |page: &PageId| intake.written.contains(page.region, page.page.0);
        let Some(disk) = intake.memory().disk(run.region) else {
            for page in run.ids().filter(written) {
                pages(&self.slice(page)?).for_each(|page| clear(&page));
            }
            return Ok(());
        };
        let mut left = run.ids().peekable();
        while let Some(first) = left.find(written) {
            let mut count = 1;
            while left.next_if(written).is_some() {
                count += 1;
            }
            disk.clear(first.page, count).map_err(failed)?;
        }
        Ok(())
    }

    fn write(&mut self, page: PageId, content: &Page) -> Result<(), Fault> {
        if self.intake.memory().disk(page.region).is_none() {
            self.slice(page)?.copy_from(content);
            self.came(one(page));
        } else if !self.held.add(page, content) {
            self.store()?;
            self.held.add(page, content);
        }
        Ok(())
    }

    fn patch(&mut self, page: PageId, delta: &Delta<'_>) -> Result<(), Fault> {
        let mut content = self.read(page)?;
        delta.apply(&mut content);
        self.write(page, &content)
    }

    fn check(&mut self, group: PageRun, expected: &Digest) -> Result<(), Fault> {
        self.store()?;
        let PageRun { region, first, .. } = group;
        let disk = self.intake.memory().disk(region).filter(|disk| !disk.is_blank());
        let disk = disk.ok_or(Fault::NoOldCopy { region })?;
        let bytes = &mut *self.held.bytes;
        bytes.resize(group.bytes(), 0);
        disk.read(first, bytes).map_err(failed)?;
        let is_there = digest(bytes) == *expected;
        bytes.clear();
        if !is_there {
            self.intake.lacking.add(group);
        }
        Ok(())
    }

    fn copy(&mut self, page: PageId, from: Reference) -> Result<(), Fault> {
        self.intake.check(one(from.page))?;
        if from.same_round {
            self.await_page(from.page)?;
        }
        let in_memory = |page: PageId| self.intake.memory().disk(page.region).is_none();
        if in_memory(page) && in_memory(from.page) {
            self.slice(from.page)?.copy_to_volatile_slice(self.slice(page)?);
            self.came(one(page));
            return Ok(());
        }
        let content = self.read(from.page)?;
        self.write(page, &content)
    }
}

fn one(PageId { region, page: PageIndex(first) }: PageId) -> PageRun {
    PageRun { region, first: PageIndex(first), pages: 1 }
}
