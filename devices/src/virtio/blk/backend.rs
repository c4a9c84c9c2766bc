//! Where the bytes of a disk are.
//!
//! The device checks every range against [`BlockBackend::capacity`] before it calls, so a back end never sees one beyond
//! its end. All calls are synchronous and come from one thread at a time.

use crate::virtio::GuestSlice;
use std::fmt::Debug;
use std::io;

/// Whether zeroes may be made by giving up the space below them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmap {
    /// A hole is as good as zeroes.
    Allowed,
    /// The space must stay allocated.
    Forbidden,
}

/// The bytes of one disk.
pub trait BlockBackend: Debug + Send {
    /// Length in bytes, a multiple of 512. Never changes.
    fn capacity(&self) -> u64;

    /// Whether nothing may be written.
    fn is_read_only(&self) -> bool;

    /// Fills all of `into` from `offset` on, and marks it dirty.
    ///
    /// # Errors
    /// The host's refusal; part of `into` may be filled.
    fn read_vectored_at(&self, into: &[GuestSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes all of `from` at `offset`.
    ///
    /// # Errors
    /// The host's refusal; part may be written.
    fn write_vectored_at(&self, from: &[GuestSlice<'_>], offset: u64) -> io::Result<()>;

    /// Makes durable what was written before.
    ///
    /// # Errors
    /// The host's refusal.
    fn flush(&self) -> io::Result<()>;

    /// Gives up the space of a range, where the host can. What is read there afterwards is anything.
    ///
    /// # Errors
    /// The host's refusal, other than that it cannot.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The host's refusal.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: Unmap) -> io::Result<()>;

    /// Gives up the lock that keeps other writers away; nothing is written from then on.
    fn release(&mut self);

    /// Takes that lock.
    ///
    /// # Errors
    /// The host's refusal, or that someone else has it.
    fn reacquire(&mut self) -> io::Result<()>;
}
