//! Page codecs: how a page becomes fewer bytes, and a page again.
//!
//! Mechanism only. Which codec a page or a block gets is decided elsewhere; nothing here knows a socket, a thread or a
//! guest. A `Pages` frame has records (runs of pages of one code each) and one *block*: the in-band encodings of the
//! pages, one after the other in the order of the records. The block may be packed as a whole, so that its ratio is that
//! of a stream of pages and not of a lone one. Raw pages are in no block: they go from guest memory to guest memory.
//!
//! | code | in the block | encoder |
//! | --- | --- | --- |
//! | `Raw` | nothing; 4096 bytes follow the frame | |
//! | `Zero` | nothing | |
//! | `Plain` | 4096 bytes | the page itself |
//! | `Rle` | u16 length, body | [`rle`]: runs of equal words |
//! | `Delta` | u16 length, body | [`delta`]: what changed since the page was last sent; [`delta_cache`] has that copy |
//! | `Copy` | u64 | [`mod@reference`]: the target has these bytes in another page; [`dedup`] finds it |
//! | `Kept` | 16 bytes for each 16 pages | [`kept`]: digests, where the target has an old copy of a disk |
//!
//! All numbers are little endian. Encoders append to a buffer that their caller uses again, allocate nothing per page, and
//! decline what they cannot make clearly smaller. [`decode`] is the one way back. What it reads comes from a peer: nothing
//! panics, nothing allocates, and every byte that is missing, too many or means nothing is [`Malformed`].

pub mod block;
pub mod decode;
pub mod dedup;
pub mod delta;
pub mod delta_cache;
mod input;
pub mod kept;
pub mod reference;
pub mod rle;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod samples;

use crate::region::{PAGE_SIZE, PageIndex, RegionId};
use block::Packing;
use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;

/// The bytes of one page, in memory of this process: a guest cannot change them while they are looked at.
pub type Page = [u8; PAGE_SIZE];

/// The longest body of an encoded page, in bytes. What is not smaller by a quarter is not worth decoding, and a page that
/// travels plain packs better with its neighbours.
pub const MAX_ENCODED: usize = PAGE_SIZE / 4 * 3;

/// Which page of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageId {
    /// The region that the page is in.
    pub region: RegionId,
    /// The page in it.
    pub page: PageIndex,
}

/// What became of an attempt to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// The encoding was appended.
    Written,
    /// It would not be clearly smaller; the output is as it was.
    Declined,
}

/// How the pages of a run are encoded, by the number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageCode {
    /// The bytes of the pages follow the frame.
    Raw = 0,
    /// All bytes are zero.
    Zero = 1,
    /// The bytes of the pages are in the block.
    Plain = 2,
    /// Runs of equal words.
    Rle = 3,
    /// What changed since the page was last sent.
    Delta = 4,
    /// The same bytes as another page.
    Copy = 5,
    /// What an old copy of the disk may have: digests of groups of [`GROUP_PAGES`](kept::GROUP_PAGES) are in the block.
    Kept = 6,
}

impl PageCode {
    /// Every code, in the order of their numbers.
    pub const ALL: [Self; 7] = [Self::Raw, Self::Zero, Self::Plain, Self::Rle, Self::Delta, Self::Copy, Self::Kept];

    /// The code of a number; `None` if there is no such one.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The most bytes that one page of this code takes in a block.
    #[must_use]
    pub const fn max_in_block(self) -> usize {
        match self {
            Self::Raw | Self::Zero => 0,
            Self::Plain => PAGE_SIZE,
            Self::Rle | Self::Delta => LENGTH_BYTES + MAX_ENCODED,
            Self::Copy => reference::REFERENCE_BYTES,
            Self::Kept => kept::DIGEST_BYTES,
        }
    }
}

impl fmt::Display for PageCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// How a block is packed, by the number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BlockCode {
    /// Not at all.
    Stored = 0,
    /// The LZ4 block format.
    Lz4 = 1,
    /// A Zstandard frame.
    Zstd = 2,
}

impl BlockCode {
    /// Every code, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Stored, Self::Lz4, Self::Zstd];

    /// The code of a number; `None` if there is no such one.
    #[must_use]
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

impl fmt::Display for BlockCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Which codecs are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Codecs {
    /// Zero pages are told, not sent. Without it only pages that the host never backed are.
    pub zero: bool,
    /// Pages of few runs of equal words.
    pub rle: bool,
    /// What changed in a page since it was last sent.
    pub delta: bool,
    /// Pages that are equal to others.
    pub dedup: bool,
    /// What is left, packed together.
    pub packing: Packing,
}

impl Codecs {
    /// Every page as it is.
    pub const NONE: Self = Self { zero: false, rle: false, delta: false, dedup: false, packing: Packing::Stored };
    /// Zero pages are told, others sent as they are.
    pub const ZERO: Self = Self { zero: true, ..Self::NONE };

    /// Whether a page that nothing makes smaller is best sent straight from guest memory, which takes no copy.
    pub(crate) fn leave_raw(&self) -> bool {
        !self.delta && !self.dedup && self.packing == Packing::Stored
    }
}

/// What is wrong with bytes that should be encoded pages. The peer is at fault, always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The bytes end too soon.
    #[error("{what} ends early")]
    Truncated {
        /// What they should be.
        what: &'static str,
    },
    /// Bytes are left that belong to nothing.
    #[error("{what} has {extra} bytes too many")]
    LeftOver {
        /// What they follow.
        what: &'static str,
        /// How many.
        extra: usize,
    },
    /// A number is over its maximum, or not a possible one.
    #[error("{what} of {found} is not possible; the maximum is {max}")]
    Value {
        /// Which number.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The largest value accepted.
        max: u64,
    },
    /// A block does not unpack to the length that its frame tells.
    #[error("A block packed as {code} does not unpack to {expected} bytes")]
    Packed {
        /// How it says it is packed.
        code: BlockCode,
        /// The length that its frame tells.
        expected: usize,
    },
}

/// Bytes of the length before the body of an encoded page.
const LENGTH_BYTES: usize = size_of::<u16>();

/// Appends a body and its length before it. If the body grows over [`MAX_ENCODED`], or `append` gives up, the output is as
/// it was before.
fn append_body(out: &mut Vec<u8>, append: impl FnOnce(&mut Vec<u8>) -> Tried) -> Tried {
    let start = out.len();
    out.extend([0; LENGTH_BYTES]);
    let body = out.len();
    let tried = append(out);
    match u16::try_from(out.len() - body) {
        Ok(length) if tried == Tried::Written && usize::from(length) <= MAX_ENCODED => {
            out[start..body].copy_from_slice(&length.to_le_bytes());
            Tried::Written
        }
        _ => {
            out.truncate(start);
            Tried::Declined
        }
    }
}
