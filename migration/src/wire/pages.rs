//! Page records: what a `Pages` frame says about runs of pages.

use super::{FrameError, Kind};
use crate::region::{MAX_REGION_PAGES, PageIndex, PageRun, RegionId};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The most records of one frame.
pub const MAX_RECORDS: usize = 256;

/// The most raw pages of one frame: 1 MiB, after which progress and cancellation are looked at.
pub const MAX_RAW_PAGES: u32 = 256;

/// The most pages of one frame, raw and zero: 256 MiB, so that no frame keeps its receiver busy for long.
pub const MAX_PAGES: u32 = 1 << 16;

/// How the pages of a run are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageCode {
    /// The bytes of the pages follow the frame.
    Raw = 0,
    /// All bytes are zero.
    Zero = 1,
}

impl PageCode {
    fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Raw),
            1 => Some(Self::Zero),
            _ => None,
        }
    }
}

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

    /// Adds one page at the end, if it continues the run in the same encoding.
    #[must_use]
    pub fn extend(&mut self, region: RegionId, page: PageIndex, code: PageCode) -> bool {
        let next = self.first.get() + u64::from(self.pages.get());
        let fits = self.region.get() == region.0 && self.code == code as u8 && next == page.0;
        if fits {
            self.pages += 1;
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

    /// Reads records from a body.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, FrameError> {
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

    /// The bytes of the records.
    pub(super) fn as_bytes(&self) -> &'a [u8] {
        self.0.as_bytes()
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

    /// How many bytes follow the frame.
    #[must_use]
    pub fn raw_bytes(&self) -> usize {
        self.raw_runs().map(|run| run.bytes()).sum()
    }
}
