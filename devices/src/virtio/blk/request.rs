//! One request of a disk's driver: parsed from a chain, executed on a back end, answered (virtio 1.3, 5.2.6).
//!
//! Buffers may be framed in any way (virtio 1.3, 2.7.4.3): the header is the first 16 readable bytes, the status the last
//! writable one, wherever buffers begin. Invariant: no range reaches the back end that is not inside its capacity.

use super::counters::Counted;
use super::{BlockBackend, MAX_DISCARD, MAX_RANGES, MAX_WRITE_ZEROES, SECTOR, Unmap};
use crate::GuestRam;
use crate::virtio::queue::{Chain, copy_from, copy_to, slices, total_bytes};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
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

/// A parsed request.
#[derive(Debug)]
pub(super) struct Request<'a> {
    kind: Kind,
    sector: u64,
    chain: &'a Chain,
    /// Bytes of data the driver gives.
    data_out: usize,
    /// Bytes of data the driver has room for.
    data_in: usize,
}

impl<'a> Request<'a> {
    /// `None` if there is no byte for the status: then the driver cannot be answered.
    pub(super) fn parse(ram: &GuestRam, chain: &'a Chain) -> Option<Self> {
        let data_in = total_bytes(chain.writable()).checked_sub(1)?;
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
        Some(Self { kind, sector: header.sector.get(), chain, data_out, data_in })
    }

    /// Whether a success changed the disk.
    pub(super) fn writes(&self) -> bool {
        matches!(self.kind, Kind::Write | Kind::WriteZeroes)
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

    /// Does what is asked for; the status, and the bytes of data written for the driver.
    pub(super) fn execute(&self, ram: &GuestRam, backend: &dyn BlockBackend, serial: &str) -> (Status, usize) {
        let outcome = match self.kind {
            Kind::Read => self.read(ram, backend),
            Kind::Id => Ok(self.id(ram, serial)),
            Kind::Flush if backend.is_read_only() => Ok(0),
            Kind::Flush => done(backend.flush()),
            Kind::Write | Kind::Discard | Kind::WriteZeroes if backend.is_read_only() => Err(Status::IoError),
            Kind::Write => self.write(ram, backend),
            Kind::Discard => self.ranges(
                ram,
                MAX_DISCARD,
                &mut |range, offset, length| {
                    // Discard has no flags (virtio 1.3, 5.2.6.2).
                    if range.flags.get() != 0 {
                        return Err(Status::Unsupported);
                    }
                    done(backend.discard(offset, length))
                },
                backend,
            ),
            Kind::WriteZeroes => self.ranges(
                ram,
                MAX_WRITE_ZEROES,
                &mut |range, offset, length| {
                    let unmap = match range.flags.get() {
                        0 => Unmap::Forbidden,
                        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => Unmap::Allowed,
                        _ => return Err(Status::Unsupported),
                    };
                    done(backend.write_zeroes(offset, length, unmap))
                },
                backend,
            ),
            Kind::Unknown => Err(Status::Unsupported),
            Kind::Headless => Err(Status::IoError),
        };
        match outcome {
            Ok(written) => (Status::Ok, written),
            Err(status) => (status, 0),
        }
    }

    /// Writes the status; the bytes written in all, for the used ring.
    pub(super) fn finish(&self, ram: &GuestRam, status: Status, data: usize) -> u32 {
        let written = copy_to(ram, self.chain.writable(), self.data_in, &[status.byte()]);
        u32::try_from(data + written).unwrap_or(u32::MAX)
    }

    fn read(&self, ram: &GuestRam, backend: &dyn BlockBackend) -> Result<usize, Status> {
        let offset = place(self.sector, self.data_in as u64, backend)?;
        let into = slices(ram, self.chain.writable(), 0, self.data_in);
        backend.read_vectored_at(&into, offset).map_err(|error| failed(&error))?;
        Ok(self.data_in)
    }

    fn write(&self, ram: &GuestRam, backend: &dyn BlockBackend) -> Result<usize, Status> {
        let offset = place(self.sector, self.data_out as u64, backend)?;
        let from = slices(ram, self.chain.readable(), HEADER, self.data_out);
        done(backend.write_vectored_at(&from, offset))
    }

    fn id(&self, ram: &GuestRam, serial: &str) -> usize {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let length = serial.len().min(id.len());
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        let room = self.data_in.min(id.len());
        copy_to(ram, self.chain.writable(), 0, &id[..room])
    }

    fn ranges(
        &self,
        ram: &GuestRam,
        longest: u32,
        each: &mut dyn FnMut(Range, u64, u64) -> Result<usize, Status>,
        backend: &dyn BlockBackend,
    ) -> Result<usize, Status> {
        let size = size_of::<Range>();
        if self.data_out == 0 || !self.data_out.is_multiple_of(size) || self.data_out / size > MAX_RANGES as usize {
            return Err(Status::IoError);
        }
        for at in (HEADER..HEADER + self.data_out).step_by(size) {
            let mut range = Range::new_zeroed();
            let found = copy_from(ram, self.chain.readable(), at, range.as_mut_bytes());
            if found < size || range.sectors.get() > longest {
                return Err(Status::IoError);
            }
            let length = u64::from(range.sectors.get()) * SECTOR;
            each(range, place(range.sector.get(), length, backend)?, length)?;
        }
        Ok(0)
    }
}

/// The offset in bytes of a range of whole sectors that lies inside the disk.
fn place(sector: u64, length: u64, backend: &dyn BlockBackend) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(length).ok_or(Status::IoError)?;
    if length.is_multiple_of(SECTOR) && end <= backend.capacity() { Ok(offset) } else { Err(Status::IoError) }
}

fn done(outcome: std::io::Result<()>) -> Result<usize, Status> {
    outcome.map(|()| 0).map_err(|error| failed(&error))
}

fn failed(error: &std::io::Error) -> Status {
    tracing::debug!(%error, "A disk request failed at the host");
    Status::IoError
}
