//! One request after the other, waited for: for threads that have nothing else to do.

use crate::backend::{Answer, Backend, Channel, Completion, Durability, Extent, Operation, Unmap};
use crate::memory::{Buffers, Scratch};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;

/// A channel that is waited for.
#[derive(Debug)]
pub struct Blocking {
    channel: Box<dyn Channel>,
    done: Vec<Completion>,
}

impl Blocking {
    /// Opens a channel of `backend`.
    ///
    /// # Errors
    /// The back end's refusal.
    pub fn open(backend: &dyn Backend) -> io::Result<Self> {
        Ok(Self { channel: backend.channel()?, done: Vec::new() })
    }

    /// Does one request to its end.
    ///
    /// # Errors
    /// The request's failure.
    pub fn run(&mut self, operation: Operation) -> io::Result<Answer> {
        self.channel.submit(0, operation);
        self.channel.commit();
        loop {
            self.channel.reap(&mut self.done);
            if let Some(Completion { outcome, .. }) = self.done.pop() {
                return outcome;
            }
            let event = self.channel.event();
            match poll(&mut [PollFd::from_borrowed_fd(event, PollFlags::IN)], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// The request's failure.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut scratch = Scratch::new(bytes.len());
        self.run(Operation::Read { offset, into: Buffers::of(&scratch) })?;
        bytes.copy_from_slice(scratch.bytes().expect("the request is over, and its buffers with it"));
        Ok(())
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// The request's failure.
    pub fn write(&mut self, offset: u64, bytes: &[u8], durability: Durability) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let from = Buffers::of(&Scratch::copy_of(bytes));
        self.done(Operation::Write { offset, from, durability })
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// The request's failure.
    pub fn flush(&mut self) -> io::Result<()> {
        self.done(Operation::Flush)
    }

    /// Gives up the space of a range.
    ///
    /// # Errors
    /// The request's failure.
    pub fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.done(Operation::Discard { offset, length })
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// The request's failure.
    pub fn write_zeroes(&mut self, offset: u64, length: u64, unmap: Unmap, durability: Durability) -> io::Result<()> {
        self.done(Operation::WriteZeroes { offset, length, unmap, durability })
    }

    /// What is known of a range, all of it.
    ///
    /// # Errors
    /// The request's failure.
    pub fn extents(&mut self, offset: u64, length: u64) -> io::Result<Vec<Extent>> {
        let (mut offset, end) = (offset, offset.saturating_add(length));
        let mut all: Vec<Extent> = Vec::new();
        while offset < end {
            let Answer::Extents(extents) = self.run(Operation::Status { offset, length: end - offset })? else {
                return Err(io::Error::other("The disk does not tell what is where"));
            };
            let known: u64 = extents.iter().map(|extent| extent.length).sum();
            if known == 0 {
                return Err(io::Error::other("The disk told of nothing"));
            }
            offset += known;
            all.extend(extents);
        }
        Ok(all)
    }

    fn done(&mut self, operation: Operation) -> io::Result<()> {
        self.run(operation).map(|_| ())
    }
}
