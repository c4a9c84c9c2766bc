//! Numbers and headers of the protocol. All are big-endian.

use crate::backend::{Extent, ExtentKind};
use std::io;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The port that IANA has given to the protocol.
pub(super) const PORT: u16 = 10_809;

/// "NBDMAGIC" and "IHAVEOPT".
pub(super) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub(super) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags of the server, and the client's answers to them.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

/// The longest name, of an export or a metadata context.
pub(super) const MAX_NAME: usize = 4096;
/// The longest payload of a request or a reply, where the other end names no other limit: what every server takes.
pub(super) const MAX_PAYLOAD: u32 = 32 << 20;
/// The name of the one metadata context that is known here.
pub(super) const ALLOCATION: &str = "base:allocation";

/// Transmission flags.
pub(super) mod transmission {
    pub(in super::super) const HAS_FLAGS: u16 = 1;
    pub(in super::super) const READ_ONLY: u16 = 1 << 1;
    pub(in super::super) const FLUSH: u16 = 1 << 2;
    pub(in super::super) const FUA: u16 = 1 << 3;
    pub(in super::super) const TRIM: u16 = 1 << 5;
    pub(in super::super) const WRITE_ZEROES: u16 = 1 << 6;
    pub(in super::super) const DONT_FRAGMENT: u16 = 1 << 7;
    pub(in super::super) const MULTI_CONN: u16 = 1 << 8;
}

/// Options.
pub(super) mod option {
    pub(in super::super) const EXPORT_NAME: u32 = 1;
    pub(in super::super) const ABORT: u32 = 2;
    pub(in super::super) const LIST: u32 = 3;
    pub(in super::super) const START_TLS: u32 = 5;
    pub(in super::super) const INFO: u32 = 6;
    pub(in super::super) const GO: u32 = 7;
    pub(in super::super) const STRUCTURED_REPLY: u32 = 8;
    pub(in super::super) const LIST_META_CONTEXT: u32 = 9;
    pub(in super::super) const SET_META_CONTEXT: u32 = 10;
    pub(in super::super) const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options. Errors have bit 31 set.
pub(super) mod reply {
    pub(in super::super) const ACK: u32 = 1;
    pub(in super::super) const SERVER: u32 = 2;
    pub(in super::super) const INFO: u32 = 3;
    pub(in super::super) const META_CONTEXT: u32 = 4;
    pub(in super::super) const ERROR: u32 = 1 << 31;
    pub(in super::super) const UNSUPPORTED: u32 = ERROR | 1;
    pub(in super::super) const POLICY: u32 = ERROR | 2;
    pub(in super::super) const INVALID: u32 = ERROR | 3;
    pub(in super::super) const TLS_REQUIRED: u32 = ERROR | 5;
    pub(in super::super) const UNKNOWN: u32 = ERROR | 6;
    pub(in super::super) const SHUTDOWN: u32 = ERROR | 7;
    pub(in super::super) const TOO_BIG: u32 = ERROR | 9;
}

/// Kinds of information about an export.
pub(super) mod info {
    pub(in super::super) const EXPORT: u16 = 0;
    pub(in super::super) const BLOCK_SIZE: u16 = 3;
}

/// Commands.
pub(super) mod command {
    pub(in super::super) const READ: u16 = 0;
    pub(in super::super) const WRITE: u16 = 1;
    pub(in super::super) const DISCONNECT: u16 = 2;
    pub(in super::super) const FLUSH: u16 = 3;
    pub(in super::super) const TRIM: u16 = 4;
    pub(in super::super) const WRITE_ZEROES: u16 = 6;
    pub(in super::super) const BLOCK_STATUS: u16 = 7;

    /// Flags of commands.
    pub(in super::super) const FUA: u16 = 1;
    pub(in super::super) const NO_HOLE: u16 = 1 << 1;
    pub(in super::super) const DONT_FRAGMENT: u16 = 1 << 2;
    pub(in super::super) const ONE_EXTENT: u16 = 1 << 3;
    pub(in super::super) const PAYLOAD_LENGTH: u16 = 1 << 5;
}

/// Types and flags of the chunks of a structured reply. Errors have bit 15 set.
pub(super) mod chunk {
    pub(in super::super) const DONE: u16 = 1;
    pub(in super::super) const NONE: u16 = 0;
    pub(in super::super) const DATA: u16 = 1;
    pub(in super::super) const HOLE: u16 = 2;
    pub(in super::super) const BLOCK_STATUS: u16 = 5;
    pub(in super::super) const BLOCK_STATUS_EXTENDED: u16 = 6;
    pub(in super::super) const IS_ERROR: u16 = 1 << 15;
    pub(in super::super) const ERROR: u16 = IS_ERROR | 1;
}

/// What a server says first.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Greeting {
    pub(super) magic: U64,
    pub(super) option_magic: U64,
    pub(super) flags: U16,
}

/// An option of the client, up to its data.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct OptionHeader {
    pub(super) magic: U64,
    pub(super) option: U32,
    pub(super) length: U32,
}

/// A reply to an option, up to its data.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct OptionReply {
    pub(super) magic: U64,
    pub(super) option: U32,
    pub(super) kind: U32,
    pub(super) length: U32,
}

/// Size and transmission flags of an export.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ExportInfo {
    pub(super) size: U64,
    pub(super) flags: U16,
}

/// The sizes of requests that an export takes, in bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct BlockSizes {
    pub(super) minimum: U32,
    pub(super) preferred: U32,
    pub(super) maximum: U32,
}

/// A request.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RequestHeader {
    pub(super) magic: U32,
    pub(super) flags: U16,
    pub(super) command: U16,
    pub(super) cookie: U64,
    pub(super) offset: U64,
    pub(super) length: U32,
}

/// A request with extended headers.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ExtendedRequestHeader {
    pub(super) magic: U32,
    pub(super) flags: U16,
    pub(super) command: U16,
    pub(super) cookie: U64,
    pub(super) offset: U64,
    pub(super) length: U64,
}

/// A reply without structure.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct SimpleReply {
    pub(super) magic: U32,
    pub(super) error: U32,
    pub(super) cookie: U64,
}

/// A chunk of a structured reply, up to its payload.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct StructuredReply {
    pub(super) magic: U32,
    pub(super) flags: U16,
    pub(super) kind: U16,
    pub(super) cookie: U64,
    pub(super) length: U32,
}

/// A chunk of a reply with extended headers, up to its payload.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ExtendedReply {
    pub(super) magic: U32,
    pub(super) flags: U16,
    pub(super) kind: U16,
    pub(super) cookie: U64,
    pub(super) offset: U64,
    pub(super) length: U64,
}

/// An extent of a block status.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Descriptor {
    pub(super) length: U32,
    pub(super) flags: U32,
}

/// An extent of a block status with extended headers.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ExtendedDescriptor {
    pub(super) length: U64,
    pub(super) flags: U64,
}

/// What requests and replies look like on a connection; the later, the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dialect {
    /// Simple replies.
    Simple,
    /// Replies in chunks; without data a simple one will do.
    Structured,
    /// Long headers, and replies in chunks only.
    Extended,
}

/// Flags of `base:allocation`.
const STATE_HOLE: u64 = 1;
const STATE_ZERO: u64 = 2;

/// What the flags of `base:allocation` say. A hole that does not read as zeros has anything in it.
pub(super) fn extent_kind(flags: u64) -> ExtentKind {
    match (flags & STATE_ZERO != 0, flags & STATE_HOLE != 0) {
        (true, true) => ExtentKind::Hole,
        (true, false) => ExtentKind::Zero,
        (false, _) => ExtentKind::Data,
    }
}

/// The flags of `base:allocation` for an extent.
pub(super) fn extent_flags(extent: Extent) -> u32 {
    let flags = match extent.kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => STATE_ZERO,
        ExtentKind::Hole => STATE_ZERO | STATE_HOLE,
    };
    u32::try_from(flags).expect("two bits")
}

/// The errors that the protocol knows are numbers of Linux.
const ERRORS: [i32; 8] =
    [libc::EPERM, libc::EIO, libc::ENOMEM, libc::EINVAL, libc::ENOSPC, libc::EOVERFLOW, libc::ENOTSUP, libc::ESHUTDOWN];

/// The number by which a server tells of an error.
pub(super) fn error_number(error: &io::Error) -> u32 {
    let told = match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => libc::EPERM,
        io::ErrorKind::InvalidInput => libc::EINVAL,
        io::ErrorKind::Unsupported => libc::ENOTSUP,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => libc::ENOSPC,
        _ => error.raw_os_error().filter(|number| ERRORS.contains(number)).unwrap_or(libc::EIO),
    };
    told.unsigned_abs()
}

/// What a server's number says. One that the protocol does not know is as bad as invalid (proto.md, "Error values").
pub(super) fn error_of(number: u32) -> io::Error {
    let known = i32::try_from(number).ok().filter(|number| ERRORS.contains(number));
    io::Error::from_raw_os_error(known.unwrap_or(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_long_as_the_protocol_says() {
        let lengths = [
            size_of::<Greeting>(),
            size_of::<OptionHeader>(),
            size_of::<OptionReply>(),
            size_of::<RequestHeader>(),
            size_of::<ExtendedRequestHeader>(),
            size_of::<SimpleReply>(),
            size_of::<StructuredReply>(),
            size_of::<ExtendedReply>(),
        ];
        assert_eq!(lengths, [18, 16, 20, 28, 32, 16, 20, 32]);
    }

    #[test]
    fn errors_keep_their_meaning() {
        for number in ERRORS {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(error_number(&error), number.unsigned_abs());
            assert_eq!(error_of(number.unsigned_abs()).raw_os_error(), Some(number));
        }
        let number = |number| error_number(&io::Error::from_raw_os_error(number));
        assert_eq!(number(libc::EACCES), 1);
        assert_eq!(number(libc::EROFS), 1);
        assert_eq!(number(libc::EFBIG), 28);
        assert_eq!(number(libc::ENODEV), 5);
        assert_eq!(error_number(&io::Error::other("lost")), 5);
        for unknown in [0, 2, 1 << 31, u32::MAX] {
            assert_eq!(error_of(unknown).raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn extents_and_their_flags() {
        for kind in [ExtentKind::Data, ExtentKind::Zero, ExtentKind::Hole] {
            assert_eq!(extent_kind(extent_flags(Extent { length: 1, kind }).into()), kind);
        }
        assert_eq!(extent_kind(STATE_HOLE), ExtentKind::Data, "what is in such a hole is not known");
        assert_eq!(extent_kind(STATE_ZERO | 1 << 40), ExtentKind::Zero, "unknown flags are ignored");
    }
}
