//! Putting the pages of one frame where they belong.

use super::error::Fault;
use super::intake::{Intake, memory};
use crate::bell::Bell;
use crate::channel::TICK;
use crate::clock::Clock;
use crate::codec::block::Unpacker;
use crate::codec::decode::{DecodeError, PageSink, decode};
use crate::codec::delta::Delta;
use crate::codec::reference::Reference;
use crate::codec::{Page, PageId};
use crate::guest::{GuestPages, exact_slice};
use crate::region::{PAGE_SIZE, PageIndex, PageRun};
use crate::wire::Pages;
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

/// Applies everything of a frame that travels in it. The memory of its raw runs, whose bytes come next.
pub(super) fn install<'m, M: GuestPages>(
    intake: &'m Intake<M>,
    frame: Pages<'_>,
    unpacker: &mut Unpacker,
    wait: Wait<'_>,
) -> Result<Vec<VolatileSlice<'m>>, Fault> {
    let Pages { records, block } = frame;
    let unpacked = unpacker.unpack(block.code, block.bytes, block.unpacked).map_err(Fault::Malformed)?;
    decode(records.iter(), unpacked, &mut Installer { intake, wait }).map_err(|error| match error {
        DecodeError::Malformed(malformed) => Fault::Malformed(malformed),
        DecodeError::Sink(fault) => fault,
    })?;
    if !unpacked.is_empty() {
        intake.news.ring();
    }
    let raw = |run| {
        intake.written.add(run);
        exact_slice(intake.memory(), run).map_err(memory)
    };
    records.raw_runs().map(raw).collect()
}

struct Installer<'a, 'm, M> {
    intake: &'m Intake<M>,
    wait: Wait<'a>,
}

impl<'m, M: GuestPages> Installer<'_, 'm, M> {
    fn slice(&self, page: PageId) -> Result<VolatileSlice<'m>, Fault> {
        exact_slice(self.intake.memory(), one(page)).map_err(memory)
    }

    /// Notes that a page has its content.
    fn came(&self, page: PageId) {
        self.intake.written.add(one(page));
        self.intake.arrived.add(one(page));
    }

    fn read(&self, page: PageId) -> Result<Page, Fault> {
        let mut content = [0; PAGE_SIZE];
        self.slice(page)?.copy_to(&mut content);
        Ok(content)
    }

    /// Waits for a page of the round under way.
    fn await_page(&mut self, page: PageId) -> Result<(), Fault> {
        let Wait { clock, limit, idle } = &mut self.wait;
        let (intake, end) = (self.intake, clock.now() + *limit);
        // The others may wait for what this frame has brought so far.
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

impl<M: GuestPages> PageSink for Installer<'_, '_, M> {
    type Error = Fault;

    /// Pages that are zero already are not touched, so the host need not back them.
    fn clear(&mut self, run: PageRun) -> Result<(), Fault> {
        for page in run.ids().filter(|page| self.intake.written.contains(page.region, page.page.0)) {
            pages(&self.slice(page)?).for_each(|page| clear(&page));
        }
        Ok(())
    }

    fn write(&mut self, page: PageId, content: &Page) -> Result<(), Fault> {
        self.slice(page)?.copy_from(content);
        self.came(page);
        Ok(())
    }

    fn patch(&mut self, page: PageId, delta: &Delta<'_>) -> Result<(), Fault> {
        let mut content = self.read(page)?;
        delta.apply(&mut content);
        self.write(page, &content)
    }

    fn copy(&mut self, page: PageId, from: Reference) -> Result<(), Fault> {
        self.intake.check(one(from.page))?;
        if from.same_round {
            self.await_page(from.page)?;
        }
        self.slice(from.page)?.copy_to_volatile_slice(self.slice(page)?);
        self.came(page);
        Ok(())
    }
}

fn one(PageId { region, page: PageIndex(first) }: PageId) -> PageRun {
    PageRun { region, first: PageIndex(first), pages: 1 }
}
