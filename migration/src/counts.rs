//! How many pages went, by the way they went.

use crate::codec::PageCode;
use serde::{Deserialize, Serialize};

/// Pages of a frame, a round or a stream, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// As they are.
    pub raw: u64,
    /// Zero: no content was sent.
    pub zero: u64,
    /// Whole, in a block.
    pub plain: u64,
    /// As runs of equal words.
    pub rle: u64,
    /// As changes to what was sent before.
    pub delta: u64,
    /// As references to other pages.
    pub copy: u64,
    /// As digests, which an old copy of a disk may have.
    pub kept: u64,
    /// Not at all: they were as the target has them already. Only the source knows of these.
    pub same: u64,
}

impl PageCounts {
    /// Counts pages that go in one code.
    pub(crate) fn add(&mut self, code: PageCode, pages: u64) {
        *match code {
            PageCode::Raw => &mut self.raw,
            PageCode::Zero => &mut self.zero,
            PageCode::Plain => &mut self.plain,
            PageCode::Rle => &mut self.rle,
            PageCode::Delta => &mut self.delta,
            PageCode::Copy => &mut self.copy,
            PageCode::Kept => &mut self.kept,
        } += pages;
    }

    /// Pages of which the target is told.
    #[must_use]
    pub fn sent(&self) -> u64 {
        let Self { raw, zero, plain, rle, delta, copy, kept, same: _ } = self;
        raw + zero + plain + rle + delta + copy + kept
    }

    /// Pages that were dealt with.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.sent() + self.same
    }
}

impl std::ops::AddAssign for PageCounts {
    fn add_assign(&mut self, Self { raw, zero, plain, rle, delta, copy, kept, same }: Self) {
        self.raw += raw;
        self.zero += zero;
        self.plain += plain;
        self.rle += rle;
        self.delta += delta;
        self.copy += copy;
        self.kept += kept;
        self.same += same;
    }
}
