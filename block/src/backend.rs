//! The contract between who has a disk's bytes and who wants them.
//!
//! ```text
//! Backend --channel()--> Channel --submit()...commit()--> in flight --reap()--> Completion
//! ```
//!
//! A channel belongs to one thread at a time. Requests are done in any order and side by side: who needs an order waits for
//! the first before the second is submitted. A [`Operation::Flush`] covers all writes, of any channel, that were reaped
//! before it was submitted. Invariant: each submitted request is reaped once, whatever happens; a channel that cannot go on
//! fails its requests. What does not lie inside of the capacity is refused.

use crate::memory::Buffers;
use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

/// The unit of lengths of disks, in bytes.
pub const SECTOR: u64 = 512;

/// What may be done with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read and write; nobody else may write.
    ReadWrite,
    /// Read; so may others.
    ReadOnly,
}

/// What a write's success says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The bytes are read from now on; a flush makes them survive a loss of power.
    Cached,
    /// They survive a loss of power.
    Durable,
}

/// Whether zeros may be made by giving up the space below them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmap {
    /// A hole is as good as zeros.
    Allowed,
    /// The space must stay allocated.
    Forbidden,
}

/// What a channel can be asked for. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum Operation {
    /// Fill all of `into` from `offset` on.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        into: Buffers,
    },
    /// Write all of `from` at `offset`. If it fails, any part of it may have been written.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where from.
        from: Buffers,
        /// What its success says.
        durability: Durability,
    },
    /// Make durable what was written before.
    Flush,
    /// Give up the space of a range, where that can be done. What is read there afterwards is anything.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: u64,
        /// Whether a hole will do.
        unmap: Unmap,
        /// What its success says.
        durability: Durability,
    },
    /// Tell what is known of a range, from its beginning on; not necessarily to its end.
    Status {
        /// Where on the disk.
        offset: u64,
        /// How much.
        length: u64,
    },
}

impl Operation {
    /// Where on the disk it works, as offset and length; at its beginning, and of length 0, if nowhere.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Read { offset, into } => (*offset, into.length() as u64),
            Self::Write { offset, from, .. } => (*offset, from.length() as u64),
            Self::Flush => (0, 0),
            Self::Discard { offset, length }
            | Self::WriteZeroes { offset, length, .. }
            | Self::Status { offset, length } => (*offset, *length),
        }
    }

    /// Whether it may change what is on the disk.
    #[must_use]
    pub fn writes(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Flush | Self::Status { .. } => false,
            Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. } => true,
        }
    }

    /// Checks that it lies inside a disk of `capacity` bytes.
    ///
    /// # Errors
    /// `InvalidInput` if it does not.
    pub fn check(&self, capacity: u64) -> io::Result<()> {
        let (offset, length) = self.range();
        let fits = offset.checked_add(length).is_some_and(|end| end <= capacity);
        if fits { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

/// What a request brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// What is known of a range, in order, without gaps, at least one.
    Extents(Vec<Extent>),
}

/// A part of a disk of which one thing is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes, not 0.
    pub length: u64,
    /// What is known.
    pub kind: ExtentKind,
}

/// What is known of a part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Anything may be there.
    Data,
    /// It reads as zeros, and has its space.
    Zero,
    /// It reads as zeros, and has no space.
    Hole,
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// The tag that it was submitted with.
    pub tag: u64,
    /// What it brought.
    pub outcome: io::Result<Answer>,
}

/// What a disk is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Length in bytes.
    pub capacity: u64,
    /// What may be done with it.
    pub access: Access,
    /// The most channels that may be open at a time.
    pub channels: usize,
}

/// One disk.
pub trait Backend: Debug + Send + Sync {
    /// What it is like now. Its capacity may change, the rest does not.
    fn geometry(&self) -> Geometry;

    /// Opens a channel.
    ///
    /// # Errors
    /// The host's or the server's refusal, or that all channels are open.
    fn channel(&self) -> io::Result<Box<dyn Channel>>;

    /// Makes the disk as long as `capacity` bytes, where this can be done; how long it is then.
    ///
    /// # Errors
    /// The reason why not, for people.
    fn grow(&self, capacity: u64) -> io::Result<u64>;

    /// Whether a channel that is open keeps others from the disk, whatever [`release`](Self::release) does: then channels
    /// are closed before.
    fn is_held_by_channels(&self) -> bool;

    /// Gives up the lock that keeps other writers away; writes fail from then on.
    fn release(&self);

    /// Takes that lock.
    ///
    /// # Errors
    /// The host's refusal, or that someone else has it.
    fn reacquire(&self) -> io::Result<()>;
}

/// A way to a disk's bytes. See the module's page for the rules.
pub trait Channel: Debug + Send {
    /// Takes a request on. `tag` names it in its completion.
    fn submit(&mut self, tag: u64, operation: Operation);

    /// Begins all that was submitted. Some of it may be complete when this returns, without [`event`](Self::event) saying
    /// so: [`reap`](Self::reap) afterwards.
    fn commit(&mut self);

    /// A descriptor that is readable when there may be something to be reaped, or when the channel needs that call to get
    /// on. The same for the channel's life.
    fn event(&self) -> BorrowedFd<'_>;

    /// Appends what is complete to `done`. Does not wait.
    fn reap(&mut self, done: &mut Vec<Completion>);

    /// How many requests were submitted and not yet reaped. Where nothing is in flight, a channel is closed by dropping it,
    /// which may wait a moment until the other end has heard of it.
    fn in_flight(&self) -> usize;
}
