//! The header in front of every frame, and the kinds of frames with the bounds of their bodies.

use super::{FrameError, MAX_BUILD, MAX_MACHINE, MAX_REASON, MAX_REPORT, MAX_STATE, frame, pages};
use std::fmt;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The version of the protocol. One more for every change that an older end would misunderstand.
pub const VERSION: u16 = 4;

/// "GWMG" as it stands in memory.
const MAGIC: u32 = u32::from_le_bytes(*b"GWMG");

/// Bytes of a header.
pub const HEADER_BYTES: usize = size_of::<WireHeader>();

/// What the checksum covers of the header: all but itself.
const CHECKED_BYTES: usize = HEADER_BYTES - size_of::<U32>();

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHeader {
    magic: U32,
    version: U16,
    kind: U16,
    length: U32,
    checksum: U32,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, at most $max:expr;)*) => {
        /// The kinds of frames, by their number on the wire.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u16)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The longest body, in bytes.
            #[must_use]
            pub const fn max_body(self) -> usize {
                match self { $(Self::$name => $max,)* }
            }

            fn from_wire(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// The offer.
    Hello = 1, at most frame::HELLO_BYTES + MAX_BUILD + frame::MAX_REGION_BYTES + MAX_MACHINE;
    /// The offer is taken.
    Accept = 2, at most 25;
    /// The offer is not taken.
    Refuse = 3, at most MAX_REASON;
    /// Page records, followed by the bytes of raw runs.
    Pages = 4, at most pages::MAX_PAGES_BODY;
    /// The end of a pass over memory.
    RoundEnd = 5, at most frame::ROUND_END_BYTES;
    /// The saved state.
    State = 6, at most MAX_STATE;
    /// The last frame before the hand-over.
    Seal = 7, at most frame::MAX_SEAL_BYTES;
    /// The target could run the guest.
    Ready = 8, at most 0;
    /// The guest is the target's.
    Go = 9, at most 0;
    /// The guest runs at the target.
    Running = 10, at most frame::RUNNING_BYTES;
    /// A question about a session.
    Query = 11, at most 32;
    /// The answer to it.
    Verdict = 12, at most 1;
    /// One end gives up.
    Abort = 13, at most MAX_REASON;
    /// A sign of life.
    Heartbeat = 14, at most 0;
    /// What the source knows of a migration that is over.
    Report = 15, at most MAX_REPORT;
    /// One more stream of a migration.
    Join = 16, at most frame::JOIN_BYTES;
    /// How far the target is.
    Installed = 17, at most size_of::<U32>();
    /// Pages that the target's old copies of disks do not have.
    Lacks = 18, at most frame::MAX_LACKS_BYTES;
}

impl Kind {
    /// Whether the frame means the same in every version of the protocol.
    fn in_all_versions(self) -> bool {
        matches!(self, Self::Refuse | Self::Abort)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A header that was read and is plausible by itself. Its checksum is not checked before the body is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    length: usize,
    checksum: u32,
    head_checksum: u32,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`FrameError`] if it is not of this protocol and version, or its body would be longer than its kind may have.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let wire = zerocopy::transmute_ref!(bytes);
        let WireHeader { magic, version, kind, length, checksum } = wire;
        if magic.get() != MAGIC {
            return Err(FrameError::NotOurs { found: magic.get() });
        }
        let known = Kind::from_wire(kind.get());
        if version.get() != VERSION && !known.is_some_and(Kind::in_all_versions) {
            return Err(FrameError::Version { found: version.get() });
        }
        let kind = known.ok_or_else(|| FrameError::Kind { found: kind.get() })?;
        let (found, max) = (length.get() as usize, kind.max_body());
        if found > max {
            return Err(FrameError::Length { what: "A body", kind, found: found as u64, max: max as u64 });
        }
        let head_checksum = crc32c::crc32c(&bytes[..CHECKED_BYTES]);
        Ok(Self { kind, length: found, checksum: checksum.get(), head_checksum })
    }

    /// What kind of frame follows.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How many bytes of body follow; at most what the kind allows.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        self.length
    }

    /// Compares the checksum with that of the body.
    pub(super) fn check(&self, body: &[u8]) -> Result<(), FrameError> {
        let computed = crc32c::crc32c_append(self.head_checksum, body);
        if computed == self.checksum {
            Ok(())
        } else {
            Err(FrameError::Checksum { kind: self.kind, found: self.checksum, computed })
        }
    }
}

/// Fills in the header at the start of `frame`, whose body stands behind it already.
///
/// # Panics
/// If the body is longer than its kind allows: callers bound what they put in.
pub(super) fn finish(kind: Kind, frame: &mut [u8]) {
    let (head, body) = frame.split_at_mut(HEADER_BYTES);
    assert!(body.len() <= kind.max_body(), "a body of {kind} is bounded by whoever makes it");
    let mut wire = WireHeader {
        magic: MAGIC.into(),
        version: VERSION.into(),
        kind: (kind as u16).into(),
        length: u32::try_from(body.len()).expect("every bound of a body is far below 4 GiB").into(),
        checksum: 0.into(),
    };
    let checked = crc32c::crc32c(&wire.as_bytes()[..CHECKED_BYTES]);
    wire.checksum = crc32c::crc32c_append(checked, body).into();
    head.copy_from_slice(wire.as_bytes());
}
