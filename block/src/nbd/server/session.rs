//! One client in the transmission phase: requests come in, go to the disk's channel, and are answered as they are done.
//!
//! Nothing waits but `poll`. What a client may have open is limited by number and by bytes, answers that it does not fetch
//! included; beyond that its requests stay in the socket.

use super::super::inbox::Inbox;
use super::super::outbox::Outbox;
use super::super::transport::Transport;
use super::super::wire::{
    Dialect, EXTENDED_REQUEST_MAGIC, ExtendedRequestHeader, MAX_PAYLOAD, REQUEST_MAGIC, RequestHeader, command,
};
use super::haggling::{Chosen, access};
use super::replies::About;
use super::spare::Spare;
use crate::backend::{Access, Answer, Channel, Completion, Durability, Operation, SECTOR, Unmap};
use crate::memory::{Buffers, Scratch};
use rustix::event::{PollFd, PollFlags, poll};
use slab::Slab;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// The most requests of a client that are not answered.
const MAX_REQUESTS: usize = 128;
/// The most memory for requests and answers of a client, in bytes: two of the longest.
const MAX_HELD: usize = 2 * MAX_PAYLOAD as usize;
/// The most zeros of one request, in bytes: what has no holes has to write them out.
const MAX_ZEROES: u64 = 1 << 30;
/// The flags of commands that are known here.
const KNOWN_FLAGS: u16 =
    command::FUA | command::NO_HOLE | command::DONT_FRAGMENT | command::ONE_EXTENT | command::PAYLOAD_LENGTH;

/// A request, as its header says.
#[derive(Debug, Clone, Copy)]
struct Asked {
    command: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    length: u64,
}

/// What comes next from the client.
#[derive(Debug)]
enum Expected {
    Request,
    /// The data of a write, of which so many bytes are here.
    Payload {
        asked: Asked,
        scratch: Arc<Scratch>,
        at: usize,
    },
}

/// A request that the disk works on.
#[derive(Debug)]
struct Open {
    asked: Asked,
    scratch: Option<Arc<Scratch>>,
}

#[derive(Debug)]
pub(super) struct Session {
    inbox: Inbox,
    outbox: Outbox,
    channel: Box<dyn Channel>,
    dialect: Dialect,
    allocation: bool,
    access: Access,
    capacity: u64,
    expected: Expected,
    open: Slab<Open>,
    /// Bytes of memory of open requests.
    held: usize,
    spare: Spare,
    /// Whether nothing more is read: the client has said farewell, or the server ends.
    closing: bool,
    /// Whether the client sends nothing more. It does not hear of what it has written last, and may have asked for it once more
    /// on another connection.
    has_left: bool,
}

impl Session {
    pub(super) fn begin(chosen: &Chosen<'_>) -> io::Result<Self> {
        let &Chosen { export, dialect, allocation, capacity, .. } = chosen;
        Ok(Self {
            inbox: Inbox::new(),
            outbox: Outbox::default(),
            channel: export.backend.channel()?,
            dialect,
            allocation,
            access: access(export),
            capacity,
            expected: Expected::Request,
            open: Slab::new(),
            held: 0,
            spare: Spare::default(),
            closing: false,
            has_left: false,
        })
    }

    /// Serves the client until it leaves or the server ends; `ends` is readable then.
    ///
    /// # Errors
    /// The client breaks off, or the protocol.
    pub(super) fn run(mut self, transport: &mut Transport, ends: BorrowedFd<'_>) -> io::Result<()> {
        let mut done = Vec::new();
        loop {
            let may_have_more = !self.take_in(transport)?;
            self.channel.commit();
            self.channel.reap(&mut done);
            for completion in done.drain(..) {
                self.answer(completion);
            }
            self.outbox.send(transport)?;
            if self.closing && self.open.is_empty() && self.outbox.is_empty() {
                return Ok(());
            }
            // What was received already does not make the socket readable.
            if !(may_have_more && self.may_take_more()) {
                self.wait(transport, ends)?;
            }
        }
    }

    fn may_take_more(&self) -> bool {
        !self.closing && self.open.len() < MAX_REQUESTS && self.held + self.outbox.held() < MAX_HELD
    }

    fn wait(&mut self, transport: &Transport, ends: BorrowedFd<'_>) -> io::Result<()> {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, self.may_take_more());
        interest.set(PollFlags::OUT, !self.outbox.is_empty());
        let mut polled = vec![
            PollFd::from_borrowed_fd(self.channel.event(), PollFlags::IN),
            PollFd::from_borrowed_fd(transport.as_fd(), interest),
        ];
        if !self.closing {
            polled.push(PollFd::from_borrowed_fd(ends, PollFlags::IN));
        }
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let gone = PollFlags::HUP | PollFlags::ERR;
        let hung_up = polled[1].revents().intersects(gone) && !polled[1].revents().contains(PollFlags::IN);
        let has_ended = polled.get(2).is_some_and(|ends| !ends.revents().is_empty());
        if hung_up {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.closing |= has_ended;
        Ok(())
    }

    /// Takes requests from the socket, as many as may be open; whether those were all.
    fn take_in(&mut self, transport: &mut Transport) -> io::Result<bool> {
        self.has_left |= transport.is_left();
        while self.may_take_more() {
            let more = match &mut self.expected {
                Expected::Request => match self.next_request()? {
                    Some(asked) => {
                        self.take_on(asked)?;
                        true
                    }
                    None => has_come(self.inbox.fill(transport))?,
                },
                Expected::Payload { asked, scratch, at } => {
                    let left = usize::try_from(asked.length).expect("it is 32 MiB at most") - *at;
                    let into = Buffers::of(scratch);
                    let moved = self.inbox.move_to(transport, &into, *at, left);
                    let moved = match moved {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(moved) => moved,
                        Err(error) if is_temporary(&error) => return Ok(true),
                        Err(error) => return Err(error),
                    };
                    *at += moved;
                    if moved == left {
                        self.write_out()?;
                    }
                    true
                }
            };
            if !more {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn next_request(&mut self) -> io::Result<Option<Asked>> {
        let asked = match self.dialect {
            Dialect::Extended => self.inbox.peek::<ExtendedRequestHeader>().map(|header| {
                let asked = Asked {
                    command: header.command.get(),
                    flags: header.flags.get(),
                    cookie: header.cookie.get(),
                    offset: header.offset.get(),
                    length: header.length.get(),
                };
                (asked, header.magic.get() == EXTENDED_REQUEST_MAGIC, size_of::<ExtendedRequestHeader>())
            }),
            Dialect::Simple | Dialect::Structured => self.inbox.peek::<RequestHeader>().map(|header| {
                let asked = Asked {
                    command: header.command.get(),
                    flags: header.flags.get(),
                    cookie: header.cookie.get(),
                    offset: header.offset.get(),
                    length: header.length.get().into(),
                };
                (asked, header.magic.get() == REQUEST_MAGIC, size_of::<RequestHeader>())
            }),
        };
        let Some((asked, has_magic, length)) = asked else { return Ok(None) };
        if !has_magic {
            return Err(wrong("what it sends is no request"));
        }
        self.inbox.consume(length);
        Ok(Some(asked))
    }

    /// Whether a request has data that follow it.
    fn has_payload(&self, asked: &Asked) -> bool {
        match self.dialect {
            Dialect::Extended => asked.flags & command::PAYLOAD_LENGTH != 0,
            Dialect::Simple | Dialect::Structured => asked.command == command::WRITE,
        }
    }

    fn take_on(&mut self, asked: Asked) -> io::Result<()> {
        if self.has_payload(&asked) && asked.length > 0 {
            if asked.length > u64::from(MAX_PAYLOAD) {
                return Err(wrong("its data are longer than 32 MiB"));
            }
            let length = usize::try_from(asked.length).expect("it is 32 MiB at most");
            let scratch = self.spare.take(length);
            self.held += scratch.length();
            self.expected = Expected::Payload { asked, scratch, at: 0 };
            return Ok(());
        }
        if self.has_left && writes(asked.command) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match self.judge(&asked) {
            _ if asked.command == command::DISCONNECT => self.closing = true,
            Err(error) => self.about(&asked).failed(&mut self.outbox, &error),
            Ok(()) if asked.command == command::READ => {
                let length = usize::try_from(asked.length).expect("it is 32 MiB at most");
                let scratch = self.spare.take(length);
                self.held += scratch.length();
                let into = Buffers::part_of(&scratch, 0, length);
                self.submit(asked, Some(scratch), Operation::Read { offset: asked.offset, into });
            }
            Ok(()) => {
                let operation = self.without_data(&asked);
                self.submit(asked, None, operation);
            }
        }
        Ok(())
    }

    /// The data of a write are here.
    fn write_out(&mut self) -> io::Result<()> {
        let expected = std::mem::replace(&mut self.expected, Expected::Request);
        let Expected::Payload { asked, scratch, at: length } = expected else { return Ok(()) };
        if self.has_left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match self.judge(&asked) {
            Ok(()) => {
                let from = Buffers::part_of(&scratch, 0, length);
                let durability = durability(&asked);
                self.submit(asked, Some(scratch), Operation::Write { offset: asked.offset, from, durability });
            }
            Err(error) => {
                self.give_back(scratch);
                self.about(&asked).failed(&mut self.outbox, &error);
            }
        }
        Ok(())
    }

    /// Whether a request may be done.
    fn judge(&self, asked: &Asked) -> io::Result<()> {
        let Asked { command, flags, cookie: _, offset, length } = *asked;
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let writes = writes(command);
        let ranges = writes || matches!(command, command::READ | command::BLOCK_STATUS);
        if flags & !KNOWN_FLAGS != 0 || !(ranges || command == command::FLUSH) {
            return Err(invalid());
        }
        if self.has_payload(asked) != (command == command::WRITE) {
            return Err(invalid());
        }
        if command == command::BLOCK_STATUS && !self.allocation {
            return Err(invalid());
        }
        if writes && self.access == Access::ReadOnly {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        if ranges {
            let whole = length > 0 && offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR);
            let inside = offset.checked_add(length).is_some_and(|end| end <= self.capacity);
            if !inside && writes {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            let zeroes = command == command::WRITE_ZEROES || command == command::TRIM && flags & command::FUA != 0;
            if zeroes && length > MAX_ZEROES {
                return Err(invalid());
            }
            if !whole || !inside || command == command::READ && length > u64::from(MAX_PAYLOAD) {
                return Err(invalid());
            }
        }
        Ok(())
    }

    /// What the disk is asked for by a request that was judged and has no data.
    fn without_data(&self, asked: &Asked) -> Operation {
        let Asked { command, flags, cookie: _, offset, length } = *asked;
        match command {
            // What is there afterwards may be anything: if it is to last, zeros do.
            command::TRIM if flags & command::FUA != 0 => {
                Operation::WriteZeroes { offset, length, unmap: Unmap::Allowed, durability: Durability::Durable }
            }
            command::TRIM => Operation::Discard { offset, length },
            command::WRITE_ZEROES => {
                let unmap = if flags & command::NO_HOLE == 0 { Unmap::Allowed } else { Unmap::Forbidden };
                Operation::WriteZeroes { offset, length, unmap, durability: durability(asked) }
            }
            command::BLOCK_STATUS => Operation::Status { offset, length },
            _ => Operation::Flush,
        }
    }

    fn submit(&mut self, asked: Asked, scratch: Option<Arc<Scratch>>, operation: Operation) {
        let key = self.open.insert(Open { asked, scratch });
        self.channel.submit(key as u64, operation);
    }

    fn answer(&mut self, Completion { tag, outcome }: Completion) {
        let key = usize::try_from(tag).expect("it is a key of this address space");
        let Open { asked, scratch } = self.open.remove(key);
        let about = self.about(&asked);
        match (outcome, scratch) {
            (Err(error), scratch) => {
                about.failed(&mut self.outbox, &error);
                scratch.into_iter().for_each(|scratch| self.give_back(scratch));
            }
            (Ok(Answer::Extents(extents)), _) => {
                let shown = if asked.flags & command::ONE_EXTENT == 0 { &extents[..] } else { &extents[..1] };
                about.extents(&mut self.outbox, shown);
            }
            (Ok(Answer::Done), Some(scratch)) if asked.command == command::READ => {
                self.send_data(about, &asked, scratch);
            }
            (Ok(Answer::Done), scratch) => {
                about.done(&mut self.outbox);
                scratch.into_iter().for_each(|scratch| self.give_back(scratch));
            }
        }
    }

    /// Sends what was read; zeros as such where the client's language has a word for them.
    fn send_data(&mut self, about: About, asked: &Asked, mut scratch: Arc<Scratch>) {
        let length = usize::try_from(asked.length).expect("it is 32 MiB at most");
        let is_zero = self.dialect != Dialect::Simple
            && asked.flags & command::DONT_FRAGMENT == 0
            && scratch.bytes().is_some_and(|bytes| is_zero(&bytes[..length]));
        match u32::try_from(length) {
            Ok(length) if is_zero => about.hole(&mut self.outbox, length),
            _ => about.data(&mut self.outbox, Buffers::part_of(&scratch, 0, length)),
        }
        self.give_back(scratch);
    }

    fn about(&self, asked: &Asked) -> About {
        About { dialect: self.dialect, cookie: asked.cookie, offset: asked.offset }
    }

    fn give_back(&mut self, scratch: Arc<Scratch>) {
        self.held -= scratch.length();
        self.spare.give(scratch);
    }
}

/// Whether a command may change what is on the disk.
fn writes(command: u16) -> bool {
    matches!(command, command::WRITE | command::TRIM | command::WRITE_ZEROES)
}

fn durability(asked: &Asked) -> Durability {
    if asked.flags & command::FUA == 0 { Durability::Cached } else { Durability::Durable }
}

/// Whether all bytes are 0; most others show that within the first few.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Whether something came; the other end's farewell without words is an error.
fn has_come(filled: io::Result<bool>) -> io::Result<bool> {
    match filled {
        Ok(true) => Ok(true),
        Ok(false) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) if is_temporary(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn wrong(how: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("The client breaks the protocol: {how}"))
}
