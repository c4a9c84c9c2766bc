//! One connection in the transmission phase: commands go out, what the server says comes in and is believed as far as it can
//! be true.

use super::super::inbox::Inbox;
use super::super::outbox::Outbox;
use super::super::transport::Transport;
use super::super::wire::{
    Dialect, EXTENDED_REQUEST_MAGIC, ExtendedRequestHeader, REQUEST_MAGIC, RequestHeader, command, error_of,
};
use super::dialler::Connected;
use super::haggling::Agreement;
use super::ledger::{Ledger, Verb};
use super::reply::{Heard, What, next};
use crate::backend::{Extent, ExtentKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// How long a server may take to hang up when it was told to.
const FAREWELL_WITHIN: Duration = Duration::from_secs(1);

/// Why a connection is of no more use.
#[derive(Debug)]
pub(super) enum Loss {
    /// It broke off, or the server is about to end: another may do.
    Broken(io::Error),
    /// The server breaks the rules in this way.
    Violation(String),
}

impl From<io::Error> for Loss {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// What comes next from the server.
#[derive(Debug, Clone, Copy)]
enum Expected {
    Message,
    /// Data of a read: where the next byte goes, and how many there are.
    Data {
        key: usize,
        at: usize,
        left: usize,
        is_last: bool,
    },
}

#[derive(Debug)]
pub(super) struct Connection {
    transport: Transport,
    agreement: Agreement,
    inbox: Inbox,
    outbox: Outbox,
    expected: Expected,
}

impl Connection {
    pub(super) fn new(Connected { transport, agreement }: Connected) -> Self {
        Self { transport, agreement, inbox: Inbox::new(), outbox: Outbox::default(), expected: Expected::Message }
    }

    /// Puts a command behind those that are to be sent.
    pub(super) fn post(&mut self, ledger: &mut Ledger, key: usize) {
        let cookie = ledger.cookie(key);
        let (kind, flags, offset, length, memory) = match &ledger.command(key).verb {
            Verb::Read { offset, into } => (command::READ, 0, *offset, into.length() as u64, None),
            Verb::Write { offset, from, flags } => {
                let has_payload = if self.agreement.dialect == Dialect::Extended { command::PAYLOAD_LENGTH } else { 0 };
                let memory = from.part(0, from.length());
                (command::WRITE, flags | has_payload, *offset, from.length() as u64, Some(memory))
            }
            Verb::Flush => (command::FLUSH, 0, 0, 0, None),
            Verb::Trim { offset, length } => (command::TRIM, 0, *offset, *length, None),
            Verb::WriteZeroes { offset, length, flags } => (command::WRITE_ZEROES, *flags, *offset, *length, None),
            // It had the context when this was asked for. Now nothing is known.
            &Verb::Status { length, .. } if self.agreement.allocation.is_none() => {
                ledger.learn(key, vec![Extent { length, kind: ExtentKind::Data }]);
                let flush = ledger.over(key, Ok(()));
                debug_assert!(flush.is_none(), "a question is not flushed");
                return;
            }
            Verb::Status { offset, length } => (command::BLOCK_STATUS, 0, *offset, *length, None),
        };
        self.outbox.push(self.head(kind, flags, cookie, offset, length), memory);
    }

    fn head(&self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
        match self.agreement.dialect {
            Dialect::Extended => ExtendedRequestHeader {
                magic: EXTENDED_REQUEST_MAGIC.into(),
                flags: flags.into(),
                command: kind.into(),
                cookie: cookie.into(),
                offset: offset.into(),
                length: length.into(),
            }
            .as_bytes()
            .to_vec(),
            Dialect::Simple | Dialect::Structured => RequestHeader {
                magic: REQUEST_MAGIC.into(),
                flags: flags.into(),
                command: kind.into(),
                cookie: cookie.into(),
                offset: offset.into(),
                length: u32::try_from(length).expect("commands are at most 1 GiB long").into(),
            }
            .as_bytes()
            .to_vec(),
        }
    }

    /// Sends what the socket takes; whether something is left that waits for it.
    pub(super) fn send(&mut self) -> io::Result<bool> {
        self.outbox.send(&mut self.transport)?;
        Ok(!self.outbox.is_empty())
    }

    /// Takes in all that has come.
    pub(super) fn receive(&mut self, ledger: &mut Ledger) -> Result<(), Loss> {
        loop {
            let more = match self.expected {
                Expected::Data { key, at, left, is_last } => self.receive_data(ledger, key, at, left, is_last)?,
                Expected::Message => match next(&mut self.inbox, self.agreement.dialect).map_err(Loss::Violation)? {
                    Some(heard) => {
                        self.hear(ledger, heard)?;
                        true
                    }
                    None => self.fill()?,
                },
            };
            if !more {
                return Ok(());
            }
        }
    }

    /// Whether more has come.
    fn fill(&mut self) -> Result<bool, Loss> {
        loop {
            match self.inbox.fill(&mut self.transport) {
                Ok(true) => return Ok(true),
                Ok(false) => return Err(hung_up()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn receive_data(
        &mut self,
        ledger: &mut Ledger,
        key: usize,
        at: usize,
        left: usize,
        is_last: bool,
    ) -> Result<bool, Loss> {
        let Verb::Read { into, .. } = &ledger.command(key).verb else {
            unreachable!("data are expected for reads alone")
        };
        let moved = match self.inbox.move_to(&mut self.transport, into, at, left) {
            Ok(0) => return Err(hung_up()),
            Ok(moved) => moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        self.expected = Expected::Data { key, at: at + moved, left: left - moved, is_last };
        if moved == left {
            self.expected = Expected::Message;
            if is_last {
                self.conclude(ledger, key)?;
            }
        }
        Ok(true)
    }

    fn hear(&mut self, ledger: &mut Ledger, Heard { cookie, is_last, what }: Heard) -> Result<(), Loss> {
        let wrong = |how: &str| Loss::Violation(how.to_owned());
        let key = ledger.find(cookie).ok_or_else(|| wrong("it answers what it was not asked"))?;
        let command = ledger.command_mut(key);
        match (what, &command.verb) {
            (What::Simple, Verb::Read { into, .. }) => {
                if self.agreement.dialect != Dialect::Simple {
                    return Err(wrong("it answers a read without structure"));
                }
                let left = into.length();
                command.fill(0, left).map_err(wrong)?;
                self.expected = Expected::Data { key, at: 0, left, is_last: true };
                return Ok(());
            }
            (What::Data { offset: place, length }, Verb::Read { offset, into }) => {
                let (at, left) = within(place, length, *offset, into.length() as u64).ok_or_else(out_of_range)?;
                command.fill(at, left).map_err(wrong)?;
                self.expected = Expected::Data { key, at, left, is_last };
                return Ok(());
            }
            (What::Hole { offset: place, length }, Verb::Read { offset, into }) => {
                let (at, left) = within(place, length, *offset, into.length() as u64).ok_or_else(out_of_range)?;
                into.write_zeroes(at, left);
                command.fill(at, left).map_err(wrong)?;
            }
            (What::Extents { context, extents }, Verb::Status { length, .. }) => {
                if self.agreement.allocation != Some(context) {
                    return Err(wrong("it tells of a metadata context that was not chosen"));
                }
                let extents = known(extents, *length).ok_or_else(|| wrong("it tells of an extent without length"))?;
                ledger.learn(key, extents);
            }
            (What::Error { number, message }, _) => {
                if i32::try_from(number) == Ok(libc::ESHUTDOWN) {
                    return Err(Loss::Broken(error_of(number)));
                }
                let error = error_of(number);
                tracing::debug!(%error, message, "An NBD server refuses a request");
                command.error.get_or_insert(error);
            }
            (What::Simple | What::Nothing, _) => {}
            (What::Data { .. } | What::Hole { .. } | What::Extents { .. }, _) => {
                return Err(wrong("its answer is of another kind than the request"));
            }
        }
        if is_last { self.conclude(ledger, key) } else { Ok(()) }
    }

    /// The server has said the last about a command.
    fn conclude(&mut self, ledger: &mut Ledger, key: usize) -> Result<(), Loss> {
        let command = ledger.command_mut(key);
        let outcome = match command.error.take() {
            Some(error) => Err(error),
            None if command.is_full() => Ok(()),
            None => return Err(Loss::Violation("it says that a read is done and has not sent all of it".to_owned())),
        };
        if let Some(flush) = ledger.over(key, outcome) {
            self.post(ledger, flush);
        }
        Ok(())
    }

    /// See [`Transport::break_off`].
    pub(super) fn break_off(&self) {
        self.transport.break_off();
    }

    /// Ends the connection as the protocol wants it, and waits a moment for the server to do so, too: it holds the disk as
    /// long as it does not know.
    pub(super) fn hang_up(&mut self) {
        let farewell = self.head(command::DISCONNECT, 0, 0, 0, 0);
        if !self.outbox.is_empty() {
            return;
        }
        self.transport.close(&farewell);
        let deadline = Instant::now() + FAREWELL_WITHIN;
        while Instant::now() < deadline {
            let timeout = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
            let _ = poll(&mut [PollFd::new(&self.transport, PollFlags::IN)], Some(&timeout));
            match self.transport.receive(&mut [0; 64]) {
                Ok(1..) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

fn hung_up() -> Loss {
    Loss::Broken(io::Error::new(io::ErrorKind::UnexpectedEof, "The server hung up"))
}

fn out_of_range() -> Loss {
    Loss::Violation("it sends data that were not asked for".to_owned())
}

/// Where a part of the disk lies in the memory of a read, if it lies in it; and its length.
fn within(place: u64, length: u64, offset: u64, room: u64) -> Option<(usize, usize)> {
    let at = place.checked_sub(offset)?;
    let fits = at.checked_add(length).is_some_and(|end| end <= room) && length > 0;
    fits.then(|| Some((usize::try_from(at).ok()?, usize::try_from(length).ok()?))).flatten()
}

/// What is known of a range: a server may know more of it than it was asked.
fn known(extents: Vec<Extent>, length: u64) -> Option<Vec<Extent>> {
    let mut left = length;
    let mut known = Vec::with_capacity(extents.len());
    for extent in extents {
        if extent.length == 0 {
            return None;
        }
        let part = extent.length.min(left);
        if part > 0 {
            known.push(Extent { length: part, kind: extent.kind });
        }
        left -= part;
    }
    (!known.is_empty()).then_some(known)
}
