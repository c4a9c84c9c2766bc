//! Packing the block of a frame: as it is, by LZ4, or by Zstandard.
//!
//! Contexts and buffers are kept from block to block, so nothing is allocated once the largest block has been seen.
//! Blocks do not depend on each other: streams may carry them in any order. They have no checksum of their own, because
//! the frame has one.

use super::{BlockCode, Malformed};
use crate::region::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;
use zstd::zstd_safe::{CCtx, CParameter, DCtx};

/// The longest block, in bytes: 256 pages that travel plain.
pub const MAX_BLOCK: usize = 256 * PAGE_SIZE;

/// A level of Zstandard, from 1 (fast) to 9 (small). Above 9 no processor keeps a link busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct ZstdLevel(u8);

/// A number that is no level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("Zstandard has no level {0} here; it has 1 to 9")]
pub struct NoSuchLevel(u8);

impl ZstdLevel {
    /// The fastest level.
    pub const MIN: Self = Self(1);
    /// The level that packs smallest.
    pub const MAX: Self = Self(9);

    /// The level of a number; `None` if it is not from 1 to 9.
    #[must_use]
    pub const fn new(level: u8) -> Option<Self> {
        if Self::MIN.0 <= level && level <= Self::MAX.0 { Some(Self(level)) } else { None }
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for ZstdLevel {
    type Error = NoSuchLevel;

    fn try_from(level: u8) -> Result<Self, NoSuchLevel> {
        Self::new(level).ok_or(NoSuchLevel(level))
    }
}

impl From<ZstdLevel> for u8 {
    fn from(ZstdLevel(level): ZstdLevel) -> Self {
        level
    }
}

/// How to pack a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// Not at all.
    Stored,
    /// By LZ4.
    Lz4,
    /// By Zstandard.
    Zstd(ZstdLevel),
}

/// Packs the blocks of one stream.
pub struct Packer {
    zstd: CCtx<'static>,
    lz4: lz4_flex::block::CompressTable,
    packed: Vec<u8>,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Default for Packer {
    fn default() -> Self {
        Self::new()
    }
}

impl Packer {
    /// A packer whose memory grows with the first blocks.
    #[must_use]
    pub fn new() -> Self {
        Self { zstd: CCtx::create(), lz4: lz4_flex::block::CompressTable::large(), packed: Vec::new() }
    }

    /// Packs `plain`, which comes back stored if it does not get smaller. The code is what the frame has to tell.
    ///
    /// # Panics
    /// If `plain` is longer than [`MAX_BLOCK`]: the source bounds its frames.
    pub fn pack<'a>(&'a mut self, packing: Packing, plain: &'a [u8]) -> (BlockCode, &'a [u8]) {
        assert!(plain.len() <= MAX_BLOCK, "a block is bounded by whoever fills it");
        let (code, packed) = match packing {
            Packing::Stored => (BlockCode::Stored, None),
            Packing::Lz4 => (BlockCode::Lz4, self.lz4(plain)),
            Packing::Zstd(level) => (BlockCode::Zstd, self.zstd(level, plain)),
        };
        match packed {
            Some(length) if length < plain.len() => (code, &self.packed[..length]),
            _ => (BlockCode::Stored, plain),
        }
    }

    fn lz4(&mut self, plain: &[u8]) -> Option<usize> {
        grow(&mut self.packed, lz4_flex::block::get_maximum_output_size(plain.len()));
        lz4_flex::block::compress_into_with_table(plain, &mut self.packed, &mut self.lz4).ok()
    }

    /// `None` also where there is no memory for the level: the block travels stored then, which is right, if not small.
    fn zstd(&mut self, level: ZstdLevel, plain: &[u8]) -> Option<usize> {
        grow(&mut self.packed, plain.len());
        self.zstd.set_parameter(CParameter::CompressionLevel(level.0.into())).ok()?;
        self.zstd.compress2(&mut self.packed[..plain.len()], plain).ok()
    }
}

/// Unpacks the blocks of one stream.
pub struct Unpacker {
    zstd: DCtx<'static>,
    plain: Vec<u8>,
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Default for Unpacker {
    fn default() -> Self {
        Self::new()
    }
}

impl Unpacker {
    /// An unpacker whose memory grows with the first blocks.
    #[must_use]
    pub fn new() -> Self {
        Self { zstd: DCtx::create(), plain: Vec::new() }
    }

    /// Unpacks a block that was `length` bytes long, which its frame tells. A stored block is not copied.
    ///
    /// # Errors
    /// [`Malformed`] if the length is over [`MAX_BLOCK`], or the block does not unpack to exactly that.
    pub fn unpack<'a>(&'a mut self, code: BlockCode, packed: &'a [u8], length: usize) -> Result<&'a [u8], Malformed> {
        if length > MAX_BLOCK {
            return Err(Malformed::Value {
                what: "The length of a block",
                found: length as u64,
                max: MAX_BLOCK as u64,
            });
        }
        let unpacked = match code {
            BlockCode::Stored if packed.len() == length => return Ok(packed),
            BlockCode::Stored => None,
            BlockCode::Lz4 => lz4_flex::block::decompress_into(packed, self.room(length)).ok(),
            BlockCode::Zstd => {
                grow(&mut self.plain, length);
                self.zstd.decompress(&mut self.plain[..length], packed).ok()
            }
        };
        match unpacked {
            Some(found) if found == length => Ok(&self.plain[..length]),
            _ => Err(Malformed::Packed { code, expected: length }),
        }
    }

    fn room(&mut self, length: usize) -> &mut [u8] {
        grow(&mut self.plain, length);
        &mut self.plain[..length]
    }
}

/// Makes a buffer at least `length` bytes long. It never shrinks, so that no byte is cleared twice.
fn grow(buffer: &mut Vec<u8>, length: usize) {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
}
