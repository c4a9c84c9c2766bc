//! One request of a disk's driver: parsed from a chain, turned into operations of the back end, answered (virtio 1.3,
//! 5.2.6).
//!
//! Buffers may be framed in any way (virtio 1.3, 2.7.4.3): the header is the first 16 readable bytes, the status the last
//! writable one, wherever buffers begin. Invariant: no range reaches the back end that is not inside its capacity.

#![expect(unsafe_code, reason = "guest memory becomes the memory of requests")]

use super::counters::Counted;
use super::{MAX_DISCARD, MAX_RANGES, MAX_TRANSFER, MAX_WRITE_ZEROES, SECTOR};
use crate::GuestRam;
use crate::virtio::queue::{Buffer, Chain, copy_from, copy_to, slices, total_bytes};
use block::{Access, Buffers, Durability, Operation, Piece, Unmap};
use std::ptr::NonNull;
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::bitmap::Bitmap;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// `struct virtio_blk_req` up to its data.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}
const HEADER: usize = size_of::<Header>();

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Range {
    sector: U64,
    sectors: U32,
    flags: U32,
}

/// The answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        let status = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(status).expect("a status is 0, 1 or 2")
    }
}

/// What is asked for; the device-readable data are out of the driver, the device-writable ones into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Id,
    Discard,
    WriteZeroes,
    Unknown,
    /// The header is cut.
    Headless,
}

/// What a request is judged by.
#[derive(Debug)]
pub(super) struct Rules<'a> {
    /// Length of the disk in bytes.
    pub(super) capacity: u64,
    pub(super) access: Access,
    /// What the driver expects of a write that succeeds.
    pub(super) durability: Durability,
    pub(super) serial: &'a str,
}

/// What a request comes to.
#[derive(Debug)]
pub(super) enum Work {
    /// It can be answered.
    Answer(Status),
    /// The disk is to do this.
    Operation(Operation),
    /// The disk is to do these; there are at least two.
    Operations(Vec<Operation>),
}

/// A parsed request.
#[derive(Debug)]
pub(super) struct Request {
    kind: Kind,
    sector: u64,
    chain: Chain,
    /// Bytes of data the driver gives.
    data_out: usize,
    /// Bytes of data the driver has room for.
    data_in: usize,
}

impl Request {
    /// # Errors
    /// The chain, if it has no byte for the status: then the driver cannot be answered.
    pub(super) fn parse(ram: &GuestRam, chain: Chain) -> Result<Self, Chain> {
        let Some(data_in) = total_bytes(chain.writable()).checked_sub(1) else { return Err(chain) };
        let mut header = Header::new_zeroed();
        let found = copy_from(ram, chain.readable(), 0, header.as_mut_bytes());
        let kind = match header.kind.get() {
            _ if found < HEADER => Kind::Headless,
            VIRTIO_BLK_T_IN => Kind::Read,
            VIRTIO_BLK_T_OUT => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::Id,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => Kind::Unknown,
        };
        let data_out = total_bytes(chain.readable()).saturating_sub(HEADER);
        Ok(Self { kind, sector: header.sector.get(), chain, data_out, data_in })
    }

    pub(super) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// What it counts as.
    pub(super) fn counted(&self) -> Counted {
        match self.kind {
            Kind::Read => Counted::Read(self.data_in as u64),
            Kind::Write => Counted::Write(self.data_out as u64),
            Kind::Flush => Counted::Flush,
            Kind::Id | Kind::Discard | Kind::WriteZeroes | Kind::Unknown | Kind::Headless => Counted::Other,
        }
    }

    /// How many bytes go between guest and disk.
    pub(super) fn moved(&self) -> u64 {
        match self.counted() {
            Counted::Read(bytes) | Counted::Write(bytes) => bytes,
            Counted::Flush | Counted::Other => 0,
        }
    }

    /// What is to be done.
    pub(super) fn begin(&self, ram: &Arc<GuestRam>, rules: &Rules<'_>) -> Work {
        let outcome = match self.kind {
            Kind::Id => Ok(Work::Answer(self.id(ram, rules.serial))),
            Kind::Read => self.read(ram, rules),
            Kind::Flush if rules.access == Access::ReadOnly => Ok(Work::Answer(Status::Ok)),
            Kind::Flush => Ok(Work::Operation(Operation::Flush)),
            Kind::Write | Kind::Discard | Kind::WriteZeroes if rules.access == Access::ReadOnly => Err(Status::IoError),
            Kind::Write => self.write(ram, rules),
            Kind::Discard => self.ranges(ram, rules, MAX_DISCARD, |flags, offset, length| match flags {
                // Discard has no flags (virtio 1.3, 5.2.6.2).
                0 => Ok(Operation::Discard { offset, length }),
                _ => Err(Status::Unsupported),
            }),
            Kind::WriteZeroes => self.ranges(ram, rules, MAX_WRITE_ZEROES, |flags, offset, length| {
                let unmap = match flags {
                    0 => Unmap::Forbidden,
                    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => Unmap::Allowed,
                    _ => return Err(Status::Unsupported),
                };
                Ok(Operation::WriteZeroes { offset, length, unmap, durability: rules.durability })
            }),
            Kind::Unknown => Err(Status::Unsupported),
            Kind::Headless => Err(Status::IoError),
        };
        outcome.unwrap_or_else(Work::Answer)
    }

    /// Writes the status; the bytes written in all, for the used ring.
    pub(super) fn finish(&self, ram: &GuestRam, status: Status) -> u32 {
        let data = match (self.kind, status) {
            (Kind::Read, Status::Ok) => {
                // Now, that it is there: a harvest before would not have been believed for long.
                for slice in slices(ram, self.chain.writable(), 0, self.data_in) {
                    slice.bitmap().mark_dirty(0, slice.len());
                }
                self.data_in
            }
            (Kind::Id, Status::Ok) => self.data_in.min(VIRTIO_BLK_ID_BYTES as usize),
            _ => 0,
        };
        let written = copy_to(ram, self.chain.writable(), self.data_in, &[status.byte()]);
        u32::try_from(data + written).unwrap_or(u32::MAX)
    }

    fn read(&self, ram: &Arc<GuestRam>, rules: &Rules<'_>) -> Result<Work, Status> {
        let offset = transfer(self.sector, self.data_in as u64, rules)?;
        let into = buffers(ram, self.chain.writable(), 0, self.data_in);
        Ok(Work::Operation(Operation::Read { offset, into }))
    }

    fn write(&self, ram: &Arc<GuestRam>, rules: &Rules<'_>) -> Result<Work, Status> {
        let offset = transfer(self.sector, self.data_out as u64, rules)?;
        let from = buffers(ram, self.chain.readable(), HEADER, self.data_out);
        Ok(Work::Operation(Operation::Write { offset, from, durability: rules.durability }))
    }

    fn id(&self, ram: &GuestRam, serial: &str) -> Status {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let length = serial.len().min(id.len());
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        let room = self.data_in.min(id.len());
        let _ = copy_to(ram, self.chain.writable(), 0, &id[..room]);
        Status::Ok
    }

    fn ranges(
        &self,
        ram: &GuestRam,
        rules: &Rules<'_>,
        longest: u32,
        each: impl Fn(u32, u64, u64) -> Result<Operation, Status>,
    ) -> Result<Work, Status> {
        let size = size_of::<Range>();
        if self.data_out == 0 || !self.data_out.is_multiple_of(size) || self.data_out / size > MAX_RANGES as usize {
            return Err(Status::IoError);
        }
        let one = |at| {
            let mut range = Range::new_zeroed();
            let found = copy_from(ram, self.chain.readable(), at, range.as_mut_bytes());
            if found < size || range.sectors.get() > longest {
                return Err(Status::IoError);
            }
            let length = u64::from(range.sectors.get()) * SECTOR;
            each(range.flags.get(), place(range.sector.get(), length, rules)?, length)
        };
        let mut all: Vec<_> = (HEADER..HEADER + self.data_out).step_by(size).map(one).collect::<Result<_, _>>()?;
        match all.len() {
            1 => Ok(Work::Operation(all.remove(0))),
            _ => Ok(Work::Operations(all)),
        }
    }
}

/// The same for data, which are no longer than a driver may have them.
fn transfer(sector: u64, length: u64, rules: &Rules<'_>) -> Result<u64, Status> {
    if length <= MAX_TRANSFER { place(sector, length, rules) } else { Err(Status::IoError) }
}

/// The offset in bytes of a range of whole sectors that lies inside the disk.
fn place(sector: u64, length: u64, rules: &Rules<'_>) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(length).ok_or(Status::IoError)?;
    if length.is_multiple_of(SECTOR) && end <= rules.capacity { Ok(offset) } else { Err(Status::IoError) }
}

/// Guest memory as the memory of a request.
fn buffers(ram: &Arc<GuestRam>, buffers: &[Buffer], skip: usize, take: usize) -> Buffers {
    let piece = |slice: &crate::virtio::GuestSlice<'_>| {
        let start = NonNull::new(slice.ptr_guard_mut().as_ptr()).expect("guest memory is mapped somewhere");
        Piece::new(start, slice.len())
    };
    let pieces = slices(ram, buffers, skip, take).iter().map(piece).collect();
    let owner = Arc::clone(ram);
    // SAFETY: each piece is guest memory that is mapped, readable and writable as long as `ram` lives, of which this is a
    // handle. The guest changes it at any time, and nothing in this process makes references to it.
    unsafe { Buffers::new(pieces, owner) }
}
