//! What has been received on a connection and not been looked at yet.

use super::transport::Transport;
use crate::memory::Buffers;
use std::io;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Several headers, or the data of small requests, come with one call; and the longest message that is looked at whole fits.
pub(super) const CAPACITY: usize = 256 << 10;

/// Bytes between the socket and who understands them.
#[derive(Debug)]
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; CAPACITY].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What is there.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The header that is there first, if all of it is.
    pub(super) fn peek<T: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> Option<T> {
        T::read_from_prefix(self.bytes()).ok().map(|(header, _)| header)
    }

    /// Forgets the first `count` bytes, which are there.
    pub(super) fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.end - self.start, "only what is there is consumed");
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives more. `false` if the other end has hung up.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing yet. A full inbox is a mistake of who did not consume.
    pub(super) fn fill(&mut self, transport: &mut Transport) -> io::Result<bool> {
        self.make_room();
        debug_assert!(self.end < self.bytes.len(), "what is there was consumed");
        let received = transport.receive(&mut self.bytes[self.end..])?;
        self.end += received;
        Ok(received > 0)
    }

    /// Moves at most `length` bytes to `memory` from `start` on: what is there, or what the socket has, in which case more
    /// may be there afterwards. How many bytes were moved; 0 if the other end has hung up.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing yet.
    pub(super) fn move_to(
        &mut self,
        transport: &mut Transport,
        memory: &Buffers,
        start: usize,
        length: usize,
    ) -> io::Result<usize> {
        let there = length.min(self.end - self.start);
        if there > 0 {
            memory.write(start, &self.bytes[self.start..self.start + there]);
            self.consume(there);
            return Ok(there);
        }
        let received = transport.receive_to(memory, start, length, &mut self.bytes)?;
        self.end = received.saturating_sub(length);
        Ok(received.min(length))
    }

    fn make_room(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }
}

#[cfg(test)]
impl Inbox {
    pub(super) fn holding(bytes: &[u8]) -> Self {
        let mut inbox = Self::new();
        inbox.bytes[..bytes.len()].copy_from_slice(bytes);
        inbox.end = bytes.len();
        inbox
    }
}
