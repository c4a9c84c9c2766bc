//! The bytes that travel: frames with a fixed header, their bodies, and the bounds of each.
//!
//! ```text
//! header, little endian:  magic "GWMG"  version u16  kind u16  length u32  checksum u32     then `length` bytes of body
//! ```
//! The checksum is the CRC-32C of the header's first 12 bytes and the body. Two frames are followed by more. After `Pages`
//! come the bytes of its raw runs, which are in no frame buffer but go from guest memory to guest memory; how many follow
//! from its records. After a `Hello` that says so comes the handle to the guest's memory, which is no bytes at all.
//!
//! | frame | direction | says |
//! | --- | --- | --- |
//! | `Hello` | → | session, guest, memory and machine offered; whether a handle to the memory follows |
//! | `Accept` | ← | the machine is built; who to ask in doubt; whether the handle came |
//! | `Refuse` | ← | no, in words |
//! | `Join` | → | on a new link: one more stream of that session, for `Pages` and `RoundEnd` |
//! | `Pages` | → | runs of zero pages, runs in one of the codecs, and runs whose bytes follow |
//! | `RoundEnd` | → | what the round held |
//! | `Installed` | ← | the pages of all rounds up to this one are in the guest's memory; may come at any time after that |
//! | `State` | → | the saved state of the paused guest |
//! | `Seal` | → | digest of all frames before it on each stream, and of memory on request |
//! | `Ready` | ← | all restored, nothing runs |
//! | `Go` | → | the guest is yours |
//! | `Running` | ← | it runs here, and what that took |
//! | `Report` | → | what it all took, in JSON; if it is lost, nothing is but the figures |
//! | `Query` | → | on a new link: whose is the guest of that session? |
//! | `Verdict` | ← | mine, or not mine and never will be |
//! | `Abort` | ↔ | I end this, in words |
//! | `Heartbeat` | ↔ | I am alive; may come at any time |
//!
//! The header, `Refuse` and `Abort` keep their form in all versions, so that a refusal of a version reads as words.
//! What is parsed here comes from a peer: nothing panics, and nothing allocates more than the bound of its kind.

mod cursor;
mod frame;
mod header;
mod pages;
#[cfg(test)]
mod tests;

pub use frame::{Frame, Hello, Join, MAX_LACKS, Mode, RoundEnd, Running, Seal, Transfer};
pub use header::{HEADER_BYTES, Header, Kind, VERSION};
pub use pages::{MAX_PAGES, MAX_RAW_PAGES, MAX_RECORDS, PackedBlock, PageRecord, Pages, Records};

use thiserror::Error;

/// The most streams of one migration.
pub const MAX_STREAMS: u16 = 64;

/// The longest description of a machine, in bytes of JSON.
pub const MAX_MACHINE: usize = 1 << 20;

/// The longest saved state, in bytes.
pub const MAX_STATE: usize = 64 << 20;

/// The longest reason of a refusal or abort, in bytes of text.
pub const MAX_REASON: usize = 4096;

/// The longest report, in bytes of JSON: several thousand rounds.
pub const MAX_REPORT: usize = 1 << 20;

/// The longest name of an engine's build, in bytes of text.
pub const MAX_BUILD: usize = 64;

/// What is wrong with bytes that should be a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The peer does not speak this protocol.
    #[error("The other end does not speak Godwit's migration protocol: a frame begins with {found:#010x}")]
    NotOurs {
        /// What stands in place of the magic.
        found: u32,
    },
    /// The peer speaks another version.
    #[error("The other end speaks version {found} of the migration protocol, this end version {VERSION}")]
    Version {
        /// The peer's version.
        found: u16,
    },
    /// No frame has that number.
    #[error("There is no frame of kind {found}")]
    Kind {
        /// The number.
        found: u16,
    },
    /// A length is over its maximum, or not a possible one.
    #[error("{what} of {found} in {kind} is not possible; the maximum is {max}")]
    Length {
        /// Which length.
        what: &'static str,
        /// In which frame.
        kind: Kind,
        /// The value found.
        found: u64,
        /// The largest value accepted.
        max: u64,
    },
    /// Header or body were changed on the way.
    #[error("The checksum of {kind} is {found:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// The frame.
        kind: Kind,
        /// The checksum in the header.
        found: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// The body ends inside a field.
    #[error("The body of {kind} ends early")]
    Truncated {
        /// The frame.
        kind: Kind,
    },
    /// Bytes follow the last field.
    #[error("The body of {kind} has {extra} bytes too many")]
    TrailingBytes {
        /// The frame.
        kind: Kind,
        /// How many.
        extra: usize,
    },
    /// A field has a value that nothing stands for.
    #[error("{what} in {kind} is {found}, which means nothing")]
    Value {
        /// Which field.
        what: &'static str,
        /// In which frame.
        kind: Kind,
        /// The value found.
        found: u64,
    },
    /// A text is not UTF-8.
    #[error("The text in {kind} is not UTF-8")]
    NotText {
        /// The frame.
        kind: Kind,
    },
}
