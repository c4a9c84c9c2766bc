//! What is to be sent on a connection, in order, many messages with one call.

use super::transport::{Part, Transport};
use crate::memory::Buffers;
use std::collections::VecDeque;
use std::io;

/// The most messages of one call: with head and memory the kernel's limit on pieces is not far.
const AT_ONCE: usize = 128;

#[derive(Debug)]
struct Message {
    head: Vec<u8>,
    memory: Option<Buffers>,
}

impl Message {
    fn length(&self) -> usize {
        self.head.len() + self.memory.as_ref().map_or(0, Buffers::length)
    }

    /// What it takes of this process' memory, about.
    fn held(&self) -> usize {
        self.length() + size_of::<Self>()
    }
}

/// Messages that wait for the socket.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    messages: VecDeque<Message>,
    /// Bytes of the first message that have gone already.
    sent: usize,
    /// What all messages take of this process' memory, in bytes.
    held: usize,
    /// Whether the transport has taken bytes that the socket has not.
    lingers: bool,
}

impl Outbox {
    /// Puts a message at the end: a head, and memory that follows it.
    pub(super) fn push(&mut self, head: Vec<u8>, memory: Option<Buffers>) {
        let message = Message { head, memory };
        self.held += message.held();
        self.messages.push_back(message);
    }

    /// What the messages that wait take of this process' memory, in bytes.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    /// Whether all has gone.
    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty() && !self.lingers
    }

    /// Sends as much as the socket takes now.
    pub(super) fn send(&mut self, transport: &mut Transport) -> io::Result<()> {
        while !self.messages.is_empty() {
            let taken = match transport.send(&self.parts()) {
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            self.sent += taken;
            while let Some(message) = self.messages.pop_front_if(|message| self.sent >= message.length()) {
                self.sent -= message.length();
                self.held -= message.held();
            }
        }
        self.lingers = !transport.flush_records()?;
        Ok(())
    }

    fn parts(&self) -> Vec<Part<'_>> {
        let mut parts = Vec::with_capacity(2 * self.messages.len().min(AT_ONCE));
        let mut skip = self.sent;
        for Message { head, memory } in self.messages.iter().take(AT_ONCE) {
            if skip < head.len() {
                parts.push(Part::Bytes(&head[skip..]));
            }
            let start = skip.saturating_sub(head.len());
            parts.extend(memory.as_ref().map(|memory| Part::Memory(memory, start)));
            skip = 0;
        }
        parts
    }
}
