//! What a `Pages` frame says: records about runs of pages, and the block with those that travel encoded.

use super::cursor::Cursor;
use super::{FrameError, Kind};
use crate::codec::block::MAX_BLOCK;
use crate::codec::kept::GROUP_PAGES;
use crate::codec::{BlockCode, PageCode};
use crate::region::{MAX_REGION_PAGES, PageIndex, PageRun, RegionId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most records of one frame.
pub const MAX_RECORDS: usize = 256;

/// The most raw pages of one frame: 1 MiB, after which progress and cancellation are looked at.
pub const MAX_RAW_PAGES: u32 = 256;

/// The most pages of one frame, raw and zero: 256 MiB, so that no frame keeps its receiver busy for long.
pub const MAX_PAGES: u32 = 1 << 16;

/// One record as it travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PageRecord {
    first: U64,
    pages: U32,
    region: U16,
    code: u8,
    reserved: u8,
}

impl PageRecord {
    /// A record of one run.
    #[must_use]
    pub fn new(run: PageRun, code: PageCode) -> Self {
        let PageRun { region, first, pages } = run;
        Self { first: first.0.into(), pages: pages.into(), region: region.0.into(), code: code as u8, reserved: 0 }
    }

    /// The run, and how it is encoded; `None` if there is no such encoding.
    fn decode(&self) -> Option<(PageRun, PageCode)> {
        let Self { first, pages, region, code, reserved: _ } = self;
        let run = PageRun { region: RegionId(region.get()), first: PageIndex(first.get()), pages: pages.get() };
        Some((run, PageCode::from_wire(*code)?))
    }

    /// Adds a run at the end, if it continues this one in the same encoding.
    #[must_use]
    pub fn extend(&mut self, run: PageRun, code: PageCode) -> bool {
        let next = self.first.get() + u64::from(self.pages.get());
        // Digests are of groups that are counted from the run's beginning.
        let is_whole = code != PageCode::Kept || self.pages.get().is_multiple_of(GROUP_PAGES);
        let fits = is_whole && self.region.get() == run.region.0 && self.code == code as u8 && next == run.first.0;
        if fits {
            self.pages += run.pages;
        }
        fits
    }
}

/// The records of one frame, each of them valid by itself. Whether its run exists is for the receiver to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Records<'a>(&'a [PageRecord]);

impl<'a> Records<'a> {
    /// Takes records that this end made.
    #[must_use]
    pub fn new(records: &'a [PageRecord]) -> Self {
        Self(records)
    }

    /// Reads records from a part of a body.
    fn parse(body: &'a [u8]) -> Result<Self, FrameError> {
        let kind = Kind::Pages;
        let records = <[PageRecord]>::ref_from_bytes(body).map_err(|_| FrameError::Truncated { kind })?;
        let (mut raw, mut all) = (0, 0);
        let length = |what, found, max| FrameError::Length { what, kind, found, max };
        for record in records {
            let (run, code) = record.decode().ok_or_else(|| FrameError::Value {
                what: "An encoding",
                kind,
                found: record.code.into(),
            })?;
            if run.pages == 0 {
                return Err(length("A run", 0, MAX_PAGES.into()));
            }
            if run.first.0 >= MAX_REGION_PAGES {
                return Err(length("A first page", run.first.0, MAX_REGION_PAGES - 1));
            }
            all += u64::from(run.pages);
            if code == PageCode::Raw {
                raw += u64::from(run.pages);
            }
        }
        if raw > u64::from(MAX_RAW_PAGES) {
            return Err(length("The number of raw pages", raw, MAX_RAW_PAGES.into()));
        }
        if all > u64::from(MAX_PAGES) {
            return Err(length("The number of pages", all, MAX_PAGES.into()));
        }
        Ok(Self(records))
    }

    /// The runs in order.
    pub fn iter(&self) -> impl Iterator<Item = (PageRun, PageCode)> + use<'a> {
        // Parsing refused encodings that there are not, and the constructor takes none.
        self.0.iter().filter_map(PageRecord::decode)
    }

    /// The runs whose bytes follow the frame, in order.
    pub fn raw_runs(&self) -> impl Iterator<Item = PageRun> + use<'a> {
        self.iter().filter_map(|(run, code)| (code == PageCode::Raw).then_some(run))
    }
}

/// The in-band encodings of pages, one after the other in the order of the records, and perhaps packed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedBlock<'a> {
    /// How it is packed.
    pub code: BlockCode,
    /// How long it is unpacked, in bytes; at most [`MAX_BLOCK`].
    pub unpacked: usize,
    /// The packed bytes; at most [`MAX_BLOCK`] of them.
    pub bytes: &'a [u8],
}

/// What a `Pages` frame says. The bytes of its raw runs follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages<'a> {
    /// The runs.
    pub records: Records<'a>,
    /// The pages of those runs that travel encoded.
    pub block: PackedBlock<'a>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WirePages {
    records: U16,
    code: u8,
    reserved: u8,
    unpacked: U32,
}

pub(super) const MAX_PAGES_BODY: usize = size_of::<WirePages>() + MAX_RECORDS * size_of::<PageRecord>() + MAX_BLOCK;

impl<'a> Pages<'a> {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        const BOUNDED: &str = "whoever fills a frame bounds it";
        let Self { records: Records(records), block: PackedBlock { code, unpacked, bytes } } = self;
        let head = WirePages {
            records: u16::try_from(records.len()).expect(BOUNDED).into(),
            code: *code as u8,
            reserved: 0,
            unpacked: u32::try_from(*unpacked).expect(BOUNDED).into(),
        };
        out.extend(head.as_bytes());
        out.extend(records.as_bytes());
        out.extend(*bytes);
    }

    pub(super) fn parse(cursor: &mut Cursor<'a>) -> Result<Self, FrameError> {
        let kind = Kind::Pages;
        let length = |what, found, max: usize| FrameError::Length { what, kind, found, max: max as u64 };
        let WirePages { records, code, reserved: _, unpacked } = cursor.field()?;
        let (count, unpacked) = (usize::from(records.get()), unpacked.get() as usize);
        if count > MAX_RECORDS {
            return Err(length("The number of records", count as u64, MAX_RECORDS));
        }
        if unpacked > MAX_BLOCK {
            return Err(length("A block", unpacked as u64, MAX_BLOCK));
        }
        let code = BlockCode::from_wire(*code).ok_or_else(|| FrameError::Value {
            what: "The packing of a block",
            kind,
            found: u64::from(*code),
        })?;
        let records = Records::parse(cursor.bytes(count * size_of::<PageRecord>())?)?;
        let bytes = cursor.bytes(cursor.left())?;
        if bytes.len() > MAX_BLOCK {
            return Err(length("A packed block", bytes.len() as u64, MAX_BLOCK));
        }
        Ok(Self { records, block: PackedBlock { code, unpacked, bytes } })
    }
}
