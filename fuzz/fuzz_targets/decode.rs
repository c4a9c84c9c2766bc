//! Whole frames of pages: any records, and any block, applied to a small memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::codec::decode::{PageSink, decode};
use migration::codec::delta::Delta;
use migration::codec::kept::Digest;
use migration::codec::reference::Reference;
use migration::codec::{Page, PageCode, PageId};
use migration::{PAGE_SIZE, PageIndex, PageRun, RegionId};

const PAGES: usize = 32;

/// Bytes of a record in the input: code, first page, pages.
const RECORD: usize = 3;

/// One region; what is behind its end is not there.
struct Memory([Page; PAGES]);

/// There is no such page.
#[derive(Debug)]
struct Absent;

impl Memory {
    fn page(&mut self, id: PageId) -> Result<&mut Page, Absent> {
        let index = usize::try_from(id.page.0).map_err(|_| Absent)?;
        self.0.get_mut(index).filter(|_| id.region == RegionId(0)).ok_or(Absent)
    }
}

impl PageSink for Memory {
    type Error = Absent;

    fn clear(&mut self, run: PageRun) -> Result<(), Absent> {
        (run.first.0..).take(run.pages as usize).try_for_each(|page| {
            *self.page(PageId { region: run.region, page: PageIndex(page) })? = [0; PAGE_SIZE];
            Ok(())
        })
    }

    fn write(&mut self, page: PageId, content: &Page) -> Result<(), Absent> {
        *self.page(page)? = *content;
        Ok(())
    }

    fn patch(&mut self, page: PageId, delta: &Delta<'_>) -> Result<(), Absent> {
        delta.apply(self.page(page)?);
        Ok(())
    }

    fn copy(&mut self, page: PageId, from: Reference) -> Result<(), Absent> {
        *self.page(page)? = *self.page(from.page)?;
        Ok(())
    }

    fn check(&mut self, group: PageRun, _: &Digest) -> Result<(), Absent> {
        self.page(PageId { region: group.region, page: group.first }).map(|_| ())
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&count, data)) = data.split_first() else { return };
    let Some((records, block)) = data.split_at_checked(usize::from(count % 8) * RECORD) else { return };
    let records = records.as_chunks::<RECORD>().0.iter().filter_map(|&[code, first, pages]| {
        // The highest first pages stand for those behind every region.
        let first = if first == u8::MAX { u64::MAX } else { first.into() };
        let run = PageRun { region: RegionId(0), first: PageIndex(first), pages: pages.into() };
        Some((run, PageCode::from_wire(code % 8)?))
    });
    // No fuzzer makes up whole pages: some stand before what it made.
    let block = [[0x77; PAGE_SIZE].repeat(usize::from(count / 8 % 4)).as_slice(), block].concat();
    let mut memory = Memory([[0x5a; PAGE_SIZE]; PAGES]);
    if let Err(error) = decode(records, &block, &mut memory) {
        // Errors are told to people: they have words.
        assert!(!format!("{error:?}").is_empty());
    }
});
